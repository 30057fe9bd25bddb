"""
Many pictures: a job's rows are drawn in batches and written in shards, by one process or by many, on one machine or on many.

Shard i has the rows from i times `shard_size`; nothing else decides what is in it, and in which batches its rows are
drawn. So any process may draw any shard, and a shard that is done is never drawn again.
"""

import contextlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..about import __version__
from ..checks import check_choice, check_integer
from ..pipelines.pipeline_base import PaellaPipelineBase
from . import BATCH_LAYOUTS, BATCH_OUTPUTS
from .batch_input import BAD, BatchInput, ShardReader
from .batch_output import JOB, Store, encode, to_json
from .rows import Drawn, Row, batch_key, draw


class TooManyErrors(ValueError):
    """More rows were refused than a job allows."""


@dataclass(frozen=True)
class Job:
    """
    What is drawn, and where it is written.

    Args:
        rows ([`BatchInput`]): The rows.
        out (`str`): A local folder or an fsspec address.
        layout (`str`, defaults to `"webdataset"`): Shards are WebDataset archives, or folders with `"files"`.
        output (`str`, defaults to `"png"`): "png", "jpg", "webp", or "tokens" for the token grid and its initial noise.
        shard_size (`int`, defaults to 512): Rows of a shard.
        batch_size (`int`, defaults to 16): Rows of a call of the pipeline; the last call of a shard is padded.
        threads (`int`, defaults to 1): CPU threads of a process.
        max_errors (`int`, *optional*): The job ends when more rows are refused.
        made_with (`dict`, *optional*): What the pipeline is loaded with; it is written beside every picture.
    """

    rows: BatchInput
    out: str
    layout: str = "webdataset"
    output: str = "png"
    shard_size: int = 512
    batch_size: int = 16
    threads: int = 1
    max_errors: int | None = None
    made_with: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("layout", self.layout, BATCH_LAYOUTS)
        check_choice("output", self.output, BATCH_OUTPUTS)
        for name in ("shard_size", "batch_size", "threads"):
            check_integer(name, getattr(self, name), 1)

    def description(self) -> dict[str, Any]:
        """All that the written bytes depend on, but the kind of processor."""
        return {
            "layout": self.layout,
            "output": self.output,
            "shard_size": self.shard_size,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "seed": self.rows.seed,
            "split": self.rows.split,
            "columns": dict(self.rows.columns),
            "defaults": dict(self.rows.defaults),
            "made_with": self.made_with | self.versions,
            "input": self.rows.digest(),
        }

    @property
    def versions(self) -> dict[str, str]:
        names = ("torch", "diffusers", "transformers", "pillow", "numpy")
        return {"paella-diffusers": __version__, **{name: version(name) for name in names}}

    def begin(self) -> Store:
        """
        The output folder, with this job's description in it.

        Raises:
            ValueError: If another job's output is there, or other files.
        """
        store, description = Store(self.out), to_json(self.description())
        names = store.names()
        if names and JOB not in names:
            raise ValueError(f"{self.out} has files, but no {JOB} of an earlier start: choose a new folder.")
        if JOB not in names:
            store.write(JOB, description)
        there, here = json.loads(store.read(JOB)), json.loads(description)
        different = [name for name in here if there.get(name) != here[name]]
        if different:
            changes = "; ".join(f"{name} was {there.get(name)!r}, not {here[name]!r}" for name in different)
            raise ValueError(f"{self.out} has the output of another job: {changes}. Choose another folder.")
        return store

    def check_errors(self, store: Store) -> int:
        """The number of refused rows; raises if there are too many."""
        errors = store.count_errors()
        if self.max_errors is not None and errors > self.max_errors:
            raise TooManyErrors(
                f"{errors} rows were refused, more than {self.max_errors}: see *.errors.jsonl in {self.out}."
            )
        return errors


class Result(NamedTuple):
    """How far a job is, by all of its processes: shards that are done, of how many, and refused rows."""

    shards_done: int
    num_shards: int
    errors: int


def run(
    job: Job, load: Callable, processes: int | None = 1, rank: int = 0, world_size: int = 1, engine: str | None = None
) -> Result:
    """
    Draw what is not done yet, in this process, in several of this machine, or in a Ray cluster.

    Args:
        job ([`Job`]): What to draw.
        load (`Callable`): Makes the pipeline, without arguments; for several processes it must be picklable.
        processes (`int`, defaults to 1): Processes to start; on GPUs each takes one.
        rank, world_size (`int`): This is one of several such calls, on any machines; each draws its share of the shards.
        engine (`str`, *optional*):
            "ray" draws in actors of Ray Data, up to `processes` of them; None is as many as the cluster has room for.

    Raises:
        ValueError: If the input cannot be read, or the output is another job's.
        TooManyErrors: If more than `max_errors` rows were refused.
        RuntimeError: If a process was killed. What is whole is kept: run the same again.
    """
    store = job.begin()
    job.check_errors(store)
    num_rows = sum(1 for _ in job.rows.records())
    num_shards = math.ceil(num_rows / job.shard_size)
    done = store.done()
    shards = [index for index in range(rank, num_shards, world_size) if index not in done]

    def rows_done() -> int:
        return sum(min(job.shard_size, num_rows - index * job.shard_size) for index in store.done())

    with tqdm(total=num_rows, initial=rows_done(), unit="row", disable=rank > 0) as bar:
        if engine == "ray":
            from .batch_ray import draw_in_actors

            drawn = draw_in_actors(job, load, shards, processes)
        elif processes and processes > 1:
            drawn = draw_in_processes(job, load, shards, processes)
        else:
            drawn = draw_here(job, load, shards, bar.update)
        with contextlib.closing(drawn):  # ends its processes when there are too many errors
            for _ in drawn:
                if rank == 0:
                    bar.n = rows_done()  # of all processes, wherever they run
                    bar.refresh()
                if job.max_errors is not None:
                    job.check_errors(store)
    return Result(len(store.done()), num_shards, job.check_errors(store))


# ---------------------------------------------------------------------------------------------------------------- engines


def draw_here(job: Job, load: Callable, shards: list[int], on_rows: Callable | None = None) -> Generator[int, None, None]:
    """Draw shards in this process; yields each when it is written."""
    if shards:
        worker = Worker(job, load)
        for index in shards:
            worker(index, on_rows)
            yield index


def draw_in_processes(job: Job, load: Callable, shards: list[int], processes: int) -> Generator[int, None, None]:
    """Draw shards in processes of this machine, each as soon as one is free; yields each when it is written."""
    context = multiprocessing.get_context("spawn")
    devices = context.SimpleQueue()
    for device in range(processes):
        devices.put(device)
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(min(processes, len(shards) or 1), context, _begin_process, (job, load, devices))
    try:
        for future in as_completed([pool.submit(_draw_shard, index) for index in shards]):
            yield future.result()
    except BaseException as error:
        for child in multiprocessing.active_children():
            if child not in others:
                child.kill()  # what it was writing is not there, and is drawn at the next start
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise RuntimeError(
                "A process was killed, maybe for want of memory. Run the same command again: it draws what is not done."
            ) from error
        raise
    pool.shutdown()


_worker: "Worker | Exception | None" = None  # of a process of the pool, or why it has none


def _begin_process(job: Job, load: Callable, devices):
    global _worker
    parent = multiprocessing.parent_process().sentinel
    end_with_parent = lambda: multiprocessing.connection.wait([parent]) and os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    device = devices.get()
    if torch.cuda.is_available():
        torch.cuda.set_device(device % torch.cuda.device_count())
    try:
        _worker = Worker(job, load)
    except Exception as error:  # the pool would end without saying why
        _worker = error


def _draw_shard(index: int) -> int:
    if isinstance(_worker, Exception):
        raise _worker
    return _worker(index)


class Worker:
    """Draws shards of a job, in whatever process it is."""

    def __init__(self, job: Job, load: Callable):
        torch.set_num_threads(job.threads)  # before the first kernel; the number may change a picture's last bits
        self.job = job
        self.pipe: PaellaPipelineBase = load()
        self.store = Store(job.out)
        self.reader = ShardReader(job.rows, job.shard_size)
        self.made_with: dict[str, Any] = job.made_with | job.versions | self._components()

    def __call__(self, index: int, on_rows: Callable | None = None) -> int:
        """Draw a shard and write it, unless another process did meanwhile; its index."""
        if not self.store.is_done(index):
            files, errors = self.draw(index, on_rows or (lambda count: None))
            self.store.write_shard(index, files, errors, self.job.layout)
        return index

    def draw(self, index: int, on_rows: Callable) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
        """A shard's files, and the errors of its refused rows, both in the order of the rows."""
        groups: dict[Any, list[tuple[int, Row]]] = {}
        files: dict[int, dict[str, bytes]] = {}
        errors: dict[int, dict] = {}
        for number, record in enumerate(self.reader[index], index * self.job.shard_size):
            try:
                row = self.job.rows.row(number, record)
                groups.setdefault(batch_key(row, self.pipe), []).append((number, row))
            except BAD as error:
                errors[number] = _refused(number, None, error)
        for group in groups.values():
            for first in range(0, len(group), self.job.batch_size):
                numbers, rows = zip(*group[first : first + self.job.batch_size])
                for number, row, drawn in zip(numbers, rows, self._draw_batch(rows)):
                    if isinstance(drawn, Exception):
                        errors[number] = _refused(number, row.key, drawn)
                    else:
                        files[number] = self._files(number, row, drawn)
                on_rows(len(rows))
        in_order = {name: content for number in sorted(files) for name, content in files[number].items()}
        return in_order, [errors[number] for number in sorted(errors)]

    def _draw_batch(self, rows: tuple[Row, ...]) -> Sequence[Drawn | Exception]:
        """What each row got. If a batch fails, each row is drawn alone, so that good rows do not suffer from a bad one."""
        output_type = "latent" if self.job.output == "tokens" else "pil"
        try:
            return draw(self.pipe, rows, self.job.batch_size, exact=True, output_type=output_type)
        except BAD as error:
            if len(rows) == 1:
                return [error]
            return [self._draw_batch((row,))[0] for row in rows]

    def _files(self, number: int, row: Row, drawn: Drawn) -> dict[str, bytes]:
        """A row's files: what was drawn, and a JSON of all that made it."""
        made = {
            "key": row.key,
            "row": number,
            "prompt": row.prompt,
            "seed": row.seed,
            "arguments": dict(row.arguments),
            "steps_taken": drawn.steps_taken,
            "batch_size": self.job.batch_size,
            "made_with": self.made_with,
        }
        files = encode(drawn, self.job.output) | {"json": to_json(made)}
        return {f"{number:09d}.{ending}": content for ending, content in files.items()}

    def _components(self) -> dict[str, Any]:
        """The sampler, the guidance, whether the prior is used unless told otherwise, and the kind of processor."""
        parts = {name: getattr(self.pipe, name) for name in ("scheduler", "guider")}
        configs = {name: json.loads(part.to_json_string()) for name, part in parts.items() if part is not None}
        on_gpu = self.pipe.device.type == "cuda"
        name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
        use_prior = self.pipe.prior is not None and self.pipe.config.get("use_prior") is not False
        return configs | {"use_prior": use_prior, "processor": name}


def _refused(number: int, key: str | None, error: Exception) -> dict[str, Any]:
    return {"row": number, "key": key, "error": f"{type(error).__name__}: {error}"}
