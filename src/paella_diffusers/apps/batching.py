"""The queue of `serve.py`, and its worker, which draws what waits and fits together in one call of a pipeline."""

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ..pipelines.pipeline_base import PaellaPipelineBase
from .rows import Drawn, Row, batch_key, draw

logger = logging.getLogger(__name__)

# Clients that got an answer ask again at once, but not all at the same moment. A call waits for them: in seconds, without
# a new row, and altogether.
QUIET, LONGEST_WAIT = 0.02, 0.2


class QueueFullError(Exception):
    """
    No more rows may wait.

    Args:
        retry_after (`int`): Seconds until there may be room, estimated from the last calls.
    """

    def __init__(self, retry_after: int):
        super().__init__("Too many requests are waiting.")
        self.retry_after = retry_after


@dataclass(eq=False)
class Job:
    """
    A row that somebody waits for. Who waits no longer cancels `result`: a row that has not begun is then not drawn, and a
    call of which nobody waits for any row stops after its current step.

    Args:
        row ([`Row`]): What to draw.
        pipe ([`PaellaPipelineBase`]): With which pipeline.
        preview_steps (`frozenset[int]`): After these steps, counted from 0, `on_preview` is called.
        on_preview (`Callable`, *optional*): Gets a preview (`PIL.Image.Image`); called in the worker's thread.
        result (`Future[Drawn]`): What was drawn, or the error.
    """

    row: Row
    pipe: PaellaPipelineBase
    preview_steps: frozenset[int] = frozenset()
    on_preview: Callable[[Image.Image], None] | None = None
    result: "Future[Drawn]" = field(default_factory=Future)
    key: Hashable = None
    most_rows: int = 1


class Batcher:
    """
    A queue and a thread that empties it, oldest first. Rows with equal keys are drawn in one call.

    Args:
        batch_size (`int`): The most rows in a call, at the model's own size; of larger pictures fewer, in proportion.
        max_waiting (`int`): The most rows that may wait.
        exact (`bool`): Whether the bits of a picture must not depend on its batch, see [`draw`].
        on_call (`Callable`, *optional*): Called after each call of a pipeline with its number of rows and seconds.
    """

    def __init__(
        self, batch_size: int, max_waiting: int, exact: bool = False, on_call: Callable[[int, float], None] | None = None
    ):
        self.batch_size = batch_size
        self.max_waiting = max_waiting
        self.exact = exact
        self.on_call = on_call
        self._waiting: list[Job] = []
        self._reserved = 0  # requests whose body is being read
        self._last_arrival = 0.0
        self._seconds_per_call = 1.0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="paella-batcher", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Rows that wait and that somebody still wants."""
        return sum(not job.result.cancelled() for job in self._waiting)

    @contextmanager
    def reserve(self) -> Iterator[None]:
        """
        Room in the queue for a request that is about to be read.

        Raises:
            QueueFullError: If there is none.
        """
        with self._changed:
            self._check_room(1)
            self._reserved += 1
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= 1

    def submit(self, jobs: Sequence[Job]) -> None:
        """
        Put jobs into the queue, all or none.

        Raises:
            QueueFullError: If there is no room for all.
            ValueError: If a row's arguments are refused.
        """
        for job in jobs:
            job.key = id(job.pipe), batch_key(job.row, job.pipe if self.exact else None)
            job.most_rows = self._most_rows(job)
        with self._changed:
            self._check_room(len(jobs))
            self._waiting += jobs
            self._last_arrival = time.monotonic()
            self._changed.notify()

    def close(self) -> None:
        """Draw what waits, then end the thread; returns when it has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _check_room(self, count: int):
        if self.num_waiting + self._reserved + count > self.max_waiting:
            calls = math.ceil((self.num_waiting + self._reserved) / self.batch_size)
            raise QueueFullError(max(1, math.ceil(calls * self._seconds_per_call)))

    def _most_rows(self, job: Job) -> int:
        """How many rows like this one are in a call at most, so that memory does not grow with their size."""
        arguments, rule = job.row.arguments, job.pipe.size_rule
        if "height" in arguments:
            height, width = arguments["height"], arguments["width"]
        elif "image" in arguments:
            height, width = rule(arguments["image"].height, arguments["image"].width)
        else:
            height = width = rule.own_side
        return min(self.batch_size, max(1, self.batch_size * rule.own_side**2 // (height * width)))

    # --------------------------------------------------------------------------------------------------- the thread

    def _work(self):
        while jobs := self._take():
            self._draw(jobs)

    def _take(self) -> list[Job]:
        """The oldest job and those that can be in its call; none after `close`, once all is drawn."""
        with self._changed:
            began = time.monotonic()
            while True:
                self._waiting = [job for job in self._waiting if not job.result.cancelled()]
                if not self._waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                    began = time.monotonic()
                    continue
                first = self._waiting[0]
                jobs = [job for job in self._waiting if job.key == first.key][: first.most_rows]
                now = time.monotonic()
                rest = min(self._last_arrival + QUIET, began + LONGEST_WAIT) - now
                if len(jobs) == first.most_rows or rest <= 0 or self._closed:
                    self._waiting = [job for job in self._waiting if job not in jobs]
                    return jobs
                self._changed.wait(rest)

    def _draw(self, jobs: list[Job]):
        """Draw jobs in one call; if that fails, each alone, so that a row that cannot be drawn takes no other with it."""
        begun = time.monotonic()
        try:
            drawn = draw(
                jobs[0].pipe,
                [job.row for job in jobs],
                jobs[0].most_rows,
                self.exact,
                callback_on_step_end=StepEnd(jobs),
                callback_on_step_end_tensor_inputs=("pred_original_sample",),
            )
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    if not job.result.cancelled():
                        self._draw([job])
                return
            if not isinstance(error, ValueError):
                logger.exception("A row could not be drawn.")
            _settle(jobs[0].result.set_exception, error)
            return
        if all(job.result.cancelled() for job in jobs):  # it was stopped
            return
        self._seconds_per_call = seconds = time.monotonic() - begun
        if self.on_call is not None:
            self.on_call(len(jobs), seconds)
        for job, result in zip(jobs, drawn):
            _settle(job.result.set_result, result)


class StepEnd:
    """The callback of a call: previews for those who want them, and the end of it when nobody waits for its result."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs

    def __call__(
        self, pipe: PaellaPipelineBase, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        wanted = [index for index, job in enumerate(self.jobs) if not job.result.cancelled()]
        if not wanted:
            pipe._interrupt = True
        wanted = [index for index in wanted if step in self.jobs[index].preview_steps]
        if wanted:
            images: Any = pipe.decode(tensors["pred_original_sample"][wanted])
            for index, image in zip(wanted, images):
                self.jobs[index].on_preview(image)
        return {}


def _settle(set_outcome: Callable, outcome):
    """Give a future its outcome, unless whoever waited has just left."""
    with suppress(InvalidStateError):
        set_outcome(outcome)
