"""What a batch writes: shards of pictures or tokens, each whole or not at all, to a local folder or an fsspec address."""

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from ..loaders.atomic import atomic_file, atomic_folder

if TYPE_CHECKING:
    from .rows import Drawn

PICTURES: dict[str, dict[str, Any]] = {  # with options of Pillow
    "png": {},
    "jpg": {"format": "JPEG", "quality": 95},
    "webp": {"quality": 95},
}
JOB = "job.json"
DONE = re.compile(r"(\d{6,})\.json")  # the last file that a shard gets
ERRORS = ".errors.jsonl"


class Store:
    """
    The output folder. Files appear in it whole: local ones by a rename, others by the transactions of fsspec.

    Args:
        address (`str`): A local folder or an fsspec address, such as `s3://bucket/folder`.
    """

    def __init__(self, address: str):
        self.fs, self.folder = fsspec.core.url_to_fs(address)
        self.is_local: bool = isinstance(self.fs, LocalFileSystem)
        self._errors: dict[str, int] = {}

    def names(self) -> set[str]:
        """Of what is in the folder, but unfinished files."""
        self.fs.invalidate_cache()
        if not self.fs.exists(self.folder):
            return set()
        names = (posixpath.basename(path.rstrip("/")) for path in self.fs.ls(self.folder, detail=False))
        return {name for name in names if not name.startswith(".")}

    def done(self) -> set[int]:
        """The shards that are complete."""
        return {int(match[1]) for name in self.names() if (match := DONE.fullmatch(name))}

    def is_done(self, index: int) -> bool:
        self.fs.invalidate_cache()
        return self.fs.exists(f"{self.folder}/{index:06d}.json")

    def count_errors(self) -> int:
        """How many rows were refused so far."""
        for name in self.names():
            if name.endswith(ERRORS) and name not in self._errors:
                self._errors[name] = self.read(name).count(b"\n")
        return sum(self._errors.values())

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(f"{self.folder}/{name}")

    def write(self, name: str, content: bytes) -> None:
        if self.is_local:
            path = Path(self.folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as unfinished:
                unfinished.write_bytes(content)
        else:
            self._write_in_transaction({name: content})

    def write_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        """A new folder with files; one that is there already has the same ones."""
        if not self.is_local:
            self._write_in_transaction({f"{name}/{file}": content for file, content in files.items()})
        elif not Path(self.folder, name).exists():
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            try:
                with atomic_folder(Path(self.folder, name)) as unfinished:
                    for file, content in files.items():
                        (unfinished / file).write_bytes(content)
            except OSError:
                if not Path(self.folder, name).exists():  # else another process was faster
                    raise

    def _write_in_transaction(self, files: Mapping[str, bytes]):
        for folder in {posixpath.dirname(f"{self.folder}/{name}") for name in files}:
            self.fs.makedirs(folder, exist_ok=True)
        with self.fs.transaction:
            for name, content in files.items():
                with self.fs.open(f"{self.folder}/{name}", "wb") as file:
                    file.write(content)

    def write_shard(self, index: int, files: Mapping[str, bytes], errors: list[dict[str, Any]], layout: str) -> None:
        """Write a shard's files, then the errors of its rows, and last the file that says that it is done."""
        name = f"{index:06d}"
        if layout == "files":
            self.write_folder(name, files)
        else:
            self.write(f"{name}.tar", tar(files))
        if errors:
            self.write(f"{name}{ERRORS}", b"".join(to_json(error) + b"\n" for error in errors))
        pictures = sum(file.endswith(".json") for file in files)
        self.write(f"{name}.json", to_json({"pictures": pictures, "errors": len(errors)}))


def encode(drawn: "Drawn", output: str) -> dict[str, bytes]:
    """A picture's files, by their endings: a picture, or its tokens and their initial noise as NumPy's int32 arrays."""
    if output == "tokens":
        return {"tokens.npy": _npy(drawn.image), "noise.npy": _npy(drawn.initial_noise)}
    file = io.BytesIO()
    drawn.image.save(file, **{"format": output, **PICTURES[output]})
    return {output: file.getvalue()}


def tar(files: Mapping[str, bytes]) -> bytes:
    """An archive whose bytes depend on nothing else."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def to_json(value: Any) -> bytes:
    """In a line; what JSON has not is written as a text."""
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")


def _npy(tokens) -> bytes:
    file = io.BytesIO()
    np.save(file, tokens.cpu().numpy().astype(np.int32))
    return file.getvalue()
