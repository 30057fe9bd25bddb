"""The files that are written: pictures, contact sheets and films, each whole or not at all."""

import math
import os
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..loaders.atomic import atomic_file

# by ending, the most pixels that a side may have
PICTURES = {
    ".png": math.inf,
    ".jpg": 65500,
    ".jpeg": 65500,
    ".webp": 16383,
    ".gif": 65535,
    ".bmp": math.inf,
    ".tif": math.inf,
    ".tiff": math.inf,
}
FILMS = (".gif", ".webp", ".png")


def check_output(path: Path, is_film: bool = False, count: int = 1):
    """
    Refuse a path that cannot be written to.

    Raises:
        ValueError: Naming the option, and the endings that there are.
    """
    endings = FILMS if is_film else PICTURES
    if path.suffix.lower() not in endings:
        what = "a film" if is_film else "a picture"
        raise ValueError(f"--out must end in {', '.join(endings)} to be {what}, got {path}.")
    if not path.parent.is_dir():
        raise ValueError(f"--out: the folder {path.parent} does not exist; make it first.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out: the folder {path.parent} cannot be written to.")
    for file in [path] if count == 1 else [path, numbered(path, count)]:  # OSError: its name is too long
        if file.is_dir():
            raise ValueError(f"--out: {file} is a folder; give the name of a file.")


def numbered(path: Path, number: int) -> Path:
    return path.with_stem(f"{path.stem}-{number}")


def write(image: Image.Image, path: Path, **options):
    """Save a picture, and print where."""
    with atomic_file(path) as unfinished:
        image.save(unfinished, **options)
    tqdm.write(str(path))  # not into the bar
    sys.stdout.flush()


def write_film(frames: list[Image.Image], path: Path, duration: int):
    """Forwards and back, for ever; `duration` is each frame's, in milliseconds."""
    there_and_back = [*frames, *frames[-2:0:-1]]
    write(frames[0], path, save_all=True, append_images=there_and_back[1:], duration=duration, loop=0)


def write_sheet(images: list[Image.Image], path: Path, columns: int):
    """All pictures in one, row by row."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    write(sheet, path)
