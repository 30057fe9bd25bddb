"""
What do approximations save, and what do they cost? On the embedded emoji model.

    pip install ".[emoji]" torchao
    python benchmarks/approximations.py

Each way draws 100 icon names from the same seeds: time against the plain run beside it (the median of pairs, in turns,
batches of 25), the share of tokens that are those of the plain run, and the share of pictures whose nearest icon is the
right one. int8 is torchao's dynamic quantization of all linears, through diffusers' `TorchAoConfig`, the rest in bfloat16.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from emoji_model.data import load_icons
from emoji_model.scoring import nearest

from paella_diffusers import EMOJI_MODEL, PaellaPipeline, PaellaUNet

WAYS = {
    "deep features in every 2nd step": {"deep_feature_interval": 2},
    "deep features in every 3rd step": {"deep_feature_interval": 3},
    "guidance in the first half": {"guidance_steps": 6},
    "guidance in the middle half": {"guidance_steps": (3, 9)},
    "no guidance": {"guidance_scale": None},
    "half of the steps": {"num_inference_steps": 6},
    "early stop, confidence 0.1": {"confidence_threshold": 0.1},
}


def int8_unet() -> PaellaUNet:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    return PaellaUNet.from_pretrained(EMOJI_MODEL, subfolder="unet", quantization_config=config)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("emoji-training"), help="where the icons are, or go")
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--count", type=int, default=100, help="of names")
    parser.add_argument("--int8", action="store_true", help="needs torchao")
    args = parser.parse_args()

    args.work_dir.mkdir(parents=True, exist_ok=True)
    names, images = load_icons(args.work_dir)
    captions = random.Random(0).sample(names, args.count)
    pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)
    ways = {name: (pipe, call) for name, call in WAYS.items()}
    if args.int8:
        ways["int8 linears"] = (PaellaPipeline(**pipe.components | {"unet": int8_unet()}), {})

    def draw(pipe, first, **call):
        """Tokens of one batch, and how long they took."""
        pipe.set_progress_bar_config(disable=True)
        prompts = captions[first : first + 25]
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(prompts))]
        call = {"num_inference_steps": 12, "guidance_scale": args.guidance_scale} | call
        start = time.perf_counter()
        tokens = pipe(prompts, generator=generators, output_type="latent", **call).images
        return tokens, time.perf_counter() - start

    @torch.no_grad()
    def right(tokens) -> float:
        pictures = torch.cat([pipe.vqgan.decode_indices(part).sample.clamp(0, 1) for part in tokens.split(50)])
        return sum(names[i] == caption for i, caption in zip(nearest(pictures, images), captions)) / len(captions)

    draw(pipe, 0)  # to warm up
    print("| way | × faster | same tokens | right pictures |\n|---|---|---|---|")
    for number, (name, (other, call)) in enumerate(ways.items()):
        both = [(draw(pipe, first), draw(other, first, **call)) for first in range(0, args.count, 25)]
        plain, approximated = (torch.cat([pair[i][0] for pair in both]) for i in (0, 1))
        if number == 0:
            print(f"| plain, 12 steps | 1.00 | 100.0% | {right(plain):.1%} |")
        ratio = statistics.median(pair[0][1] / pair[1][1] for pair in both)
        same = (plain == approximated).float().mean().item()
        print(f"| {name} | {ratio:.2f} | {same:.1%} | {right(approximated):.1%} |", flush=True)


if __name__ == "__main__":
    main()
