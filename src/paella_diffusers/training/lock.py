"""One run at a time in an output folder, on one machine or on several that share a file system."""

import atexit
import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from diffusers.utils import logging

logger = logging.get_logger(__name__)


class FolderLock:
    """
    A file in the folder that names the run's host and process, and that this process touches every few seconds.

    A run that was killed leaves the file behind. The next one takes it over: at once if the process that it names is gone
    from the same host, or belonged to the same Slurm job before it was requeued; else when the file has not been touched
    for a while, which is how a run on another host is told from a dead one.

    Args:
        folder (`Path`): Where the file `run.lock` goes; made if it is not there.
        interval (`float`, defaults to 10): Seconds between touches. Another host's run counts as dead after six of them.

    Raises:
        RuntimeError: If another run is at work in the folder.
    """

    def __init__(self, folder: Path, interval: float = 10.0):
        self.path: Path = folder / "run.lock"
        self.interval = interval
        self.owner: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "id": secrets.token_hex(8),
        }
        folder.mkdir(parents=True, exist_ok=True)
        self._acquire()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True)
        self._thread.start()
        atexit.register(self.release)  # after an error, too

    def _acquire(self):
        own = self.path.with_name(f"run.lock.{self.owner['id']}")
        own.write_text(json.dumps(self.owner))
        try:
            while True:
                try:
                    self._create(own)
                    return
                except FileExistsError:
                    other = self._read()
                if other is None:
                    continue  # released meanwhile
                if self._is_alive(other):
                    raise RuntimeError(
                        f"Process {other['pid']} on {other['host']} is training in {self.path.parent}: end it first, or "
                        "take another --output-dir."
                    )
                logger.warning(f"Process {other['pid']} on {other['host']} ended without releasing {self.path}.")
                if self._read() == other:
                    os.replace(self.path, own.with_suffix(".stale"))
                    own.with_suffix(".stale").unlink()
        finally:
            own.unlink()

    def _create(self, own: Path):
        """Create the lock, which fails if it is there, unlike a rename."""
        try:
            os.link(own, self.path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with open(self.path, "x") as file:
                file.write(own.read_text())

    def _read(self) -> dict | None:
        try:
            return json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:  # without hard links it may be there before its content
            return {"host": "unknown", "pid": "unknown", "job": None}

    def _is_alive(self, other: dict) -> bool:
        if other["host"] == self.owner["host"]:
            try:
                process = psutil.Process(other["pid"])
                alive = process.create_time() == other["started"] and process.status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return False
            return alive and other["pid"] != os.getpid()
        if other["job"] is not None and other["job"] == self.owner["job"]:
            return False
        logger.warning(
            f"{self.path} names process {other['pid']} on {other['host']}: waiting {6 * self.interval:.0f} s to see whether "
            "it is at work."
        )
        touched, deadline = self._touched(), time.monotonic() + 6 * self.interval
        while time.monotonic() < deadline:
            time.sleep(self.interval / 2)
            if self._touched() != touched:
                return self._read() is not None
        return False

    def _touched(self) -> int | None:
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _touch(self):
        while not self._stopped.wait(self.interval):
            with suppress(OSError):  # a network file system may fail for a moment
                if self.is_own():
                    os.utime(self.path)

    def is_own(self) -> bool:
        """Whether the folder is still this run's. Another takes it over if this process was stopped for long."""
        return (self._read() or {}).get("id") == self.owner["id"]

    def release(self) -> None:
        """Let the next run have the folder."""
        atexit.unregister(self.release)
        self._stopped.set()
        self._thread.join()
        if self.is_own():
            self.path.unlink()
