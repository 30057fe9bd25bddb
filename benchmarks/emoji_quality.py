"""
How good is the embedded emoji model? Captions that come out right, by steps, and the VQGAN's reconstructions.

    pip install ".[emoji]"
    python benchmarks/emoji_quality.py [--table]

A picture is right if, of all 1,589 flat icons, the nearest in pixels (squared distance) is the one that was asked for.
Captions are 200 icon names, drawn once and for all; paraphrases are the 80 of `examples/emoji_model/sentences.json`, which
training never saw, each with the icons that count as right. Variations are drawn from the CLIP embedding of a caption's icon
alone.

With `--table` it prints what `examples/train_emoji.py` prints last: all icons by their names, styles that are new for an
object, each conditioning alone, larger canvases, guidance scales and negative prompts.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from diffusers.utils import make_image_grid

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from emoji_model import data, scoring
from emoji_model.captions import BENCHMARK, Captions, colours_of, keywords_of
from emoji_model.data import load_icons
from emoji_model.scoring import draw, nearest

from paella_diffusers import EMOJI_MODEL, PaellaPipeline


@torch.no_grad()
def reconstruction_psnr(vqgan, images: torch.Tensor) -> tuple[float, float]:
    """PSNR in dB: the mean over images, and that of the mean squared error."""
    errors = []
    for pixels in images.split(128):
        reconstruction = vqgan.decode_indices(vqgan.encode(pixels).indices).sample.clamp(0, 1)
        errors.append((reconstruction - pixels).square().mean((1, 2, 3)))
    errors = torch.cat(errors)
    return -10 * errors.log10().mean().item(), -10 * errors.mean().log10().item()


def print_table(args):
    icons = data.load(args.work_dir)
    captions = Captions(icons.names, keywords_of(icons, args.work_dir), colours_of(icons.images(0)))
    cells = data.training_cells(icons, data.HELD_OUT)
    scorer = scoring.Scorer(PaellaPipeline.from_pretrained(args.model), icons, captions, cells, args.limit)
    print(scoring.table(scoring.score(scorer, say=lambda line: print(line, flush=True)), args.model))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMOJI_MODEL)
    parser.add_argument("--work-dir", type=Path, default=Path("emoji-training"), help="where the icons are, or go")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 12, 24])
    parser.add_argument("--guidance-scale", type=float, help="the model's own unless given")
    parser.add_argument("--prior", action=argparse.BooleanOptionalAction, help="the model's own choice unless given")
    parser.add_argument("--sheet", type=Path, help="write the first 100 pictures at 12 steps there")
    parser.add_argument("--table", action="store_true", help="print the table of examples/train_emoji.py instead")
    parser.add_argument("--limit", type=int, help="with --table: at most so many pictures in each row")
    args = parser.parse_args()

    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.table:
        return print_table(args)
    names, images = load_icons(args.work_dir)
    pipe = PaellaPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    print(
        "VQGAN: {:.2f} dB PSNR in the mean, {:.2f} dB from the mean error".format(*reconstruction_psnr(pipe.vqgan, images))
    )
    with torch.no_grad():
        decoded = torch.cat(
            [pipe.vqgan.decode_indices(pipe.vqgan.encode(p).indices).sample.clamp(0, 1) for p in images.split(128)]
        )
    kept = sum(i == index for i, index in enumerate(nearest(decoded, images))) / len(images)
    print(f"icons that stay nearest to themselves through the VQGAN, the ceiling: {kept:.1%}")

    captions = random.Random(0).sample(names, 200)
    paraphrases = json.loads(BENCHMARK.read_text())
    rows = torch.stack([images[names.index(name)] for name in captions])
    icons = pipe.image_processor.postprocess(rows, do_denormalize=[False] * len(rows))
    print(f"right, of {len(captions)} captions, {len(paraphrases)} paraphrases and {len(icons)} variations:")
    print("| steps | captions | their PSNR | paraphrases | variations |\n|---|---|---|---|---|")
    for steps in args.steps:
        call = {"num_inference_steps": steps, "use_prior": args.prior}
        if args.guidance_scale is not None:
            call["guidance_scale"] = args.guidance_scale
        pictures = draw(pipe, captions, **call)
        right = sum(names[i] == caption for i, caption in zip(nearest(pictures, images), captions))
        found = nearest(draw(pipe, list(paraphrases), **call), images)
        understood = sum(names[i] in expected for i, expected in zip(found, paraphrases.values()))
        found = nearest(draw(pipe, [""] * len(icons), icons, **call), images)
        same = sum(names[i] == caption for i, caption in zip(found, captions))
        shares = (right / len(captions), understood / len(paraphrases), same / len(icons))
        psnr = -10 * (pictures - rows).square().mean((1, 2, 3)).log10().mean().item()
        cells = [f"{steps}", f"{shares[0]:.1%}", f"{psnr:.1f} dB", *(f"{share:.1%}" for share in shares[1:])]
        print("|", " | ".join(cells), "|", flush=True)
        if args.sheet and steps == 12:
            sheet = pipe.image_processor.postprocess(pictures[:100], do_denormalize=[False] * 100)
            make_image_grid(sheet, 10, 10).save(args.sheet)


if __name__ == "__main__":
    main()
