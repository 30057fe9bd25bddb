"""The commands and their options."""

import argparse
from pathlib import Path

from .. import __version__
from ..about import pip_install
from .batch import add_batch
from .convert import convert
from .draw import draw
from .examples import copy_examples
from .model_options import DTYPES, MAX_SEED, MOST, add_hub_options, add_model_options, add_sampling_options
from .output import FILMS
from .serve import add_serve
from .values import number, size
from .web import add_web

OPTIONAL_COMPONENTS = (
    "text_encoder",
    "tokenizer",
    "text_encoder_2",
    "tokenizer_2",
    "image_encoder",
    "feature_extractor",
    "prior",
    "prior_scheduler",
)


def make_parser() -> argparse.ArgumentParser:
    """The parser; each command sets `run` to the function that runs it."""
    parser = argparse.ArgumentParser(
        prog="paella-diffusers",
        description="Generate and edit pictures with Paella. Without --model, they come from the small "
        "model inside the package, which draws emoji.",
        epilog='A first example: paella-diffusers generate "red heart" --out heart.png',
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="print the whole Python traceback of an error, for a bug report"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_generate,
        _add_edit,
        _add_inpaint,
        _add_outpaint,
        _add_vary,
        _add_interpolate,
        add_batch,
        add_web,
        add_serve,
        _add_convert,
        _add_examples,
    ):
        add(commands)
    return parser


# --------------------------------------------------------------------------------------------------------------- commands


def _add_generate(commands):
    parser = _add_command(
        commands, "generate", "PROMPT [PROMPT ...]", "generate pictures", "Generate a picture for each prompt."
    )
    parser.add_argument("prompt", nargs="+", metavar="PROMPT", help="text that describes the picture; put it in quotes")
    parser.add_argument(
        "--region-masks",
        type=Path,
        nargs="+",
        metavar="PICTURE",
        help="one mask for each prompt: one picture is generated, and each prompt applies where its mask is white",
    )
    _add_drawing(parser)


def _add_edit(commands):
    parser = _add_command(
        commands,
        "edit",
        "PROMPT [PROMPT ...] --image PICTURE",
        "change a picture",
        "Change a picture to match a prompt. --source-prompt keeps its composition (discrete inversion).",
    )
    parser.add_argument("prompt", nargs="+", metavar="PROMPT", help="text that describes the result")
    _add_image(parser)
    parser.add_argument("--source-prompt", metavar="TEXT", help="text that describes the picture as it is now")
    _add_strength(parser, 0.75, "how much of the picture is replaced, above 0 and up to 1")
    parser.add_argument(
        "--residual-scale",
        type=number(float, at_least=0),
        metavar="L",
        help="with --source-prompt: how closely the result keeps to the picture, 0 or more (default: 0.9)",
    )
    _add_drawing(parser, steps="the model's own, mostly 12, or 32 with --source-prompt")


def _add_inpaint(commands):
    parser = _add_command(
        commands,
        "inpaint",
        "PROMPT [PROMPT ...] --image PICTURE --mask PICTURE",
        "replace a part of a picture",
        "Replace the part of a picture where a mask is white.",
    )
    parser.add_argument("prompt", nargs="+", metavar="PROMPT", help="text that describes the whole result")
    _add_image(parser)
    parser.add_argument("--mask", type=Path, required=True, metavar="PICTURE", help="white where the picture is replaced")
    _add_strength(parser, 1.0, "below 1, the masked part is changed rather than replaced, above 0 and up to 1")
    parser.add_argument(
        "--padding-mask-crop",
        type=number(int, at_least=0),
        metavar="N",
        help="crop to the mask and N pixels around it, generate that crop at full size, and paste it back",
    )
    _add_drawing(parser)


def _add_outpaint(commands):
    parser = _add_command(
        commands,
        "outpaint",
        "PROMPT [PROMPT ...] --image PICTURE --padding LEFT TOP RIGHT BOTTOM",
        "extend a picture",
        "Extend a picture beyond its edges.",
    )
    parser.add_argument("prompt", nargs="+", metavar="PROMPT", help="text that describes the whole result")
    _add_image(parser)
    parser.add_argument(
        "--padding",
        type=number(int, at_least=0),
        nargs=4,
        required=True,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="pixels to add at each side: multiples of the model's token size (4 with the published and the embedded model)",
    )
    _add_drawing(parser)


def _add_vary(commands):
    parser = _add_command(
        commands,
        "vary",
        "[PROMPT ...] --image PICTURE [PICTURE ...]",
        "generate variations of pictures",
        "Generate pictures that resemble others, from their CLIP embeddings. Several pictures are mixed.",
    )
    parser.add_argument(
        "prompt", nargs="*", default=[""], metavar="PROMPT", help="text that describes the result (optional)"
    )
    parser.add_argument("--image", type=Path, nargs="+", required=True, metavar="PICTURE", help="the picture, of any size")
    weight = number(float, at_least=0)
    parser.add_argument(
        "--weights",
        type=weight,
        nargs="+",
        metavar="W",
        help="one number of 0 or more for each picture: how strongly it counts (default: 1)",
    )
    _add_drawing(parser)


def _add_interpolate(commands):
    parser = _add_command(
        commands,
        "interpolate",
        "FROM TO",
        "generate a film between two prompts or pictures",
        "Generate a film that goes from one prompt or picture to another, and back.",
    )
    parser.add_argument("a", metavar="FROM", help="the first prompt, or the file of the first picture")
    parser.add_argument("b", metavar="TO", help="the second prompt, or the file of the second picture")
    _add_drawing(parser, is_film=True)


def _add_convert(commands):
    parser = commands.add_parser(
        "convert",
        help="convert between the published layout and diffusers'",
        description="Convert the published checkpoints to a folder in diffusers' layout, or back.",
    )
    parser.set_defaults(run=convert)
    parser.add_argument("source", metavar="SOURCE", help="a folder or a Hub id, such as dome272/Paella")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write the result; must not exist yet")
    parser.add_argument("--to-original", action="store_true", help="convert from diffusers' layout to the published one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="data type of the weights (default: %(default)s)")
    parser.add_argument(
        "--leave-out",
        nargs="+",
        choices=OPTIONAL_COMPONENTS,
        default=[],
        metavar="NAME",
        help=f"components to leave out: {', '.join(OPTIONAL_COMPONENTS)}",
    )
    add_hub_options(parser)


def _add_examples(commands):
    parser = commands.add_parser(
        "examples",
        help="copy the example scripts to a folder",
        description=f"Copy the examples and the training scripts, which need `{pip_install('train')}`.",
    )
    parser.set_defaults(run=copy_examples)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to copy them; must not exist yet")


# ---------------------------------------------------------------------------------------------------------------- options


def _add_command(commands, name: str, usage: str, summary: str, description: str) -> argparse.ArgumentParser:
    """A command that draws. Its usage names prompts first: after an option with several values they would be these."""
    parser = commands.add_parser(
        name, usage=f"paella-diffusers {name} {usage} [OPTION ...]", help=summary, description=description
    )
    parser.set_defaults(run=draw)
    return parser


def _add_image(parser):
    parser.add_argument("--image", type=Path, required=True, metavar="PICTURE", help="the picture, of any size")
    parser.add_argument(
        "--resize-mode",
        choices=("default", "fill", "crop"),
        help="how a picture of other proportions is fitted: stretched (default), with its edges repeated (fill), or "
        "cropped to its middle (crop)",
    )


def _add_strength(parser, default: float, help: str):
    kind = number(float, above=0, at_most=1)
    parser.add_argument("--strength", type=kind, default=default, metavar="S", help=f"{help} (default: %(default)s)")


def _add_drawing(parser, is_film: bool = False, steps: str = "the model's own, mostly 12"):
    """What all commands that draw have."""
    _add_output(parser.add_argument_group("output"), is_film)
    _add_sampling(parser.add_argument_group("sampling"), steps)
    add_model_options(parser.add_argument_group("model"))


def _add_output(group, is_film: bool):
    many = number(int, at_least=1, at_most=MOST)
    if is_film:
        endings = ", ".join(FILMS)
        group.add_argument(
            "--out",
            type=Path,
            default=Path("paella.gif"),
            help=f"file of the film, ending in {endings} (default: %(default)s)",
        )
        frames = number(int, at_least=2, at_most=MOST)
        group.add_argument(
            "--frames",
            type=frames,
            default=16,
            metavar="N",
            help="number of frames from the first to the last (default: %(default)s)",
        )
        duration = number(int, at_least=10, at_most=60_000)
        group.add_argument(
            "--frame-ms",
            type=duration,
            default=120,
            metavar="MS",
            help="milliseconds for which a frame is shown (default: %(default)s)",
        )
    else:
        group.add_argument(
            "--out",
            type=Path,
            default=Path("paella.png"),
            help="file of the picture; of several, a contact sheet, and each in OUT-1, OUT-2, … (default: %(default)s)",
        )
        group.add_argument(
            "--num-images", type=many, default=1, metavar="N", help="number of pictures for each prompt (default: 1)"
        )
        group.add_argument(
            "--batch-size",
            type=many,
            default=4,
            metavar="N",
            help="number of pictures generated together (default: %(default)s)",
        )
    group.add_argument(
        "--size", type=size, metavar="N or WxH", help="size in pixels (default: the input picture's, or the model's own)"
    )


def _add_sampling(group, steps: str):
    seed = number(int, at_least=0, at_most=MAX_SEED)
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="random seed of the first picture; each further picture takes the next one (default: 0)",
    )
    add_sampling_options(group, steps)
