"""Taking off the offloading of a pipeline for a time."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def without_offloading(pipeline: Any) -> Iterator[None]:
    """
    The weights of a pipeline's models are in place within, and afterwards offloaded again, to where they were computed with:
    diffusers' loaders forget the device.
    """
    device = getattr(pipeline, "_offload_device", None)
    is_model_offload, is_sequential_offload, _ = pipeline._optionally_disable_offloading(pipeline)
    try:
        yield
    finally:
        if is_model_offload:
            pipeline.enable_model_cpu_offload(device=device)
        elif is_sequential_offload:
            pipeline.enable_sequential_cpu_offload(device=device)


def runs_without_offloading(method: Callable) -> Callable:
    """A method of a pipeline that runs in [`without_offloading`]."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        with without_offloading(self):
            return method(self, *args, **kwargs)

    return wrapper
