"""The command line: `paella-diffusers generate "red heart" --out heart.png`, and one command for each other task."""

import argparse
import gc
import math
import os
import sys
from pathlib import Path

from . import EMOJI_MODEL, __version__

FILMS = (".gif", ".webp", ".png")
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit status: 0, or 2 if the input was refused."""
    parser = argparse.ArgumentParser(prog="paella-diffusers", description="Pictures with Paella.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_commands(commands)
    args = parser.parse_args(argv)
    try:
        convert(args) if args.command == "convert" else run(args)
    except (ValueError, OSError) as error:
        print(f"paella-diffusers {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _add_commands(commands):
    generate = _add_command(commands, "generate", "pictures from prompts", "Make a picture for each prompt.")
    generate.add_argument("prompt", nargs="+", help="what to draw; quote it")
    _add_size(generate)

    edit = _add_command(
        commands,
        "edit",
        "change a picture",
        "Change a picture towards a prompt. With --source-prompt, what is in it is kept by discrete inversion.",
    )
    edit.add_argument("prompt", nargs="+", help="what the result shall show")
    edit.add_argument("--image", type=Path, required=True, metavar="PICTURE")
    edit.add_argument("--source-prompt", metavar="TEXT", help="what the picture shows now")
    edit.add_argument("--strength", type=float, default=0.75, metavar="S", help="share of the picture made anew, in (0, 1]")
    edit.add_argument(
        "--residual-scale", type=float, default=0.9, metavar="L", help="with --source-prompt: what is put back"
    )
    _add_size(edit)

    inpaint = _add_command(commands, "inpaint", "redraw a part of a picture", "Redraw what is white in a mask.")
    inpaint.add_argument("prompt", nargs="+", help="what the whole result shall show")
    inpaint.add_argument("--image", type=Path, required=True, metavar="PICTURE")
    inpaint.add_argument("--mask", type=Path, required=True, metavar="PICTURE", help="white where to draw")

    outpaint = _add_command(commands, "outpaint", "continue a picture", "Continue a picture beyond its edges.")
    outpaint.add_argument("prompt", nargs="+", help="what the whole result shall show")
    outpaint.add_argument("--image", type=Path, required=True, metavar="PICTURE")
    outpaint.add_argument(
        "--padding", type=int, nargs=4, required=True, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help="new pixels"
    )

    vary = _add_command(commands, "vary", "variations of pictures", "Make pictures like others, by their CLIP embeddings.")
    vary.add_argument("prompt", nargs="*", default=[""], help="what to draw, beside")
    vary.add_argument("--image", type=Path, nargs="+", required=True, metavar="PICTURE", help="several are mixed")
    vary.add_argument("--weights", type=float, nargs="+", metavar="W", help="of the attention to each picture")
    _add_size(vary)

    interpolate = _add_command(
        commands,
        "interpolate",
        "a film from one prompt or picture to another",
        "Go from one prompt or picture to another, and back.",
        film=True,
    )
    interpolate.add_argument("a", help="a prompt, or a file that is a picture")
    interpolate.add_argument("b", help="likewise")
    interpolate.add_argument("--frames", type=int, default=16, metavar="N", help="with both ends")
    interpolate.add_argument("--frame-ms", type=int, default=120, metavar="MS", help="how long each is shown")
    _add_size(interpolate)

    convert = commands.add_parser(
        "convert",
        help="between the published layout and diffusers'",
        description="Convert the published checkpoints to a folder in diffusers' layout, or back.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    convert.add_argument("source", help="folder or Hub id, such as dome272/Paella")
    convert.add_argument("folder", type=Path, help="a new one, for the result")
    convert.add_argument("--to-original", action="store_true", help="from diffusers' layout to the published one")
    convert.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    convert.add_argument("--leave-out", nargs="+", default=[], metavar="NAME", help="optional components, such as prior")
    convert.add_argument("--revision", help="of the repository")


def _add_command(commands, name: str, summary: str, description: str, film: bool = False) -> argparse.ArgumentParser:
    """A command with the options that all have."""
    if not film:
        description += " Several pictures also make a contact sheet."
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = commands.add_parser(name, help=summary, description=description, formatter_class=formatter)
    if film:
        parser.add_argument("--out", type=Path, default=Path("paella.gif"), help="film: .gif, .webp or .png")
    else:
        out_help = "picture; with several, the sheet, and OUT-1, OUT-2, … beside it"
        parser.add_argument("--out", type=Path, default=Path("paella.png"), help=out_help)
        parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures for each prompt")
    parser.add_argument("--model", default=EMOJI_MODEL, help="folder or Hub id, in diffusers' or the published layout")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; each further one takes the next")
    parser.add_argument(
        "--steps",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="sampling steps (default: 12, and 32 for discrete inversion)",
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=argparse.SUPPRESS,
        metavar="W",
        help="how strictly to follow the prompt; 1 for no guidance (default: 1.5 with the embedded model, else 8)",
    )
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to keep away from")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--device", default=None, help="such as cpu or cuda; an accelerator if there is one")
    return parser


def _add_size(parser: argparse.ArgumentParser):
    parser.add_argument("--size", type=_size, default=None, metavar="N or WxH", help="pixels; the model's own unless given")


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in (text.split("x") if "x" in text else (text, text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor WIDTHxHEIGHT") from None
    return width, height


def run(args: argparse.Namespace):
    """Read the pictures, load the model, make pictures and write them."""
    film = args.command == "interpolate"
    _check_output(args.out)
    if film and args.out.suffix.lower() not in FILMS:
        raise ValueError(f"--out must end in {', '.join(FILMS)} to be a film, got {args.out}.")
    if not film and args.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {args.num_images}.")
    task, call = _task(args)

    gc.disable()  # imports and loading leave no garbage; searching for it takes a tenth of the time to the first picture
    import paella_diffusers

    pipeline = getattr(paella_diffusers, task)  # imports all that is heavy, quicker than if torch were imported before

    import torch
    from transformers.utils import logging

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = args.device or accelerator
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} is not to be had here: {str(error).splitlines()[0]}") from error
    logging.set_verbosity_error()  # which image processor it takes is no news
    pipe = pipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    pipe.to(device)
    gc.freeze()
    gc.enable()
    guidance_scale = getattr(args, "guidance_scale", 1.5 if args.model == EMOJI_MODEL else 8.0)
    call |= {"guidance_scale": guidance_scale, "negative_prompt": args.negative_prompt}
    if hasattr(args, "steps"):  # or the task's own
        call["num_inference_steps"] = args.steps
    if getattr(args, "size", None):
        call["width"], call["height"] = args.size
    if film:
        frames = pipe.interpolate(**call, generator=torch.Generator().manual_seed(args.seed)).images
        _write_film(frames, args.out, args.frame_ms)
        return
    count = len(args.prompt) * args.num_images
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(count)]
    _write_sheet(pipe(**call, num_images_per_prompt=args.num_images, generator=generators).images, args)


def convert(args: argparse.Namespace):
    """Convert a repository or folder to the other layout."""
    import torch

    from .convert import convert_to_diffusers, convert_to_original

    options = {"dtype": getattr(torch, args.dtype)} | ({"revision": args.revision} if args.revision else {})
    if args.to_original:
        if args.leave_out:
            raise ValueError(
                "--leave-out is for the way to diffusers' layout: the published one has no optional components."
            )
        convert_to_original(args.source, args.folder, **options)
    else:
        convert_to_diffusers(args.source, args.folder, leave_out=tuple(args.leave_out), **options)
    print(args.folder)


def _task(args: argparse.Namespace) -> tuple[str, dict]:
    """The pipeline of a command, and the arguments that only it has."""
    if args.command == "generate":
        return "PaellaPipeline", {"prompt": args.prompt}
    if args.command == "edit":
        call = {"prompt": args.prompt, "image": _read(args.image), "strength": args.strength}
        if args.source_prompt is None:
            return "PaellaImg2ImgPipeline", call
        call |= {"source_prompt": args.source_prompt, "residual_scale": args.residual_scale}
        return "PaellaInversionPipeline", call
    if args.command == "inpaint":
        call = {"prompt": args.prompt, "image": _read(args.image), "mask_image": _read(args.mask)}
        return "PaellaInpaintPipeline", call
    if args.command == "outpaint":
        call = {"prompt": args.prompt, "image": _read(args.image), "padding": tuple(args.padding)}
        return "PaellaInpaintPipeline", call
    if args.command == "vary":
        call = {"prompt": args.prompt, "condition_image": [_read(path) for path in args.image]}
        return "PaellaPipeline", call | {"condition_image_weights": args.weights}
    a, b = (_read(Path(end)) if os.path.isfile(end) else end for end in (args.a, args.b))
    return "PaellaPipeline", {"a": a, "b": b, "num_images": args.frames}


def _read(path: Path):
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture that can be read.") from error


def _write_sheet(images: list, args: argparse.Namespace):
    """One picture as it is; of several each, and a contact sheet."""
    from diffusers.utils import make_image_grid
    from PIL import Image

    count = len(images)
    if count == 1:
        _write(images[0], args.out)
        return
    for number, image in enumerate(images, start=1):
        _write(image, args.out.with_stem(f"{args.out.stem}-{number}"))
    one_row_a_prompt = len(args.prompt) > 1 and args.num_images > 1
    columns = args.num_images if one_row_a_prompt else math.ceil(math.sqrt(count))
    images += [Image.new("RGB", images[0].size, "white")] * (-count % columns)
    _write(make_image_grid(images, rows=len(images) // columns, cols=columns), args.out)


def _write_film(frames: list, path: Path, duration: int):
    """Forwards and back, for ever."""
    there_and_back = [*frames, *frames[-2:0:-1]]
    _write(frames[0], path, save_all=True, append_images=there_and_back[1:], duration=duration, loop=0)


def _check_output(path: Path):
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out must end in .png, .jpg, .webp or another picture format, got {path}.")
    if not path.parent.is_dir():
        raise ValueError(f"--out: the folder {path.parent} does not exist; make it first.")


def _write(image, path: Path, **options):
    """Save a picture, whole or not at all, and say where."""
    unfinished = path.with_stem(f".{path.stem}.{os.getpid()}")
    try:
        image.save(unfinished, **options)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
