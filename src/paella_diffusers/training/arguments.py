"""The trainers' command line: diffusers' names, with hyphens or underscores, and why some of them do not apply here."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from diffusers.optimization import SchedulerType

from ..about import pip_install
from .data import INTERPOLATIONS, add_filters

# arguments of diffusers' training scripts that mean nothing for Paella, and why
GAUSSIAN = "it belongs to Gaussian diffusion, and Paella's noise is random tokens"
REFUSED = {
    "--input-perturbation": GAUSSIAN,
    "--noise-offset": GAUSSIAN,
    "--snr-gamma": GAUSSIAN + "; --clean-weight weighs the loss",
    "--prediction-type": GAUSSIAN + "; the clean tokens are predicted",
    "--dream-training": GAUSSIAN,
    "--dream-detail-preservation": GAUSSIAN,
    "--enable-xformers-memory-efficient-attention": "PyTorch's attention is used, which needs no more memory",
    "--non-ema-revision": "a Paella's repository has one set of weights; --revision chooses its revision",
    "--offload-ema": "averages stay on the training device; leave out --use-ema if they do not fit",
    "--validation-epochs": "give --validation-steps",
    # of DreamBooth's scripts
    "--offset-noise": GAUSSIAN,
    "--class-labels-conditioning": "a Paella has no class labels",
    "--tokenizer-name": "a Paella's tokenizers are those of its encoders",
    "--tokenizer-max-length": "captions are as long as they are, up to 768 bytes",
    "--text-encoder-use-attention-mask": "padding is always masked",
    "--pre-compute-text-embeddings": "captions are encoded once in a batch, however often they occur in it",
    "--skip-save-text-encoder": "text encoders are saved as adapters only, if they are trained",
    "--num-validation-images": "a sample sheet has one picture for each of --validation-prompts; repeat a prompt for more",
    "--validation-images": "sample sheets are drawn from --validation-prompts",
    "--validation-scheduler": "sample sheets are drawn with the model's own scheduler",
}


OPTIMIZERS = ["adamw", "prodigy"]
# piecewise constant schedules need rules
SCHEDULES: list[str] = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
MAX_SEED = 4_000_000_000  # NumPy's generator takes 32 bits, and steps and processes are added to the seed


class Refuse(argparse.Action):
    """An argument that is refused with a reason, so that it is not taken for a misspelling."""

    def __init__(self, option_strings: Sequence[str], dest: str, reason: str, **kwargs: Any):
        super().__init__(option_strings, dest, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.reason = reason

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string} does not apply here: {self.reason}.")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds to the help of an argument its default, if there is one to give."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.help is None or action.nargs == 0 or action.default in (None, argparse.SUPPRESS, [], (), {}):
            return action.help
        return f"{action.help} (default: %(default)s)"


class TrainingParser(argparse.ArgumentParser):
    """A parser for which `--batch_size` is `--batch-size`. It also remembers the command, for the model card."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        args = sys.argv[1:] if args is None else list(args)
        spelled = []
        for arg in args:
            name, equals, value = str(arg).partition("=")
            spelled.append(name.replace("_", "-") + equals + value if name.startswith("--") else str(arg))
        parsed, unknown = super().parse_known_args(spelled, namespace)
        if parsed.optimizer == "prodigy" and "--learning-rate" not in [name.partition("=")[0] for name in spelled]:
            parsed.learning_rate = 1.0  # it finds the rate itself, and this only scales what it finds
        parsed.script, parsed.command = Path(sys.argv[0]).name, without_token(args)
        return parsed, unknown


def without_token(command: list[str]) -> list[str]:
    """A command without `--hub-token` and its value."""
    shown, skip = [], False
    for argument in map(str, command):
        name, equals, _ = argument.replace("_", "-").partition("=")
        if skip or name == "--hub-token":
            skip = name == "--hub-token" and not equals
            continue
        shown.append(argument)
    return shown


def training_arguments(description: str, default_steps: int = 1_500_000, **defaults: Any) -> TrainingParser:
    """
    The arguments that all trainers have. `defaults` replace the published U-Net's; the names are the arguments'.
    `default_steps` is `--max-steps` if neither that nor `--num-train-epochs` is given.

    An argument's first name is the attribute's, and the others are diffusers' names for it.
    """
    parser = TrainingParser(description=description)
    _add_data(parser)
    _add_optimisation(parser, default_steps)
    _add_output(parser)
    for name, reason in REFUSED.items():
        parser.add_argument(name, action=Refuse, reason=reason)
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)  # accelerate reads it from the environment
    for name in ("--foreach-ema", "--set-grads-to-none"):  # which is always done
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(default_steps=default_steps, **defaults)
    return parser


def _add_data(parser):
    group = parser.add_argument_group("data")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--data", help="a folder of images with metadata.jsonl, WebDataset shards, or a dataset of the Hub")
    add("--train-data-dir", "--instance-data-dir", dest="data", metavar="DATA", help="the same")
    add("--dataset-name", dest="data", metavar="DATA", help="the same")
    add = group.add_argument
    add("--dataset-config-name", help="the configuration of a dataset of the Hub that has several")
    add("--image-column", default="image", help="the column with the images")
    add("--text-column", "--caption-column", default="text", help="the column with a caption, or a list of them")
    add("--max-train-samples", type=int, help="use so many samples, chosen at random; not with shards")
    add("--resolution", type=int, default=256, help="pixels a side")
    add("--center-crop", action="store_true", help="crop the middle instead of a random part")
    add("--random-flip", action="store_true", help="mirror half of the images, left to right")
    add("--image-interpolation-mode", choices=INTERPOLATIONS, default="bicubic", help="how images are resized")
    add("--num-workers", "--dataloader-num-workers", type=int, default=2, help="processes that read data, for each trainer")
    add_filters(add)


def _add_optimisation(parser, default_steps):
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", "--train-batch-size", type=int, default=16, help="images in a process's pass")
    add("--gradient-accumulation-steps", type=int, default=1, help="passes in a step")
    add("--max-steps", "--max-train-steps", type=int, help=f"optimizer steps, {default_steps} unless given")
    add("--num-train-epochs", type=int, help="passes over the data; not with shards, whose samples are not counted")
    add("--learning-rate", type=float, default=1e-4, help="the highest of the schedule")
    add("--scale-lr", action="store_true", help="multiply the learning rate by the number of images in a step")
    add("--lr-scheduler", choices=SCHEDULES, default="constant_with_warmup", help="as in diffusers")
    add("--warmup-steps", "--lr-warmup-steps", type=int, default=10_000, help="steps until the learning rate is reached")
    add("--lr-num-cycles", type=int, default=1, help="of the schedule cosine_with_restarts")
    add("--lr-power", type=float, default=1.0, help="of the schedule polynomial")
    add("--weight-decay", "--adam-weight-decay", type=float, default=0.01, help="of the optimizer")
    add("--adam-beta1", type=float, default=0.9, help="decay of its mean of gradients")
    add("--adam-beta2", type=float, default=0.999, help="decay of its mean of squared gradients")
    add("--adam-epsilon", type=float, default=1e-8, help="added to their root")
    add(
        "--optimizer",
        type=str.lower,
        choices=OPTIMIZERS,
        default="adamw",
        help="with prodigy, --learning-rate is 1 by default",
    )
    add("--adam-8bit", "--use-8bit-adam", action="store_true", help="bitsandbytes' AdamW with 8-bit states")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are scaled down to this norm")
    add("--use-ema", action="store_true", help="average the weights, with a decay of 0.9999 unless --ema-decay says another")
    add("--ema-decay", type=float, help="average the weights, and publish and sample the averages")
    add("--ema-start", "--ema-update-after-step", type=int, default=0, help="step at which averaging starts")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="accelerate's setting unless given")
    add("--allow-tf32", action="store_true", help="TensorFloat-32 matrix products on NVIDIA GPUs")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--compile", action="store_true", help="torch.compile the model's repeated blocks")
    add("--seed", type=int, default=0, help="of all random numbers")


def _add_output(parser):
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", type=Path, required=True, help="the result; within it: checkpoints, logs, samples")
    add("--resume", "--resume-from-checkpoint", help="`latest`, or a checkpoint's path or name, to resume from")
    add("--skip-batches", type=int, default=0, help="on resuming, leave out so many passes' batches of every process")
    add("--save-every", "--checkpointing-steps", type=int, default=2000, help="steps between checkpoints")
    add("--keep", "--checkpoints-total-limit", type=int, default=2, help="checkpoints to keep")
    add("--sample-every", "--validation-steps", type=int, default=2000, help="steps between sample sheets")
    add("--log-every", "--logging-steps", type=int, default=50, help="steps between reports")
    add("--report-to", default="tensorboard", help="accelerate's trackers: tensorboard, wandb, ..., all, or none")
    add("--tracker-project-name", default="paella", help="the project in these trackers")
    add("--logging-dir", default="logs", help="the trackers' folder, within the output folder unless absolute")
    add("--push-to-hub", action="store_true", help="upload the result")
    add("--hub-model-id", help="the repository to upload to; the output folder's name unless given")
    add("--hub-token", help="the token to upload with; the stored one unless given")


def add_pretrained(parser: argparse.ArgumentParser, what: str, required: bool = True) -> None:
    """Arguments for what training starts from."""
    add = parser.add_argument_group("start").add_argument
    add("--pretrained", "--pretrained-model-name-or-path", required=required, help=what)
    add("--revision", help="its revision on the Hub")
    add("--variant", help="part of its weights' file names, such as fp16")
    add("--cache-dir", help="folder for downloads and prepared data")


def pretrained_options(args: argparse.Namespace) -> dict[str, Any]:
    """`from_pretrained`'s keyword arguments of `add_pretrained`."""
    return {name: value for name in ("revision", "variant", "cache_dir") if (value := getattr(args, name)) is not None}


def check_arguments(args: argparse.Namespace) -> None:
    """
    Refuse what cannot work before anything is loaded, and fill in what follows from other arguments.

    Raises:
        ValueError: Names the argument, its value, and what to give instead.
    """
    counts = ["batch_size", "gradient_accumulation_steps", "save_every", "sample_every", "log_every", "keep", "resolution"]
    for name in counts:
        _at_least(args, name, 1)
    for name in ["max_steps", "num_train_epochs", "max_train_samples"]:
        if getattr(args, name) is not None:
            _at_least(args, name, 1)
    for name in ["num_workers", "warmup_steps", "ema_start", "skip_batches"]:
        _at_least(args, name, 0)
    if not 0 <= args.seed <= MAX_SEED:
        raise ValueError(f"--seed must be from 0 to {MAX_SEED}, got {args.seed}.")
    if args.max_steps is None and args.num_train_epochs is None:
        args.max_steps = args.default_steps
    args.ema_decay = args.ema_decay or (0.9999 if args.use_ema else None)
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        raise ValueError(f"--ema-decay must be between 0 and 1, got {args.ema_decay}.")
    if args.adam_8bit and args.optimizer != "adamw":
        raise ValueError(f"--adam-8bit is of AdamW: leave it out with --optimizer {args.optimizer}.")
    if args.optimizer == "prodigy" and find_spec("prodigyopt") is None:
        raise ImportError(f"--optimizer prodigy needs prodigyopt: {pip_install('train')}")
    if args.adam_8bit and find_spec("bitsandbytes") is None:
        raise ImportError("--adam-8bit needs bitsandbytes: pip install bitsandbytes")
    if args.skip_batches and args.resume is None:
        raise ValueError("--skip-batches leaves out batches after a checkpoint: add --resume latest.")
    available = [str(tracker) for tracker in get_available_trackers()]
    for tracker in [] if args.report_to in ("none", "all") else args.report_to.split(","):
        if tracker not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"--report-to {tracker}: not a tracker; there are {', '.join(LOGGER_TYPE_TO_CLASS)}, all, none."
            )
        if tracker not in available:
            raise ImportError(f"--report-to {tracker}: not installed. pip install {tracker}, or give --report-to none.")


def _at_least(args, name: str, lowest: int):
    if getattr(args, name) < lowest:
        raise ValueError(f"--{name.replace('_', '-')} must be at least {lowest}, got {getattr(args, name)}.")
