"""Image files as users have them, made without any file in the repository."""

import io

import numpy as np
from PIL import Image

ORIENTATION = 0x0112  # the EXIF tag; 6: turn clockwise to see the picture upright


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours that fall from left to right and from top to bottom, with some grain: as a photo compresses."""
    rows, columns = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 1))
    colours = np.stack([230 - 200 * columns, 60 + 120 * rows, 200 - 150 * rows], axis=-1)
    return Image.fromarray((colours + grain).clip(0, 255).astype(np.uint8))


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
