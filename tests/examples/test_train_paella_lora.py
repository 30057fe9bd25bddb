import pytest
import torch
import train_paella_lora
from PIL import Image
from safetensors.torch import load_file
from trainers import TINY

from paella_diffusers import PaellaPipeline

MORE = ["--max-steps", 4, "--save-every", 2]


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
    expected = train(options, tmp_path / "whole", *MORE)
    resumed = train(options, tmp_path / "parts", *MORE, "--resume", tmp_path / "whole" / "checkpoints" / "00000002")
    assert resumed.keys() == expected.keys() and all(torch.equal(resumed[name], expected[name]) for name in resumed)


def test_push_to_hub(options, tmp_path, hub):
    repo = hub.repo("me/out")
    more = ["--push-to-hub", "--hub-model-id", "me/out", "--prompts", "red"]
    train(options, tmp_path / "out", "--max-steps", 1, *more)
    uploaded = {str(path.relative_to(repo)) for path in repo.rglob("*") if path.is_file()} - {".gitattributes"}
    assert uploaded == {"pytorch_lora_weights.safetensors", "README.md", "images/sample-0.png"}
    card = (repo / "README.md").read_text()
    assert "| rank | 2 |" in card and "load_lora_weights" in card and str(tmp_path) not in card


TEXT = ["--train_text_encoder", "--clip-text-dropout", "0.3", "--ema-decay", "0.5"]


@pytest.mark.parametrize("kind", [["--use-dora"], ["--lora_dropout", "0.5"], TEXT, ["--optimizer", "Prodigy"]])
def test_kinds_of_adapters_resumed_end_as_if_not_interrupted(options, tmp_path, pretrained, kind):
    expected = train([*options, *kind], tmp_path / "whole", *MORE)
    assert any("magnitude" in name for name in expected) == (kind == ["--use-dora"])
    components = {"unet", "text_encoder", "text_encoder_2"} if kind == TEXT else {"unet"}
    assert {name.partition(".")[0] for name in expected} == components
    changed = {name.partition(".")[0] for name, weight in expected.items() if "lora_B" in name and weight.any()}
    assert changed == components  # which begin as zeros
    middle = tmp_path / "whole" / "checkpoints" / "00000002"
    found = train([*options, *kind], tmp_path / "parts", *MORE, "--resume", middle)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    PaellaPipeline.from_pretrained(pretrained).load_lora_weights(tmp_path / "parts")


def test_dropout_is_honoured(options, tmp_path):
    without = train(options, tmp_path / "without", "--max-steps", 2)
    dropped = train(options, tmp_path / "with", "--max-steps", 2, "--lora_dropout", "0.5")
    assert any(not torch.equal(without[name], dropped[name]) for name in without)


def test_sheets_are_drawn_with_the_trained_text_encoders(options, tmp_path, pretrained):
    more = ["--max-steps", 2, "--prompts", "red", "--learning-rate", 0.1, "--lr-scheduler", "constant"]
    train([*options, *TEXT], tmp_path / "out", *more)
    pipe = PaellaPipeline.from_pretrained(pretrained)
    pipe.load_lora_weights(tmp_path / "out")
    image = pipe("red", height=32, width=32, generator=torch.Generator().manual_seed(0)).images[0]
    assert Image.open(tmp_path / "out" / "samples" / "00000002.png").tobytes() == image.tobytes()


def test_prodigy_takes_steps_of_its_own_size(options, tmp_path, monkeypatch):
    parse = lambda *more: train_paella_lora.parse_args([*options, "--output-dir", "out", *more])
    assert parse("--optimizer", "prodigy").learning_rate == 1.0
    assert parse("--optimizer", "prodigy", "--learning_rate=0.5").learning_rate == 0.5
    train(options, tmp_path / "out", "--max-steps", 1)
    with pytest.raises(ValueError, match="was saved with --optimizer adamw, but now it is prodigy"):
        train(options, tmp_path / "out", "--max-steps", 2, "--resume", "latest", "--optimizer", "prodigy")
    with pytest.raises(ValueError, match="--adam-8bit is of AdamW: leave it out with --optimizer prodigy"):
        train(options, tmp_path / "new", "--optimizer", "prodigy", "--adam-8bit")
    monkeypatch.setattr("paella_diffusers.training.arguments.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"--optimizer prodigy needs prodigyopt: pip install .*train"):
        train(options, tmp_path / "new", "--optimizer", "prodigy")
