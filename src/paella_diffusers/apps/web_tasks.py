"""What each tab of the page does: from what a visitor put into its fields to the call of a pipeline."""

import ast
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from ..checks import check_integer
from ..pipelines.image_reading import load_image, to_rgb
from .web_calls import Call

MOST_PIXELS, MOST_STEPS, MOST_FRAMES = 1024, 1000, 16  # what a visitor may ask for; pixels a side
# of the regions' brush; dark enough for white text, and told apart with any colour vision (Okabe and Ito)
COLOURS = {"orange": "#d55e00", "blue": "#0072b2", "green": "#009e73"}


def text_to_image(prompt: str, width: str, height: str) -> Call:
    sides = given(width=number(width), height=number(height))
    for name, side in sides.items():
        check_integer(name, side, 1, MOST_PIXELS)
    return Call("PaellaPipeline", {"prompt": prompt} | sides)


def variations(prompt: str, first: str | None, second: str | None) -> Call:
    """Of one picture, or of two that are mixed."""
    pictures = [picture(first), *([load_image(second)] if second else [])]
    return Call("PaellaPipeline", given(prompt=prompt) | {"condition_image": pictures})


def image_to_image(prompt: str, image: str | None, strength: float) -> Call:
    return Call("PaellaImg2ImgPipeline", {"prompt": prompt, "image": picture(image), "strength": strength})


def inpainting(prompt: str, painted: dict | None, strength: float) -> Call:
    """Where the brush painted over the picture."""
    background = painted["background"] if painted else None
    image = to_rgb(picture(None) if background is None else background)
    where = _painted(painted["layers"], image.size) >= 0
    if not where.any():
        raise ValueError("Nothing is painted over: paint over the part of the picture that shall be drawn anew.")
    arguments = {"prompt": prompt, "image": image, "mask_image": _mask(where)}
    return Call("PaellaInpaintPipeline", arguments | ({"strength": strength} if strength < 1 else {}))


def outpainting(prompt: str, image: str | None, left: int, top: int, right: int, bottom: int) -> Call:
    padding = tuple(side or 0 for side in (left, top, right, bottom))
    for side in padding:
        check_integer("padding", side, 0, MOST_PIXELS)
    if not any(padding):
        raise ValueError("There is nothing to draw: at one side at least there must be new pixels.")
    return Call("PaellaInpaintPipeline", {"prompt": prompt, "image": picture(image), "padding": padding})


def regions(elsewhere: str, painted: dict | None, *prompts: str, side: int) -> Call:
    """A prompt for what each colour of the brush painted, and one for the rest; `side` is that of the picture."""
    where = _painted(painted["layers"] if painted else [], (side, side))
    shown = {number: prompt for number, prompt in enumerate((elsewhere, *prompts), -1) if (where == number).any()}
    if not all(prompt.strip() for number, prompt in shown.items() if number >= 0):
        raise ValueError("A colour is painted that has no prompt: write one, or erase it.")
    masks = [_mask(where == number) for number in shown]
    return Call("PaellaPipeline", {"prompt": list(shown.values()), "region_masks": masks})


def editing(source_prompt: str, prompt: str, image: str | None, residual_scale: float, strength: float) -> Call:
    arguments = {"prompt": prompt, "image": picture(image), "source_prompt": source_prompt}
    return Call("PaellaInversionPipeline", arguments | {"residual_scale": residual_scale, "strength": strength})


def interpolation(a: str, b: str, first: str | None, last: str | None, num_images: int) -> Call:
    """From a prompt, or a picture in its place, to another."""
    check_integer("num_images", num_images, 2, MOST_FRAMES)
    ends = {"a": load_image(first) if first else a, "b": load_image(last) if last else b}
    return Call("PaellaPipeline", ends | {"num_images": num_images}, is_film=True)


def with_settings(call: Call, settings: dict[str, Any]) -> Call:
    """The call with what all tabs share; what is left empty is the model's own or the pipeline's."""
    call.seed = int(settings["seed"])
    call.scheduler, call.guider = settings["scheduler"] or None, settings["guider"] or None
    numbers = {name: number(settings[name]) for name in ("num_inference_steps", "guidance_scale", "temperature")}
    call.arguments |= given(negative_prompt=settings["negative_prompt"], **numbers)
    if numbers["num_inference_steps"] != "":
        check_integer("num_inference_steps", numbers["num_inference_steps"], 1, MOST_STEPS)
    return call


def title(call: Call) -> str:
    """A few words for a picture: its prompts and its seed."""
    texts = [call.arguments.get(name) for name in ("source_prompt", "prompt", "a", "b")]
    texts = [text for part in texts for text in (part if isinstance(part, list) else [part])]
    words = ", ".join(text for text in texts if isinstance(text, str) and text)
    return f"{words or 'without a prompt'} (seed {call.seed})"


def given(**arguments) -> dict[str, Any]:
    """Those that are not empty."""
    return {name: value for name, value in arguments.items() if value not in (None, "")}


def number(text: str):
    """What is written in a field, 3 or 0.5 or 3, 8; another text as it is, for the pipeline to refuse."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def picture(file: str | None) -> Image.Image:
    if not file:
        raise ValueError("There is no picture yet: choose a file, or take the last result.")
    return load_image(file)


def _painted(layers: list[Image.Image], size: tuple[int, int]) -> np.ndarray:
    """Which of `COLOURS` is painted at each pixel, `(height, width)`, at this size; -1 where nothing is."""
    palette = np.array([ImageColor.getrgb(colour) for colour in COLOURS.values()], float)
    painted = np.full(size[::-1], -1)
    for layer in layers:
        pixels = np.asarray(layer.convert("RGBA").resize(size, Image.Resampling.NEAREST), float)
        nearest = ((pixels[..., None, :3] - palette) ** 2).sum(-1).argmin(-1)  # the edges of strokes are blended
        painted = np.where(pixels[..., 3] > 127, nearest, painted)
    return painted


def _mask(where: np.ndarray) -> Image.Image:
    return Image.fromarray(255 * where.astype(np.uint8))
