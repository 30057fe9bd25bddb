"""
Do DreamBooth and textual inversion teach the embedded model new icons? On one processor core.

    pip install ".[emoji,train]"
    python benchmarks/personalization.py

Each of ten icons of another set (Flat Color Icons, MIT, by Icons8), which the model has never seen, is learned for itself,
from four pictures that differ by a pixel, and drawn from four prompts that training did not have. A picture is right if, of
the old and the ten new icons, the nearest in pixels is the one that was learned. An icon is right if its four pictures are.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from lora import load_new
from PIL import Image

from paella_diffusers import EMOJI_MODEL, PaellaPipeline

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from emoji_model.data import load_icons
from emoji_model.scoring import draw, nearest

ICONS = [
    "circuit",
    "dam",
    "database",
    "doughnut chart",
    "landscape",
    "mind map",
    "pie chart",
    "podium with speaker",
    "sim card",
    "vip",
]
PROMPTS = ["a picture of a {}", "my {} emoji", "this is a {} for you", "a nice {} on a table"]
SHARED = ["--resolution", 64, "--num-workers", 0, "--lr-scheduler", "cosine", "--label-smoothing", 0, "--seed", 0]
SHARED += ["--report-to", "none", "--resume", "latest", "--save-every", 10_000, "--center-crop"]
METHODS = {
    "DreamBooth": ("train_dreambooth", "qxz"),
    "textual inversion": ("train_textual_inversion", "<qxz>"),
}


def options(method: str, args) -> list:
    """The script's arguments for one icon."""
    if method == "DreamBooth":
        own = ["--instance-prompt", "an icon of a qxz", "--rank", 32, "--batch-size", 4, "--learning-rate", 2e-3]
        return [*own, "--warmup-steps", 5, "--max-steps", args.dreambooth_steps]
    own = ["--placeholder-token", "<qxz>", "--initializer-token", "icon", "--num-vectors", args.vectors]
    own += ["--initializer-scale", args.initializer_scale]
    own += ["--batch-size", 4, "--learning-rate", args.inversion_rate, "--warmup-steps", 5]
    return [*own, "--clip-text-dropout", 0, "--max-steps", args.inversion_steps]


def write_pictures(image: torch.Tensor, folder: Path):
    """The icon, and moved by a pixel: the margin is white."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    for number, (left, top) in enumerate([(0, 0), (1, 0), (0, 1), (-1, -1)]):
        moved = Image.new("RGB", picture.size, "white")
        moved.paste(picture, (left, top))
        moved.save(folder / f"{number}.png")


def learn(method: str, name: str, image: torch.Tensor, args) -> PaellaPipeline:
    """The pipeline that has learned an icon; what was learned before is loaded."""
    script, folder = importlib.import_module(METHODS[method][0]), args.output_dir / METHODS[method][0] / name
    write_pictures(image, folder / "pictures")
    command = [*SHARED, *options(method, args), "--pretrained", args.model, "--data", folder / "pictures"]
    if not (folder / "result" / "README.md").exists():
        script.main(script.parse_args([str(part) for part in [*command, "--output-dir", folder / "result"]]))
    pipe = PaellaPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    if method == "DreamBooth":
        pipe.load_lora_weights(folder / "result")
    else:
        for encoder, file in ((pipe.text_encoder, "learned_embeds"), (pipe.text_encoder_2, "learned_embeds_2")):
            pipe.load_textual_inversion(folder / "result", weight_name=f"{file}.safetensors", text_encoder=encoder)
    return pipe


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMOJI_MODEL))
    parser.add_argument("--work-dir", type=Path, default=Path("emoji-training"), help="where the icons are, or go")
    parser.add_argument("--output-dir", type=Path, default=Path("personalization"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--icons", nargs="+", default=ICONS)
    parser.add_argument("--dreambooth-steps", type=int, default=80)
    parser.add_argument("--inversion-steps", type=int, default=600)
    parser.add_argument("--inversion-rate", type=float, default=0.15)
    parser.add_argument("--vectors", type=int, default=32)
    parser.add_argument("--initializer-scale", type=float, default=200.0)
    parser.add_argument("--sheet", type=Path, help="write the icons, and below each its pictures, there")
    args = parser.parse_args()

    torch.set_num_threads(1)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    old, new = load_icons(args.work_dir), load_new(args.work_dir)
    learned = dict(zip(*new))
    known = list(dict.fromkeys([*ICONS, *args.icons]))  # a part of the icons is judged among all
    images = torch.cat([old[1], torch.stack([learned[name] for name in known])])
    rows = [[learned[name] for name in args.icons]]
    for method in args.methods:
        print(f"\n| {method} | right of {len(PROMPTS)} | RMS error | minutes |\n|---|---|---|---|", flush=True)
        pictures, icons_right = [], 0
        for name in args.icons:
            start = time.time()
            pipe = learn(method, name, learned[name], args)
            minutes = (time.time() - start) / 60
            prompts = [prompt.format(METHODS[method][1]) for prompt in PROMPTS]
            pictures.append(draw(pipe, prompts, use_prior=False))
            right = sum(index == len(old[0]) + known.index(name) for index in nearest(pictures[-1], images))
            error = (pictures[-1] - learned[name]).square().mean().sqrt().item()
            icons_right += right == len(prompts)
            print(f"| {name} | {right} | {error:.3f} | {minutes:.1f} |", flush=True)
        print(f"\n{method}: {icons_right} of {len(args.icons)} icons are right in all prompts.", flush=True)
        rows += list(zip(*pictures))
    if args.sheet:
        tiles = torch.stack([picture for row in rows for picture in row])
        tiles = pipe.image_processor.postprocess(tiles, do_denormalize=[False] * len(tiles))
        make_image_grid(tiles, len(rows), len(args.icons)).save(args.sheet)


if __name__ == "__main__":
    main()
