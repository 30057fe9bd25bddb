"""One call of a pipeline, as the page makes it: run with a preview after each step, and written as Python to copy."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from .. import EMOJI_MODEL
from .. import __all__ as NAMES
from ..loaders.low_memory import weights_on_disk

DIFFUSERS_SCHEDULERS = ("DiscreteDDIMScheduler", "EntropyBoundScheduler")
_OURS = [name for name in NAMES if name.startswith("Paella")]
SCHEDULERS = [*(name for name in _OURS if name.endswith("Scheduler")), *DIFFUSERS_SCHEDULERS]
GUIDERS = [name for name in _OURS if name.endswith("Guidance") and name != "PaellaSemanticGuidance"]  # it needs prompts
FILM = "save_all=True, append_images=[*images[1:], *images[-2:0:-1]], duration=120, loop=0"  # forwards and back


@dataclass
class Call:
    """
    A call of a pipeline.

    Args:
        pipeline (`str`): The name of its class.
        arguments (`dict`): Those of the call: texts, numbers, pictures, and lists or tuples of them.
        seed (`int`, defaults to 0): Of the call's generator.
        scheduler (`str`, *optional*): The class that takes the place of the model's own, with the same settings.
        guider (`str`, *optional*): The class that takes the place of the model's own, with the same scale.
        is_film (`bool`, defaults to `False`): Whether it is an interpolation, whose pictures are frames.
    """

    pipeline: str
    arguments: dict[str, Any]
    seed: int = 0
    scheduler: str | None = None
    guider: str | None = None
    is_film: bool = False

    def run(self, pipe, on_step: Callable | None = None) -> list[Image.Image]:
        """The pictures, from the components of `pipe`, which stays as it is: other calls may be using it."""
        made = _class(self.pipeline).from_pipe(pipe)
        made.set_progress_bar_config(disable=True)
        if self.scheduler:
            made.scheduler = _class(self.scheduler).from_config(pipe.scheduler.config)
        if self.guider:
            made.guider = _class(self.guider)(**({"guidance_scale": pipe.guider.guidance_scale} if pipe.guider else {}))
        return (made.interpolate if self.is_film else made)(
            **self.arguments,
            generator=torch.Generator().manual_seed(self.seed),
            callback_on_step_end=on_step,
            callback_on_step_end_tensor_inputs=["pred_original_sample"],
        ).images

    def pictures(self) -> dict[str, Image.Image]:
        """The pictures among the arguments, by the names of the files that the code reads."""
        return {file: image for name, value in self.arguments.items() for file, image in _pictures(name, value).items()}

    def code(self, pipe, load_options: dict[str, Any], setup: Sequence[str] = ()) -> str:
        """
        Python that makes the same pictures, in the folder with the files of `pictures`.

        Args:
            pipe ([`PaellaPipelineBase`]): As it was loaded.
            load_options (`dict`): What `from_pretrained` was given beside the dtype and `low_memory`.
            setup (`list[str]`, *optional*): Lines that change `pipe` after it is loaded, such as by adapters.
        """
        source = str(pipe.config.get("_name_or_path"))
        options = {"dtype": pipe.unet.dtype} if pipe.unet.dtype != torch.float32 else {}
        options |= {"low_memory": True} if weights_on_disk(pipe) else {}
        options |= {name: str(value) if isinstance(value, Path) else value for name, value in load_options.items()}
        where, device = "EMOJI_MODEL" if source == EMOJI_MODEL else repr(source), pipe._execution_device.type
        names = {self.pipeline, self.scheduler, self.guider, where if where == "EMOJI_MODEL" else None} - {None}
        theirs = names & {*DIFFUSERS_SCHEDULERS}
        lines = ["import torch"]
        lines += [f"from diffusers import {name}" for name in theirs]
        lines += ["from PIL import Image"] if self.pictures() else []
        lines += [f"from paella_diffusers import {', '.join(sorted(names - theirs))}", ""]
        lines += [f"pipe = {self.pipeline}.from_pretrained({', '.join([where, *map(_keyword, options.items())])})", *setup]
        lines += [f"pipe.to({device!r})"] if device != "cpu" else []
        if self.scheduler:
            lines += [f"pipe.scheduler = {self.scheduler}.from_config(pipe.scheduler.config)"]
        if self.guider:
            scale = "guidance_scale=pipe.guider.guidance_scale" if pipe.guider else ""
            lines += [f"pipe.guider = {self.guider}({scale})"]
        lines += [f"images = pipe{'.interpolate' if self.is_film else ''}("]
        lines += [f"    {_keyword(argument)}," for argument in self.arguments.items()]
        lines += [f"    generator=torch.Generator().manual_seed({self.seed}),", ").images"]
        lines += [f'images[0].save("paella.png"{", " + FILM if self.is_film else ""})']
        return "\n".join(lines) + "\n"

    def save(self, images: list[Image.Image], path: Path):
        """Write the picture, or the film, as the code does."""
        film = {"save_all": True, "append_images": [*images[1:], *images[-2:0:-1]], "duration": 120, "loop": 0}
        images[0].save(path, **film if self.is_film else {})


def _class(name: str) -> type:
    import paella_diffusers

    return getattr(diffusers if name in DIFFUSERS_SCHEDULERS else paella_diffusers, name)


def _pictures(name: str, value) -> dict[str, Image.Image]:
    """An argument's pictures, by the names of their files."""
    if isinstance(value, Image.Image):
        return {f"{name}.png": value}
    several = isinstance(value, list) and all(isinstance(one, Image.Image) for one in value)
    return {f"{name}-{number}.png": one for number, one in enumerate(value)} if several else {}


def _keyword(argument: tuple[str, Any]) -> str:
    """A keyword argument in Python."""
    name, value = argument
    opened = ", ".join(f'Image.open("{file}")' for file in _pictures(name, value))
    if not opened:
        return f"{name}={value!r}"
    return f"{name}=[{opened}]" if isinstance(value, list) else f"{name}={opened}"


# ------------------------------------------------------------------------------------------------------------- running


@dataclass
class Progress:
    """
    Args:
        step (`int`): The number of steps that are done.
        num_steps (`int`): Of all.
        images (`list[PIL.Image.Image]`): What the model now takes the pictures for; or the pictures themselves.
        is_result (`bool`, defaults to `False`): Whether they are that, the last that there is.
    """

    step: int
    num_steps: int
    images: list[Image.Image]
    is_result: bool = False


def watch(call: Call, pipe, preview: Callable, executor: Executor, cancelled: threading.Event) -> Iterator[Progress]:
    """
    Run a call in a thread of the executor. A step's preview is decoded while the next step runs, and steps that end before
    that is done are passed over: the call waits for nobody. If `cancelled` is set, or the iterator closed, the call ends
    with its present step, and there is no result.

    Args:
        call ([`Call`]): What is run.
        pipe ([`PaellaPipelineBase`]): The pipeline.
        preview (`Callable`): Tokens `(num_images, height / 4, width / 4)` to pictures.
        executor (`Executor`): Its threads.
        cancelled (`threading.Event`): Whether to stop.
    """
    steps = queue.SimpleQueue()

    def on_step(made, step, timestep, tensors):
        if cancelled.is_set():
            made._interrupt = True
        elif steps.empty():
            steps.put((step + 1, made.num_timesteps, tensors["pred_original_sample"]))

    future = executor.submit(call.run, pipe, on_step)
    future.add_done_callback(lambda _: steps.put(None))
    num_steps = 0
    try:
        while (taken := steps.get()) is not None:
            step, num_steps, tokens = taken
            if not cancelled.is_set():
                yield Progress(step, num_steps, preview(tokens))
        images = future.result()
        if not cancelled.is_set():
            yield Progress(num_steps, num_steps, images, is_result=True)
    finally:
        cancelled.set()


def make_preview(pipe) -> Callable:
    """A function from tokens to pictures. With `low_memory` it has a VQGAN of its own, so that the U-Net's weights stay."""
    vqgan = pipe.vqgan
    if weights_on_disk(pipe):
        vqgan = type(vqgan).from_config(vqgan.config)
        vqgan.load_state_dict(pipe.vqgan.weights_on_disk.weights.load())
        vqgan.to(pipe._execution_device, pipe.vqgan.dtype).eval()

    @torch.no_grad()
    def preview(tokens: torch.Tensor) -> list[Image.Image]:
        images = vqgan.decode_indices(tokens).sample.clamp(0, 1)
        return pipe.image_processor.postprocess(images, "pil", do_denormalize=[False] * len(images))

    return preview
