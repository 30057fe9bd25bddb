"""The training loop of all stages: it resumes from its last checkpoint, and ends as if it had never stopped."""

import contextlib
import functools
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from paella_diffusers.loaders.atomic import atomic_file

SAVE_SECONDS = 180


def log(work_dir: Path, message: str):
    """Print a line, and append it to the log in the work folder."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}"
    print(line, flush=True)
    with open(work_dir / "log.txt", "a") as file:
        file.write(line + "\n")


@functools.cache
def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones: measured, as its flags do not tell."""

    def seconds(dtype: torch.dtype) -> float:
        matrix, times = torch.ones(1024, 1024, dtype=dtype), []
        for _ in range(5):
            begun = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - begun)
        return min(times)

    return 1.2 * seconds(torch.bfloat16) < seconds(torch.float32)


def autocast():
    """bfloat16 where it is faster."""
    return torch.autocast("cpu", torch.bfloat16) if has_fast_bfloat16() else contextlib.nullcontext()


def adamw(module: nn.Module, lr: float, weight_decay: float = 0.01, fast: str = "") -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone; parameters with `fast` in their names get ten times the learning rate."""
    groups = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = (parameter.ndim >= 2, bool(fast) and fast in name)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": weight_decay * matrix, "lr": lr * (10 if quick else 1)}
            for (matrix, quick), parameters in groups.items()
        ],
        betas=(0.9, 0.99),
        fused=True,
    )


def seed(name: str):
    """Seed torch's global generator by a name: the first weights of a stage do not depend on what ran before it."""
    torch.manual_seed(random.Random(name).getrandbits(48))


def save(path: Path, state: dict):
    """Whole or not at all."""
    with atomic_file(path) as unfinished:
        torch.save(state, unfinished)


def fit(
    name: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int, random.Random], torch.Tensor],
    steps: int,
    work_dir: Path,
    warmup: int = 100,
    average: float | None = None,
    after_step: Callable[[int], None] | None = None,
    report: Callable[[], str] | None = None,
):
    """
    Train with a linear warmup and a cosine decay. `work_dir/name.pt` is written every few minutes; if it is there, training
    goes on from it. All random numbers of a step come from its number, so that a resumed run is the same as one that never
    stopped.

    Args:
        loss: From the step and a random number generator of its own to the loss; torch's global one is seeded as well.
        average (`float`, *optional*): Decay of the exponential moving average of the weights, which are the result if given.
        after_step: Called after each update.
        report: Called at the end with the final weights; what it returns is logged.
    """
    path, start = work_dir / f"{name}.pt", 0
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    averages = None if average is None else [parameter.detach().clone() for parameter in parameters]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1, step / steps)))
    )
    if path.exists():
        state = torch.load(path, weights_only=True)
        start = state["step"]
        module.load_state_dict(state["module"])
        if start < steps:
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            averages = state["averages"]
    if 0 < start < steps:
        log(work_dir, f"{name}: resumed at step {start} of {steps}")
    saved = begun = time.time()
    first, total, module = start, 0.0, module.train()
    for step in range(start, steps):
        seed(f"{name} {step}")
        value = loss(step, random.Random(f"{name} {step} python"))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if averages is not None:
            weight = 1 - min(average, (step + 1) / (step + 10))
            torch._foreach_lerp_(averages, [parameter.detach() for parameter in parameters], weight)
        if after_step is not None:
            after_step(step)
        total += value.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"{name}: the loss is {value.item()} at step {step}; {path} is from before.")
        if step + 1 == steps or time.time() - saved > SAVE_SECONDS:
            seconds = (time.time() - begun) / (step + 1 - first)
            mean = total / (step + 1 - first)
            log(work_dir, f"{name}: step {step + 1} of {steps}, loss {mean:.4f}, {seconds:.2f} s a step")
            state = {"step": step + 1, "optimizer": {}, "schedule": {}, "averages": averages}
            if step + 1 == steps:
                if averages is not None:
                    for parameter, mean in zip(parameters, averages):
                        parameter.data.copy_(mean)
                state["averages"] = None
            else:
                state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            save(path, state | {"module": module.state_dict()})
            saved, begun, first, total = time.time(), time.time(), step + 1, 0.0
    module.eval().requires_grad_(False)
    if report is not None and start < steps:
        log(work_dir, f"{name}: {report()}")
