import shutil
import time

import pytest
import torch
import train_paella
from PIL import Image
from safetensors.torch import load_file
from trainers import TINY, finish, start

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
    # published are the averaged weights, checkpointed the others
    current = load_file(folder / "checkpoints" / "00000004" / "model.safetensors")
    assert not identical(current, after)


def test_from_scratch_with_other_sizes(options, tmp_path):
    config = '{"layers_per_block": [1, 1], "dropout": 0.0}'
    train(options, tmp_path / "out", "--max-steps", 1, "--from-scratch", "--unet-config", config)
    unet = PaellaUNet.from_pretrained(tmp_path / "out", subfolder="unet")
    assert list(unet.config.layers_per_block) == [1, 1]


def test_killed_and_resumed_it_ends_as_if_it_had_not_been(options, tmp_path):
    options += ["--ema-decay", "0.9", "--max-steps", "150", "--save-every", "5"]
    expected = train(options, tmp_path / "whole")
    folder = tmp_path / "killed"
    for delay in (0.0, 0.05, 0.2):  # after a checkpoint was named complete; far shorter than what is left of the run
        process = start("train_paella.py", *options, "--output-dir", folder, "--resume", "latest")
        newest = lambda: max((path.name for path in folder.glob("checkpoints/[0-9]*[0-9]")), default="")
        before = newest()
        while newest() == before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(delay)
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        process.communicate()
        assert newest() < "00000150"
    finish(start("train_paella.py", *options, "--output-dir", folder, "--resume", "latest"))
    assert identical(weights(folder), expected)
    assert not list(folder.glob("checkpoints/*.tmp"))


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
    options = [*options, "--max-steps", "20", "--log-every", "1", "--clip-image-dropout", "0.5", "--num-workers", "2"]
    expected = train(options, tmp_path / "one")
    halves = [*options, "--batch-size", "2", "--output-dir", tmp_path / "two"]
    finish(start("train_paella.py", *halves, processes=2))
    for name, weight in weights(tmp_path / "two").items():
        # but for sums in another order; a key's bias, whose true gradient is zero, goes where rounding and AdamW take it
        tolerance = 1e-4 if name.endswith("to_k.bias") else 1e-6
        torch.testing.assert_close(weight, expected[name], atol=tolerance, rtol=0, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_two_processes_resume(options, tmp_path):
    """As if they had not been interrupted."""
    options = [*options, "--save-every", "2", "--clip-image-dropout", "0.5"]
    finish(start("train_paella.py", *options, "--output-dir", tmp_path / "whole", "--max-steps", 4, processes=2))
    resumed = [*options, "--output-dir", tmp_path / "resumed"]
    finish(start("train_paella.py", *resumed, "--max-steps", 2, processes=2))
    finish(start("train_paella.py", *resumed, "--max-steps", 4, "--resume", "latest", processes=2))
    assert identical(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))


def test_fsdp(options, tmp_path):
    """Two processes with half of each weight; checkpoints are continued, and what is published is whole."""
    folder = tmp_path / "out"
    options = [*options, "--output-dir", folder, "--save-every", 2, "--log-every", 1]
    finish(start("train_paella.py", *options, "--max-steps", 3, processes=2, config="fsdp"))
    shutil.rmtree(folder / "unet")
    finish(start("train_paella.py", *options, "--max-steps", 6, "--resume", "latest", processes=2, config="fsdp"))
    sharded = weights(folder)
    assert PaellaPipeline.from_pretrained(folder)("red", num_inference_steps=2).images[0].size == (32, 32)
    assert all(weight.isfinite().all() for weight in sharded.values())


def test_clear_errors(options, tmp_path):
    train(options, tmp_path / "out", "--max-steps", 1)
    with pytest.raises(ValueError, match="has the checkpoints of another run: go on with `--resume latest`"):
        train(options, tmp_path / "out", "--max-steps", 1)
    with pytest.raises(FileNotFoundError, match="--resume nowhere is no checkpoint; there are"):
        train(options, tmp_path / "out", "--max-steps", 1, "--resume", "nowhere")
    with pytest.raises(ValueError, match="was saved with --batch-size 4, but now it is 2: take the same"):
        train(options, tmp_path / "out", "--max-steps", 2, "--resume", "latest", "--batch-size", 2)
    scratch = ["--from-scratch", "--unet-config", '{"layers_per_block": [1, 1]}']
    with pytest.raises(ValueError, match=r"is of another model: \['down_blocks"):
        train(options, tmp_path / "out", "--max-steps", 2, "--resume", "latest", *scratch)
    with pytest.raises(ValueError, match="--resolution must be divisible by 16, for VQGAN and U-Net, got 40"):
        train(options, tmp_path / "new", "--resolution", 40)
    with pytest.raises(SystemExit):
        train(options, tmp_path / "new", *scratch[1:])
    with pytest.raises(ValueError, match="--batch-size must be at least 1, got 0"):
        train(options, tmp_path / "new", "--batch-size", 0)
    with pytest.raises(FloatingPointError, match="the loss is nan and the gradient norm is nan: lower"):
        train(options, tmp_path / "far", "--max-steps", 30, "--learning-rate", 1e30, "--log-every", 1, "--warmup-steps", 0)
