"""
Files and folders that are written whole or not at all, whatever stops the writer: an error, a kill, a full disk.

While something is written it has another name beside its own, `.NAME-unfinished-HOST-PID-RANDOM` and NAME's suffix. Once it
is complete and on the disk (`fsync`), it takes its name in one step.

* `atomic_file(path)`: one file, new or in place of another.
* `atomic_folder(path)`: a new folder.
* `atomic_update(folder, marker)`: new files for a folder, all in one step; other files in it stay.
* `unfinished_path(path)` and `publish(unfinished, path)`: the two halves, for a folder that several processes write.
* `remove_abandoned(path)`: removes unfinished files of `path` whose process is dead; the three above do it first.
* `interrupted_update(folder)`, `check_not_interrupted(folder)` and `restore_folder(folder)`: see `atomic_update`.

A process is known by host and id: what was left behind on another host is never removed. Windows has no `fsync` here, and no
process is known to be dead there.
"""

import ctypes
import errno
import glob
import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_OWNED = re.compile(
    r"\.(?P<name>.+)-(?:unfinished|replaced)-(?P<host>[\w.]+)-(?P<pid>\d+)-[0-9a-f]{8}(?:\.[^.]*)?", re.ASCII | re.DOTALL
)
ADDED = ".added.json"  # among replaced files: the names of new ones that replaced none
_live: set[str] = set()  # the paths like these that this process is writing


# ------------------------------------------------------------------------------------------------------ the three writers


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yields an unfinished path, in the same folder and with the same suffix, to write to. At the end it becomes `path`; after
    an error it is removed, and `path` is what it was.
    """
    path = Path(os.path.realpath(path))
    remove_abandoned(path)
    unfinished = unfinished_path(path)
    try:
        yield unfinished
        publish(unfinished, path)
    finally:
        _discard(unfinished)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yields an unfinished, empty folder to write into. At the end it becomes `path`; after an error it is removed.

    Raises:
        FileExistsError: If there is something at `path`.
        FileNotFoundError: If its parent folder does not exist.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already: choose another folder, or remove it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {path.parent} does not exist: create it first.")
    remove_abandoned(path)
    unfinished = unfinished_path(path)
    try:
        unfinished.mkdir()
        yield unfinished
        publish(unfinished, path)
    finally:
        _discard(unfinished)


@contextmanager
def atomic_update(
    folder: str | os.PathLike, marker: str, superseded: Callable[[Path, Path], set[Path]] | None = None
) -> Iterator[Path]:
    """
    Yields an unfinished, empty folder to write into. At the end its files are in `folder`, which is created if necessary,
    all of them in one step: a process that is killed at any moment leaves `folder` as it was or as it shall be. Other files
    in `folder` stay.

    On Linux, a copy of the whole folder (of hard links, which take no space) is exchanged with it. Where that is not
    possible, the old files move out and the new ones in, one after another, `marker` first out and last in: on other
    systems, on some network file systems, and for the working directory, a mount point, or a folder whose parent or contents
    belong to someone else. A process that is killed between leaves a folder without `marker`: `interrupted_update` finds it,
    and `restore_folder`, which the next `atomic_update` calls, restores the old files.

    Args:
        folder (`str` or `Path`): The folder.
        marker (`str`): The name of the file without which nothing loads the folder, such as `model_index.json`.
        superseded (`Callable`, *optional*):
            From `folder` and the unfinished folder to the files of `folder`, as relative paths, that shall be removed.

    Raises:
        NotADirectoryError: If `folder` is a file.
        PermissionError: If it cannot be written to.
        OSError: If a process of another host was interrupted, or is about to end: see `check_not_interrupted`.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} must be a folder, but it is a file.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in (folder, folder / marker):
        remove_abandoned(path)
    if folder.is_dir():
        for replaced in _replaced(folder):
            if _is_abandoned(replaced):
                _finish(folder, replaced, marker)
        if not (folder / marker).is_file():
            check_not_interrupted(folder)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written to.")
    unfinished = unfinished_path(folder / marker if folder.is_dir() and _must_stay(folder) else folder)
    try:
        unfinished.mkdir()
        yield unfinished
        _sync_files(unfinished)
        if unfinished.parent != folder and not _replace(folder, unfinished, superseded):
            outside, unfinished = unfinished, unfinished_path(folder / marker)
            shutil.move(outside, unfinished)
            _live.discard(str(outside))
        if unfinished.parent == folder:
            _move_in(folder, unfinished, marker, superseded(folder, unfinished) if superseded else set())
    finally:
        _discard(unfinished)


# --------------------------------------------------------------------------------------------------------- their two halves


def unfinished_path(path: str | os.PathLike[str]) -> Path:
    """A name beside `path` that no other call returns, and that `remove_abandoned(path)` knows; nothing is created."""
    path = Path(path)
    unfinished = path.with_name(f"{_prefix(path, 'unfinished')}{_owner()}-{secrets.token_hex(4)}{path.suffix}")
    _live.add(str(unfinished))
    return unfinished


def publish(unfinished: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """
    Write an unfinished file or folder to the disk, then give it its name. It takes the place of a file or of an empty
    folder, but not of another folder.
    """
    unfinished, path = Path(unfinished), Path(path)
    if unfinished.is_dir():
        _sync_files(unfinished)
        _sync_folders(unfinished)
    else:
        _sync(unfinished)
    os.replace(unfinished, path)
    _live.discard(str(unfinished))
    _sync(path.parent)


def remove_abandoned(path: str | os.PathLike[str]) -> None:
    """Remove unfinished files and folders of `path` that a process of this host left behind when it died."""
    path = Path(path)
    if path.parent.is_dir():
        for found in path.parent.glob(glob.escape(_prefix(path, "unfinished")) + "*"):
            if _is_abandoned(found):
                _remove(found)


# ------------------------------------------------------------------------------------------------- updates one by one


def interrupted_update(folder: str | os.PathLike[str]) -> bool:
    """Whether an `atomic_update` of the folder stopped halfway, so that `restore_folder` is needed."""
    return bool(_replaced(Path(folder)))


def check_not_interrupted(folder: str | os.PathLike[str]) -> None:
    """Raise an `OSError` that says how to restore a folder, if an `atomic_update` of it stopped halfway."""
    if interrupted_update(folder):
        raise OSError(
            f"Saving to {folder} was interrupted. Restore what was there before with "
            f"`from {__name__} import restore_folder; restore_folder({str(folder)!r})`, or, on the same machine, save "
            "again."
        )


def restore_folder(folder: str | os.PathLike[str]) -> None:
    """
    Restore the files that a folder had before an `atomic_update` that stopped halfway, on whatever host; without one, or if
    its process lives, do nothing.
    """
    for replaced in _replaced(Path(folder)):
        if _is_abandoned(replaced) or not _is_of_this_host(replaced):
            _finish(Path(folder), replaced, _OWNED.fullmatch(replaced.name)["name"])


def _move_in(folder: Path, unfinished: Path, marker: str, superseded: set[Path]):
    """Move the old files of a folder out and the new ones in, the marker first out and last in."""
    new = sorted((path.relative_to(unfinished) for path in unfinished.rglob("*") if not path.is_dir()), key=str)
    new.sort(key=lambda path: str(path) == marker)
    old = [path for path in dict.fromkeys([Path(marker), *new, *superseded]) if os.path.lexists(folder / path)]
    replaced = folder / f"{_prefix(folder / marker, 'replaced')}{_owner()}-{secrets.token_hex(4)}"
    _live.add(str(replaced))
    try:
        with atomic_folder(replaced) as listed:
            (listed / ADDED).write_text(json.dumps([str(path) for path in new if path not in old]))
        for source, target, paths in ((folder, replaced, old), (unfinished, folder, new)):
            for path in paths:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(source / path, target / path)
        for changed in {(folder / path).parent for path in (*old, *new)}:
            if changed.is_dir():
                _sync(changed)
        done = unfinished_path(folder / marker)
        os.replace(replaced, done)  # in one step: half of the old files shall not be restored
    except BaseException:
        _restore(folder, replaced, marker)
        raise
    finally:
        _live.discard(str(replaced))
    _discard(done)


def _replaced(folder: Path) -> list[Path]:
    return [path for path in folder.glob(".*-replaced-*") if _OWNED.fullmatch(path.name)]


def _finish(folder: Path, replaced: Path, marker: str):
    """End a `_move_in` that was stopped. With the marker, the folder is all old or all new; else the old files return."""
    if (folder / marker).is_file():
        _remove(replaced)
    else:
        _restore(folder, replaced, marker)


def _restore(folder: Path, replaced: Path, marker: str):
    """Undo a `_move_in` that stopped anywhere; this may itself be stopped and repeated."""
    added = replaced / ADDED
    old = [path.relative_to(replaced) for path in replaced.rglob("*") if not path.is_dir() and path != added]
    if Path(marker) in old:
        (folder / marker).unlink(missing_ok=True)
    if added.is_file():
        for path in json.loads(added.read_text()):
            (folder / path).unlink(missing_ok=True)
    for path in sorted(old, key=lambda path: str(path) == marker):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(replaced / path, folder / path)
    _remove(replaced)


# ---------------------------------------------------------------------------------------------------- exchanging folders


def _must_stay(folder: Path) -> bool:
    """Whether a folder cannot be exchanged: someone is in it, or its parent does not let it go."""
    try:
        inside = folder in (Path.cwd(), *Path.cwd().parents)
    except FileNotFoundError:  # the working directory was removed
        inside = False
    return sys.platform != "linux" or inside or os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)


def _replace(folder: Path, unfinished: Path, superseded) -> bool:
    """Put an unfinished folder, completed with the old one's other files, in the old one's place; whether it succeeded."""
    if not os.path.lexists(folder):
        try:
            publish(unfinished, folder)
            return True
        except OSError:
            if not folder.is_dir():  # it is there now: another process was faster
                raise
    gone = superseded(folder, unfinished) if superseded else set()
    written = {path.relative_to(unfinished) for path in unfinished.rglob("*") if not path.is_dir()}
    try:
        _link_others(folder, unfinished, gone)
    except OSError:  # someone else's files, or a file system without hard links
        _remove_links(unfinished, written)
        return False
    _sync_folders(unfinished)
    if not _exchange(unfinished, folder):
        _remove_links(unfinished, written)
        return False
    _sync(folder.parent)
    gone = superseded(unfinished, folder) if superseded else set()
    _move_newer(unfinished, folder, gone | written)
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, where the system can."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_working_directory, exchange = -100, 2
    if renameat2 is None:
        return False
    return renameat2(at_working_directory, os.fsencode(one), at_working_directory, os.fsencode(other), exchange) == 0


def _link_others(old: Path, new: Path, gone: set[Path], inner: Path = Path()):
    """Give `new` what `old` has and it has not: links to files, and folders with their owner and mode."""
    for entry in os.scandir(old / inner):
        path = inner / entry.name
        if path in gone or _is_abandoned(path):
            continue
        if entry.is_dir(follow_symlinks=False):
            if not os.path.lexists(new / path):
                (new / path).mkdir()
            if (new / path).is_dir():
                _link_others(old, new, gone, path)
        elif not os.path.lexists(new / path):
            os.link(old / path, new / path, follow_symlinks=False)
    before, after = (old / inner).stat(), (new / inner).stat()
    if (before.st_uid, before.st_gid) != (after.st_uid, after.st_gid):
        os.chown(new / inner, before.st_uid, before.st_gid)
    shutil.copymode(old / inner, new / inner)


def _remove_links(folder: Path, written: set[Path]):
    """Leave in an unfinished folder only what was written into it."""
    for path in [path for path in folder.rglob("*") if not path.is_dir()]:
        if path.relative_to(folder) not in written:
            path.parent.chmod(0o700)
            path.unlink()


def _move_newer(old: Path, new: Path, gone: set[Path]):
    """What another process wrote into the old folder after its files were linked belongs into the new one."""
    for path in [path for path in old.rglob("*") if not path.is_dir()]:
        inner = path.relative_to(old)
        if inner in gone or any(_is_abandoned(part) for part in (inner, *inner.parents)):
            continue
        same = os.path.lexists(new / inner) and os.path.samestat(path.lstat(), (new / inner).lstat())
        if not same:
            (new / inner).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, new / inner)


# -------------------------------------------------------------------------------------------------------------- small parts


def _prefix(path: Path, kind: str) -> str:
    return f".{path.name.encode()[:100].decode(errors='ignore')}-{kind}-"  # names have at most 255 bytes


def _owner() -> str:
    return f"{re.sub(r'[^a-zA-Z0-9.]', '_', socket.gethostname())[:60] or 'host'}-{os.getpid()}"


def _is_of_this_host(path: Path) -> bool:
    name = _OWNED.fullmatch(path.name)
    return name is not None and name["host"] == _owner().rpartition("-")[0]


def _is_abandoned(path: Path) -> bool:
    """Whether it is an unfinished file or folder, or replaced files, of a dead process of this host."""
    if not _is_of_this_host(path):
        return False
    pid = int(_OWNED.fullmatch(path.name)["pid"])
    if pid == os.getpid():  # perhaps of an earlier process of this number, as in containers that start anew
        return path.name not in {os.path.basename(live) for live in list(_live)}  # threads add to it
    if os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


def _discard(unfinished: Path):
    _remove(unfinished)
    _live.discard(str(unfinished))


def _remove(path: Path):
    """Remove a file or a folder, with folders in it that are not to be written to."""
    if path.is_dir() and not path.is_symlink():
        for folder, _, _ in os.walk(path):
            os.chmod(folder, 0o700)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_files(folder: Path):
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)


def _sync_folders(folder: Path):
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())):
        _sync(path)


def _sync(path: Path):
    """Write a file, or the names in a folder, to the disk."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)
