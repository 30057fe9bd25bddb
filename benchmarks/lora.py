"""
Does a LoRA adapter learn new icons without spoiling the others? On two CPU cores, with the embedded model.

    pip install ".[emoji,train]"
    python benchmarks/lora.py

20 icons of another set (Flat Color Icons, MIT, by Icons8), which look and are called otherwise than all that the model
knows, are trained with `examples/train_paella_lora.py`, beside 200 of the old ones, so that these are not forgotten. A
picture is right if, of the 1,589 old and the 20 new icons, the nearest in pixels is the one that was asked for.
"""

import argparse
import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import resvg_py
import torch
from diffusers.utils import make_image_grid
from PIL import Image

from paella_diffusers import EMOJI_MODEL, PaellaPipeline

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from emoji_model.data import load_icons, npm_file
from emoji_model.scoring import draw, nearest

EXAMPLES = Path(__file__).parent.parent / "examples"
PACKAGE = "@iconify-json/flat-color-icons@1.2.3"
NEW = "area-chart circuit cloth crystal-oscillator dam database doughnut-chart electrical-sensor heat-map landscape mind-map"
NEW += " pie-chart podium-with-speaker questions radar-plot scatter-plot sim-card stack-of-photos vip workflow"


def load_new(work_dir: Path) -> tuple[list[str], torch.Tensor]:
    """Names, and images `(20, 3, 64, 64)` in [0, 1] on white."""
    icons = json.loads(npm_file(PACKAGE, "icons.json", work_dir / "flat-color-icons").read_text())["icons"]
    names, images = NEW.split(), []
    for name in names:
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48">{icons[name]["body"]}</svg>'
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=64, height=64, background="white"))
        images.append(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))
    return [name.replace("-", " ") for name in names], torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def write_dataset(folder: Path, new, old):
    """Ten files of each new icon and one of each of 200 old ones, so that half of a batch is new."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(1), []
    rows = [(f"new-{i}-{copy}", *pair) for i, pair in enumerate(zip(*new)) for copy in range(10)]
    rows += [(f"old-{i}", old[0][i], old[1][i]) for i in rng.sample(range(len(old[0])), 200)]
    for file_name, name, image in rows:
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{file_name}.png")
        lines.append(json.dumps({"file_name": f"{file_name}.png", "text": [name, name, f"a {name}", f"the {name} icon"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMOJI_MODEL))
    parser.add_argument("--work-dir", type=Path, default=Path("emoji-training"), help="where the icons are, or go")
    parser.add_argument("--output-dir", type=Path, default=Path("emoji-adapter"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sheet", type=Path, help="write pictures of the new icons there")
    args = parser.parse_args()

    args.work_dir.mkdir(parents=True, exist_ok=True)
    old, new = load_icons(args.work_dir), load_new(args.work_dir)
    images = torch.cat([old[1], new[1]])
    names = [*old[0], *new[0]]
    write_dataset(args.work_dir / "lora-icons", new, old)
    options = ["--data", args.work_dir / "lora-icons", "--pretrained", args.model, "--output-dir", args.output_dir]
    options += ["--resolution", 64, "--batch-size", 32, "--max-steps", args.steps, "--mixed-precision", "bf16"]
    options += ["--lr-scheduler", "cosine", "--label-smoothing", 0, "--clip-text-dropout", 0.1, "--clip-image-dropout", 0.9]
    options += ["--rank", 32, "--learning-rate", 2e-3, "--num-workers", 0, "--resume", "latest"]
    start = time.time()
    subprocess.run([sys.executable, *map(str, [EXAMPLES / "train_paella_lora.py", *options])], check=True)
    print(f"trained in {(time.time() - start) / 60:.1f} minutes")

    captions = random.Random(0).sample(old[0], 200)
    print("| | new icons right | of 200 other captions right |\n|---|---|---|")
    for adapter in (False, True):
        pipe = PaellaPipeline.from_pretrained(args.model)
        pipe.set_progress_bar_config(disable=True)
        if adapter:
            pipe.load_lora_weights(args.output_dir)
        call = {"guidance_scale": 1.5, "use_prior": False}  # the prior has not seen the new icons
        pictures = draw(pipe, new[0] * 5, **call)
        learnt = sum(names[i] == name for i, name in zip(nearest(pictures, images), new[0] * 5)) / len(pictures)
        kept = nearest(draw(pipe, captions, **call), images)
        kept = sum(names[i] == caption for i, caption in zip(kept, captions)) / len(captions)
        print(f"| {'with' if adapter else 'without'} the adapter | {learnt:.1%} | {kept:.1%} |", flush=True)
    if args.sheet:
        rows = torch.cat([new[1], pictures[:20]]).view(4, 10, 3, 64, 64)[[0, 2, 1, 3]].flatten(0, 1)
        make_image_grid(pipe.image_processor.postprocess(rows, do_denormalize=[False] * 40), 4, 10).save(args.sheet)


if __name__ == "__main__":
    main()
