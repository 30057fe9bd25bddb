"""Pictures to look at: what the figures do not say."""

import random
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw

from paella_diffusers import PaellaPipeline

from .captions import Captions
from .data import SIZE, STYLES, Icons


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def names(pipe: PaellaPipeline, icons: Icons, count: int = 100) -> Image.Image:
    """Random objects by their names, ten in a row, with the default call."""
    some = random.Random(0).sample(icons.names, min(count, len(icons.names)))
    pictures = pipe(some, generator=seeds(len(some))).images
    pictures += [Image.new("RGB", (SIZE, SIZE), "white")] * (-len(pictures) % 10)
    return make_image_grid(pictures, len(pictures) // 10, 10)


def styles(
    pipe: PaellaPipeline, icons: Icons, captions: Captions, cells: torch.BoolTensor, objects: list[int]
) -> Image.Image:
    """Objects by styles, one row for each style; pictures in a style that the model never saw of the object are framed."""
    pictures = []
    for style in range(len(STYLES)):
        prompts = [captions.named(icons.names[row], style) for row in objects]
        for row, picture in zip(objects, pipe(prompts, generator=seeds(len(objects))).images):
            framed = Image.new("RGB", (SIZE + 8, SIZE + 8), "white")
            framed.paste(picture, (4, 4))
            if not cells[style, row]:
                ImageDraw.Draw(framed).rectangle((1, 1, SIZE + 6, SIZE + 6), outline=(0, 120, 212), width=2)
            pictures.append(framed)
    return make_image_grid(pictures, len(STYLES), len(objects))


def write(pipe: PaellaPipeline, icons: Icons, captions: Captions, cells: torch.BoolTensor, folder: Path, count: int = 100):
    """`names.png`, `styles.png` with twelve objects that have a held-out style, and `canvas.png`, in `folder`."""
    names(pipe, icons, count).save(folder / "names.png")
    held_out = (~cells.all(0)).nonzero().flatten().tolist()
    objects = random.Random(0).sample(held_out, min(12, len(held_out)))
    styles(pipe, icons, captions, cells, objects).save(folder / "styles.png")
    three = [icons.names[row] for row in captions.short.nonzero().flatten().tolist()[:3]]
    prompt = f"{three[0]} and {three[1]} and {three[2]}"
    pipe(prompt, height=SIZE, width=3 * SIZE, generator=torch.Generator().manual_seed(0)).images[0].save(
        folder / "canvas.png"
    )
