"""
What do approximations save, and what do they cost? On the embedded emoji model.

    pip install ".[emoji]" torchao
    python benchmarks/approximations.py

Each way draws icon names, objects in a style that is new for them, and sentences, from the same seeds: time against the
plain run beside it (the median of pairs, in turns, batches of 25), the share of tokens that are those of the plain run, and
the share of pictures of each kind that are right, with standard errors. Caches are diffusers', as `pipe.unet.enable_cache`
takes them; MagCache is calibrated on other names. int8 is torchao's dynamic quantization of all linears, through diffusers'
`TorchAoConfig`, the rest in bfloat16.
"""

import argparse
import ast
import contextlib
import io
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from emoji_model import prompt_sets
from emoji_model.scoring import decode

from benchmarks.schedulers import standard_error, table
from paella_diffusers import EMOJI_MODEL, PaellaPipeline, PaellaUNet

WAYS = {
    "DeepCache, every 2nd step": {"deep_feature_interval": 2},
    "DeepCache, every 3rd step": {"deep_feature_interval": 3},
    "guidance in the first half": {"guidance_steps": 6},
    "guidance in the middle half": {"guidance_steps": (3, 9)},
    "no guidance": {"guidance_scale": None},
    "half of the steps": {"num_inference_steps": 6},
    "early stop, confidence 0.1": {"confidence_threshold": 0.1},
}


CACHES = {
    "FirstBlockCache, threshold 0.5": FirstBlockCacheConfig(threshold=0.5),
    "TaylorSeer, attention in every 2nd step": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2),
    "TaylorSeer lite, every 2nd step": TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, use_lite_mode=True
    ),
    "PyramidAttentionBroadcast, every 2nd step": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0.0, 1.0)
    ),
}


def mag_cache(draw: Callable, unet: PaellaUNet, threshold: float) -> MagCacheConfig:
    """MagCache with ratios from a run of its own, which prints them."""
    unet.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=12))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        draw()
    unet.disable_cache()
    ratios = next(line for line in printed.getvalue().splitlines() if line.startswith("[1.0"))
    return MagCacheConfig(threshold, num_inference_steps=12, mag_ratios=ast.literal_eval(ratios))


def int8_unet() -> PaellaUNet:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    return PaellaUNet.from_pretrained(EMOJI_MODEL, subfolder="unet", quantization_config=config)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("emoji-training"), help="where the icons are, or go")
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--prompts", type=int, default=200, help="at most so many of each kind")
    parser.add_argument("--int8", action="store_true", help="needs torchao")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="ways whose name has one")
    args = parser.parse_args()

    sets = prompt_sets.load(args.work_dir, args.prompts)
    prompts = [prompt for asked in sets.values() for prompt in asked.prompts]
    others = random.Random(1).sample(sets["names"].icons.names, 25)
    pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)

    def draw(pipe, first, prompts=prompts, cache=None, **call):
        """Tokens of one batch, and how long they took."""
        pipe.set_progress_bar_config(disable=True)
        if cache is not None:
            pipe.unet.enable_cache(cache)
        prompts = prompts[first : first + 25]
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(prompts))]
        call = {"num_inference_steps": 12, "guidance_scale": args.guidance_scale} | call
        start = time.perf_counter()
        tokens = pipe(prompts, generator=generators, output_type="latent", **call).images
        seconds = time.perf_counter() - start
        if cache is not None:
            pipe.unet.disable_cache()
        return tokens, seconds

    def right(tokens) -> list[str]:
        """The share of each kind."""
        parts = decode(pipe, tokens).split([len(asked.prompts) for asked in sets.values()])
        shares = [asked.measure(part)[0] for asked, part in zip(sets.values(), parts)]
        return [f"{share.mean():.1%} ± {standard_error(share):.1%}" for share in shares]

    draw(pipe, 0)  # to warm up
    ways = {name: (pipe, call) for name, call in WAYS.items()}
    ways |= {name: (pipe, {"cache": config}) for name, config in CACHES.items()}
    for threshold in (0.06, 0.12):
        config = mag_cache(lambda: draw(pipe, 0, others), pipe.unet, threshold)
        ways[f"MagCache, threshold {threshold}"] = (pipe, {"cache": config})
    if args.int8:
        ways["int8 linears"] = (PaellaPipeline(**pipe.components | {"unet": int8_unet()}), {})
    if args.only:
        ways = {name: way for name, way in ways.items() if any(word in name for word in args.only)}

    def rows():
        for number, (name, (other, call)) in enumerate(ways.items()):
            both = [(draw(pipe, first), draw(other, first, **call)) for first in range(0, len(prompts), 25)]
            plain, approximated = (torch.cat([pair[i][0] for pair in both]) for i in (0, 1))
            if number == 0:
                yield ["plain, 12 steps", "1.00", "100.0%", *right(plain)]
            ratio = statistics.median(pair[0][1] / pair[1][1] for pair in both)
            yield [name, f"{ratio:.2f}", f"{(plain == approximated).float().mean():.1%}", *right(approximated)]

    table(["way", "× faster", "same tokens", *(f"{len(asked.prompts)} {kind}" for kind, asked in sets.items())], rows())


if __name__ == "__main__":
    main()
