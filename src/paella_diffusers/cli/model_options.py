"""Options about the model, which all commands that load one have."""

from pathlib import Path

from .. import EMOJI_MODEL
from .values import device, number

DTYPES = ("float32", "bfloat16", "float16")


def add_model_options(group):
    """Which model is loaded, with what, and where to."""
    group.add_argument(
        "--model",
        default=EMOJI_MODEL,
        help="a folder or Hub id, in diffusers' or the published layout (default: the model in the package)",
    )
    add_hub_options(group)
    group.add_argument("--variant", metavar="NAME", help="variant of the weight files, such as bf16")
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="SOURCE",
        help="LoRA adapter: a file, a folder or a Hub id; may be given several times",
    )
    group.add_argument(
        "--lora-scale",
        action="append",
        default=[],
        type=number(float),
        metavar="S",
        help="scale of the --lora in the same place; may be given several times (default: 1)",
    )
    group.add_argument("--no-prior", action="store_true", help="do not load the prior")
    group.add_argument("--low-memory", action="store_true", help="keep only the weights of the running model in memory")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="data type of the weights (default: %(default)s)")
    group.add_argument(
        "--device", type=device, help="device, such as cpu or cuda (default: an accelerator, if there is one)"
    )


def add_hub_options(parser):
    """Where a model comes from."""
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--cache-dir", type=Path, metavar="FOLDER", help="where downloads are kept")
