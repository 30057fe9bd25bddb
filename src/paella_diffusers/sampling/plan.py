"""What a run will do, decided before it begins."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Step:
    """
    One evaluation of the model, and the scheduler's step after it.

    Args:
        index (`int`): From 0.
        timestep (`torch.Tensor`, a scalar): The scheduler's own, as its `step` and callbacks get it.
        level (`torch.Tensor`, a scalar): The noise level t in (0, 1] that the model is told.
        next_level (`float`): The noise level after the step; 0 after the last.
        num_steps (`int`): Steps of the run.
        temperature (`float`, *optional*): Of this step, for schedulers that take one a step.
        num_sweeps (`int`, defaults to 0): Evaluations for the scheduler's corrector, after the step.
        is_sweep (`bool`, defaults to `False`): Whether this is such an evaluation.
    """

    index: int
    timestep: torch.Tensor
    level: torch.Tensor
    next_level: float
    num_steps: int
    temperature: float | None = None
    num_sweeps: int = 0
    is_sweep: bool = False

    @property
    def is_last(self) -> bool:
        return self.index + 1 == self.num_steps

    @property
    def corrector_sweeps(self) -> tuple["Step", ...]:
        """The corrector's evaluations: as this step, but at the level after it."""
        level = self.level.new_tensor(self.next_level)
        return (replace(self, level=level, is_sweep=True, num_sweeps=0),) * self.num_sweeps


@dataclass(frozen=True)
class Plan:
    """
    The steps of a run.

    Args:
        steps (`tuple[Step]`): In order.
        start_level (`float`): The noise level t in (0, 1] that the run begins with.
    """

    steps: tuple[Step, ...]
    start_level: float

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the model, those for the corrector included."""
        return sum(1 + step.num_sweeps for step in self.steps)


def linear_ramp(value: float | tuple[float, float] | list[float] | None, num_steps: int) -> list[float | None]:
    """A value for each step: one number for all, or from the first of two to the last, linearly."""
    first, last = value if isinstance(value, tuple | list) else (value, value)
    return [None] * num_steps if first is None or last is None else torch.linspace(first, last, num_steps).tolist()
