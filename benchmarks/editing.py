"""
How do the ways of editing a picture compare? Image to image by strength, discrete inversion by λ, and semantic guidance by
scale and threshold, on the embedded model.

    pip install ".[emoji]"
    python benchmarks/editing.py

Distances are root-mean-square differences of pixels in [0, 1]. An edit is right if, of all icons, the nearest in pixels is
the one asked for. Inversion takes 32 steps from noise level 0.75, image to image and semantic guidance 12 steps. Semantic
guidance edits what it draws itself: towards the target and away from the source, in the picture that the source's name gives
with the same seed. It is given the source's icon in no other way, so that its distances are to that picture.
"""

import argparse
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from emoji_model.data import load_icons
from emoji_model.scoring import nearest

from paella_diffusers import EMOJI_MODEL, PaellaImg2ImgPipeline, PaellaInversionPipeline, PaellaPipeline

EDITS = """red heart → blue heart; red heart → green heart; blue heart → yellow heart; orange heart → purple heart
green heart → red heart; purple heart → orange heart; brown heart → blue heart; red circle → blue circle
blue circle → green circle; yellow circle → red circle; purple circle → orange circle; blue square → red square
green square → yellow square; red square → purple square; red apple → green apple; green apple → red apple
blue book → green book; green book → orange book; large blue diamond → large orange diamond
first quarter moon face → last quarter moon face; full moon face → new moon face"""
STRENGTHS = [round(0.1 * i, 1) for i in range(1, 11)]
SCALES = [3.0, 2.0, 1.7, 1.5, 1.3, 1.1, 1.0, 0.9, 0.5]
SEMANTIC = [  # edit scale, threshold, warm-up steps
    (1.0, 0.0, 0),
    (2.0, 0.0, 0),
    (3.0, 0.0, 0),
    (5.0, 0.0, 0),
    (5.0, 0.3, 0),
    (5.0, 0.6, 0),
    (5.0, 0.9, 0),
    (5.0, 0.0, 2),
    (5.0, 0.0, 4),
]


def rms(pictures: torch.Tensor, originals: torch.Tensor) -> float:
    return (pictures - originals).square().mean((1, 2, 3)).sqrt().mean().item()


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def strengths(args, names, images, image_to_image, inversion, call):
    """How far image to image goes by strength, and whether inversion comes back."""
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


def semantic(pipe, sources: list[str], targets: list[str], **call) -> torch.Tensor:
    """The sources' pictures, each edited by semantic guidance of its own; without an edit scale, unedited."""
    pictures = []
    for source, target, generator in zip(sources, targets, generators(len(sources))):
        editing = {"editing_prompt": [target, source], "reverse_editing_direction": [False, True]}
        editing = editing if "edit_guidance_scale" in call else {}
        pictures.append(pipe(source, generator=generator, **editing, **call).images)
    return torch.cat(pictures)


def edits(args, names, images, pipe, image_to_image, inversion, call):
    """Distance to the picture before the edit, and the share of edits that are right."""
    pairs = [edit.strip().split(" → ") for edit in EDITS.replace("\n", ";").split(";")]
    sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
    icons = images[[names.index(source) for source in sources]]
    print(f"{len(pairs)} edits like “{sources[0]}” to “{targets[0]}”:")
    print("| way | distance to the picture before | right | still the source |\n|---|---|---|---|")

    def row(way: str, pictures: torch.Tensor, before: torch.Tensor):
        found = [names[i] for i in nearest(pictures, images)]
        right = sum(name == target for name, target in zip(found, targets)) / len(targets)
        kept = sum(name == source for name, source in zip(found, sources)) / len(targets)
        print(f"| {way} | {rms(pictures, before):.3f} | {right:.0%} | {kept:.0%} |", flush=True)

    if "image" in args.ways:
        for strength in [0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 0.6, 1.0]:
            change = {"image": icons, "strength": strength, "generator": generators(len(pairs))}
            row(f"image to image, strength {strength}", image_to_image(targets, **change, **call).images, icons)
    if "inversion" in args.ways:
        for scale in SCALES:
            change = {"image": icons, "source_prompt": sources, "residual_scale": scale}
            pictures = inversion(targets, **change, generator=generators(len(pairs)), **call).images
            row(f"inversion, λ = {scale}", pictures, icons)
    if "semantic" in args.ways:
        before = semantic(pipe, sources, targets, **call)
        row("semantic guidance, scale 0", before, before)
        for scale, threshold, warmup in SEMANTIC:
            edit = {"edit_guidance_scale": scale, "edit_threshold": threshold, "edit_warmup_steps": warmup}
            way = f"semantic guidance, scale {scale:g}, threshold {threshold:g}, warm-up {warmup}"
            row(way, semantic(pipe, sources, targets, **edit, **call), before)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMOJI_MODEL)
    parser.add_argument("--work-dir", type=Path, default=Path("emoji-training"), help="where the icons are, or go")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    ways = ["strengths", "image", "inversion", "semantic"]
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways, help="what to measure")
    args = parser.parse_args()

    args.work_dir.mkdir(parents=True, exist_ok=True)
    names, images = load_icons(args.work_dir)
    pipe = PaellaPipeline.from_pretrained(args.model)
    pipelines = [pipe, PaellaImg2ImgPipeline.from_pipe(pipe), PaellaInversionPipeline.from_pipe(pipe)]
    for each in pipelines:
        each.set_progress_bar_config(disable=True)
    call = {"guidance_scale": args.guidance_scale, "output_type": "pt"}
    if "strengths" in args.ways:
        strengths(args, names, images, *pipelines[1:], call)
    edits(args, names, images, *pipelines, call)


if __name__ == "__main__":
    main()
