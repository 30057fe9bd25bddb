"""Killing processes while they write: not at random moments, which may all be harmless, but before each file operation."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from paella_diffusers.loaders import atomic

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "exchange"}


def killed_before(operation: int, folder: Path, action: Callable) -> bool:
    """
    Run `action` in a process that is killed before its file operation of this number, counted in `folder`; False if there
    are not so many.
    """
    pid = os.fork()
    if pid == 0:
        count = 0

        def step(event, arguments):
            nonlocal count
            if event in OPERATIONS and any(str(folder) in str(argument) for argument in arguments):
                count += 1
                if count > operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        exchange = atomic._exchange
        atomic._exchange = lambda *names: step("exchange", names) or exchange(*names)
        failed = True
        try:
            sys.addaudithook(step)
            action()
            failed = False
        finally:
            os._exit(failed)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "it failed without being killed"
    return os.WIFSIGNALED(status)


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder, without unfinished and replaced ones."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if "-unfinished-" not in name and "-replaced-" not in name}


def leftovers(folder: Path) -> list[str]:
    """Those."""
    return [str(path) for path in folder.rglob(".*") if "-unfinished-" in path.name or "-replaced-" in path.name]
