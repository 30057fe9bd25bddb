import pytest
import torch
import train_paella_lora
from safetensors.torch import load_file
from trainers import TINY

from paella_diffusers import PaellaPipeline


@pytest.fixture
def options(pictures, pretrained):
    return [*TINY, "--data", pictures, "--pretrained", pretrained, "--batch-size", "4", "--rank", "2"]


def train(options, folder, *more):
    train_paella_lora.main(train_paella_lora.parse_args([*options, "--output-dir", str(folder), *map(str, more)]))
    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_the_adapter_changes_what_is_drawn(options, tmp_path, pretrained):
    folder = tmp_path / "out"
    adapter = train(options, folder, "--max-steps", 3, "--prompts", "red", "--sample-every", 3)
    assert (folder / "samples" / "00000003.png").exists()
    assert all("lora_" in name for name in adapter) and any(name.endswith("to_k.lora_B.weight") for name in adapter)
    pipe = PaellaPipeline.from_pretrained(pretrained)
    sample = torch.zeros(1, 8, 8, dtype=torch.long)
    before = pipe.unet(sample, 0.5, torch.ones(1, 3, 16)).sample
    pipe.load_lora_weights(folder)
    after = pipe.unet(sample, 0.5, torch.ones(1, 3, 16)).sample
    assert not torch.equal(before, after)
    # checkpoints have the adapter, not what it stands beside
    checkpoint = load_file(folder / "checkpoints" / "00000003" / "model.safetensors")
    assert all("lora_" in name for name in checkpoint)


def test_resumed_it_ends_as_if_not_interrupted(options, tmp_path):
    options += ["--num-workers", "2", "--ema-decay", "0.5"]
    expected = train(options, tmp_path / "whole", "--max-steps", 4)
    train(options, tmp_path / "parts", "--max-steps", 2)
    resumed = train(options, tmp_path / "parts", "--max-steps", 4, "--resume", "latest")
    assert resumed.keys() == expected.keys() and all(torch.equal(resumed[name], expected[name]) for name in resumed)


def test_push_to_hub(options, tmp_path, hub):
    repo = hub.repo("me/out")
    train(options, tmp_path / "out", "--max-steps", 1, "--push-to-hub", "--hub-model-id", "me/out")
    assert (repo / "pytorch_lora_weights.safetensors").exists() and not (repo / "checkpoints").exists()
