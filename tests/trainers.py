"""What the tests of the trainers share: the arguments of a tiny run, and ways to start one."""

import importlib
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--num-workers", "0", "--resolution", "32", "--report-to", "none", "--warmup-steps", "2"]
# what `accelerate launch --config_file examples/configs/fsdp.yaml` puts into the environment
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}

# children of a server that has imported everything start at once
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = [
    "train_paella",
    "train_paella_lora",
    "train_prior",
    "train_vqgan",
    "datasets",
    "webdataset",
    "torchdata",
    "peft",
]
PRELOADED += [f"transformers.models.{name}" for name in ("t5.modeling_t5", "clip.modeling_clip", "byt5.tokenization_byt5")]
PRELOADED += ["torchdata.stateful_dataloader", "transformers.models.clip.image_processing_pil_clip", "torch._dynamo"]
FORKS.set_forkserver_preload(PRELOADED)


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


class Launch:
    """A trainer in processes of its own, as a cluster would start them: `launch("train_paella", options, processes=2)`."""

    def __init__(self, script: str, options: list, processes: int = 1, fsdp: bool = False, **environment):
        self.log = Path(tempfile.mkstemp(prefix="trainer-", suffix=".log")[1])
        environment = {"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"} | environment
        environment |= FSDP if fsdp else {}
        if processes > 1:
            environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        start_server()
        self.processes = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            arguments = (script, [str(option) for option in options], environment | own, str(self.log))
            self.processes.append(FORKS.Process(target=_train, args=arguments))
            self.processes[-1].start()

    def kill(self, rank: int = 0, number: int = signal.SIGKILL):
        os.kill(self.processes[rank].pid, number)

    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def end(self, timeout: float = 300) -> list[int]:
        """The exit codes. When one process fails the others are killed, as `srun --kill-on-bad-exit` does."""
        deadline = time.monotonic() + timeout
        while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            if any(process.exitcode for process in self.processes):
                time.sleep(0.5)  # they may have the same reason
                break
            time.sleep(0.02)
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def finish(self) -> str:
        """What all have printed, once all have succeeded."""
        codes = self.end()
        output = self.log.read_text()
        assert not any(codes), f"{codes}\n{output[-5000:]}"
        return output


def start_server():
    """Start the server with this process's module path, which it would not have by itself."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    multiprocessing.forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if path is not None:
        os.environ["PYTHONPATH"] = path


def _train(script: str, options: list[str], environment: dict, log: str):
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    multiprocessing.set_start_method("fork", force=True)  # data readers are then started as by a trainer of its own
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(script)
    module.main(module.parse_args(options))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
