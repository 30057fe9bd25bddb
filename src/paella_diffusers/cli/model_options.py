"""Options about the model and its sampling, which several commands have."""

from pathlib import Path

from .. import EMOJI_MODEL
from .values import SCHEDULERS, Scheduler, Temperature, device, number

DTYPES = ("float32", "bfloat16", "float16")
MOST = 10_000  # steps, pictures or frames
MAX_SEED = 2**63 - 1


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


def add_sampling_options(group, steps: str):
    """How pictures are sampled; `steps` says what the number of steps is by default."""
    group.add_argument(
        "--steps",
        type=number(int, at_least=1, at_most=MOST),
        metavar="N",
        help=f"number of sampling steps (default: {steps})",
    )
    group.add_argument(
        "--guidance-scale",
        type=number(float),
        metavar="W",
        help="how strictly to follow the prompt; 1 turns guidance off (default: the model's own)",
    )
    group.add_argument("--negative-prompt", metavar="TEXT", help="text that describes what to avoid")
    group.add_argument(
        "--temperature",
        action=Temperature,
        nargs="+",
        metavar="T",
        help="sampling temperature: one number, or two for the first and the last step (default: the scheduler's own)",
    )
    group.add_argument(
        "--scheduler",
        action=Scheduler,
        nargs="+",
        metavar=("NAME", "SETTING=VALUE"),
        help=f"scheduler and its settings: {', '.join(SCHEDULERS)} (default: the model's own)",
    )
