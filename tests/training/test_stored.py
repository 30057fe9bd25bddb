"""Embeddings in float8; that other damaged arrays are skipped is in `test_data.py`."""

import io

import numpy as np
import pytest
import torch

from paella_diffusers.training.stored import SCALES, StoredArrays, dequantize, quantize, store

EMBEDS = torch.randn(7, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]


def test_float8_is_wrong_by_at_most_a_28th_of_the_tokens_greatest_value():
    embeds = torch.cat([EMBEDS, torch.zeros(1, 24)]).half().numpy()
    quantized, scales = quantize(embeds)
    assert (quantized.dtype, quantized.shape, scales.dtype, scales.shape) == (np.uint8, (8, 24), np.float32, (8,))
    found = dequantize(quantized, scales)
    assert found.dtype == np.float16 and not found[-1].any()
    error, greatest = (np.abs(array.astype(np.float64)) for array in (found - embeds, embeds))
    greatest = greatest.max(1, keepdims=True)
    assert (error <= greatest * (1 / 28 + 2**-10)).all()  # and float16's own rounding
    assert (np.abs(found).max(1) == np.abs(embeds).max(1)).all()
    # what was read is stored without a further loss
    assert (dequantize(*quantize(found)) == found).all()


def test_in_files_it_has_half_the_size():
    embeds = torch.randn(78, 2560)  # ByT5-XL's, of 77 bytes
    sizes = [sum(map(len, store({"prompt_embeds": embeds}, float8).values())) for float8 in (False, True)]
    assert sizes == [128 + 78 * 2560 * 2, 2 * 128 + 78 * (2560 + 4)]


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name, array, message",
    [
        (SCALES, None, "`prompt_embeds` has the type uint8"),
        (SCALES, np.ones(6, np.float32), "`prompt_embeds_scales` must be 7 positive float32 numbers"),
        (SCALES, np.ones(7, np.float16), "`prompt_embeds_scales` must be 7 positive float32 numbers"),
        (SCALES, np.full(7, np.nan, np.float32), "`prompt_embeds_scales` must be 7 positive float32 numbers"),
        (SCALES, np.zeros(7, np.float32), "`prompt_embeds_scales` must be 7 positive float32 numbers"),
        (SCALES, np.full(7, 1e30, np.float32), "`prompt_embeds` has NaN or infinite values"),
        ("prompt_embeds", np.full((7, 24), 0x7F, np.uint8), "`prompt_embeds` has NaN or infinite values"),
        ("prompt_embeds", np.ones((7, 24), np.float16), "`prompt_embeds_scales` stands beside .* of type float16"),
        ("prompt_embeds", np.ones(7, np.uint8), r"beside `prompt_embeds` of type uint8, shape \(7,\)"),
        ("prompt_embeds", np.ones((7, 23), np.uint8), r"`prompt_embeds` has the shape \(7, 23\)"),
    ],
)
def test_damaged_or_foreign_float8_is_refused(name, array, message):
    files = {key.removesuffix(".npy"): content for key, content in store({"prompt_embeds": EMBEDS}, float8=True).items()}
    arrays = StoredArrays({"prompt_embeds": (None, 24)})
    assert arrays.read(files)["prompt_embeds"].dtype == np.float16
    del files[name]
    if array is not None:
        files[name] = npy(array)
    with pytest.raises(ValueError, match=message):
        arrays.read(files)
