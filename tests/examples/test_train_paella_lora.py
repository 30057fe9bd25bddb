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
    # a checkpoint has the adapter as `load_lora_weights` takes it, not what it stands beside
    pipe.unload_lora_weights()
    pipe.load_lora_weights(folder / "checkpoints" / "00000003", subfolder="unet_lora")
    assert torch.equal(pipe.unet(sample, 0.5, torch.ones(1, 3, 16)).sample, after)
    assert not list((folder / "checkpoints").rglob("diffusion_pytorch_model*"))


def test_resumed_it_ends_as_if_not_interrupted(options, tmp_path):
    options += ["--num-workers", "2", "--ema-decay", "0.5"]
    expected = train(options, tmp_path / "whole", "--max-steps", 4)
    train(options, tmp_path / "parts", "--max-steps", 2)
    resumed = train(options, tmp_path / "parts", "--max-steps", 4, "--resume", "latest")
    assert resumed.keys() == expected.keys() and all(torch.equal(resumed[name], expected[name]) for name in resumed)


def test_push_to_hub(options, tmp_path, hub):
    repo = hub.repo("me/out")
    more = ["--push-to-hub", "--hub-model-id", "me/out", "--prompts", "red"]
    train(options, tmp_path / "out", "--max-steps", 1, *more)
    uploaded = {str(path.relative_to(repo)) for path in repo.rglob("*") if path.is_file()} - {".gitattributes"}
    assert uploaded == {"pytorch_lora_weights.safetensors", "README.md", "images/sample-0.png"}
    card = (repo / "README.md").read_text()
    assert "| rank | 2 |" in card and "load_lora_weights" in card and str(tmp_path) not in card


@pytest.mark.parametrize("kind", [["--use-dora"], ["--lora-dropout", "0.5"]])
def test_kinds_of_adapters(options, tmp_path, pretrained, kind):
    adapter = train(options, tmp_path / "out", "--max-steps", 2, *kind)
    assert any("magnitude" in name for name in adapter) == (kind == ["--use-dora"])
    train(options, tmp_path / "out", "--max-steps", 3, "--resume", "latest", *kind)
    PaellaPipeline.from_pretrained(pretrained).load_lora_weights(tmp_path / "out")
