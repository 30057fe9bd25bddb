"""DreamBooth (https://huggingface.co/papers/2208.12242): a few pictures of one thing, beside pictures of its class."""

import argparse
import gc
import random
from copy import copy
from pathlib import Path
from typing import Any, cast

import torch

from ..loaders.atomic import atomic_file
from ..pipelines.pipeline_paella import PaellaPipeline
from .arguments import pretrained_options
from .data import IMAGE_EXTENSIONS, SampleTransform
from .run import TrainingRun
from .unet import Computed

PRECISIONS = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_dreambooth_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the functions here, by the names of diffusers' script."""
    add = parser.add_argument_group("DreamBooth").add_argument
    add("--instance-prompt", required=True, help='the caption of all pictures, with a rare word: "a photo of sks dog"')
    add(
        "--with-prior-preservation",
        action="store_true",
        help="also train on pictures of the class, to keep it",
    )
    add("--class-data-dir", type=Path, help="the class's pictures; what is missing of them the model draws into it")
    add("--class-prompt", help='the caption of these: "a photo of a dog"')
    add("--num-class-images", type=int, default=100, help="how many of them there shall be")
    add("--prior-loss-weight", type=float, default=1.0, help="loss weight of a class's picture; an instance's is 1")
    add("--sample-batch-size", type=int, default=4, help="pictures of the class that are drawn at once")
    add("--prior-generation-precision", choices=list(PRECISIONS), default="fp32", help="the model's while it draws them")


def check_dreambooth_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with the usage if the arguments do not fit together."""
    missing = [name for name in ("class_data_dir", "class_prompt") if getattr(args, name) is None]
    if args.with_prior_preservation and missing:
        parser.error(f"--with-prior-preservation needs --{missing[0].replace('_', '-')}")
    if not args.with_prior_preservation and len(missing) < 2:
        parser.error("--class-data-dir and --class-prompt are of no use without --with-prior-preservation")
    if args.aspect_ratio_buckets:
        parser.error("--aspect-ratio-buckets: DreamBooth's pictures and those of the class have one size; leave it out")
    for name in ("num_class_images", "sample_batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not args.prior_loss_weight >= 0:
        parser.error(f"--prior-loss-weight must be at least 0, got {args.prior_loss_weight}")


class Instances:
    """
    Samples of [`SampleTransform`] with the instance prompt. If there are pictures of the class, each has one of them,
    chosen at random, as `preserved`, another sample. Both have a `weight` in the loss.

    Args:
        transform ([`SampleTransform`]): From a picture to a sample. Its filter and captions are not for the class.
        prompt (`str`): The caption.
        class_pictures (`list[Path]`): The class's pictures.
        class_prompt (`str`, *optional*): Their caption.
        class_weight (`float`, defaults to 1.0): Their weight; that of the others is 1.
    """

    def __init__(
        self,
        transform: SampleTransform,
        prompt: str,
        class_pictures: list[Path],
        class_prompt: str | None,
        class_weight: float = 1.0,
    ):
        self.transform = transform
        self.prompt = prompt
        self.class_pictures = class_pictures
        self.class_prompt = class_prompt
        self.class_weight = class_weight
        self.class_transform: SampleTransform = copy(transform)
        self.class_transform.quality, self.class_transform.captions = None, False

    def __call__(self, raw: dict[str, Any], rng: random.Random) -> dict[str, Any] | None:
        sample = self.transform(raw, rng)
        if sample is None:
            return None
        sample |= {"text": self.prompt, "weight": torch.tensor(1.0)}
        if self.class_pictures:
            raw = {"image": str(rng.choice(self.class_pictures)), "text": None}
            preserved = cast(dict, self.class_transform(raw, rng))  # without a filter
            sample["preserved"] = preserved | {"text": self.class_prompt, "weight": torch.tensor(self.class_weight)}
        return sample


def load_instances(run: TrainingRun) -> None:
    """Give a run's pictures the instance prompt and, with prior preservation, a picture of the class each."""
    args, pictures = run.args, []
    if Computed.read(args.data).parts:
        raise ValueError(f"{args.data} has computed arrays, but DreamBooth takes pictures: give a folder of them.")
    if args.with_prior_preservation:
        draw_class_pictures(run)
        pictures = find_pictures(args.class_data_dir)
    prompts = (args.instance_prompt, pictures, args.class_prompt, args.prior_loss_weight)
    run.stream.transform = Instances(cast(SampleTransform, run.stream.transform), *prompts)


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, without unfinished ones, whose names begin with a dot."""
    found = [path for extension in IMAGE_EXTENSIONS for path in folder.glob(f"[!.]*.{extension}")]
    return sorted(found)


def draw_class_pictures(run: TrainingRun) -> None:
    """
    Have the pretrained model draw what is missing of `--num-class-images`, each process a part. A picture's seed is its
    number: a run that was killed and resumed, or that has other processes, draws the same pictures.
    """
    args, (index, count) = run.args, run.part
    missing = args.num_class_images - len(find_pictures(args.class_data_dir))
    paths = (args.class_data_dir / f"class-{number:05d}.png" for number in range(args.num_class_images))
    wanted = [path for path in paths if not path.exists()][: max(0, missing)]
    run.accelerator.wait_for_everyone()  # before one of them draws, all have looked
    if wanted:
        args.class_data_dir.mkdir(parents=True, exist_ok=True)
        with run.accelerator.local_main_process_first():
            pipe = PaellaPipeline.from_pretrained(args.pretrained, **pretrained_options(args))
        pipe.to(run.accelerator.device, PRECISIONS[args.prior_generation_precision])
        pipe.set_progress_bar_config(disable=not run.accelerator.is_main_process)
        own = wanted[index::count]
        for at in range(0, len(own), args.sample_batch_size):
            _draw(pipe, own[at : at + args.sample_batch_size], args)
        del pipe
        gc.collect()
        torch.cuda.empty_cache()
    run.accelerator.wait_for_everyone()


def _draw(pipe: PaellaPipeline, paths: list[Path], args: argparse.Namespace):
    generators = [torch.Generator().manual_seed(int(path.stem.removeprefix("class-"))) for path in paths]
    prompts = [args.class_prompt] * len(paths)
    images = pipe(prompts, height=args.resolution, width=args.resolution, generator=generators).images
    for path, image in zip(paths, images):
        with atomic_file(path) as unfinished:
            image.save(unfinished, "png")
