"""
How do the ways of editing a picture compare? Image to image by strength, and discrete inversion by λ, on the embedded model.

    pip install ".[emoji]"
    python benchmarks/editing.py

Distances are root-mean-square differences of pixels in [0, 1]. An edit is right if, of all icons, the nearest in pixels is
the one asked for. Inversion takes 32 steps from noise level 0.75, image to image 12 steps.
"""

import argparse
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from emoji_model.data import load_icons
from emoji_model.scoring import nearest

from paella_diffusers import EMOJI_MODEL, PaellaImg2ImgPipeline, PaellaInversionPipeline

EDITS = """red heart → blue heart; red heart → green heart; blue heart → yellow heart; orange heart → purple heart
green heart → red heart; purple heart → orange heart; brown heart → blue heart; red circle → blue circle
blue circle → green circle; yellow circle → red circle; purple circle → orange circle; blue square → red square
green square → yellow square; red square → purple square; red apple → green apple; green apple → red apple
blue book → green book; green book → orange book; large blue diamond → large orange diamond
first quarter moon face → last quarter moon face; full moon face → new moon face"""
STRENGTHS = [round(0.1 * i, 1) for i in range(1, 11)]
SCALES = [3.0, 2.0, 1.7, 1.5, 1.3, 1.1, 1.0, 0.9, 0.5]


def rms(pictures: torch.Tensor, originals: torch.Tensor) -> float:
    return (pictures - originals).square().mean((1, 2, 3)).sqrt().mean().item()


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMOJI_MODEL)
    parser.add_argument("--work-dir", type=Path, default=Path("emoji-training"), help="where the icons are, or go")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    args = parser.parse_args()

    args.work_dir.mkdir(parents=True, exist_ok=True)
    names, images = load_icons(args.work_dir)
    image_to_image = PaellaImg2ImgPipeline.from_pretrained(args.model)
    inversion = PaellaInversionPipeline.from_pipe(image_to_image)
    for pipe in (image_to_image, inversion):
        pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": args.guidance_scale, "output_type": "pt"}

    some = random.Random(0).sample(range(len(names)), 100)
    originals, own, others = images[some[:50]], [names[i] for i in some[:50]], [names[i] for i in some[50:]]
    print("50 icons, distance to the input:\n| strength | no prompt | its own name | another's |\n|---|---|---|---|")
    for strength in [0.02, 0.05, *STRENGTHS]:
        figures = []
        for prompts, guidance_scale in (([""] * 50, None), (own, args.guidance_scale), (others, args.guidance_scale)):
            change = {"image": originals, "strength": strength, "generator": generators(50)}
            pictures = image_to_image(prompts, **change, **call | {"guidance_scale": guidance_scale}).images
            figures.append(f"{rms(pictures, originals):.3f}")
        print(f"| {strength} | {' | '.join(figures)} |", flush=True)

    tokens = torch.cat([inversion.vqgan.encode(part).indices for part in originals.split(25)])
    call_latent = call | {"output_type": "latent"}
    again = inversion(
        own, image=tokens, source_prompt=own, residual_scale=1.0, generator=generators(50), **call_latent
    ).images
    print(
        f"\nInversion with the source prompt and λ = 1: {(again == tokens).float().mean():.2%} of the tokens of 50 icons.\n"
    )

    edits = [edit.strip().split(" → ") for edit in EDITS.replace("\n", ";").split(";")]
    sources, targets = [source for source, _ in edits], [target for _, target in edits]
    originals = images[[names.index(source) for source in sources]]
    print(f"{len(edits)} edits like “{sources[0]}” to “{targets[0]}”:")
    print("| way | distance to the input | right |\n|---|---|---|")

    def row(way: str, pictures: torch.Tensor):
        right = sum(names[i] == target for i, target in zip(nearest(pictures, images), targets)) / len(targets)
        print(f"| {way} | {rms(pictures, originals):.3f} | {right:.0%} |", flush=True)

    for strength in [0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 0.6, 1.0]:
        pictures = image_to_image(
            targets, image=originals, strength=strength, generator=generators(len(edits)), **call
        ).images
        row(f"image to image, strength {strength}", pictures)
    for scale in SCALES:
        pictures = inversion(
            targets,
            image=originals,
            source_prompt=sources,
            residual_scale=scale,
            generator=generators(len(edits)),
            **call,
        ).images
        row(f"inversion, λ = {scale}", pictures)


if __name__ == "__main__":
    main()
