"""Errors and warnings of the pipelines, which name arguments, in the words of the command line."""

import logging
import re
import sys

from tqdm import tqdm

OPTIONS = {  # by argument
    "prompt": "PROMPT",
    "a": "FROM",
    "b": "TO",
    "source_prompt": "--source-prompt",
    "negative_prompt": "--negative-prompt",
    "image": "--image",
    "condition_image": "--image",
    "condition_image_weights": "--weights",
    "mask_image": "--mask",
    "region_masks": "--region-masks",
    "padding": "--padding",
    "padding_mask_crop": "--padding-mask-crop",
    "resize_mode": "--resize-mode",
    "strength": "--strength",
    "residual_scale": "--residual-scale",
    "height": "--size",
    "width": "--size",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "temperature": "--temperature",
    "num_images_per_prompt": "--num-images",
    "num_images": "--frames",
    "scheduler": "--scheduler",
    "low_memory": "--low-memory",
    "dtype": "--dtype",
    "revision": "--revision",
    "variant": "--variant",
    "cache_dir": "--cache-dir",
    "token": "HF_TOKEN",  # these two are read from the environment
    "local_files_only": "HF_HUB_OFFLINE",
}
PHRASES = {
    "`height` and `width` set": "--size sets",
    "`height` and `width`": "--size",
    "`guidance_scale=None`": "--guidance-scale 1",
    "`to(torch.bfloat16)`": "--dtype bfloat16",
    ", or raise `PIL.Image.MAX_IMAGE_PIXELS` if you trust it": "",
}


def in_options(message: str) -> str:
    """A message with options in place of arguments."""
    for phrase, replacement in PHRASES.items():
        message = message.replace(phrase, replacement)
    return re.sub(r"`(\w+)`", lambda name: OPTIONS.get(name[1], name[0]), message)


class Warnings(logging.Handler):
    """Prints the package's warnings in the words of the command line, and not into a progress bar."""

    def emit(self, record: logging.LogRecord):
        tqdm.write(in_options(record.getMessage()), file=sys.stderr)


def one_line(error: BaseException) -> str:
    """What an error says, in a line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return in_options(" ".join(str(error).split()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, for which PyTorch has several classes."""
    return isinstance(error, MemoryError) or any(part in str(error) for part in ("out of memory", "can't allocate memory"))
