"""`paella-diffusers serve`: what can be refused is refused before the model is loaded."""

import argparse
import importlib.util
import ipaddress
import os
from pathlib import Path

from ..about import pip_install
from .address import add_address_options, bind
from .checks import check_adapters, local_model
from .draw import load
from .model_options import add_model_options
from .values import number

KEY_VARIABLE, SHORTEST_KEY = "PAELLA_API_KEY", 16
MODULES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def add_serve(commands):
    """The command and its options."""
    parser = commands.add_parser(
        "serve",
        help="answer other programs as OpenAI's image API does",
        description="Answer other programs as OpenAI's image API does: POST /v1/images/generations, /v1/images/edits and "
        f"/v1/images/variations. It needs `{pip_install('serve')}`.",
    )
    parser.set_defaults(run=serve, scheduler=None)
    _add_address(parser.add_argument_group("address"))
    _add_drawing(parser.add_argument_group("drawing"))
    _add_limits(parser.add_argument_group("limits"))
    add_model_options(parser.add_argument_group("model"))


def serve(args: argparse.Namespace):
    """Load the model and serve it until Ctrl-C or SIGTERM; what has begun is finished then."""
    missing = [module for module in MODULES if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"serve needs {', '.join(missing)}: {pip_install('serve')}")
    key = read_key(args.api_key_file)
    if key is None and not is_loopback(args.host):
        raise ValueError(
            f"--host {args.host} can be reached from other machines, so that an API key is needed: in the file of "
            f"--api-key-file, or in the environment variable {KEY_VARIABLE}."
        )
    if args.max_n > args.max_waiting:
        raise ValueError(f"--max-n {args.max_n} needs a --max-waiting of at least as much, got {args.max_waiting}.")
    check_adapters(args)
    local_model(args)
    with bind(args.host, args.port) as listener:
        pipe = load(args)

        from ..apps.openai_images import Limits
        from ..apps.serve import Settings, run

        limits = Limits(args.max_n, args.max_size, args.max_steps, args.max_upload_mib * 2**20, args.timeout)
        settings = Settings(
            args.model_name or Path(args.model).name,
            args.batch_size,
            args.exact,
            args.max_waiting,
            limits,
            key,
            tuple(args.cors_origin),
        )
        run(pipe, settings, listener)


def read_key(file: Path | None) -> str | None:
    """The API key, from the file or else the environment; None if there is none."""
    if file is None:
        key, source = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
        if key is None:
            return None
    else:
        try:
            key, source = file.read_text(encoding="utf-8"), f"--api-key-file {file}"
        except (OSError, ValueError) as error:
            raise ValueError(f"--api-key-file {file}: {getattr(error, 'strerror', None) or error}.") from None
    key = key.strip()
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{source} must hold an API key of at least {SHORTEST_KEY} letters, digits and signs, such as "
            "`openssl rand -hex 32` makes."
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


# ---------------------------------------------------------------------------------------------------------------- options


def _add_address(group):
    add_address_options(group, port=8000, others="which needs an API key")
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"holds the key that clients must send (default: that in the environment variable {KEY_VARIABLE}, or none)",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="address of a page on which browsers may call the server, such as https://example.org; may be given several "
        "times (default: none)",
    )
    group.add_argument("--model-name", metavar="NAME", help="what clients call the model (default: the end of --model)")


def _add_drawing(group):
    many = number(int, at_least=1, at_most=1024)
    group.add_argument(
        "--batch-size",
        type=many,
        default=8,
        metavar="N",
        help="the most pictures drawn together; of larger ones fewer, in proportion (default: %(default)s)",
    )
    group.add_argument(
        "--exact",
        action="store_true",
        help="pad every batch to the same size: the bits of a picture then depend on its request alone, and a lone request "
        "takes as long as a full batch",
    )


def _add_limits(group):
    group.add_argument(
        "--max-waiting",
        type=number(int, at_least=1, at_most=100_000),
        default=64,
        metavar="N",
        help="the most pictures that wait; further requests are answered 429 (default: %(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=number(float, above=0, at_most=86_400),
        default=300,
        metavar="SECONDS",
        help="the most that a request may take, waiting included (default: %(default)s)",
    )
    integer = number(int, at_least=1)
    for option, default, what in (
        ("--max-n", 10, "pictures in a request"),
        ("--max-size", 1024, "pixels a side, of pictures asked for or uploaded"),
        ("--max-steps", 100, "sampling steps"),
        ("--max-upload-mib", 16, "MiB in a request"),
    ):
        group.add_argument(
            option, type=integer, default=default, metavar="N", help=f"the most {what} (default: %(default)s)"
        )
