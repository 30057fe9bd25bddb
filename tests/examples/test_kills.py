"""
Runs that are killed at stated moments, resumed, and compared with one that was not: bit for bit.

Here four scripts and each way of training are killed once, in as few steps as that takes. `make test-kills` kills all
scripts in all ways at all moments, one after the other. The others' own tests resume them, too.
"""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainers import MOMENTS, TINY, Launch

WAYS = {"one": {}, "ddp": {"processes": 2}, "fsdp": {"processes": 2, "fsdp": True}}
SIZES = ["--config", '{"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 32}']
DREAMBOOTH = ["--instance-prompt", "a qxz", "--class-prompt", "red", "--num-class-images", "3", "--sample-batch-size", "2"]
OPTIONS = {
    "train_dreambooth": [*DREAMBOOTH, "--with-prior-preservation", "--rank", "2", "--ema-decay", "0.9"],
    "train_paella": ["--clip-image-dropout", "0.5", "--ema-decay", "0.9"],
    "train_paella_lora": [
        "--rank",
        "2",
        "--train-text-encoder",
        "--lora-dropout",
        "0.1",
        "--clip-image-dropout",
        "0.5",
        "--ema-decay",
        "0.9",
    ],
    "train_paella_few_steps": ["--rank", "2", "--ema-decay", "0.9"],
    "train_prior": ["--ema-start", "3"],
    "train_textual_inversion": ["--placeholder-token", "<x>", "--initializer-token", "red", "--ema-decay", "0.9"],
    "train_vqgan": [*SIZES, "--adversarial-start", "3", "--restart-every", "4", "--ema-decay", "0.9"],
}
# the process that is killed, and the newest checkpoint that it leaves
KILLS = {
    "before the first checkpoint": (-1, None),
    "while a checkpoint is written": (0, None),
    "after the first checkpoint": (-1, "00000002"),
    "before a checkpoint has its name": (0, "00000002"),
    "while an older one is deleted": (0, "00000006"),
}
FEW = [
    ("train_paella", "fsdp", ["before a checkpoint has its name"], 4),
    ("train_paella_lora", "one", ["while a checkpoint is written"], 3),
    ("train_prior", "one", ["while an older one is deleted"], 7),
    ("train_vqgan", "ddp", ["after the first checkpoint"], 4),
]
ALL = [(script, way, list(MOMENTS), 8) for script in OPTIONS for way in WAYS]


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """All that was published, and the checkpoint at the end: weights, averages and optimizer."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        if "checkpoints" not in path.parts:
            found |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
    newest = max(folder.glob("checkpoints/[0-9]*"))
    for path in newest.rglob("*.safetensors"):
        found |= {f"{path.relative_to(newest)} {name}": tensor for name, tensor in load_file(path).items()}
    for path in newest.glob("optimizer-*.pt"):
        for name, state in torch.load(path, weights_only=True).items():
            found |= {f"{path.name} {name} {key}": value for key, value in state.items()}
    return found


@pytest.mark.parametrize(
    "script, way, moments, steps",
    [pytest.param(*case, id="-".join(case[:2])) for case in FEW]
    + [pytest.param(*case, id="-".join(case[:2]) + "-all", marks=pytest.mark.kills) for case in ALL],
)
def test_killed_and_resumed_it_ends_as_if_it_had_not_been(script, way, moments, steps, request, pretrained, tmp_path):
    data = request.getfixturevalue("pairs" if script == "train_paella_few_steps" else "pictures")
    options = [*TINY, "--data", data, "--batch-size", "2", *OPTIONS[script], "--max-steps", steps, "--save-every", 2]
    options += [] if script == "train_vqgan" else ["--pretrained", pretrained]
    options += ["--class-data-dir", tmp_path / "class"] if script == "train_dreambooth" else []
    folder, processes = tmp_path / "killed", WAYS[way].get("processes", 1)
    with Launch(script, [*options, "--output-dir", tmp_path / "whole"], **WAYS[way]) as whole:
        options += ["--output-dir", folder, "--resume", "latest"]
        for moment in moments:
            rank, newest = KILLS[moment][0] % processes, KILLS[moment][1]
            with Launch(script, options, **WAYS[way], killed_at=(rank, moment)) as run:
                assert run.end()[rank] == -signal.SIGKILL, run.log.read_text()[-5000:]
            assert max((path.name for path in folder.glob("checkpoints/[0-9]*")), default=None) == newest
        Launch(script, options, **WAYS[way]).finish()
        whole.finish()
    expected, found = contents(tmp_path / "whole"), contents(folder)
    assert expected.keys() == found.keys() and len(expected) > 10
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert not list(folder.glob("checkpoints/.*")) and not (folder / "run.lock").exists()
