"""What the tests of the trainers share: the arguments of a tiny run, and ways to start one."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--num-workers", "0", "--resolution", "32", "--report-to", "none", "--warmup-steps", "2"]


def start(script: str, *args, processes: int = 1, config: str = "ddp", **environment) -> subprocess.Popen:
    """A trainer in a process of its own, or in several through `accelerate launch`, on CPUs."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(EXAMPLES / "configs" / f"{config}.yaml")]
        command += ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
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
