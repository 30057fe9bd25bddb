"""Drawing: a command's pipeline is loaded and called for a few pictures at a time, and these are written."""

import argparse
import gc
import math
import os
from typing import Any

from tqdm import tqdm

from .checks import check, count, sheet_size
from .output import numbered, write, write_film, write_sheet

PIPELINES = {  # of the other commands `PaellaPipeline`
    "edit": "PaellaImg2ImgPipeline",
    "inpaint": "PaellaInpaintPipeline",
    "outpaint": "PaellaInpaintPipeline",
}
ARGUMENTS = {  # of the pipelines' calls, by option
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "negative_prompt": "negative_prompt",
    "temperature": "temperature",
    "source_prompt": "source_prompt",
    "residual_scale": "residual_scale",
    "strength": "strength",
    "padding": "padding",
    "padding_mask_crop": "padding_mask_crop",
    "resize_mode": "resize_mode",
    "weights": "condition_image_weights",
    "frames": "num_images",
}


def draw(args: argparse.Namespace):
    """Run a command that draws: what can be checked is checked before the model is loaded."""
    pictures = check(args)
    pipe = load(args)
    call = arguments(args, pictures)
    if "region_masks" in call:
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        call["region_masks"] = [mask.resize(args.size or (side, side)) for mask in call["region_masks"]]
    if args.command == "interpolate":
        draw_film(pipe, call, args)
    else:
        draw_pictures(pipe, call, args)


def arguments(args: argparse.Namespace, pictures: dict[str, Any]) -> dict[str, Any]:
    """What the pipeline is called with, apart from prompts and generators: only what was given."""
    call = {ARGUMENTS[name]: value for name, value in vars(args).items() if name in ARGUMENTS and value is not None}
    call |= {name: value for name, value in pictures.items() if value}
    if args.size:
        call |= dict(zip(("width", "height"), args.size))
    if args.no_prior:
        call["use_prior"] = False
    return call


def draw_pictures(pipe, call: dict[str, Any], args: argparse.Namespace):
    """Draw a few pictures at a time, and write each as soon as it is drawn; several also make a contact sheet."""
    import torch

    total, images = count(args), []
    with Progress(math.ceil(total / args.batch_size)) as progress:
        for first in range(0, total, args.batch_size):
            numbers = range(first, min(first + args.batch_size, total))
            if "region_masks" in call:
                prompts = {"prompt": args.prompt, "num_images_per_prompt": len(numbers)}
            else:
                prompts = {"prompt": [args.prompt[number // args.num_images] for number in numbers]}
            generators = [torch.Generator().manual_seed(args.seed + number) for number in numbers]
            for image in pipe(**call, **prompts, generator=generators, callback_on_step_end=progress).images:
                images.append(image)
                write(image, numbered(args.out, len(images)) if total > 1 else args.out)
    if total > 1:
        write_sheet(images, args.out, columns=sheet_size(args)[0])


def draw_film(pipe, call: dict[str, Any], args: argparse.Namespace):
    """Draw the frames of an interpolation at once, and write the film."""
    import torch

    generator = torch.Generator().manual_seed(args.seed)
    with Progress(calls=1) as progress:
        frames = pipe.interpolate(**call, generator=generator, callback_on_step_end=progress).images
    write_film(frames, args.out, args.frame_ms)


class Progress:
    """One bar over the steps of all calls of a pipeline: their callback."""

    def __init__(self, calls: int):
        self.calls, self.bar = calls, None

    def __enter__(self):
        return self

    def __call__(self, pipe, step, timestep, tensors) -> dict:
        if self.bar is None:
            self.bar = tqdm(total=self.calls * pipe.num_timesteps, unit="step")
        self.bar.update()
        return {}

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()


# ---------------------------------------------------------------------------------------------------------------- loading


def load(args: argparse.Namespace):
    """The pipeline of a command, on its device, with its scheduler and adapters."""
    gc.disable()  # imports and loading leave no garbage; searching for it takes a tenth of the time to the first picture
    try:
        pipe = _load(args)
    finally:
        gc.freeze()
        gc.unfreeze()  # both together: what was loaded counts as old now
        gc.enable()
    return pipe


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `from_pretrained` is given beside the dtype and `low_memory`."""
    options = {name: getattr(args, name) for name in ("revision", "variant", "cache_dir") if getattr(args, name) is not None}
    return options | ({"prior": None, "prior_scheduler": None} if args.no_prior else {})


def _load(args):
    import paella_diffusers

    name = PIPELINES.get(args.command, "PaellaPipeline")
    if getattr(args, "source_prompt", None) is not None:
        name = "PaellaInversionPipeline"
    pipeline = getattr(paella_diffusers, name)  # imports all that is heavy, quicker than if torch were imported before

    import diffusers
    import torch
    import transformers

    device = _device(args.device)
    if args.scheduler:
        _scheduler(*args.scheduler)
    transformers.logging.set_verbosity_error()  # which image processor it takes is no news
    if os.path.isdir(args.model):  # nothing is downloaded: one bar is enough, that of the drawing
        transformers.logging.disable_progress_bar()
        diffusers.logging.disable_progress_bar()
    options = load_options(args) | ({"low_memory": True} if args.low_memory else {})
    pipe = pipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **options)
    if args.scheduler:
        pipe.scheduler = _scheduler(*args.scheduler, config=pipe.scheduler.config)
    if args.lora:
        names = [f"lora_{number}" for number in range(len(args.lora))]
        for name, source in zip(names, args.lora):
            pipe.load_lora_weights(source, adapter_name=name, cache_dir=args.cache_dir)
        pipe.set_adapters(names, args.lora_scale or [1.0] * len(names))
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)  # ours is one over all calls
    return pipe


def _device(name: str | None) -> str:
    """The device that is asked for, or else an accelerator, or else the CPU."""
    import torch

    if name is None:
        return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # of many kinds
        raise ValueError(f"--device {name}: not available on this machine ({str(error).splitlines()[0]}).") from error
    return name


def _scheduler(name: str, settings: dict[str, Any], config: dict[str, Any] | None = None):
    """A scheduler with these settings, and others as in `config`."""
    import diffusers

    import paella_diffusers

    scheduler = getattr(paella_diffusers if name in paella_diffusers.__all__ else diffusers, name)
    try:
        return scheduler.from_config(config or {}, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--scheduler {name}: {error}") from error
