"""Prompts for regions of one image."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from .source_image import read_mask


def read_region_masks(region_masks: Any, height: int, width: int, patch_size: int) -> torch.Tensor:
    """
    Masks as a share for every prompt at every token, `(num_prompts, height / patch_size, width / patch_size)`, summing to 1.

    Args:
        region_masks (`list` or `torch.Tensor`):
            A mask for each prompt, in [0, 1]: PIL, arrays or tensors `(height, width)`, or over the token grid.
        height, width (`int`): Size of the image in pixels.
        patch_size (`int`): Pixels that a token covers, a side.

    Raises:
        ValueError: If they are no masks, or leave a token without a prompt.
    """
    if not isinstance(region_masks, Iterable):
        raise ValueError(f"`region_masks` must be a list with a mask for each prompt, got {type(region_masks).__name__}.")
    grid = (height // patch_size, width // patch_size)
    masks = read_mask(region_masks, "region_masks")
    for mask in masks:
        if tuple(mask.shape[-2:]) not in (grid, (height, width)):
            raise ValueError(
                f"`region_masks` must be as large as the image, {height}×{width}, or as its token grid, "
                f"{grid[0]}×{grid[1]}: got {tuple(mask.shape[-2:])}."
            )
    masks = torch.cat([F.adaptive_avg_pool2d(mask, grid) for mask in masks])[:, 0]
    total = masks.sum(0)
    if (total == 0).any():
        row, column = (total == 0).nonzero()[0].tolist()
        raise ValueError(
            f"`region_masks` leave the token in row {row} and column {column} without a prompt: let one cover it."
        )
    return masks / total
