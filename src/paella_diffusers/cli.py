"""The command line: `paella-diffusers generate "red heart" --out heart.png`."""

import argparse
import math
import os
import sys
from pathlib import Path

from . import EMOJI_MODEL, __version__

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit status: 0, or 2 if the input was refused."""
    parser = argparse.ArgumentParser(prog="paella-diffusers", description="Text to image with Paella.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"paella-diffusers {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _add_generate(commands):
    parser = commands.add_parser(
        "generate",
        help="pictures from prompts",
        description="Make a picture for each prompt. Several pictures also make a contact sheet.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("prompt", nargs="+", help="what to draw; quote it")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("paella.png"),
        help="picture; with several, the sheet, and OUT-1, OUT-2, … beside it",
    )
    parser.add_argument("--model", default=EMOJI_MODEL, help="folder or Hub id, in diffusers' or the published layout")
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures for each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; each further one takes the next")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="sampling steps")
    parser.add_argument(
        "--guidance-scale", type=float, default=8.0, metavar="W", help="how strictly to follow the prompt; 1 for no guidance"
    )
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to keep away from")
    parser.add_argument("--size", type=_size, default=None, metavar="N or WxH", help="pixels; the model's own unless given")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--device", default=None, help="such as cpu or cuda; an accelerator if there is one")
    parser.set_defaults(run=generate)


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in (text.split("x") if "x" in text else (text, text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor WIDTHxHEIGHT") from None
    return width, height


def generate(args: argparse.Namespace):
    """Load the model, make the pictures and write them."""
    _check_output(args.out)
    if args.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {args.num_images}.")

    import torch
    from diffusers.utils import make_image_grid
    from PIL import Image

    from . import PaellaPipeline

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = args.device or accelerator
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} is not to be had here: {str(error).splitlines()[0]}") from error
    pipe = PaellaPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    pipe.to(device)
    width, height = args.size or (None, None)
    count = len(args.prompt) * args.num_images
    images = pipe(
        args.prompt,
        negative_prompt=args.negative_prompt,
        width=width,
        height=height,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        num_images_per_prompt=args.num_images,
        generator=[torch.Generator().manual_seed(args.seed + i) for i in range(count)],
    ).images
    if count == 1:
        _write(images[0], args.out)
        return
    for number, image in enumerate(images, start=1):
        _write(image, args.out.with_stem(f"{args.out.stem}-{number}"))
    one_row_a_prompt = len(args.prompt) > 1 and args.num_images > 1
    columns = args.num_images if one_row_a_prompt else math.ceil(math.sqrt(count))
    images += [Image.new("RGB", images[0].size, "white")] * (-count % columns)
    _write(make_image_grid(images, rows=len(images) // columns, cols=columns), args.out)


def _check_output(path: Path):
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out must end in .png, .jpg, .webp or another picture format, got {path}.")
    if not path.parent.is_dir():
        raise ValueError(f"--out: the folder {path.parent} does not exist; make it first.")


def _write(image, path: Path):
    """Save a picture, whole or not at all, and say where."""
    unfinished = path.with_stem(f".{path.stem}.{os.getpid()}")
    try:
        image.save(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
