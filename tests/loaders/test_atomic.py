"""Processes are killed before every single file operation, and what they leave is compared."""

import errno
import os
import socket
import sys
from pathlib import Path

import pytest
from kills import contents, killed_before, leftovers

from paella_diffusers.loaders import atomic
from paella_diffusers.loaders.atomic import (
    atomic_file,
    atomic_folder,
    atomic_update,
    interrupted_update,
    publish,
    remove_abandoned,
    restore_folder,
    unfinished_path,
)


def save(folder: Path):
    """The second version, without `gone.txt`."""
    with atomic_update(folder, "marker.json", lambda *_: {Path("gone.txt")}) as new:
        (new / "marker.json").write_text("2")
        (new / "part").mkdir()
        (new / "part" / "weights").write_text("2")
        (new / "added").write_text("2")


def reset(folder: Path):
    """The first version again."""
    for name in (OLD | NEW).keys() - OTHERS.keys():
        (folder / name).unlink(missing_ok=True)
    for name in OLD.keys() - OTHERS.keys():
        (folder / name).write_bytes(OLD[name])


OTHERS = {"notes.txt": b"mine", "part/card": b"mine", "checkpoints/1/state": b"mine"}
OLD = OTHERS | {"marker.json": b"1", "part/weights": b"1", "gone.txt": b"1"}
NEW = OTHERS | {"marker.json": b"2", "part/weights": b"2", "added": b"2"}
LINK = {"link": b"mine"}  # to notes.txt


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, data in OLD.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "folder" / "link").symlink_to("notes.txt")
    assert contents(tmp_path / "folder") == OLD | LINK
    (tmp_path / "folder" / "checkpoints" / "1").chmod(0o555)
    return tmp_path / "folder"


@pytest.fixture
def no_sync(monkeypatch):
    """Kills need none, and the tests are faster without."""
    monkeypatch.setattr(atomic, "_sync", lambda path: None)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not exchange folders")
def test_killed_anywhere_a_folder_is_old_or_new(folder, no_sync):
    seen, operation = [], 0
    while killed_before(operation, folder.parent, lambda: save(folder)):
        state = contents(folder)
        assert state in (OLD | LINK, NEW | LINK)
        seen.append(state == NEW | LINK)
        if seen[-1]:
            reset(folder)
        operation += 1
    assert contents(folder) == NEW | LINK and not leftovers(folder.parent)
    assert 20 < seen.index(True) < len(seen) - 5  # killed in every phase, and after the exchange all of it is new
    assert (folder / "checkpoints" / "1").stat().st_mode & 0o777 == 0o555


@pytest.mark.parametrize("why", ["no exchange", "working directory"])
def test_without_an_exchange_what_was_interrupted_is_restored(folder, monkeypatch, no_sync, why):
    if why == "no exchange":
        monkeypatch.setattr(atomic, "_exchange", lambda *names: False)
    else:
        monkeypatch.chdir(folder)
    seen, operation = {"old": 0, "new": 0, "interrupted": 0}, 0
    while killed_before(operation, folder.parent, lambda: save(folder)):
        state = contents(folder)
        if "marker.json" not in state:
            assert interrupted_update(folder)
            state = "interrupted"
        else:
            assert state in (OLD | LINK, NEW | LINK)
            state = "new" if state == NEW | LINK else "old"
        seen[state] += 1
        if state == "interrupted":
            step = seen[state] % 3  # restoring may be killed as well
            while killed_before(step, folder.parent, lambda: restore_folder(folder)):
                assert "marker.json" not in contents(folder) or contents(folder) == OLD | LINK
                step += 3
        elif state == "new":
            restore_folder(folder)
            if contents(folder) == NEW | LINK:
                break
        assert contents(folder) == OLD | LINK
        operation += 1
    assert all(seen.values()), seen
    save(folder)
    assert contents(folder) == NEW | LINK and not leftovers(folder.parent)


def test_what_another_host_left_is_restored_when_asked_for(folder, monkeypatch, no_sync):
    """Its process may live, as far as is known here: containers often have a new host name each time."""
    monkeypatch.setattr(atomic, "_exchange", lambda *names: False)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    operation = 0
    while killed_before(operation, folder.parent, lambda: save(folder)) and "marker.json" in contents(folder):
        operation += 1
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    with pytest.raises(OSError, match="was interrupted. Restore what was there before with `from .* import restore_folder"):
        save(folder)
    restore_folder(folder)
    assert contents(folder) == OLD | LINK
    save(folder)
    assert contents(folder) == NEW | LINK


@pytest.mark.parametrize("exchange", [True, False])
def test_a_full_disk_at_any_moment_changes_nothing(folder, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *names: False)
    outcomes, fails_at, count = [], 0, 0

    def failing(name):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real[name](*args, **kwargs)

        return call

    real = {name: getattr(os, name) for name in ("replace", "mkdir", "fsync")}
    while count >= fails_at:
        fails_at, count = fails_at + 1, 0
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, failing(name))
            try:
                save(folder)
                outcomes.append("saved")
            except OSError as error:
                assert error.errno == errno.ENOSPC
                outcomes.append("failed")
        assert contents(folder) in (OLD | LINK, NEW | LINK) and not leftovers(folder.parent)
        if contents(folder) == NEW | LINK:
            reset(folder)
    assert outcomes.count("failed") > 8 and outcomes[-1] == "saved"


def test_a_new_folder_and_one_that_cannot_be(tmp_path):
    save(tmp_path / "new" / "folder")
    assert contents(tmp_path / "new" / "folder") == {"marker.json": b"2", "part/weights": b"2", "added": b"2"}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file must be a folder"):
        save(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "new" / "folder")
    save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


def test_what_others_write_meanwhile_stays(folder, monkeypatch):
    exchange = atomic._exchange

    def meanwhile(*names):
        (folder / "notes.txt").unlink()
        (folder / "notes.txt").write_text("newer")
        (folder / "log").write_text("new")
        return exchange(*names)

    monkeypatch.setattr(atomic, "_exchange", meanwhile)
    save(folder)
    assert contents(folder) == NEW | {"notes.txt": b"newer", "link": b"newer", "log": b"new"}


def test_two_processes_save_to_one_folder(folder):
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(30):
                    save(folder)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert contents(folder) == NEW | LINK and not leftovers(folder.parent)


def test_files(tmp_path):
    path = tmp_path / "picture.png"
    with atomic_file(path) as unfinished:
        assert unfinished.suffix == ".png" and unfinished.parent == tmp_path
        unfinished.write_text("1")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as unfinished:
        unfinished.write_text("2")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"picture.png": b"1"} and not leftovers(tmp_path)

    def overwrite():
        with atomic_file(path) as unfinished:
            unfinished.write_text("2")

    operation = 0
    while killed_before(operation, tmp_path, overwrite):
        assert path.read_text() in ("1", "2")
        operation += 1
    assert operation > 3 and path.read_text() == "2" and not leftovers(tmp_path)


def test_new_folders(tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(ValueError), atomic_folder(path) as unfinished:
        (unfinished / "state").write_text("1")
        raise ValueError
    assert not path.exists() and not leftovers(tmp_path)
    with atomic_folder(path) as unfinished:
        (unfinished / "state").write_text("1")
    assert contents(path) == {"state": b"1"} and not leftovers(tmp_path)
    with pytest.raises(FileExistsError, match="checkpoint exists already"), atomic_folder(path):
        pass
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"), atomic_folder(tmp_path / "nowhere" / "folder"):
        pass


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    log = []
    sync, replace, exchange = os.fsync, os.replace, atomic._exchange
    monkeypatch.setattr(os, "fsync", lambda fd: log.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd))
    monkeypatch.setattr(os, "replace", lambda *names: log.append("named") or replace(*names))
    monkeypatch.setattr(atomic, "_exchange", lambda *names: log.append("named") or exchange(*names))
    with atomic_file(tmp_path / "file") as unfinished:
        unfinished.write_text("1")
    assert log == [str(unfinished), "named", str(tmp_path)]
    for _ in range(2):  # a new folder, and one that is exchanged
        log.clear()
        save(tmp_path / "folder")
        before = {Path(name).name for name in log[: log.index("named")]}
        assert {"marker.json", "weights", "added", "part"} <= before and log[-1] == str(tmp_path)


def test_only_what_no_living_process_owns_is_removed(tmp_path):
    path = tmp_path / "model"
    mine = unfinished_path(path)
    mine.mkdir()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    name = mine.name.replace(str(os.getpid()), str(pid))
    dead, other_host = tmp_path / name, tmp_path / name.replace(socket.gethostname()[:1], "other", 1)
    earlier = tmp_path / (mine.name[:-8] + "0" * 8)  # of an earlier process that had this one's number
    living = tmp_path / mine.name.replace(str(os.getpid()), str(os.getppid()))
    unrelated = tmp_path / ".model-unfinished-mine"
    for folder in (dead, earlier, living, unrelated, other_host):
        folder.mkdir(exist_ok=True)
    remove_abandoned(path)
    assert not dead.exists() and not earlier.exists()
    assert living.exists() and unrelated.exists() and mine.exists()
    publish(mine, path)
    assert path.is_dir()
