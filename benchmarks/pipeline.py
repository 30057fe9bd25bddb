"""
How long does a whole picture take, from the prompt to pixels, and which stage takes it?

    python benchmarks/pipeline.py [--dtypes bfloat16 float32] [--cpu-time] [--distinct-layers 4]
    python benchmarks/pipeline.py --low-memory FOLDER [--dtypes float32] [--repeats 0]

Random weights of the published sizes, 256 × 256 pixels, guidance 8: one picture that finds its weights in memory but is the
first call, then others. `--small` is the embedded model as it comes, without its prior.

In float32 all models take 24 GiB. With `--distinct-layers N`, equal layers of ByT5-XL and of the prior take turns with the
weights of N: as long as these are larger than the processor's caches, calls take the same time, in less memory. With
`--low-memory FOLDER`, all weights are written once to FOLDER, 12 GB or, in float32, 24 GB, and `low_memory=True` maps them
while a model is called: then a stage's time includes reading.

CLIP has as many tokens as the prompt has bytes, more than its own tokenizer makes of it.
"""

import argparse
import functools
import gc
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from inference import machine, processor_time
from memory import published_models, random_weights

from paella_diffusers import EMOJI_MODEL, PaellaPipeline, PaellaScheduler

PROMPT = "an astronaut riding a horse"


def full_size(dtype: torch.dtype, distinct_layers: int) -> PaellaPipeline:
    from diffusers import DDPMWuerstchenScheduler
    from transformers import ByT5Tokenizer

    models = published_models()
    for name, model in models.items():
        random_weights(model, dtype, distinct_layers if name in ("text_encoder", "prior") else 0)
    return PaellaPipeline(
        **models,
        scheduler=PaellaScheduler(),
        tokenizer=ByT5Tokenizer(),
        tokenizer_2=ByT5Tokenizer(),
        prior_scheduler=DDPMWuerstchenScheduler(),
    )


def on_disk(dtype: str, folder: Path) -> PaellaPipeline:
    """The same with its weights on disk; a process of its own writes them, so that this one's memory is the pictures'."""
    place = folder / dtype
    if not (place / "model_index.json").exists():
        code = f"import memory, pathlib, sys, torch; memory.save_pipeline(pathlib.Path(sys.argv[1]), torch.{dtype})"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", code, str(place)], check=True, env=environment)
    return PaellaPipeline.from_pretrained(place, dtype=getattr(torch, dtype), low_memory=True)


class Stages:
    """What the stages of a pipeline's calls take, by a clock."""

    def __init__(self, pipe: PaellaPipeline, clock):
        self.pipe, self.clock, self.seconds = pipe, clock, {}
        for stage, owner, name in (
            ("ByT5", pipe.text_encoder, "forward"),
            ("CLIP", pipe.text_encoder_2, "forward"),
            ("prior", pipe, "sample_prior"),
            ("U-Net", pipe.unet, "encode_conditioning"),
            ("U-Net", pipe.unet, "forward"),
            ("VQGAN", pipe.vqgan, "decode_indices"),
        ):
            setattr(owner, name, functools.partial(self.call, stage, getattr(owner, name)))

    def call(self, stage: str, method, *args, **kwargs):
        start = self.clock()
        output = method(*args, **kwargs)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self.clock() - start
        return output

    def picture(self, **call) -> dict[str, float]:
        """Seconds of each stage of one call, and of the rest and all of it."""
        self.seconds = {}
        start = self.clock()
        self.pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call)
        total = self.clock() - start
        rest = total - sum(self.seconds.values())
        return self.seconds | {"drawing tokens, and the rest": rest, "picture": total}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prior-steps", type=int, default=60)
    parser.add_argument(
        "--repeats", type=int, default=3, help="calls after the first, of which the median is taken; 0: the first alone"
    )
    parser.add_argument("--cpu-time", action="store_true", help="of all threads, where other programs are running")
    parser.add_argument("--distinct-layers", type=int, default=0, metavar="N", help="in ByT5-XL and the prior; 0: all")
    parser.add_argument("--low-memory", type=Path, metavar="FOLDER", help="weights are here, on disk")
    parser.add_argument("--small", action="store_true", help="the embedded model")
    args = parser.parse_args()

    print(machine())
    clock = processor_time if args.cpu_time else time.perf_counter
    call = {"num_inference_steps": args.steps}
    for dtype in args.dtypes:
        if args.small:
            pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL, dtype=getattr(torch, dtype))
        elif args.low_memory:
            pipe = on_disk(dtype, args.low_memory)
        else:
            pipe = full_size(getattr(torch, dtype), args.distinct_layers)
        if not args.small:
            call |= {"prior_num_inference_steps": args.prior_steps, "height": 256, "width": 256}
        pipe.set_progress_bar_config(disable=True)
        stages = Stages(pipe, clock)
        first, *later = [stages.picture(**call) for _ in range(1 + args.repeats)]
        later = {stage: statistics.median(picture[stage] for picture in later or [first]) for stage in first}
        names = {"prior": f"prior, {args.prior_steps} steps", "U-Net": f"U-Net, {args.steps} steps"}
        print(f"\n| {dtype} | first picture | later pictures | share of a later one |\n|---|---|---|---|")
        for stage, seconds in later.items():
            print(
                f"| {names.get(stage, stage)} | {first[stage]:.3g} s | {seconds:.3g} s | {seconds / later['picture']:.1%} |"
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"\nPeak memory so far: {peak:.2f} GiB", flush=True)
        del pipe, stages
        gc.collect()  # of models whose methods refer to them


if __name__ == "__main__":
    main()
