"""
The pictures: three icon sets from npm that draw the same objects in three styles. Some are held out of training.
"""

import base64
import hashlib
import io
import json
import random
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
import torch
from PIL import Image

from paella_diffusers.loaders.atomic import atomic_file

SIZE = 64  # pixels, 16 × 16 tokens
STYLES = ("flat", "3d", "high contrast")
SAME = 0.05  # pictures that differ by less than this root mean square, of pixels in [0, 1], count as the same
HELD_OUT = Path(__file__).parent / "held_out.json"

ICONS = (
    "@iconify-json/fluent-emoji-flat@1.2.6",
    "@iconify-json/fluent-emoji@1.2.7",
    "@iconify-json/fluent-emoji-high-contrast@1.2.6",
)
INTEGRITY = {
    ICONS[0]: "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ICONS[1]: "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
    ICONS[2]: "sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
    "emojilib@4.0.3": "sha512-KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g==",
    "cldr-annotations-full@48.2.0": (
        "sha512-DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ=="
    ),
    "cldr-annotations-derived-full@48.2.0": (
        "sha512-log62km+AOzI7n/NEuNNFV0mg9DWnt67EYCh1RwxZq9dyRuyteB586LT83Ke8TchEfnwI9cIk2P31zO4nTvZmw=="
    ),
}


def npm_file(package: str, member: str, folder: Path) -> Path:
    """
    A file of an npm package, downloaded once into `folder`.

    Raises:
        ValueError: If the downloaded package is not the one whose checksum is known.
    """
    path = folder / re.sub("[@/]", "-", package).strip("-") / Path(member).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True, text=True)
        archive = folder / packed.stdout.split()[-1]
        digest = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != INTEGRITY.get(package, digest):
            raise ValueError(f"{archive} has the checksum {digest}, not that of {package}: delete it and try again.")
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(archive) as files, atomic_file(path) as unfinished:
            unfinished.write_bytes(files.extractfile(f"package/{member}").read())
    return path


def svg_of(icon: dict, defaults: dict) -> str:
    """An icon of an Iconify set, with its own view box; `currentColor` is black."""
    left, top, width, height = (
        icon.get(name, defaults.get(name, value)) for name, value in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}" width="256" height="256" '
        f'color="black">{icon["body"]}</svg>'
    )


def rasterise(svg: str) -> np.ndarray:
    """`(64, 64, 3)` uint8 on white, from 256 × 256 pixels: drawn small, shadows of the shaded set have jagged edges."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, background="white"))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB").reduce(256 // SIZE))


def visible(icons: dict) -> set[str]:
    """Names of a set's icons that are neither skin-tone variants of another nor marked as hidden."""
    tone = re.compile("-(light|medium-light|medium|medium-dark|dark)$")
    return {
        slug
        for slug, icon in icons.items()
        if not icon.get("hidden") and not (tone.search(slug) and tone.sub("", slug) in icons)
    }


@dataclass
class Icons:
    """
    The objects that all three sets draw.

    Args:
        names (`list[str]`): One for each object.
        emoji (`list[str]`): Their Unicode characters, without variation selectors; "" if unknown.
        pixels (`torch.ByteTensor` of shape `(3, num_objects, 3, 64, 64)`): Pictures by style and object, on white.
    """

    names: list[str]
    emoji: list[str]
    pixels: torch.Tensor

    def images(self, style: int | slice, rows=slice(None)) -> torch.Tensor:
        """Pictures in [0, 1], float32."""
        return self.pixels[style, rows].float() / 255


def load(work_dir: Path) -> Icons:
    """All objects; rasterised once, into `work_dir`, which takes about two minutes."""
    sets = [json.loads(npm_file(package, "icons.json", work_dir / "npm").read_text("utf-8")) for package in ICONS]
    slugs = sorted(set.intersection(*(visible(part["icons"]) for part in sets)))
    cache = work_dir / "pixels.npy"
    pixels = np.load(cache) if cache.exists() else None
    if pixels is None or pixels.shape[1] != len(slugs):
        pixels = np.stack([[rasterise(svg_of(part["icons"][slug], part)) for slug in slugs] for part in sets])
        with atomic_file(cache) as unfinished, open(unfinished, "wb") as file:
            np.save(file, pixels)
    codes = json.loads(npm_file(ICONS[0], "chars.json", work_dir / "npm").read_text("utf-8"))
    emoji_of = {}
    for code, slug in codes.items():
        emoji_of.setdefault(slug, "".join(chr(int(part, 16)) for part in code.split("-")).replace("\ufe0f", ""))
    pixels = torch.from_numpy(pixels).permute(0, 1, 4, 2, 3).contiguous()
    return Icons([slug.replace("-", " ") for slug in slugs], [emoji_of.get(slug, "") for slug in slugs], pixels)


def load_icons(work_dir: Path) -> tuple[list[str], torch.Tensor]:
    """Names, and flat pictures `(N, 3, 64, 64)` in [0, 1] on white, of all objects."""
    icons = load(work_dir)
    return icons.names, icons.images(0)


def distances(pictures: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Root mean square differences of pictures `(n, 3, 64, 64)` and `(m, 3, 64, 64)` in [0, 1]: `(n, m)`."""
    return torch.cdist(pictures.flatten(1), others.flatten(1)) / pictures[0].numel() ** 0.5


def is_nearest(apart: torch.Tensor, objects: list[list[int]]) -> torch.BoolTensor:
    """Whether the least of each row's distances `(n, num_objects)` is to one of its objects, or to a picture like theirs."""
    return torch.stack([row[index].amin() <= row.amin() + 1e-3 for row, index in zip(apart, objects)])


def twin_groups(icons: Icons) -> list[list[int]]:
    """
    Objects in groups: together are gender twins, clocks, and objects whose pictures are the same in some style. Of such a
    group one could be copied from another, so that all must be on one side of the split.
    """
    group = list(range(len(icons.names)))

    def find(index: int) -> int:
        while group[index] != index:
            index = group[index]
        return index

    keys = {}
    for index, name in enumerate(icons.names):
        key = "clock" if re.search("(oclock|thirty)$", name) else re.sub("^(man|woman|person|men|women|people) ", "", name)
        group[find(index)] = find(keys.setdefault(key, index))
    for style in range(len(STYLES)):
        images = icons.images(style)
        for one, other in (distances(images, images) < SAME).nonzero().tolist():
            group[find(one)] = find(other)
    groups = {}
    for index in range(len(group)):
        groups.setdefault(find(index), []).append(index)
    return list(groups.values())


def draw_held_out(icons: Icons, count: int = 300, seed: int = 0) -> dict[str, str]:
    """
    Draw at least `count` objects, each with the one style in which it is held out of training; groups of twins are held out
    as a whole, in the same style. Objects that look the same flat and shaded are no test of anything.
    """
    same = (icons.images(0) - icons.images(1)).square().mean((1, 2, 3)).sqrt() < SAME
    groups = [group for group in twin_groups(icons) if len(group) <= 4 and not any(same[i] for i in group)]
    random.Random(seed).shuffle(groups)
    held_out, sizes = {}, [0] * len(STYLES)
    for group in groups:
        if len(held_out) >= count:
            return held_out
        style = sizes.index(min(sizes))  # as many of each
        sizes[style] += len(group)
        held_out |= {icons.names[index]: STYLES[style] for index in group}
    raise ValueError(f"Only {len(held_out)} of {len(icons.names)} objects can be held out, not {count}.")


def training_cells(icons: Icons, path: Path, count: int = 300) -> torch.BoolTensor:
    """
    Which (style, object) pairs are trained on, `(3, num_objects)`: all but those that the file at `path` lists. If there is
    no such file, they are drawn and it is written.
    """
    if not path.exists():
        with atomic_file(path) as unfinished:
            unfinished.write_text(json.dumps(draw_held_out(icons, count), indent=0, sort_keys=True) + "\n")
    held_out = json.loads(path.read_text())
    unknown = sorted(held_out.keys() - set(icons.names))
    if unknown:
        raise ValueError(f"{path} holds out {unknown[:3]}, which are no objects of the icon sets: delete it to draw anew.")
    cells = torch.ones(len(STYLES), len(icons.names), dtype=torch.bool)
    for name, style in held_out.items():
        cells[STYLES.index(style), icons.names.index(name)] = False
    return cells
