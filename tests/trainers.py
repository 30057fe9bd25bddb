"""What the tests of the trainers share: the arguments of a tiny run, and ways to start one."""

import contextlib
import faulthandler
import importlib
import multiprocessing.connection
import multiprocessing.forkserver
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--num-workers", "0", "--resolution", "32", "--report-to", "none", "--warmup-steps", "2"]
TIMEOUT = 900  # seconds after which a run counts as hanging
# When a process is killed, in a run that saves every second step and keeps two checkpoints: before a pass of the training
# loop, or before a file operation (one of Python's audit events, with a pattern of its arguments).
MOMENTS = {
    "before the first checkpoint": ("pass", 1),
    "while a checkpoint is written": ("open", r"-unfinished-.*/files\.json"),
    "after the first checkpoint": ("pass", 3),
    "before a checkpoint has its name": ("os.rename", r"checkpoints/0*4$"),
    "while an older one is deleted": ("shutil.rmtree", r"checkpoints/\.0*2-unfinished-"),
}
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
    "train_dreambooth",
    "train_emoji",
    "train_paella",
    "train_paella_lora",
    "train_prior",
    "train_textual_inversion",
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
    """A trainer in a process of its own, or in several through `accelerate launch`, on CPUs. To be ended with `finish`."""
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
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    """What it has printed, once it has succeeded. In any case nothing that it started is left."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        kill_group(process.pid)
        process.wait()
    assert process.returncode == 0, output[-5000:]
    return output


def kill_group(leader: int):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


class Launch:
    """
    A trainer in processes of its own, as a cluster would start them. Leaving the context kills what is left of them:

        with Launch("train_paella", options, processes=2) as run:
            run.finish()

    Args:
        killed_at (`tuple[int, str]`, *optional*): A process's number, and which of the `MOMENTS` it is killed at.
    """

    def __init__(self, script: str, options: list, processes: int = 1, fsdp: bool = False, killed_at=(None, None)):
        self.log = Path(tempfile.mkstemp(prefix="trainer-", suffix=".log")[1])
        environment = {"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"} | (FSDP if fsdp else {})
        if processes > 1:
            environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        start_server()
        self.processes = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            moment = killed_at[1] if killed_at[0] == rank else None
            arguments = (script, [str(option) for option in options], environment | own, str(self.log), moment)
            self.processes.append(FORKS.Process(target=_train, args=arguments))
            self.processes[-1].start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            kill_group(process.pid)  # its data readers, too
            process.join()
        self.log.unlink(missing_ok=True)

    def wait_until(self, condition: Callable[[], bool]):
        """Wait for what the run does. It must not end before."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert all(process.is_alive() for process in self.processes), self.log.read_text()[-5000:]
            assert time.monotonic() < deadline, self._stacks()
            time.sleep(0.02)

    def kill(self, rank: int = 0, number: int = signal.SIGKILL):
        os.kill(self.processes[rank].pid, number)

    def end(self) -> list[int]:
        """The exit codes. When one process fails the others are killed, as `srun --kill-on-bad-exit` does."""
        deadline = time.monotonic() + TIMEOUT
        while any(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline, self._stacks()
            if any(process.exitcode for process in self.processes):
                for process in self.processes:
                    process.join(0.5)  # they may have the same reason
                    process.kill()
            multiprocessing.connection.wait([process.sentinel for process in self.processes if process.is_alive()], 1)
        return [process.exitcode for process in self.processes]

    def finish(self) -> str:
        """What all have printed, once all have succeeded."""
        with self:
            codes = self.end()
            output = self.log.read_text()
        assert not any(codes), f"{codes}\n{output[-5000:]}"
        return output

    def _stacks(self) -> str:
        """What the processes are doing: `faulthandler` prints it when they are aborted."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGABRT)
                process.join(5)
        return f"Not done after {TIMEOUT} s.\n{self.log.read_text()[-20000:]}"


def start_server():
    """Start the server with this process's module path, which it would not have by itself."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    multiprocessing.forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if path is not None:
        os.environ["PYTHONPATH"] = path


def _train(script: str, options: list[str], environment: dict, log: str, moment: str | None):
    os.setpgid(0, 0)  # a group of its own, which can be killed whole
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    faulthandler.enable(descriptor)
    multiprocessing.set_start_method("fork", force=True)  # data readers are then started as by a trainer of its own
    import torch
    from huggingface_hub import constants

    torch.set_num_threads(1)
    constants.HF_HUB_USER_AGENT_ORIGIN = f"process-{environment.get('RANK', 0)}"
    if moment is not None:
        _die_at(moment)
    module = importlib.import_module(script)
    module.main(module.parse_args(options))


def _die_at(moment: str):
    """Have this process killed before a file operation, or before a pass of the training loop."""
    from paella_diffusers.training.run import TrainingRun

    event, pattern = MOMENTS[moment]
    if event == "pass":
        go_on = TrainingRun._next

        def next_or_die(run, loader):
            return os.kill(os.getpid(), signal.SIGKILL) if run.passes == pattern else go_on(run, loader)

        TrainingRun._next = next_or_die
        return

    def watch(name, arguments):
        if name == event and any(re.search(pattern, str(argument)) for argument in arguments):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
