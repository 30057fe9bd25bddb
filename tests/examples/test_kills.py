"""
Runs that are killed at a random moment, resumed, and compared with one that was not: bit for bit.

Here every script is killed once with two processes, and one in all ways; `make test-kills` kills each five times in all.
"""

import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainers import TINY, Launch

KILLS = int(os.environ.get("PAELLA_KILLS", 0))
STEPS = 16 + 16 * KILLS
WAYS = {"one": {}, "ddp": {"processes": 2}, "fsdp": {"processes": 2, "fsdp": True}}
SIZES = ["--config", '{"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 32}']
OPTIONS = {
    "train_paella": ["--clip-image-dropout", "0.5", "--ema-decay", "0.9"],
    "train_paella_lora": ["--rank", "2", "--clip-image-dropout", "0.5", "--ema-decay", "0.9"],
    "train_prior": ["--ema-start", "3"],
    "train_vqgan": [*SIZES, "--adversarial-start", "3", "--restart-every", "4", "--ema-decay", "0.9"],
}

CASES = [(script, way) for script in OPTIONS for way in WAYS if KILLS or way == "ddp" or script == "train_paella"]


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


@pytest.mark.parametrize("script, way", CASES)
def test_killed_and_resumed_it_ends_as_if_it_had_not_been(script, way, pictures, pretrained, tmp_path):
    options = [*TINY, "--data", pictures, "--batch-size", "2", *OPTIONS[script]]
    options += [] if script == "train_vqgan" else ["--pretrained", pretrained]
    options += ["--max-steps", STEPS, "--save-every", 4]
    whole = Launch(script, [*options, "--output-dir", tmp_path / "whole"], **WAYS[way])
    folder, rng = tmp_path / "killed", random.Random(time.time())
    newest = lambda: max((path.name for path in folder.glob("checkpoints/[0-9]*[0-9]")), default="")
    for _ in range(max(KILLS, 1)):
        run, before = Launch(script, [*options, "--output-dir", folder, "--resume", "latest"], **WAYS[way]), newest()
        while newest() == before and run.is_alive():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        assert run.is_alive(), run.log.read_text()[-5000:]
        run.kill(rng.randrange(len(run.processes)))
        assert any(run.end())
        assert newest() < f"{STEPS:08d}"
    Launch(script, [*options, "--output-dir", folder, "--resume", "latest"], **WAYS[way]).finish()
    whole.finish()
    expected, found = contents(tmp_path / "whole"), contents(folder)
    assert expected.keys() == found.keys() and len(expected) > 10
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert not list(folder.glob("checkpoints/.*")) and not (folder / "run.lock").exists()
