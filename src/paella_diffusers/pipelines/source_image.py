"""
The image that a task begins with: from what users give to what the model takes, and the results back to the image's size.

One idea carries it: a box, in pixels of the image, is resized to a size that the model allows, and what is generated there
is resized to the box again. The box is the whole image, a part of it (`resize_mode="crop"`, `padding_mask_crop`), or more
than the image (`resize_mode="fill"`).
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import logging

from ..checks import check_boolean, check_choice, check_integer, is_integer
from .image_reading import to_grey, to_rgb

logger = logging.get_logger(__name__)

RESIZE_MODES = ("default", "fill", "crop")
Box = tuple[int, int, int, int]  # left, top, right, bottom, as in PIL; it may reach beyond the image


@dataclass(frozen=True)
class SizeRule:
    """
    Which sizes a model allows, and at which of them an image of any size is generated: its own if the model allows it, the
    shorter side is at least half the model's own side, and the longer at most three times. Otherwise, the allowed size with
    nearly the model's own area and the image's proportions.

    Args:
        own_side (`int`): The model's own height and width in pixels: 256 in the released model.
        multiple (`int`): Heights and widths must be multiples of this: 32 in the released model.
        vae_scale_factor (`int`): Pixels of a token's side: 4 in the released model.
    """

    own_side: int
    multiple: int
    vae_scale_factor: int

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        """The size at which an image of this size is generated."""
        return (height, width) if self.fits(height, width) else self.nearest_to_own(height, width)

    def allows(self, height: int, width: int) -> bool:
        return height % self.multiple == 0 and width % self.multiple == 0

    def fits(self, height: int, width: int) -> bool:
        """Whether an image of this size is taken as it is."""
        shorter, longer = sorted((height, width))
        return self.allows(height, width) and 2 * shorter >= self.own_side and longer <= 3 * self.own_side

    def nearest_to_own(self, height: int, width: int) -> tuple[int, int]:
        """The allowed size with nearly the model's own area and these proportions, of sides within the same limits."""
        first, last = math.ceil(self.own_side / 2 / self.multiple), 3 * self.own_side // self.multiple
        sides = [number * self.multiple for number in range(first, last + 1)]

        def mismatch(size: tuple[int, int]) -> float:
            distortion = abs(math.log(size[0] * width / (size[1] * height)))
            return 4 * distortion + abs(math.log(size[0] * size[1] / self.own_side**2))

        return min(product(sides, sides), key=mismatch)

    def complete(self, height: int | None, width: int | None, own_height: int, own_width: int) -> tuple[int, int]:
        """An explicit size: a missing side follows from the image's proportions."""
        for name, side in {"height": height, "width": width}.items():
            if side is not None and not (is_integer(side) and side > 0):
                raise ValueError(f"`{name}` must be a number of pixels, got {side!r}: a multiple of {self.multiple}.")
        self.check(*(self.multiple if side is None else side for side in (height, width)))
        if height is None:
            height = self.nearest(width * own_height / own_width)
        if width is None:
            width = self.nearest(height * own_width / own_height)
        return height, width

    def check(self, height: int, width: int) -> None:
        """Refuse a size that the model does not allow, and name the nearest."""
        for name, side in {"height": height, "width": width}.items():
            if not is_integer(side):
                raise ValueError(f"`{name}` must be an integer, of the multiples of {self.multiple}, got {side!r}.")
        most = PIL.Image.MAX_IMAGE_PIXELS
        if most and height * width > most and min(height, width) > 0:
            raise ValueError(
                f"`height` and `width` must be at most {most} pixels together, got {height} and {width}: pass less, or "
                "raise `PIL.Image.MAX_IMAGE_PIXELS`."
            )
        if height < 1 or width < 1 or not self.allows(height, width):
            raise ValueError(
                f"`height` and `width` must be multiples of {self.multiple}, got {height} and {width}: the nearest are "
                f"{self.nearest(height)} and {self.nearest(width)}."
            )

    def nearest(self, side: float) -> int:
        return max(1, round(side / self.multiple)) * self.multiple


@dataclass
class SourceImage:
    """
    An image as a task begins with it, and the way back to its size. n is the number of images, or 1 for all results.

    Args:
        image (`torch.Tensor`):
            Pixels `(n, 3, height, width)` in [0, 1], float32, at the size at which results are generated; or tokens
            `(n, height / 4, width / 4)`, int64.
        mask (`torch.BoolTensor` of shape `(n, height / 4, width / 4)`, *optional*):
            True where tokens are generated, the others are kept; everywhere unless given.
        margins (`tuple[int, int, int, int]`, defaults to none):
            So many tokens at the left, top, right and bottom are no part of the image, and shall not change its tokens.
        result_size (`tuple[int, int]`, *optional*): Height and width of the results; `image`'s unless given.
        box (`tuple[int, int, int, int]`, *optional*):
            The part of the results that is generated: left, top, right and bottom, perhaps beyond them; all unless given.
        original (`torch.Tensor` of shape `(n, 3, *result_size)`, *optional*): Pixels that results keep.
        blend (`torch.Tensor` of shape `(n, 1, *result_size)`, *optional*):
            With `original`: the share of generated pixels in the results, in [0, 1]. Where it is 0, results have exactly the
            original's pixels.
    """

    image: torch.Tensor
    mask: torch.Tensor | None = None
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)
    result_size: tuple[int, int] | None = None
    box: Box | None = None
    original: torch.Tensor | None = None
    blend: torch.Tensor | None = None

    @property
    def is_tokens(self) -> bool:
        return not self.image.is_floating_point()

    def warn_if_enlarged(self, images: torch.Tensor) -> None:
        """Say so where generated images are much smaller than their box in the results."""
        height, width = self.result_size or images.shape[-2:]
        left, top, right, bottom = self.box or (0, 0, width, height)
        enlarged = max((bottom - top) / images.shape[-2], (right - left) / images.shape[-1])
        if enlarged > 2:
            logger.warning(
                f"Results are enlarged {enlarged:.1f} times to the size of `image`: they were generated at "
                f"{images.shape[-1]}×{images.shape[-2]} pixels. `height` and `width` set another size, for both."
            )

    def restore(self, images: torch.Tensor) -> torch.Tensor:
        """
        Generated images `(num_images, 3, height, width)` in [0, 1] to results `(num_images, 3, *result_size)`: resized to
        their box, with the original's pixels around them and where they are kept.
        """
        height, width = self.result_size or images.shape[-2:]
        left, top, right, bottom = self.box or (0, 0, width, height)
        images = _resize(images, bottom - top, right - left)
        images = images[..., max(0, -top) : height - top, max(0, -left) : width - left]
        if self.original is None:
            return images
        results, blend = (part.to(images.device) for part in (self.original, self.blend))
        results, blend = (part.repeat_interleave(len(images) // len(part), dim=0) for part in (results, blend))
        inside = (..., slice(max(0, top), bottom), slice(max(0, left), right))
        results[inside] = torch.lerp(results[inside], images.float(), blend[inside])
        return results


def prepare_source(
    image: PipelineImageInput | None,
    rule: SizeRule,
    mask_image: PipelineImageInput | None = None,
    padding: tuple[int, int, int, int] | None = None,
    height: int | None = None,
    width: int | None = None,
    resize_mode: str = "default",
    padding_mask_crop: int | None = None,
    keep_original_pixels: bool = True,
    feather_radius: int = 0,
) -> SourceImage:
    """
    What a task begins with, from its arguments. Results have the size of `image` and its padding, or `height` and `width`.

    Args:
        image: What [`read_image`] takes. A token grid is taken as it is, with a mask of the same grid.
        rule ([`SizeRule`]): Which sizes the model allows, and which one it takes without `height` and `width`.
        mask_image (*optional*):
            What [`read_mask`] takes, of any size, one or one for each image. A pixel of it counts from 0.5 on; a pixel of
            the image is masked if any such pixel lies on it, and a token is generated if any masked pixel lies on it.
        padding (`tuple[int, int, int, int]`, *optional*): New pixels at the left, top, right and bottom of the image.
        height, width (`int`, *optional*):
            Multiples of `rule.multiple`; from one of them alone and the image's proportions follows the other. With
            `padding_mask_crop`, the size at which the part around the mask is generated; results have the image's size.
        resize_mode (`str`, defaults to `"default"`):
            How an image gets other proportions: `"default"` stretches it, `"fill"` repeats its edges around it, `"crop"`
            takes its middle; without `height` and `width`, results then have the size of that part.
        padding_mask_crop (`int`, *optional*):
            Generate only a part of the image: around the mask, with a margin of this many pixels.
        keep_original_pixels (`bool`, defaults to `True`): Whether results have the image's own pixels outside the mask.
        feather_radius (`int`, defaults to 0): They blend into the new ones over `2 * feather_radius` pixels beyond the mask.

    Raises:
        ValueError: If an argument is out of range, or does not go with the others.
    """
    _check_options(mask_image, padding, resize_mode, padding_mask_crop, keep_original_pixels, feather_radius)
    left, top, right, bottom = padding or (0, 0, 0, 0)
    padding = (left, top, right, bottom)
    images = read_image(image)
    if isinstance(images, torch.Tensor):
        if resize_mode != "default" or padding_mask_crop is not None:
            raise ValueError("`resize_mode` and `padding_mask_crop` need pixels, but `image` is a token grid.")
        return _token_source(images, rule, mask_image, padding, height, width)
    _check_one_size(images, height, width, padding, padding_mask_crop)
    images, masks = _with_masks(images, mask_image, any(padding))
    image_size = images[0].shape[-2:]

    # 1. outpainting: what is new counts as masked
    if any(padding):
        padded = (-left, -top, image_size[1] + right, image_size[0] + bottom)
        _check_pixels(padded)
        images = [_take(pixels, padded) for pixels in images]
        masks = [_take(mask, padded, beyond=1.0) for mask in masks]

    # 2. the size at which images are generated, and the box of each that becomes it
    explicit = height is not None or width is not None
    whole = images[0].shape[-2:]
    size = rule.complete(height, width, *whole) if explicit else rule(*whole)
    if padding_mask_crop is not None:
        size = size if explicit else rule.nearest_to_own(*whole)
        boxes = [_box_around(masks, size, padding_mask_crop)] * len(images)
    elif any(padding) and not explicit and (room := _room(image_size, padding, rule)):
        boxes, size = [room] * len(images), (room[3] - room[1], room[2] - room[0])
    else:
        boxes = [_box(pixels.shape[-2:], size, resize_mode) for pixels in images]

    # 3. what the model takes
    image_parts = [_take(pixels, box) for pixels, box in zip(images, boxes)]
    mask_parts = [_take(mask, box) for mask, box in zip(masks, boxes)]
    source = SourceImage(torch.cat([_resize(part, *size) for part in image_parts]))
    if masks:
        grid = [side // rule.vae_scale_factor for side in size]
        source.mask = torch.cat([_any_pixel(part, *grid) for part in mask_parts])[:, 0].bool()
    if any(padding):
        inner = (left, top, left + image_size[1], top + image_size[0])
        source.margins = _margins(inner, boxes[0], grid)

    # 4. the way back
    if explicit and padding_mask_crop is None:
        images, masks = [source.image], [_any_pixel(part, *size) for part in mask_parts]
    elif resize_mode == "crop":
        images, masks = image_parts, mask_parts
    else:
        source.box = boxes[0]
    source.result_size = tuple(images[0].shape[-2:])
    if masks:
        source.original, blend = torch.cat(images), torch.cat(masks)
        source.blend = feather(blend, feather_radius) if keep_original_pixels else torch.ones_like(blend)
    return source


def read_image(image: Any, name: str = "image") -> list[torch.Tensor] | torch.Tensor:
    """
    PIL images of any kind, arrays `(height, width, 3)` or tensors `(3, height, width)` in [0, 1], or a list or batch of
    these, to a list of float32 pixels `(1, 3, height, width)`. An int64 tensor, a token grid or several, to a tensor
    `(n, height, width)`.

    Raises:
        ValueError: If it is none of these, or out of range.
    """
    if isinstance(image, torch.Tensor) and image.dtype == torch.int64 and image.ndim in (2, 3):
        return image[None] if image.ndim == 2 else image
    images = list(image) if isinstance(image, list | tuple) else [image]
    if not images or not all(_is_image(one) for one in images):
        kinds = ", ".join(sorted({type(one).__name__ for one in images})) or "an empty list"
        raise ValueError(
            f"`{name}` must be a PIL image, an array (height, width, 3), a tensor (3, height, width), a list or batch of "
            f"these, or a token grid (int64), got {kinds}."
        )
    pil = [to_rgb(one, f"`{name}`") if isinstance(one, PIL.Image.Image) else one for one in images]
    return _pixels(pil, 3, name)


def read_mask(mask: Any, name: str = "mask_image") -> list[torch.Tensor]:
    """
    Masks as PIL images, arrays or tensors `(height, width)` in [0, 1] or of booleans, or a list or batch of these, to a list
    of float32 `(1, 1, height, width)`.

    Raises:
        ValueError: If it is none of these, or out of range.
    """
    masks = list(mask) if isinstance(mask, list | tuple) else [mask]
    if not masks or not all(_is_image(one, least_ndim=2) for one in masks):
        kinds = ", ".join(sorted({type(one).__name__ for one in masks})) or "an empty list"
        raise ValueError(
            f"`{name}` must be a PIL image, an array or a tensor, got {kinds}: of shape (height, width), or a list or batch "
            "of these."
        )
    pil = [to_grey(one, f"`{name}`") if isinstance(one, PIL.Image.Image) else one for one in masks]
    return _pixels(pil, 1, name)


def feather(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """
    Weights `(n, 1, height, width)` for a seamless seam: 1 where the mask is 1, falling to 0 at a distance of `2 * radius`
    pixels from it.
    """
    if radius == 0:
        return mask
    radius = min(radius, max(mask.shape[-2:]))  # then, all of the image is within its reach
    for side in ((2 * radius + 1, 1), (1, 2 * radius + 1)):  # one after the other is faster, and the same
        mask = F.max_pool2d(mask, side, stride=1, padding=[one // 2 for one in side])
    for side in ((2 * radius + 1, 1), (1, 2 * radius + 1)):
        mask = F.avg_pool2d(mask, side, stride=1, padding=[one // 2 for one in side], count_include_pad=False)
    return mask


def _is_image(image, least_ndim: int = 3) -> bool:
    if isinstance(image, np.ndarray | torch.Tensor):
        return least_ndim <= image.ndim <= 4 and 0 not in image.shape
    return isinstance(image, PIL.Image.Image) and 0 not in image.size


def _pixels(images: list, channels: int, name: str) -> list[torch.Tensor]:
    """PIL images, arrays and tensors to float32 `(1, channels, height, width)` in [0, 1]."""
    processor = VaeImageProcessor(
        do_resize=False, do_normalize=False, do_convert_grayscale=channels == 1, vae_latent_channels=0
    )
    pixels = []
    for image in images:
        if isinstance(image, np.ndarray):
            image = image.astype(np.float32)
        elif isinstance(image, torch.Tensor):
            image = image.detach().float()
        batch = processor.preprocess(image)
        if batch.ndim != 4 or batch.shape[1] != channels:
            kinds = {1: "one channel", 3: "3 channels, red, green and blue"}
            raise ValueError(f"`{name}` must have {kinds[channels]}, got shape {tuple(image.shape)}.")
        if not (batch.min() >= 0 and batch.max() <= 1):  # a NaN is neither
            values = f"{batch.min().item():.4g} to {batch.max().item():.4g}"
            raise ValueError(f"`{name}` must be in [0, 1], got {values}: divide bytes by 255.")
        pixels += batch.split(1)
    return pixels


def _with_masks(images: list, mask_image, padded: bool) -> tuple[list, list]:
    """As many images as masks: 1 where these count, of each image's size; without any, an empty list."""
    if mask_image is None:
        return images, [torch.zeros_like(pixels[:, :1]) for pixels in images] if padded else []
    masks = [(mask >= 0.5).float() for mask in read_mask(mask_image)]
    count = max(len(images), len(masks))
    if not {len(images), len(masks)} <= {1, count}:
        raise ValueError(f"`mask_image` has {len(masks)} masks for {len(images)} images: pass one, or one each.")
    images, masks = images * (count // len(images)), masks * (count // len(masks))
    return images, [_any_pixel(mask, *pixels.shape[-2:]) for mask, pixels in zip(masks, images)]


def _token_source(tokens, rule: SizeRule, mask_image, padding, height, width) -> SourceImage:
    """A token grid, with its padding and its mask."""
    own_height, own_width = (side * rule.vae_scale_factor for side in tokens.shape[-2:])
    if (own_height if height is None else height, own_width if width is None else width) != (own_height, own_width):
        raise ValueError(
            f"`image` is a token grid of {own_width}×{own_height} pixels, which cannot be resized: leave `height` and "
            "`width` out."
        )
    if any(side % rule.vae_scale_factor for side in padding):
        raise ValueError(f"Around a token grid, `padding` must be multiples of {rule.vae_scale_factor}, got {padding}.")
    _check_pixels((-padding[0], -padding[1], own_width + padding[2], own_height + padding[3]))
    left, top, right, bottom = (side // rule.vae_scale_factor for side in padding)
    around = (left, right, top, bottom)
    source = SourceImage(F.pad(tokens, around))
    height, width = (side * rule.vae_scale_factor for side in source.image.shape[-2:])
    if not rule.allows(height, width) or 0 in tokens.shape:
        raise ValueError(
            f"`image` is a token grid of {width}×{height} pixels with its padding: both must be multiples of "
            f"{rule.multiple}."
        )
    if mask_image is None and not any(padding):
        return source
    masks = [torch.zeros(1, 1, *tokens.shape[-2:])] if mask_image is None else read_mask(mask_image)
    if any(mask.shape[-2:] != tokens.shape[-2:] for mask in masks):
        grid = "×".join(map(str, tokens.shape[-2:]))
        raise ValueError(f"`mask_image` must be a mask of the token grid, {grid}, got {tuple(masks[0].shape[-2:])}.")
    count = max(len(tokens), len(masks))
    if not {len(tokens), len(masks)} <= {1, count}:
        raise ValueError(f"`mask_image` has {len(masks)} masks for {len(tokens)} token grids: pass one, or one each.")
    mask = F.pad((torch.cat(masks) >= 0.5)[:, 0], around, value=True)
    return SourceImage(source.image.expand(count, -1, -1), mask.expand(count, -1, -1))


# --------------------------------------------------------------------------------------------------------------- boxes


def _take(pixels: torch.Tensor, box: Box, beyond: float | None = None) -> torch.Tensor:
    """What is in a box; beyond the image, its edges are repeated, or a value is given."""
    left, top, right, bottom = box
    height, width = pixels.shape[-2:]
    part = pixels[..., max(0, top) : bottom, max(0, left) : right]
    around = (max(0, -left), max(0, right - width), max(0, -top), max(0, bottom - height))
    if not any(around):
        return part
    return F.pad(part, around, mode="replicate") if beyond is None else F.pad(part, around, value=beyond)


def _resize(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels.float(), (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def _any_pixel(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A mask in another size: 1 for each pixel or token on which any 1 lies."""
    return F.adaptive_max_pool2d(mask, (height, width))


def _box(image_size: torch.Size | tuple[int, int], size: tuple[int, int], resize_mode: str) -> Box:
    """The part of an image, or what is around it, that is resized to `size`."""
    (image_height, image_width), (height, width) = image_size, size
    if resize_mode == "default":
        return 0, 0, image_width, image_height
    too_wide = image_width * height > image_height * width
    if too_wide == (resize_mode == "crop"):
        box_height, box_width = image_height, max(1, round(image_height * width / height))
    else:
        box_height, box_width = max(1, round(image_width * height / width)), image_width
    left, top = (image_width - box_width) // 2, (image_height - box_height) // 2
    return left, top, left + box_width, top + box_height


def _box_around(masks: list[torch.Tensor], size: tuple[int, int], margin: int) -> Box:
    """The box around all masks, with a margin and the proportions of `size`; the whole image if they are empty."""
    mask = torch.cat(masks).amax(0)[0]
    if not mask.any():
        return 0, 0, mask.shape[1], mask.shape[0]
    pil = PIL.Image.fromarray(mask.byte().cpu().numpy())
    left, top, right, bottom = VaeImageProcessor.get_crop_region(pil, size[1], size[0], pad=margin)
    inner = _box((bottom - top, right - left), size, "fill")  # in narrow images, it reaches beyond them
    return left + inner[0], top + inner[1], left + inner[2], top + inner[3]


def _room(image_size: tuple[int, int], padding: Box, rule: SizeRule) -> Box | None:
    """The box of a size that fits, a little larger than the padding, so that an image that fits need not be resized."""
    left, top, right, bottom = padding
    height, width = image_size[0] + top + bottom, image_size[1] + left + right
    extra_height, extra_width = -height % rule.multiple, -width % rule.multiple
    if not rule.allows(*image_size) or not rule.fits(height + extra_height, width + extra_width):
        return None
    x, y = 0 if right else -extra_width, 0 if bottom else -extra_height
    return x, y, x + width + extra_width, y + height + extra_height


def _margins(inner: Box, box: Box, grid: list[int]) -> tuple[int, int, int, int]:
    """How many tokens of the box lie wholly beyond the inner box, at each side."""
    rows, columns = grid
    width, height = box[2] - box[0], box[3] - box[1]
    margins = (
        (inner[0] - box[0]) * columns // width,
        (inner[1] - box[1]) * rows // height,
        (box[2] - inner[2]) * columns // width,
        (box[3] - inner[3]) * rows // height,
    )
    left, top, right, bottom = (max(0, margin) for margin in margins)
    return (left, top, right, bottom) if left + right < columns and top + bottom < rows else (0, 0, 0, 0)


# -------------------------------------------------------------------------------------------------------------- checks


def _check_options(mask_image, padding, resize_mode, padding_mask_crop, keep_original_pixels, feather_radius):
    if padding is not None and (
        not isinstance(padding, tuple | list)
        or len(padding) != 4
        or not all(is_integer(side) and side >= 0 for side in padding)
    ):
        raise ValueError(f"`padding` must be (left, top, right, bottom) in pixels, at least 0, got {padding}.")
    check_choice("resize_mode", resize_mode, RESIZE_MODES)
    check_boolean("keep_original_pixels", keep_original_pixels)
    check_integer("feather_radius", feather_radius, 0)
    if padding_mask_crop is None:
        return
    check_integer("padding_mask_crop", padding_mask_crop, 0)
    if mask_image is None and not any(padding or ()):
        raise ValueError("`padding_mask_crop` needs `mask_image`: it is the margin around the mask.")
    if resize_mode != "default":
        raise ValueError("`padding_mask_crop` chooses the part of the image itself: leave `resize_mode` out.")


def _check_pixels(padded: Box):
    width, height = padded[2] - padded[0], padded[3] - padded[1]
    most = PIL.Image.MAX_IMAGE_PIXELS
    if most and width * height > most:
        raise ValueError(
            f"`padding` makes the image {width}×{height}, more than {most} pixels: pass less, or raise "
            "`PIL.Image.MAX_IMAGE_PIXELS`."
        )


def _check_one_size(images: list[torch.Tensor], height, width, padding, padding_mask_crop):
    sizes = {pixels.shape[-2:] for pixels in images}
    if len(sizes) == 1:
        return
    shown = ", ".join(f"{size[1]}×{size[0]}" for size in sorted(sizes))
    if height is None or width is None:
        raise ValueError(f"`image` has images of several sizes, {shown}: give `height` and `width` to resize them.")
    if any(padding) or padding_mask_crop is not None:
        raise ValueError(f"`padding` and `padding_mask_crop` need images of one size, got {shown}.")
