"""Paella's sampling loop. What it works with is passed in: see `denoiser.py`, `steppers.py`, `plan.py`, `steering.py`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


def sample(
    denoiser: Callable,
    stepper: Any,
    plan: Iterable[Any],
    tokens: torch.Tensor,
    noise: torch.Tensor,
    mask: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    stop: Callable | None = None,
    on_step: Callable | None = None,
    steer: Callable | None = None,
) -> torch.Tensor:
    """Paella (https://huggingface.co/papers/2211.07292, algorithm 2): predict all tokens, draw them, re-noise fewer."""
    for step in plan:  # the noise level t falls from 1, or from `strength`, to 0
        logits = denoiser(tokens, step)  # log p(x0 | x_t, c), guided
        tokens, clean = stepper.step(logits, step, tokens, noise, mask, generator)
        for sweep in step.corrector_sweeps:  # at the level just reached
            tokens = stepper.correct(denoiser(tokens, sweep), step, tokens, mask, generator)
        if steer is not None:  # particles are copied and dropped, each with the noise that it began with
            tokens, clean, noise = steer(step, tokens, clean, noise)
        finished = False
        if stop is not None:
            tokens, clean, finished = stop(logits, step, tokens, clean, mask)
        if on_step is not None:
            tokens, interrupted = on_step(step, tokens, clean)
            finished = finished or interrupted
        if finished:
            break
    return tokens
