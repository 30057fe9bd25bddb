"""What can be refused without the model. Everything here works without torch, whose import takes seconds."""

import argparse
import importlib.util
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..about import pip_install
from ..pipelines.image_reading import load_image, open_image, to_grey
from .output import PICTURES, check_output

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
TEXT, PICTURES_IN = ("text_encoder", "tokenizer"), ("image_encoder", "feature_extractor")  # components


def check(args: argparse.Namespace) -> dict[str, Any]:
    """
    Refuse options that do not go together, files that are missing, and sizes that the model does not allow.

    Returns:
        `dict`: The pictures that the command line names, read: the pipelines' arguments.

    Raises:
        ValueError: Naming the option.
    """
    is_film = args.command == "interpolate"
    check_output(args.out, is_film, 1 if is_film else count(args))
    _check_together(args)
    check_adapters(args)
    model = local_model(args)
    pictures = _read_pictures(args)
    _check_size(args, model, pictures.get("image"))
    return pictures


def count(args: argparse.Namespace) -> int:
    """How many pictures are drawn: for each prompt, or, with regions, in which all prompts are."""
    return args.num_images * (1 if getattr(args, "region_masks", None) else len(args.prompt))


def sheet_size(args: argparse.Namespace) -> tuple[int, int]:
    """Columns and rows of the contact sheet: if several prompts have several pictures each, a row for each prompt."""
    total = count(args)
    is_table = not getattr(args, "region_masks", None) and len(args.prompt) > 1 and args.num_images > 1
    columns = args.num_images if is_table else math.ceil(math.sqrt(total))
    return columns, math.ceil(total / columns)


def check_source(option: str, source: str) -> bool:
    """Whether a model or adapter is a local one; refuse what is neither that nor could be a Hub id."""
    if os.path.exists(source):
        return True
    if not HUB_ID.fullmatch(source):
        raise ValueError(f"{option} {source}: there is no such file or folder, and it is no Hub id, such as owner/name.")
    return False


def check_new_folder(folder: Path):
    """Refuse a folder that cannot be created."""
    if os.path.lexists(folder):
        raise ValueError(f"FOLDER {folder} exists already: choose another folder, or remove it.")
    if not folder.parent.is_dir():
        raise ValueError(f"FOLDER {folder}: the folder {folder.parent} does not exist; make it first.")


# ------------------------------------------------------------------------------------------------ options beside each other


def _check_together(args):
    if getattr(args, "residual_scale", None) is not None and args.source_prompt is None:
        raise ValueError("--residual-scale goes with --source-prompt.")
    if getattr(args, "weights", None) and len(args.weights) != len(args.image):
        raise ValueError(f"--weights has {len(args.weights)} numbers for {len(args.image)} pictures: give one for each.")
    masks = getattr(args, "region_masks", None)
    if masks and len(masks) != len(args.prompt):
        raise ValueError(f"--region-masks has {len(masks)} masks for {len(args.prompt)} prompts: give one for each.")
    if "padding" in args and not any(args.padding):
        raise ValueError("--padding 0 0 0 0 leaves nothing to draw: at one side at least there must be new pixels.")


# ------------------------------------------------------------------------------------------------------------------ model


def check_adapters(args: argparse.Namespace):
    """Refuse adapters that are not there, or that do not go with the other options."""
    if args.lora and args.low_memory:
        raise ValueError("--lora does not go with --low-memory: adapters need the weights in memory.")
    if len(args.lora_scale) not in (0, len(args.lora)):
        raise ValueError(
            f"--lora-scale is given {len(args.lora_scale)} times for {len(args.lora)} of --lora: give each its own."
        )
    if args.lora and importlib.util.find_spec("peft") is None:
        raise ValueError(f"--lora needs PEFT: {pip_install('lora')}")
    for source in args.lora:
        check_source("--lora", source)


@dataclass
class LocalModel:
    """
    Args:
        side (`int`): Height and width, in pixels, that it draws unless told otherwise.
        multiple (`int`): Heights and widths must be multiples of this.
        patch_size (`int`): Pixels that a token covers, a side.
        num_tokens (`int`): Size of the vocabulary.
    """

    side: int
    multiple: int
    patch_size: int
    num_tokens: int


RELEASED = LocalModel(side=256, multiple=32, patch_size=4, num_tokens=8192)


def local_model(args) -> LocalModel | None:
    """What the configuration in a local folder says; None for a Hub id, the published layout, or where it leaves it open."""
    if not check_source("--model", args.model):
        return None
    folder = Path(args.model)
    if not folder.is_dir():
        raise ValueError(f"--model {folder} is a file: give a folder or a Hub id.")
    if args.revision:
        raise ValueError(f"--revision is for Hub repositories, but --model {folder} is a folder.")
    if not (folder / "model_index.json").is_file():
        return None
    index, unet, vqgan = (
        _read_json(folder / name) for name in ("model_index.json", "unet/config.json", "vqgan/config.json")
    )
    needed = TEXT + PICTURES_IN if args.command == "vary" else TEXT
    missing = [name for name in needed if not (index.get(name) or [None])[0]]
    if missing:
        raise ValueError(f"--model {folder} has no {' and no '.join(missing)}, which `{args.command}` needs.")
    try:
        patch_size = vqgan["up_down_scale_factor"] * 2 ** (vqgan["levels"] - 1)
        multiple = patch_size * unet["patch_size"] * 2 ** (len(unet["block_out_channels"]) - 1)
        return LocalModel(unet["sample_size"] * patch_size, multiple, patch_size, unet["num_vq_embeddings"])
    except KeyError:  # its class has a default for it
        return None


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--model {path.parent}: there is no {path.name}.") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"--model: {path} is damaged ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"--model: {path} is damaged: it holds no object.")
    return content


# --------------------------------------------------------------------------------------------------------------- pictures


def _read_pictures(args) -> dict[str, Any]:
    if args.command == "interpolate":
        return {name: _prompt_or_picture(option, getattr(args, name)) for name, option in {"a": "FROM", "b": "TO"}.items()}
    if args.command == "vary":
        return {"condition_image": [_read("--image", path) for path in args.image]}
    if args.command == "generate":
        return {"region_masks": [_read("--region-masks", path, _load_mask) for path in args.region_masks or ()]}
    pictures = {"image": _read("--image", args.image)}
    return pictures | ({"mask_image": _read("--mask", args.mask, _load_mask)} if args.command == "inpaint" else {})


def _read(option: str, path: str | Path, load=load_image) -> Image.Image:
    try:
        return load(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None)  # such as "No such file or directory"
        raise ValueError(f"{option} {path}: {reason}." if reason else f"{option}: {error}") from error


def _load_mask(path: Path) -> Image.Image:
    with open_image(path) as image:
        return to_grey(image, str(path))


def _prompt_or_picture(option: str, text: str) -> str | Image.Image:
    if os.path.isfile(text):
        return _read(option, text)
    Image.init()
    if "/" in text or os.sep in text or os.path.splitext(text)[1].lower() in Image.EXTENSION:
        found = "a folder" if os.path.isdir(text) else "no such file"
        raise ValueError(
            f"{option} {text}: {found}. It is read as a picture's name; a prompt has no slash and no such ending."
        )
    return text


# ------------------------------------------------------------------------------------------------------------------- sizes


def _check_size(args, model: LocalModel | None, image: Image.Image | None):
    """Refuse a size that the model does not allow, or that neither memory nor the file could hold."""
    if args.size and model is not None:
        _check_multiple(*args.size, multiple=model.multiple)
    if "padding" in args and model is not None:
        _check_padding(args.padding, model.patch_size)
    side = (model or RELEASED).side
    width, height = args.size or (side, side)
    at_once = args.frames if args.command == "interpolate" else min(args.batch_size, count(args))
    _check_memory(width, height, at_once, model or RELEASED)
    if image is not None and (not args.size or getattr(args, "padding_mask_crop", None) is not None):
        left, top, right, bottom = getattr(args, "padding", (0, 0, 0, 0))
        width, height = image.width + left + right, image.height + top + bottom
        if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"--padding makes the picture {width}x{height}, more than {Image.MAX_IMAGE_PIXELS} pixels.")
    most = PICTURES[args.out.suffix.lower()]
    if max(width, height) > most:
        raise ValueError(
            f"--out {args.out}: pictures in this format have at most {most} pixels a side, not {width}x{height}."
        )
    if args.command != "interpolate" and (args.size or model is not None or image is not None):
        columns, rows = sheet_size(args)
        if max(columns * width, rows * height) > most:
            raise ValueError(
                f"--out {args.out}: pictures in this format have at most {most} pixels a side, and the contact sheet "
                f"would be {columns * width}x{rows * height}. Choose .png, or generate fewer pictures."
            )


def _check_padding(padding: tuple[int, ...], patch_size: int):
    if any(side % patch_size for side in padding):
        nearest = " ".join(str(-(-side // patch_size) * patch_size) for side in padding)
        given = " ".join(map(str, padding))
        raise ValueError(f"--padding takes multiples of {patch_size} with this model, not {given}. Nearest: {nearest}.")


def _check_multiple(width: int, height: int, multiple: int):
    below = [max(1, side // multiple) * multiple for side in (width, height)]
    above = [-(-side // multiple) * multiple for side in (width, height)]
    if [width, height] != above:
        nearest = " and ".join(dict.fromkeys(f"{side[0]}x{side[1]}" for side in (below, above)))
        raise ValueError(f"--size takes multiples of {multiple} with this model, not {width}x{height}. Nearest: {nearest}.")


def _check_memory(width: int, height: int, at_once: int, model: LocalModel):
    """Refuse what needs more than this machine's memory for the logits alone, in float32."""
    if not hasattr(os, "sysconf"):  # on Windows
        return
    needed = 4 * model.num_tokens * width * height * at_once / model.patch_size**2
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ValueError(
            f"--size {width}x{height}, {at_once} at a time, needs more than {needed / 2**30:,.0f} GiB of memory; this "
            f"machine has {memory / 2**30:,.0f} GiB."
        )
