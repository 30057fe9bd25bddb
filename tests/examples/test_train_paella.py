import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import train_paella
from PIL import Image
from safetensors.torch import load_file
from trainers import TINY, Launch

from paella_diffusers import PaellaPipeline, PaellaUNet


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def identical(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def options(pictures, pretrained):
    return [*TINY, "--data", pictures, "--pretrained", pretrained, "--batch-size", "4"]


def train(options, folder, *more):
    train_paella.main(train_paella.parse_args([*options, "--output-dir", str(folder), *map(str, more)]))
    return weights(folder)


def test_it_trains_samples_and_publishes(options, tmp_path, pretrained):
    before = PaellaUNet.from_pretrained(pretrained, subfolder="unet").state_dict()
    folder = tmp_path / "out"
    after = train(
        options, folder, "--max-steps", 4, "--sample-every", 2, "--save-every", 1, "--prompts", "red", "blue",
        "--report-to", "tensorboard", "--log-every", 1, "--ema-decay", 0.5,
    )  # fmt: skip
    assert not identical(before, after)
    assert Image.open(folder / "samples" / "00000004.png").size == (64, 32)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["00000003", "00000004"]  # --keep 2
    assert list((folder / "logs").rglob("events*"))
    pipe = PaellaPipeline.from_pretrained(folder)
    assert pipe("red", num_inference_steps=2).images[0].size == (32, 32)
    # published are the averaged weights; a checkpoint has both, as models to be loaded
    checkpoint = folder / "checkpoints" / "00000004"
    load = lambda name: PaellaUNet.from_pretrained(checkpoint, subfolder=name).state_dict()
    assert identical(load("unet_ema"), after) and not identical(load("unet"), after)


def test_the_command_of_diffusers_readme(pictures, pretrained, tmp_path):
    """That of its `train_text_to_image.py`, with another model and in small."""
    command = f"""--pretrained_model_name_or_path={pretrained} --train_data_dir={pictures}
        --use_ema --resolution=32 --center_crop --random_flip --train_batch_size=1 --gradient_accumulation_steps=4
        --gradient_checkpointing --max_train_steps=1 --learning_rate=1e-05 --max_grad_norm=1
        --lr_scheduler=constant --lr_warmup_steps=0 --output_dir={tmp_path / "out"}"""
    train_paella.main(train_paella.parse_args(command.split()))
    before = PaellaUNet.from_pretrained(pretrained, subfolder="unet").state_dict()
    assert weights(tmp_path / "out").keys() == before.keys() and not identical(weights(tmp_path / "out"), before)


def test_a_new_model_does_not_read_the_weights_that_it_replaces(options, tmp_path, pretrained):
    (Path(pretrained) / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    train(options, tmp_path / "out", "--max-steps", 1, "--from-scratch")
    assert (tmp_path / "out" / "model_index.json").exists()


def test_sheets_are_what_the_published_model_draws(options, tmp_path):
    """At the resolution of training, with the prior, and with the model's own guidance."""
    more = ["--max-steps", 1, "--prompts", "red", "--resolution", 48, "--seed", 3]
    train(options, tmp_path / "out", *more)
    pipe = PaellaPipeline.from_pretrained(tmp_path / "out")
    expected = pipe("red", height=48, width=48, generator=torch.Generator().manual_seed(3)).images[0]
    sheet = Image.open(tmp_path / "out" / "samples" / "00000001.png")
    assert sheet.size == (48, 48) and sheet.tobytes() == expected.tobytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "“red”, seed 3" in card and (tmp_path / "out" / "images" / "sample-0.png").exists()


def test_a_sheet_that_was_not_drawn_is_drawn_on_resuming(options, tmp_path):
    """By a run that was killed between its last checkpoint and its result."""
    folder, options = tmp_path / "out", [*options, "--max-steps", "1", "--prompts", "red"]
    train(options, folder)
    expected = (folder / "samples" / "00000001.png").read_bytes()
    for path in (folder / "samples" / "00000001.png", folder / "README.md", folder / "images" / "sample-0.png"):
        path.unlink()
    train(options, folder, "--resume", "latest")
    assert (folder / "samples" / "00000001.png").read_bytes() == expected
    assert "“red”, seed 0" in (folder / "README.md").read_text("utf-8") and (folder / "images" / "sample-0.png").exists()


def test_the_card_tells_the_base_the_data_and_the_command_but_no_folders(options, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/someone/examples/train_paella.py"])
    train([*options, "--hub_token=secret"], tmp_path / "out", "--max-steps", 1, "--learning_rate", 0.01)
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("| base | pretrained |", "| data | pictures |", "| learning rate | 0.01 |", "| batch size | 4 |"):
        assert line in card
    assert "train_paella.py" in card and "--learning_rate 0.01" in card
    assert str(tmp_path) not in card and "secret" not in card and "someone" not in card
    assert "secret" not in (tmp_path / "out" / "training_args.json").read_text()


def test_unreadable_samples_are_said_at_the_end(options, tmp_path, pictures, caplog):
    for index in range(2, 20):
        (Path(pictures) / f"{index}.png").write_bytes(b"no picture")
    train(options, tmp_path / "out", "--max-steps", 1)
    assert re.search(r"\d+ samples could not be read, beside 4 that were used", caplog.text)


def test_no_other_run_begins_before_the_result_is_written(options, tmp_path, monkeypatch):
    locks, save = [], PaellaPipeline.save_pretrained

    def save_pretrained(pipe, folder, **kwargs):
        locks.append((Path(folder) / "run.lock").exists())
        save(pipe, folder, **kwargs)

    monkeypatch.setattr(PaellaPipeline, "save_pretrained", save_pretrained)
    train(options, tmp_path / "out", "--max-steps", 1)
    assert locks == [True] and not (tmp_path / "out" / "run.lock").exists()


def test_two_runs_in_one_folder(options, tmp_path):
    """Also if the first one's launcher was killed and its processes were not."""
    with Launch("train_paella", [*options, "--output-dir", tmp_path / "out", "--max-steps", 10_000]) as run:
        run.wait_until((tmp_path / "out" / "run.lock").exists)
        with pytest.raises(RuntimeError, match=f"Process {run.processes[0].pid} on .* is training in .*: end it first"):
            train(options, tmp_path / "out", "--max-steps", 1)
        run.kill()
        run.end()
    train(options, tmp_path / "out", "--max-steps", 1)


@pytest.mark.parametrize("processes, number", [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_signal_makes_it_save_and_end(options, tmp_path, processes, number):
    options = [*options, "--output-dir", tmp_path / "out", "--num-workers", 1, "--log-every", 1, "--save-every", 10_000]
    with Launch("train_paella", [*options, "--max-steps", 10_000], processes) as run:
        run.wait_until(lambda: "1/10000" in run.log.read_text())
        run.kill(processes - 1, number)
        run.processes[0].join(60)
        codes = [process.exitcode for process in run.processes if not process.join(60)]
        assert codes == [75] * processes, run.log.read_text()
        saved = [int(path.name) for path in (tmp_path / "out" / "checkpoints").iterdir()]
        assert len(saved) == 1 and not (tmp_path / "out" / "run.lock").exists()
        assert f"Stopped by a signal at step {saved[0]}" in run.log.read_text()
    train(options, tmp_path / "out", "--max-steps", saved[0] + 1, "--resume", "latest", "--batch-size", 4 * processes)


def test_from_scratch_with_other_sizes(options, tmp_path):
    config = '{"layers_per_block": [1, 1], "dropout": 0.0}'
    train(options, tmp_path / "out", "--max-steps", 1, "--from-scratch", "--unet-config", config)
    unet = PaellaUNet.from_pretrained(tmp_path / "out", subfolder="unet")
    assert list(unet.config.layers_per_block) == [1, 1]


def test_a_run_resumed_from_an_earlier_checkpoint_leaves_the_later_ones(options, tmp_path):
    folder = tmp_path / "out"
    expected = train(options, folder, "--max-steps", 6, "--save-every", 2, "--keep", 5)
    names = lambda: sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names() == ["00000002", "00000004", "00000006"]
    earlier = folder / "checkpoints" / "00000002"
    again = train(options, folder, "--max-steps", 6, "--save-every", 3, "--keep", 2, "--resume", earlier)
    assert names() == ["00000003", "00000006"] and identical(again, expected)


def test_two_processes_train_as_one_with_twice_the_batch(options, tmp_path, pretrained):
    unet = PaellaUNet.from_pretrained(pretrained, subfolder="unet")  # without dropout, which is each process's own
    PaellaUNet.from_config({**unet.config, "dropout": 0.0}).save_config(f"{pretrained}/unet")
    options = [*options, "--max-steps", "8", "--log-every", "1", "--clip-image-dropout", "0.5", "--num-workers", "2"]
    expected = train(options, tmp_path / "one")
    halves = [*options, "--batch-size", "2", "--output-dir", tmp_path / "two"]
    Launch("train_paella", halves, processes=2).finish()
    for name, weight in weights(tmp_path / "two").items():
        # but for sums in another order; a key's bias, whose true gradient is zero, goes where rounding and AdamW take it
        tolerance = 1e-4 if name.endswith("to_k.bias") else 1e-6
        torch.testing.assert_close(weight, expected[name], atol=tolerance, rtol=0, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_a_node_downloads_the_pretrained_parts_once(options, hub, pretrained, tmp_path):
    """Its second process finds all files in the cache, as it waits for the first."""
    shutil.copytree(pretrained, hub.root / "me" / "shared-by-a-node")
    options = [*options, "--pretrained", "me/shared-by-a-node", "--max-steps", 1, "--output-dir", tmp_path / "out"]
    output = Launch("train_paella", options, processes=2).finish()
    assert "set_vital" not in output  # a warning of torchdata's own
    assert len(hub.agents) > 10 and all("process-0" in agent for agent in hub.agents), hub.agents


def test_clear_errors(options, tmp_path):
    train(options, tmp_path / "out", "--max-steps", 1)
    with pytest.raises(ValueError, match="has another run's checkpoints: resume it with `--resume latest`"):
        train(options, tmp_path / "out", "--max-steps", 1)
    with pytest.raises(FileNotFoundError, match="--resume nowhere is no checkpoint; there are"):
        train(options, tmp_path / "out", "--max-steps", 1, "--resume", "nowhere")
    scratch = ["--from-scratch", "--unet-config", '{"layers_per_block": [1, 1]}']
    with pytest.raises(ValueError, match=r"is of another model: \['down_blocks"):
        train(options, tmp_path / "out", "--max-steps", 2, "--resume", "latest", *scratch)
    with pytest.raises(ValueError, match="--resolution must be divisible by 16, for VQGAN and U-Net, got 40"):
        train(options, tmp_path / "new", "--resolution", 40)
    with pytest.raises(SystemExit):
        train(options, tmp_path / "new", *scratch[1:])
    with pytest.raises(ValueError, match="--batch-size must be at least 1, got 0"):
        train(options, tmp_path / "new", "--batch-size", 0)
    with pytest.raises(FloatingPointError, match="the loss is nan and the gradient norm is nan. Resume"):
        train(options, tmp_path / "far", "--max-steps", 30, "--learning-rate", 1e30, "--log-every", 1, "--warmup-steps", 0)
