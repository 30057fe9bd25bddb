"""The image that a task begins with, as users give it, made into tensors: pixels or tokens, and which to keep."""

from dataclasses import dataclass
from numbers import Integral

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor


@dataclass
class SourceImage:
    """
    Args:
        image (`torch.Tensor`): Pixels `(n, 3, height, width)` in [0, 1], or tokens `(n, height / 4, width / 4)`, int64.
        mask (`torch.BoolTensor` of shape `(n, height / 4, width / 4)`, *optional*):
            True where tokens are generated, the others are kept; everywhere unless given.
        blend (`torch.Tensor` of shape `(n, 1, height, width)`, *optional*):
            The share of generated pixels in the result, in [0, 1]; 1 everywhere unless given.
        margins (`tuple[int, int, int, int]`, defaults to none):
            So many tokens at the left, top, right and bottom are no part of the picture, and shall not change its tokens.
    """

    image: torch.Tensor
    mask: torch.BoolTensor | None = None
    blend: torch.Tensor | None = None
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def is_tokens(self) -> bool:
        return not self.image.is_floating_point()


def read_image(image, height: int | None = None, width: int | None = None, name: str = "image") -> torch.Tensor:
    """
    A PIL image, an array `(height, width, 3)`, a tensor `(3, height, width)`, or a list or batch of these, to float32 pixels
    `(n, 3, height, width)` in [0, 1], resized if a size is given. An int64 tensor, a token grid or several, becomes
    `(n, height, width)`.

    Raises:
        ValueError: If it is none of these, or out of range.
    """
    for side, value in {"height": height, "width": width}.items():
        if value is not None and not (isinstance(value, Integral) and value > 0):
            raise ValueError(f"`{side}` must be a number of pixels, got {value!r}.")
    if isinstance(image, torch.Tensor) and image.dtype == torch.int64 and image.ndim in (2, 3):
        return image[None] if image.ndim == 2 else image
    images = list(image) if isinstance(image, list | tuple) else [image]
    if images and all(isinstance(picture, PIL.Image.Image) for picture in images):
        images = [picture.convert("RGB") for picture in images]
    sizes = {_size(picture) for picture in images}
    if not images or None in sizes or len({type(picture) for picture in images}) > 1:
        kinds = ", ".join(sorted({type(picture).__name__ for picture in images})) or "an empty list"
        raise ValueError(
            f"`{name}` must be a PIL image, an array (height, width, 3), a tensor (3, height, width), a list or batch of "
            f"these, or a token grid (int64), got {kinds}."
        )
    if len(sizes) > 1 and (height is None or width is None):
        raise ValueError(f"`{name}` has images of several sizes, {sorted(sizes)}: give `height` and `width` to resize them.")
    own_height, own_width = next(iter(sizes))
    size = (own_height if height is None else height, own_width if width is None else width)
    processor = VaeImageProcessor(do_resize=sizes != {size}, do_normalize=False, vae_scale_factor=1, vae_latent_channels=0)
    pixels = processor.preprocess(images if isinstance(image, list | tuple | PIL.Image.Image) else image, *size).float()
    if pixels.shape[1] != 3:
        raise ValueError(f"`{name}` must have 3 channels, red, green and blue, got {pixels.shape[1]}.")
    return _in_range(name, pixels)


def read_mask(mask, size: tuple[int, int], name: str = "mask_image") -> torch.Tensor:
    """A mask as PIL image, array or tensor, `(height, width)` or a batch, to `(n, 1, height, width)` in [0, 1], float32."""
    images = list(mask) if isinstance(mask, list | tuple) else [mask]
    if not images or not all(isinstance(image, PIL.Image.Image | np.ndarray | torch.Tensor) for image in images):
        raise ValueError(f"`{name}` must be a PIL image, an array or a tensor, got {type(mask).__name__}.")
    if not isinstance(images[0], PIL.Image.Image):  # booleans are as good as numbers
        images = [image.float() if isinstance(image, torch.Tensor) else image.astype(np.float32) for image in images]
    processor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_grayscale=True, vae_latent_channels=0)
    pixels = processor.preprocess(images if len(images) > 1 else images[0]).float()
    if pixels.shape[1:] != (1, *size):
        raise ValueError(f"`{name}` must be as large as the image, {size[0]}×{size[1]}, with one channel: got "
                         f"{tuple(pixels.shape[1:])}.")  # fmt: skip
    return _in_range(name, pixels)


def feather(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """
    Weights `(n, 1, height, width)` for a seamless seam: 1 where the mask is 1, falling to 0 at a distance of `2 * radius`
    pixels from it.
    """
    if radius == 0:
        return mask
    window = 2 * radius + 1
    wider = F.max_pool2d(mask, window, stride=1, padding=radius)
    return F.avg_pool2d(wider, window, stride=1, padding=radius, count_include_pad=False)


def _size(picture) -> tuple[int, int] | None:
    if isinstance(picture, PIL.Image.Image):
        return picture.height, picture.width
    if isinstance(picture, np.ndarray) and picture.ndim in (3, 4) and picture.size:
        return picture.shape[-3:-1]
    if isinstance(picture, torch.Tensor) and picture.ndim in (3, 4) and picture.numel():
        return tuple(picture.shape[-2:])
    return None


def _in_range(name: str, pixels: torch.Tensor) -> torch.Tensor:
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # a NaN is neither
        raise ValueError(
            f"`{name}` must be in [0, 1], got {pixels.min().item():.4g} to {pixels.max().item():.4g}: divide bytes by 255."
        )
    return pixels
