"""
Every image task of Paella, with the model inside the package: writes `docs/gallery.md` and its pictures.

    python examples/make_gallery.py

Each function below is one task, its docstring the page's text, and its source is shown beside the pictures that it made.
"""

import argparse
import inspect
import textwrap
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw

from paella_diffusers import (
    EMOJI_MODEL,
    PaellaImg2ImgPipeline,
    PaellaInpaintPipeline,
    PaellaInversionPipeline,
    PaellaPipeline,
)


def seeds(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def text_to_image(pipe):
    """Text to image: a picture for each prompt."""
    prompts = ["red heart", "pizza", "dog face", "sunflower", "rocket", "green apple"]
    return pipe(prompts, generator=seeds(6)).images


def image_to_image(pipe):
    """Image to image: the first picture, changed towards "orange heart" with strength 0.2, 0.4, 0.6, 0.8 and 1."""
    heart = pipe("red heart", generator=seeds(1)).images[0]
    edit = PaellaImg2ImgPipeline.from_pipe(pipe)
    strengths = [0.2, 0.4, 0.6, 0.8, 1.0]
    results = [edit("orange heart", image=heart, strength=s, generator=seeds(1)).images[0] for s in strengths]
    return [heart, *results]


def inversion(pipe):
    """Editing by discrete inversion: what the source prompt does not explain stays. λ is 1, 0.9, 0.8, 0.6 and 0.4."""
    heart = pipe("red heart", generator=seeds(1)).images[0]
    edit = PaellaInversionPipeline.from_pipe(pipe)
    call = {"image": heart, "source_prompt": "red heart", "generator": seeds(1)}
    return [heart, *[edit("blue heart", residual_scale=s, **call).images[0] for s in (1, 0.9, 0.8, 0.6, 0.4)]]


def inpainting(pipe):
    """Inpainting: a picture, the mask, and what is drawn under it for three seeds."""
    face = pipe("grinning face", generator=seeds(1)).images[0]
    mask = Image.new("L", face.size)
    ImageDraw.Draw(mask).rectangle((0, 32, 63, 63), fill=255)
    inpaint = PaellaInpaintPipeline.from_pipe(pipe)
    call = {"image": face, "mask_image": mask, "num_images_per_prompt": 3, "generator": seeds(3)}
    return [face, mask, *inpaint("crying face", **call).images]


def outpainting(pipe):
    """Outpainting: the picture in the middle, continued by 32 pixels to the left and to the right."""
    picture = pipe("rainbow", generator=seeds(1)).images[0]
    outpaint = PaellaInpaintPipeline.from_pipe(pipe)
    return [picture, outpaint("rainbow", image=picture, padding=(32, 0, 32, 0), generator=seeds(1)).images[0]]


def variations(pipe):
    """Variations: a picture, and what is drawn from its CLIP embedding alone, for five seeds."""
    picture = pipe("red apple", generator=seeds(1)).images[0]
    call = {"condition_image": picture, "num_images_per_prompt": 5, "generator": seeds(5)}
    return [picture, *pipe("", **call).images]


def interpolation(pipe):
    """Interpolation: from one prompt to another, with the same noise."""
    return pipe.interpolate("red heart", "green apple", num_images=8, generator=seeds(1)[0]).images


def regions(pipe):
    """Prompts for regions: the left half of a wide picture is a cat's, the right half a dog's, and a ramp between."""
    left = torch.zeros(64, 128)
    left[:, :48] = 1
    left[:, 48:80] = torch.linspace(1, 0, 32)
    prompts = ["cat face", "dog face"]
    return pipe(prompts, region_masks=[left, 1 - left], width=128, generator=seeds(1)).images


TASKS = [text_to_image, image_to_image, inversion, inpainting, outpainting, variations, interpolation, regions]
PAGE = """# Gallery

Made by [`examples/make_gallery.py`](../examples/make_gallery.py) with the small model inside the package, which knows emoji,
at 64×64 pixels. The code of this page runs in order.

```python
import torch
from PIL import Image, ImageDraw
from paella_diffusers import (
    EMOJI_MODEL,
    PaellaImg2ImgPipeline,
    PaellaInpaintPipeline,
    PaellaInversionPipeline,
    PaellaPipeline,
)

pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)


{seeds}```
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMOJI_MODEL)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent.parent / "docs")
    args = parser.parse_args()

    pipe = PaellaPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    (args.output_dir / "gallery").mkdir(parents=True, exist_ok=True)
    page = PAGE.format(seeds=inspect.getsource(seeds))
    for task in TASKS:
        pictures = [picture.convert("RGB").resize((2 * picture.width, 128), Image.BICUBIC) for picture in task(pipe)]
        width = max(picture.width for picture in pictures)
        pictures = [pad(picture, width) for picture in pictures]
        make_image_grid(pictures, 1, len(pictures)).save(args.output_dir / "gallery" / f"{task.__name__}.png")
        title, _, text = task.__doc__.partition(": ")
        source = inspect.getsource(task).partition('"""\n')[2]
        page += f"\n## {title}\n\n![{title}](gallery/{task.__name__}.png)\n\n{text[0].upper() + text[1:]}\n\n"
        page += f"```python\n{textwrap.dedent(source).replace('return ', 'pictures = ')}```\n"
        print(task.__name__)
    (args.output_dir / "gallery.md").write_text(page, encoding="utf-8")


def pad(picture: Image.Image, width: int) -> Image.Image:
    wide = Image.new("RGB", (width, picture.height), "white")
    wide.paste(picture, ((width - picture.width) // 2, 0))
    return wide


if __name__ == "__main__":
    main()
