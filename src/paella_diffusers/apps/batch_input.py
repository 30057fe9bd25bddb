"""What a batch is made from: the rows of a file or of a dataset, read shard by shard, and each row's seed."""

import csv
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

if TYPE_CHECKING:
    from .rows import Row  # imports torch, which takes seconds; the command line checks its input before

FILES = (".jsonl", ".csv", ".parquet")  # also .jsonl.gz and .csv.gz
TEXTS = ("key", "prompt", "negative_prompt")  # of CSV, all other cells are JSON
# what makes a row bad, rather than ending the job
BAD = (ValueError, TypeError, RecursionError)


def seed_of(key: str, seed: int = 0) -> int:
    """A row's seed, in [0, 2**63): the first 63 bits of SHA-256 of `SEED:KEY` in UTF-8."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class BatchInput:
    """
    Rows to draw.

    Args:
        source (`str`):
            A file of JSON lines, CSV or Parquet, local or at an fsspec address, or what `datasets.load_dataset` takes: a Hub
            dataset's id, or a folder.
        split (`str`, defaults to `"train"`): Of a dataset.
        columns (`dict[str, str]`, *optional*):
            The column of every argument that is read, `prompt`, `key`, `seed` or an argument of [`Row`]; all others are
            ignored. Without it, every column has its argument's name, and no other columns may be there.
        defaults (`dict`, *optional*): Arguments of [`Row`] for rows that do not say otherwise.
        seed (`int`, defaults to 0): See [`seed_of`].
    """

    source: str
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def format(self) -> str:
        """The ending of a file, or "dataset"."""
        name = self.source.removesuffix(".gz")
        return next((ending for ending in FILES if name.endswith(ending)), "dataset")

    def digest(self) -> str | None:
        """What identifies the input's content: SHA-256 of a file or of a folder's files, or the commit of a Hub dataset."""
        if self.format == "dataset" and not os.path.isdir(self.source):
            return self._commit()
        paths = [self.source]
        if self.format == "dataset":
            paths = sorted(str(path) for path in Path(self.source).rglob("*") if path.is_file())
        digest = hashlib.sha256()
        for path in paths:
            with fsspec.open(path, "rb") as file:
                while part := file.read(2**20):
                    digest.update(part)
        return digest.hexdigest()

    def _commit(self) -> str | None:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(self.source).sha

    def records(self) -> Iterator[bytes | dict[str, Any]]:
        """The raw rows, of which `row` makes rows; blank lines are none."""
        if self.format in (".parquet", "dataset"):
            yield from self._dataset()
            return
        with fsspec.open(self.source, "rb", compression="infer") as file:
            if self.format == ".jsonl":
                yield from (line for line in file if line.strip())
            else:  # what is not UTF-8 is refused as a row
                csv.field_size_limit(2**31 - 1)  # a cell above the default limit would end the job
                yield from csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=""))

    def _dataset(self):
        from datasets import load_dataset

        if self.format == ".parquet":
            return load_dataset("parquet", data_files=self.source, split="train", streaming=True)
        revision = None if os.path.isdir(self.source) else self._commit()
        return load_dataset(self.source, split=self.split, revision=revision, streaming=True)

    def row(self, number: int, record: bytes | dict[str, Any]) -> "Row":
        """
        The row of a raw one. Without a key it is the row's number, from 0.

        Raises:
            ValueError, TypeError: If something is missing, unknown or out of range.
        """
        from .rows import Row

        values = json.loads(record) if isinstance(record, bytes) else record
        if not isinstance(values, dict):
            raise ValueError(f"A row must be a JSON object, got {type(values).__name__}.")
        if self.columns:
            values = {argument: values.get(column) for argument, column in self.columns.items()}
        if self.format == ".csv":
            values = {name: _cell(name, text) for name, text in values.items() if text}
        values = {name: value for name, value in values.items() if value is not None}
        if "prompt" not in values:
            raise ValueError(f"`prompt` is missing: the row has {', '.join(map(str, values)) or 'nothing'}.")
        key, prompt = str(values.pop("key", number)), values.pop("prompt")
        seed = values.pop("seed", None)
        return Row(key, prompt, seed_of(key, self.seed) if seed is None else seed, {**self.defaults, **values})


class ShardReader:
    """The raw rows of shards: cheapest in ascending order, as it reads on, and begins anew for one that lies behind."""

    def __init__(self, source: BatchInput, shard_size: int):
        self.source = source
        self.shard_size = shard_size
        self._records, self._next = iter(()), None

    def __getitem__(self, index: int) -> list[bytes | dict[str, Any]]:
        if self._next is None or index < self._next:
            self._records, self._next = iter(self.source.records()), 0
        skipped = (index - self._next) * self.shard_size
        next(itertools.islice(self._records, skipped, skipped), None)
        self._next = index + 1
        return list(itertools.islice(self._records, self.shard_size))


def _cell(name: str, text: str) -> Any:
    """A cell of CSV: texts as they are, others as JSON, such as 8, [8, 4] or true."""
    if name in TEXTS:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
