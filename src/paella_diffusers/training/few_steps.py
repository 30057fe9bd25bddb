"""
Few steps by rectified couplings (ReDi, https://huggingface.co/papers/2507.15897): a U-Net is trained on pairs of initial
noise and of what a teacher made of it. Training as such is `train_unet`, with a pair's own noise.
"""

import argparse
import json
import random
from typing import Any

import torch

from ..loaders.lora import WEIGHT_NAMES
from ..models.unet_paella import PaellaUNet
from ..pipelines.pipeline_paella import PaellaPipeline
from ..sampling.guidance.classifier_free_guidance import PaellaClassifierFreeGuidance
from ..schedulers.scheduling_paella import PaellaScheduler
from .card import publish, publish_files
from .data import ShardStream
from .run import TrainingRun
from .stored import StoredArrays
from .unet import FrozenParts, stored_config, trained_pipeline

PAIR = ("tokens", "noise")
HOW = "pairs are written by `paella-diffusers batch PROMPTS --out FOLDER --output tokens`"


def add_few_steps_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the functions here."""
    add = parser.add_argument_group("few steps").add_argument
    add("--num-inference-steps", type=int, default=1, help="the result's number of steps")
    add("--temperature", type=float, default=0.3, help="the result's sampling temperature; 1 suits an exact student")
    add(
        "--last-round",
        action="store_true",
        help="train at the noise levels of these steps alone, so that the result is of no use for another round",
    )


def check_few_steps_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with the usage if the arguments do not fit together."""
    try:
        few_step_scheduler(args)
    except ValueError as error:
        parser.error(str(error))
    if args.aspect_ratio_buckets:
        parser.error("--aspect-ratio-buckets crops pictures, but pairs have the size that they were drawn in; leave it out")
    for name in ("text_dropout", "clip_text_dropout"):
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} trains for guidance, which a few steps do without; leave it out")


def few_step_scheduler(args: argparse.Namespace, **sizes: Any) -> PaellaScheduler:
    """
    The sampler of the result. It re-noises to the initial noise, as always: so a noisy grid is a mixture of a picture and of
    its own noise, as in training.
    """
    return PaellaScheduler(args.num_inference_steps, temperature=args.temperature, noise_source="initial", **sizes)


def configure_few_steps(pipe: PaellaPipeline, args: argparse.Namespace) -> PaellaPipeline:
    """Let a pipeline's calls have few steps, no guidance and no prior unless told otherwise."""
    pipe.scheduler = few_step_scheduler(args, num_vq_embeddings=pipe.unet.config.num_vq_embeddings)
    pipe.guider = PaellaClassifierFreeGuidance(guidance_scale=1.0)
    pipe.register_to_config(use_prior=False)
    return pipe


class PairParts(FrozenParts):
    """
    The pipeline around a U-Net that learns pairs, configured for few steps.

    Args:
        run ([`TrainingRun`]): Its data are shards of `paella-diffusers batch … --output tokens`.

    Raises:
        ValueError: If they are not, or if a first pair is of no use for this model.
    """

    def __init__(self, run: TrainingRun):
        self._size = check_pairs(run)
        super().__init__(run)
        run.args.resolution = self._size[0] * self.pipe.vqgan.patch_size  # for the model card
        configure_few_steps(self.pipe, run.args)

    def _prepare_data(self, computed) -> tuple[int, int]:
        return self._size  # what the stream shall take, it was told by `check_pairs`


def check_pairs(run: TrainingRun) -> tuple[int, int]:
    """
    Tell a run's stream that it reads pairs, and try one. Nothing of the model is loaded but its configuration.

    Returns:
        Height and width of the pairs in tokens.
    """
    data, stream = run.args.data, run.stream
    num_tokens = ({"num_vq_embeddings": 8192} | stored_config(PaellaUNet, "unet", run.args))["num_vq_embeddings"]
    if not isinstance(stream, ShardStream):
        raise ValueError(f"--data {data} has no shards: {HOW}.")
    first = next(stream.raw_samples(0, 1), None)
    if first is None:
        raise ValueError(f"--data {data} has no pair: {HOW}.")
    *_, name, read = first
    raw = read()
    made = json.loads(raw["metadata"] or "{}")
    _check_origin(name, made.get("made_with", {}), made.get("arguments", {}), num_tokens)
    try:
        size = _pair_arrays(num_tokens).read(raw)["tokens"].shape
        stream.transform.arrays = _pair_arrays(num_tokens, size)
        if stream.transform(raw, random.Random(0)) is None:
            raise ValueError("it is filtered out, but pairs have no such metadata: leave out --min-size and the like")
    except Exception as error:
        raise ValueError(f"--data {data}: {name} is no pair for this model: {error}; {HOW}.") from error
    return size


def _check_origin(name: str, made_with: dict, arguments: dict, num_tokens: int):
    """Refuse pairs of another vocabulary, or of more conditioning than is in them."""
    drawn_with = made_with.get("scheduler", {}).get("num_vq_embeddings", num_tokens)
    if drawn_with != num_tokens:
        raise ValueError(f"{name} was drawn by a model of {drawn_with} tokens, but --pretrained has {num_tokens}.")
    used = arguments.get("use_prior")
    if made_with.get("use_prior", False) if used is None else used:
        raise ValueError(
            f"{name} was drawn with the prior, whose image embedding is not in it: draw pairs with the option --no-prior."
        )


def _pair_arrays(num_tokens: int, size: tuple[int | None, int | None] = (None, None)) -> StoredArrays:
    return StoredArrays(dict.fromkeys(PAIR, size), num_tokens, PAIR)


def publish_pipeline(run: TrainingRun, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Write the pretrained pipeline with the trained U-Net, configured for few steps."""
    publish(run, configure_few_steps(trained_pipeline(run.args, config, weights), run.args))


def publish_adapter(run: TrainingRun, frozen: PairParts) -> None:
    """Write the model card of an adapter, which cannot carry a configuration: the card has the call that it needs."""
    args = run.args
    settings = f"num_inference_steps={args.num_inference_steps}, temperature={args.temperature:g}"
    call = f'"a prompt", {settings}, guidance_scale=1, use_prior=False'
    publish_files(run, frozen.pipe, WEIGHT_NAMES[:1], is_lora=True, call=call)
