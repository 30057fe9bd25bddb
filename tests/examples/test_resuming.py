"""What may change between a checkpoint and the run that resumes it, and what may be broken."""

import math
from types import SimpleNamespace

import pytest
import torch
import train_paella
import train_paella_lora
from PIL import Image, ImageChops
from safetensors.torch import load_file
from trainers import TINY, Launch

from paella_diffusers.training.checkpoint import choose_checkpoint
from paella_diffusers.training.conditioning import Encoder
from paella_diffusers.training.run import steps_of_epochs


@pytest.fixture
def options(pictures, pretrained):
    return [*TINY, "--data", pictures, "--pretrained", pretrained, "--batch-size", "4"]


def train(options, folder, *more, script=train_paella):
    script.main(script.parse_args([*options, "--output-dir", str(folder), *map(str, more)]))
    file = "unet/diffusion_pytorch_model.safetensors" if script is train_paella else "pytorch_lora_weights.safetensors"
    return load_file(folder / file)


def identical(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def seen(monkeypatch):
    """The captions of the batches that were trained on; pictures have two each, so only their numbers."""
    texts, tokens = [], Encoder.tokens

    def noted(self, batch):
        texts.append([text.split()[-1] for text in batch["text"]])
        return tokens(self, batch)

    monkeypatch.setattr(Encoder, "tokens", noted)
    return texts


def test_another_learning_rate_is_honoured_and_named(options, tmp_path, caplog):
    options += ["--lr-scheduler", "constant"]
    before = train(options, tmp_path / "out", "--max-steps", 2)
    more = ["--max-steps", 4, "--resume", "latest", "--learning-rate", 0]
    assert identical(train(options, tmp_path / "out", *more), before)
    assert "--learning-rate 0.0 (was 0.0001)" in caplog.text and "not bit for bit" not in caplog.text


def test_other_settings_of_the_optimizer_are_honoured(options, tmp_path):
    """The step after resuming is another than it would have been."""
    options += ["--warmup-steps", "0", "--learning-rate", "0.01", "--max-steps", "3", "--ema-decay", "0.2"]
    expected = train(options, tmp_path / "out", "--save-every", 2)
    for change in (("--weight-decay", 0.5), ("--adam-beta2", 0.5), ("--lr-scheduler", "cosine"), ("--ema-decay", 0.1)):
        more = ["--resume", tmp_path / "out" / "checkpoints" / "00000002", *change]
        assert not identical(train(options, tmp_path / change[0], *more), expected), change


def test_another_alpha_of_an_adapter_is_honoured_and_another_rank_refused(options, tmp_path, caplog):
    options, first = [*options, "--rank", "2"], "out/checkpoints/00000001"
    train(options, tmp_path / "out", "--max-steps", 1, script=train_paella_lora)
    more = ["--max-steps", 2, "--resume", "latest"]
    with pytest.raises(ValueError, match="was saved with --rank 2, but now it is 3: its states do not fit. Give the same"):
        train(options, tmp_path / "out", *more, "--rank", 3, script=train_paella_lora)
    expected = train(options, tmp_path / "same", *more[:2], "--resume", tmp_path / first, script=train_paella_lora)
    found = train(options, tmp_path / "out", *more, "--alpha", 8, script=train_paella_lora)
    assert "--alpha 8.0 (was None)" in caplog.text and not identical(found, expected)


def test_averages_may_be_added(options, tmp_path):
    train(options, tmp_path / "out", "--max-steps", 2)
    averages = train(options, tmp_path / "out", "--max-steps", 5, "--resume", "latest", "--ema-decay", 0.9)
    current = load_file(tmp_path / "out/checkpoints/00000005/unet/diffusion_pytorch_model.safetensors")
    assert not identical(averages, current)
    assert all((averages[name] - current[name]).abs().max() < 0.01 for name in current)  # they began with the checkpoint


def test_batches_may_be_skipped(options, tmp_path, seen):
    train(options, tmp_path / "whole", "--max-steps", 5, "--save-every", 2, "--keep", 3)
    whole, middle = seen.copy(), tmp_path / "whole" / "checkpoints" / "00000002"
    seen.clear()
    train(options, tmp_path / "parts", "--max-steps", 4, "--resume", middle, "--skip-batches", 1)
    assert seen == whole[3:]
    with pytest.raises(ValueError, match="--skip-batches leaves out batches after a checkpoint: add --resume latest"):
        train(options, tmp_path / "new", "--skip-batches", 1)


def test_the_error_for_a_loss_that_is_not_finite_says_how_to_pass_over_it(options, tmp_path, monkeypatch):
    clean = train_paella.train_unet.__globals__["paella_loss"]
    calls = []

    def poisoned(*args):
        calls.append(1)
        return clean(*args) * (math.nan if len(calls) == 7 else 1)

    monkeypatch.setitem(train_paella.train_unet.__globals__, "paella_loss", poisoned)
    options += ["--gradient-accumulation-steps", "2", "--max-steps", "8", "--save-every", "2", "--log-every", "1"]
    with pytest.raises(FloatingPointError, match="At step 4 the loss is nan.*/00000002 with .*--skip-batches 4"):
        train(options, tmp_path / "out")
    train(options, tmp_path / "out", "--resume", "latest", "--skip-batches", 4)


def test_with_another_batch_size_or_other_readers_the_data_go_on_after_the_same_share(options, tmp_path, seen, caplog):
    train(options, tmp_path / "out", "--max-steps", 2)
    first = [number for batch in seen for number in batch]
    for change in (["--batch-size", "2"], ["--num-workers", "1"], ["--seed", "1"]):
        seen.clear(), caplog.clear()
        size = int(dict([change]).get("--batch-size", 4))
        more = ["--max-steps", 2 + 12 // size, "--resume", tmp_path / "out" / "checkpoints" / "00000002"]
        train(options, tmp_path / change[0], *more, *change)
        assert "after the same number of epochs, in another order: not bit for bit" in caplog.text
        rest = [number for batch in seen for number in batch]
        if change[0] != "--seed":  # which gives another order
            assert sorted(map(int, first + rest)) == list(range(20))
        assert len(rest) == 12


def test_epochs_go_on_after_the_same_share_with_another_batch_size(options, tmp_path, caplog):
    """Two epochs of 20 pictures: 0.8 of them in batches of 4, the rest in batches of 8."""
    options += ["--num-train-epochs", "2", "--save-every", "2", "--keep", "9"]
    newest = lambda name: max(path.name for path in (tmp_path / name / "checkpoints").iterdir())
    train(options, tmp_path / "whole")
    assert newest("whole") == "00000010"
    middle = tmp_path / "whole" / "checkpoints" / "00000004"
    train(options, tmp_path / "larger", "--batch-size", 8, "--resume", middle)
    assert newest("larger") == "00000007"  # and 1.2 × 20 / 8 more
    # resumed again as it is
    again = tmp_path / "larger" / "checkpoints" / "00000006"
    caplog.clear()
    train(options, tmp_path / "again", "--batch-size", 8, "--resume", again)
    assert newest("again") == "00000007" and "Resuming from" not in caplog.text  # nothing has changed


def test_the_steps_of_epochs():
    def steps(epochs, batch_size, processes, resumed=None):
        args = SimpleNamespace(num_train_epochs=epochs, batch_size=batch_size, gradient_accumulation_steps=1)
        return steps_of_epochs(args, processes, 800, resumed)

    assert (steps(2, 4, 1), steps(2, 4, 4), steps(1, 3, 1)) == (400, 100, 267)
    saved = {"step": 150, "totals": {"epochs": 0.75}, "settings": {"num_train_epochs": 2, "max_steps": 400}, "changed": {}}
    assert steps(2, 4, 1, saved) == 400
    assert steps(3, 4, 1, saved) == 600
    assert steps(2, 4, 4, saved | {"changed": {"processes": 1}}) == 150 + 63
    assert steps(2, 1, 1, saved | {"changed": {"batch_size": 4}}) == 150 + 1000
    assert steps(2, 4, 4, saved | {"changed": {"processes": 1}, "totals": {"epochs": 2.5}}) == 150


def test_with_other_processes_sharded_or_not(options, tmp_path):
    """FSDP trains to the weights of DDP, and each resumes the other's checkpoints, as one process does."""
    options += ["--batch-size", "2", "--ema-decay", "0.9", "--log-every", "1", "--clip-image-dropout", "0.5"]
    options += ["--save-every", "2", "--keep", "3", "--prompts", "red", "--sample-every", "4"]
    checkpoint = lambda name, step: tmp_path / name / "checkpoints" / f"{step:08d}"
    Launch("train_paella", [*options, "--output-dir", tmp_path / "ddp", "--max-steps", 6], 2).finish()
    more = ["--output-dir", tmp_path / "fsdp", "--max-steps", 4, "--resume", checkpoint("ddp", 2)]
    Launch("train_paella", [*options, *more], 2, fsdp=True).finish()
    sheets = [Image.open(tmp_path / name / "samples" / "00000004.png") for name in ("ddp", "fsdp")]
    assert ImageChops.difference(*sheets).getbbox() is None
    more = ["--output-dir", tmp_path / "again", "--max-steps", 6, "--resume", checkpoint("fsdp", 4)]
    Launch("train_paella", [*options, *more], 2).finish()
    for name, step in (("fsdp", 4), ("again", 6)):
        for model in ("unet", "unet_ema"):
            file = f"{model}/diffusion_pytorch_model.safetensors"
            expected, found = load_file(checkpoint("ddp", step) / file), load_file(checkpoint(name, step) / file)
            assert max((expected[key] - found[key]).abs().max() for key in expected) < 1e-5
    train(options, tmp_path / "fsdp", "--max-steps", 5, "--resume", "latest")  # one process


def test_a_damaged_checkpoint_is_passed_over(options, tmp_path, caplog):
    expected = train(options, tmp_path / "out", "--max-steps", 4, "--save-every", 2)
    newest = tmp_path / "out" / "checkpoints" / "00000004"
    for file in ("unet/diffusion_pytorch_model.safetensors", "optimizer-unet.pt", "process-0.pt", "state.pt"):
        caplog.clear()
        whole = (newest / file).read_bytes()
        (newest / file).write_bytes(whole[: len(whole) // 2])
        assert choose_checkpoint("latest", newest.parent) == newest.with_name("00000002")
        assert f"{newest / file} has {len(whole) // 2} bytes, but was written with {len(whole)}" in caplog.text
        assert f"Resuming from the one before, {newest.with_name('00000002')}" in caplog.text
        if file != "state.pt":
            (newest / file).write_bytes(whole)
    assert identical(train(options, tmp_path / "out", "--max-steps", 4, "--resume", "latest"), expected)


def test_damage_that_keeps_the_size_is_found_and_without_a_whole_checkpoint_there_is_an_error(options, tmp_path):
    train(options, tmp_path / "out", "--max-steps", 1)
    path = tmp_path / "out" / "checkpoints" / "00000001" / "optimizer-unet.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="No checkpoint of .* is whole: .*optimizer-unet.pt .*its checksum differs"):
        train(options, tmp_path / "out", "--max-steps", 2, "--resume", "latest")
