import json
import multiprocessing
import os
import signal
import threading
import time
from errno import EIO, EPERM

import psutil
import pytest

from paella_diffusers.training.lock import FolderLock


def write_lock(folder, **changes):
    lock = FolderLock(folder, interval=0.05)
    owner = lock.owner | changes
    lock.release()
    (folder / "run.lock").write_text(json.dumps(owner))


def hold(folder, held, over):
    FolderLock(folder)
    held.set()
    over.wait()
    os._exit(1)  # without releasing it


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    context = multiprocessing.get_context("fork")
    held, over = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, held, over))
    process.start()
    assert held.wait(60)
    with pytest.raises(RuntimeError, match=f"Process {process.pid} on .* is training in .*: end it first, or take another"):
        FolderLock(tmp_path)
    over.set()
    process.join()
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_with_a_dead_ones_number_is_not_taken_for_it(tmp_path):
    write_lock(tmp_path, pid=os.getppid(), started=1.0)
    FolderLock(tmp_path).release()


def test_a_dead_process_whose_parent_does_not_ask_for_its_status_counts_as_dead(tmp_path):
    """As in containers whose first process is no init: it stays in the process table."""
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie
    write_lock(tmp_path, pid=pid, started=psutil.Process(pid).create_time())
    FolderLock(tmp_path).release()
    os.waitpid(pid, 0)


def test_another_hosts_run_counts_as_alive_while_it_touches_its_lock(tmp_path):
    write_lock(tmp_path, host="another")
    over = threading.Event()

    def touch():
        while not over.wait(0.02):
            os.utime(tmp_path / "run.lock")

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="on another is training"):
            FolderLock(tmp_path, interval=0.1)
    finally:
        over.set()
        thread.join()
    FolderLock(tmp_path, interval=0.1).release()


def test_a_requeued_job_does_not_wait_for_its_earlier_self(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    write_lock(tmp_path, host="another")
    monkeypatch.setattr(time, "sleep", None)  # to be called is an error
    FolderLock(tmp_path, interval=1000).release()


def test_it_is_touched_again_after_an_error_of_the_file_system(tmp_path, monkeypatch):
    calls, again = [], threading.Event()

    def utime(path):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(EIO, "Input/output error")
        again.set()

    monkeypatch.setattr(os, "utime", utime)
    lock = FolderLock(tmp_path, interval=0.01)
    assert again.wait(60)
    lock.release()


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    lock = FolderLock(tmp_path)
    assert lock.is_own() and sorted(path.name for path in tmp_path.iterdir()) == ["run.lock"]
    lock.release()
    write_lock(tmp_path, pid=os.getppid(), started=psutil.Process(os.getppid()).create_time())
    with pytest.raises(RuntimeError, match=f"Process {os.getppid()} on .* is training in"):
        FolderLock(tmp_path)
    (tmp_path / "run.lock").write_text("")  # of a run that was killed before it wrote more
    FolderLock(tmp_path, interval=0.02).release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_notices_that_another_has_taken_over(tmp_path):
    lock = FolderLock(tmp_path)
    assert lock.is_own()
    write = json.loads((tmp_path / "run.lock").read_text()) | {"id": "another"}
    (tmp_path / "run.lock").write_text(json.dumps(write))
    assert not lock.is_own()
    lock.release()
    assert (tmp_path / "run.lock").exists()
