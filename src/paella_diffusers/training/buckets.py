"""Aspect-ratio buckets: batches of one size each, of sizes with about as many pixels as the square one."""

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

MAX_RATIO = 2.0  # of the longer to the shorter side; what is longer is cropped
TRANSPOSED = range(5, 9)  # EXIF orientations that swap the sides


@dataclass
class Buckets:
    """
    The sizes that there are, and how samples are put into batches of one size.

    Args:
        resolution (`int`): Pixels a side of the square size.
        multiple (`int`): What sides must be divisible by.
        batch_size (`int`): Samples in a batch.
    """

    resolution: int
    multiple: int
    batch_size: int

    def __post_init__(self) -> None:
        area, multiple, sizes = self.resolution**2, self.multiple, set()
        for steps in range(1, self.resolution * 2 // multiple + 1):
            side = steps * multiple
            other = max(1, round(area / side / multiple)) * multiple
            if max(side, other) <= MAX_RATIO * min(side, other):
                sizes |= {(side, other), (other, side)}
        self.sizes: list[tuple[int, int]] = sorted(sizes)

    def size_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size whose shape is nearest to a picture's; both are width and height."""
        ratio = math.log(size[0] / size[1])
        return min(self.sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))

    def arrange(self, images: Sequence[bytes | str | Path | None], rng: random.Random) -> list[tuple[int, int]]:
        """
        Put pictures into batches of one size, in random order. Of each size, `n` pictures are left, too few for a batch.
        They are repeated to fill one, which is then used with the probability `n / batch_size`. So in the long run all
        pictures are used equally often. At least one batch is made.

        Returns:
            For each place in the batches, one after the other, the picture's index and how often it was there before.
        """
        by_size = {}
        for index, image in enumerate(images):
            by_size.setdefault(self._size_of(image), []).append(index)
        batches, left = [], []
        for indices in by_size.values():
            whole = len(indices) // self.batch_size * self.batch_size
            batches += [[(i, 0) for i in indices[at : at + self.batch_size]] for at in range(0, whole, self.batch_size)]
            if rest := indices[whole:]:
                left.append([(rest[place % len(rest)], place // len(rest)) for place in range(self.batch_size)])
                if rng.random() < len(rest) / self.batch_size:
                    batches.append(left[-1])
        rng.shuffle(batches)
        return [place for batch in batches or left[:1] for place in batch]

    def _size_of(self, image: bytes | str | Path | None) -> tuple[int, int] | None:
        """The bucket of a picture, from its header; None if it has no readable one."""
        if image is None:
            return None
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                turned = opened.getexif().get(0x0112) in TRANSPOSED
                return self.size_for((opened.height, opened.width) if turned else opened.size)
        except Exception:  # whatever it is, reading the picture will say so
            return None

    def crop(self, image: Image.Image, resampling: Image.Resampling, place: tuple[float, float]) -> Image.Image:
        """A picture resized to cover its bucket, and cropped to it; `place` in [0, 1] is left to right and top to bottom."""
        return ImageOps.fit(image, self.size_for(image.size), resampling, centering=place)
