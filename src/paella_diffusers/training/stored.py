"""
Arrays that samples have: tokens and embeddings as `.npy` files, how they are written and read.

`prompt_embeds` are float16, or float8 at half the size: bytes of `torch.float8_e4m3fn`, beside `prompt_embeds_scales`,
a float32 for each token, by which they are multiplied. A value is then wrong by at most 1/28 of the greatest of its token.
"""

import io
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# the arrays that a sample can have, with the number of dimensions
DIMENSIONS = {"tokens": 2, "noise": 2, "prompt_embeds": 2, "clip_text_embeds": 1, "clip_image_embeds": 1}
GRIDS = ("tokens", "noise")  # those of tokens
ARRAYS = tuple(DIMENSIONS)
COMPUTED = tuple(name for name in ARRAYS if name != "noise")  # what `examples/precompute.py` can store
SCALES = "prompt_embeds_scales"
FLOAT8 = torch.float8_e4m3fn


def store(arrays: dict[str, torch.Tensor], float8: bool = False) -> dict[str, bytes]:
    """
    The files of a sample: int16 or int32 for integers, float16 for others.

    Args:
        arrays (`dict[str, torch.Tensor]`): By names of `ARRAYS`.
        float8 (`bool`, defaults to `False`): Whether `prompt_embeds` are stored as float8.

    Raises:
        FloatingPointError: If an embedding is not finite in float16.
    """
    stored = {name: _shorten(array.cpu().numpy()) for name, array in arrays.items()}
    if float8 and "prompt_embeds" in stored:
        stored["prompt_embeds"], stored[SCALES] = quantize(stored["prompt_embeds"])
    return {f"{name}.npy": _npy(array) for name, array in stored.items()}


def _shorten(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "i":
        return array.astype(np.int16 if array.max() < 2**15 else np.int32)
    array = array.astype(np.float16)
    if not np.isfinite(array).all():
        raise FloatingPointError("An embedding is not finite, or too large for float16.")
    return array


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def quantize(embeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings `(length, dim)` as bytes `(length, dim)`, uint8, and scales `(length,)`, float32, above zero."""
    values = torch.from_numpy(embeds.astype(np.float32))
    scales = (values.abs().amax(1) / torch.finfo(FLOAT8).max).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scales[:, None]).to(FLOAT8).view(torch.uint8).numpy(), scales.numpy()


def dequantize(quantized: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """
    What `quantize` was given, `(length, dim)`, float16, up to rounding.

    Raises:
        ValueError: If these are no such bytes and scales.
    """
    if quantized.dtype != np.uint8 or quantized.ndim != 2:
        raise ValueError(f"`{SCALES}` stands beside `prompt_embeds` of type {quantized.dtype}, shape {quantized.shape}")
    if scales.dtype != np.float32 or scales.shape != (len(quantized),) or not (scales > 0).all():
        raise ValueError(f"`{SCALES}` must be {len(quantized)} positive float32 numbers")
    return (torch.from_numpy(quantized).view(FLOAT8).float() * torch.from_numpy(scales)[:, None]).half().numpy()


@dataclass
class StoredArrays:
    """
    What arrays that were computed before must be, so that a damaged one is skipped like any other sample that cannot be
    read, instead of ending the training. Without arguments, finite numbers of a fitting kind are enough.

    Args:
        shapes (`dict`, *optional*): Which arrays to read, with their shapes; None for a length that may be any but zero.
        num_tokens (`int`, *optional*): Number of tokens there are: `tokens` are less.
        required (`Collection[str]`): The arrays that no sample may lack.
    """

    shapes: dict[str, tuple[int | None, ...]] | None = None
    num_tokens: int | None = None
    required: Collection[str] = ()

    def read(self, raw: dict[str, Any]) -> dict[str, np.ndarray]:
        """
        The arrays of a raw sample.

        Raises:
            ValueError: If one is missing, or has another shape, type or range.
        """
        missing = [name for name in self.required if name not in raw]
        if missing:
            raise ValueError(f"it has no `{missing[0]}`")
        wanted = ARRAYS if self.shapes is None else self.shapes
        load = lambda name: np.load(io.BytesIO(raw[name]), allow_pickle=False)
        arrays = {name: load(name) for name in wanted if name in raw}
        if "prompt_embeds" in arrays and SCALES in raw:
            arrays["prompt_embeds"] = dequantize(arrays["prompt_embeds"], load(SCALES))
        for name, array in arrays.items():
            self._check(name, array)
        return arrays

    def _check(self, name: str, array: np.ndarray):
        shape = (None,) * DIMENSIONS[name] if self.shapes is None else self.shapes[name]
        fits = len(shape) == array.ndim and all(
            has == size or (has and size is None) for has, size in zip(array.shape, shape)
        )
        if not fits:
            raise ValueError(f"`{name}` has the shape {array.shape}, but must have {shape}")
        if array.dtype.kind not in ("iu" if name in GRIDS else "f"):
            raise ValueError(f"`{name}` has the type {array.dtype}")
        if name not in GRIDS and not np.isfinite(array).all():
            raise ValueError(f"`{name}` has NaN or infinite values")
        if name in GRIDS and (array.min() < 0 or array.max() >= (self.num_tokens or np.inf)):
            raise ValueError(f"`{name}` must be from 0 to {self.num_tokens} - 1, got {array.min()} to {array.max()}")
