"""Image files as users have them, made without any file in the repository."""

import io

import numpy as np
from PIL import Image

ORIENTATION = 0x0112  # the EXIF tag; 6: turn clockwise to see the picture upright


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours that fall from left to right and from top to bottom, with some grain: as a photo compresses."""
    grain = np.random.default_rng(0).normal(0, 4, (64, 64))
    grain = np.tile(grain.astype(np.int16), (height // 64 + 1, width // 64 + 1))[:height, :width]
    column, row = np.linspace(0, 1, width)[None], np.linspace(0, 1, height)[:, None]
    pixels = np.empty((height, width, 3), np.uint8)
    for channel, colours in enumerate((230 - 200 * column, 60 + 120 * row, 200 - 150 * row)):
        pixels[..., channel] = (colours.astype(np.int16) + grain).clip(0, 255)
    return Image.fromarray(pixels)


def saved(image: Image.Image, file_format: str, **options) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    buffer.seek(0)
    return buffer


def phone_photo(width: int = 4032, height: int = 3024) -> io.BytesIO:
    """A JPEG that lies on its side, as phones write it: EXIF turns it upright, height × width."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return saved(photo(width, height), "JPEG", exif=exif)


def transparent_png(width: int = 64, height: int = 48) -> io.BytesIO:
    """Red and opaque at the left; at the right transparent, with a hidden black."""
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[:, : width // 2] = (255, 0, 0, 255)
    return saved(Image.fromarray(pixels), "PNG")


def grey_png_16(width: int = 64, height: int = 48) -> io.BytesIO:
    """A ramp over all of 16 bits, from black at the left to white at the right."""
    ramp = np.linspace(0, 65535, width).astype(np.uint16)
    return saved(Image.fromarray(np.tile(ramp, (height, 1))), "PNG")


def animation(width: int = 64, height: int = 48) -> io.BytesIO:
    """A GIF with a palette: a red frame, then a blue one."""
    frames = [Image.new("P", (width, height)) for _ in range(2)]
    for frame, colour in zip(frames, [(255, 0, 0), (0, 0, 255)]):
        frame.putpalette(colour)
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
