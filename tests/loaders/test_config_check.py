import numpy as np
import pytest

from paella_diffusers import PaellaScheduler, PaellaSemanticGuidance, PaellaUNet
from paella_diffusers.loaders.config_check import check_config


@pytest.mark.parametrize(
    "config",
    [
        {"dropout": 0, "sample_size": np.int64(8), "block_out_channels": [8, np.int32(16)]},
        {"dropout": [0.1, np.float32(0.2)], "self_attention": True, "unknown": object()},
    ],
)
def test_what_fits_is_taken(config):
    check_config(PaellaUNet, config)


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (PaellaSemanticGuidance, {"editing_prompt": "x" * 1001}, "`editing_prompt` must have at most 1000 characters, got"),
        (PaellaSemanticGuidance, {"editing_prompt": ["x"] * 1001}, "editing_prompt=.*, more than 1000 entries"),
        (PaellaSemanticGuidance, {"editing_prompt": "x", "edit_warmup_steps": 2**25}, "edit_warmup_steps=33554432, more"),
        (PaellaScheduler, {"renoise_steps": 2**24 + 1}, "renoise_steps=16777217, more than 16777216"),
        (PaellaScheduler, {"quantized_steps": 2**24 + 1}, "quantized_steps=16777217, more than 16777216"),
    ],
)
def test_what_could_not_be_loaded_is_not_made(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls(**config)


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (PaellaUNet, {"sample_size": True}, "PaellaUNet has sample_size=True, which should be int"),
        (PaellaUNet, {"sample_size": None}, "sample_size=None, which should be int"),
        (PaellaUNet, {"block_out_channels": [8, "16"]}, r"block_out_channels=\[8, '16'\], which should be tuple\[int"),
        (PaellaUNet, {"block_out_channels": 8}, "block_out_channels=8, which should be tuple"),
        (PaellaUNet, {"dropout": float("inf")}, r"dropout=inf, which should be float \| tuple"),
        (PaellaUNet, {"kernel_size": 2**30}, "kernel_size=1073741824, more than 16777216, which no real model has"),
        (PaellaScheduler, {"num_vq_embeddings": "many"}, "PaellaScheduler has num_vq_embeddings='many'"),
        (PaellaScheduler, {"temperature": 10**400}, "PaellaScheduler has temperature=1000"),
        (PaellaScheduler, {"_class_name": 10**30}, "PaellaScheduler has _class_name=10{30}, which is no class's name"),
    ],
)
def test_what_does_not_fit_is_refused(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls.from_config(config)
