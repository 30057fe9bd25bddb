"""What the tests of the trainers share: tiny pictures, a tiny pipeline, and ways to start a trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_pipeline
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
TINY = ["--num-workers", "0", "--resolution", "32", "--report-to", "none", "--warmup-steps", "2"]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for index in range(20):
        Image.new("RGB", (36, 32), (index * 12, 100, 200 - index * 10)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": [f"colour {index}", f"no. {index}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture
def pretrained(tmp_path):
    """A tiny pipeline's folder. Dropout is on: its random numbers must be continued, too."""
    tiny_pipeline().save_pretrained(tmp_path / "pretrained")
    return str(tmp_path / "pretrained")


def start(script: str, *args, processes: int = 1, **environment) -> subprocess.Popen:
    """A trainer in a process of its own, or in several through `accelerate launch`, on CPUs."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [*command, str(script if "/" in str(script) else EXAMPLES / script), *map(str, args)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-5000:]
    return output
