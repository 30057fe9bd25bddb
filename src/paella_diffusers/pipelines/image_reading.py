"""Pictures of any kind, from files or PIL, as upright RGB. Pipelines, trainers and the command line read them alike."""

import functools
import logging
import os
import warnings
from typing import IO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

logger = logging.getLogger(__name__)

# Raster formats that Pillow decodes by itself. EPS is not among them: Pillow hands it to Ghostscript, an interpreter.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "TGA", "ICO", "QOI", "MPO", "DIB")


def load_image(file: str | os.PathLike[str] | IO[bytes], name: str | None = None) -> Image.Image:
    """
    The picture in a file, as [`to_rgb`] makes it.

    Args:
        file (`str`, `os.PathLike` or binary file): Where the picture is.
        name (`str`, *optional*): What errors call it; the path unless given.

    Raises:
        OSError: If the file cannot be opened, or is no picture in one of `FORMATS`.
        ValueError: If it has too many pixels, or is damaged.
    """
    with open_image(file, name) as image:
        return to_rgb(image, name or str(file))


def open_image(file: str | os.PathLike[str] | IO[bytes], name: str | None = None) -> Image.Image:
    """As [`load_image`], but only the header is read: the size is known, and nothing is decoded yet."""
    name = name or str(file)
    Image.init()
    formats = [one for one in FORMATS if one in Image.OPEN]  # some are plugins that may be missing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"{name} is not a picture in one of the formats {', '.join(formats)}.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(_too_large(name)) from error
    except Exception as error:  # of any kind, as decoders raise it
        if isinstance(error, OSError) and error.errno is not None:  # such as FileNotFoundError
            raise
        raise _damaged(name, error) from error


def to_rgb(image: Image.Image, name: str = "`image`", background: str = "white") -> Image.Image:
    """
    Any PIL image as 8-bit RGB:

    * turned upright as its EXIF orientation says;
    * on the background where it is transparent;
    * integers of 16 bits (modes `I;16`, and `I` with values above 255) divided by 257;
    * floats (mode `F`) as they are if all are in [0, 1], otherwise divided by 255;
    * of an animation, the frame that it stands at, which is the first if it was just opened; the log says so once.

    Args:
        image (`PIL.Image.Image`): The image. It may not be decoded yet.
        name (`str`): What errors call it.
        background (`str`): A colour that Pillow knows.

    Raises:
        ValueError: If it is an EPS file, has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, is damaged, or has values
            outside these ranges.
    """
    if image.format == "EPS":
        raise ValueError(f"{name} is an EPS file, which only Ghostscript could draw: convert it to PNG first.")
    undecoded = isinstance(image, ImageFile.ImageFile)
    if undecoded and Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(_too_large(name))
    try:
        if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo with a preview
            _say_first_frame()
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "La":  # premultiplied, which Pillow converts to nothing else
            image = image.convert("LA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
        if image.mode[0] not in "IF":  # I, I;16, I;16B, F
            return image.convert("RGB")
    except Exception as error:  # of any kind, as decoders raise it
        raise _damaged(name, error) from error
    return Image.fromarray(_bytes(np.asarray(image, np.float64), image.mode, name)).convert("RGB")


def to_grey(image: Image.Image, name: str = "`mask_image`") -> Image.Image:
    """A mask, any PIL image, as 8-bit grey: read as by [`to_rgb`], but black where it is transparent."""
    return to_rgb(image, name, background="black").convert("L")


def _bytes(values: np.ndarray, mode: str, name: str) -> np.ndarray:
    """Grey values of a mode with more than 8 bits, to 8."""
    least, most = values.min(), values.max()
    if mode == "F":
        ranges = (1, 255)  # Pillow's own conversions take floats as 0 to 255; most programs write 0 to 1
    elif mode == "I":
        ranges = (255, 65535)  # Pillow's own readers and writers take these 32-bit integers for 16 bits
    else:
        ranges = (65535,)
    top = next((top for top in ranges if least >= 0 and most <= top), None)  # a NaN is in no range
    if top is None:
        raise ValueError(
            f"{name} has PIL mode {mode} with values from {least:g} to {most:g}: bring them to 0 … {ranges[-1]} first."
        )
    return (values * (255 / top)).round().astype(np.uint8)


@functools.cache
def _say_first_frame():
    logger.warning("An image has several frames: only the one that it stands at, the first unless moved, is taken.")


def _too_large(name: str) -> str:
    return (
        f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels and could be a decompression bomb: shrink it first, or raise "
        "`PIL.Image.MAX_IMAGE_PIXELS` if you trust it."
    )


def _damaged(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} cannot be decoded: {type(error).__name__}: {error}")
