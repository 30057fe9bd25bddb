"""`paella-diffusers web`: what can be refused is refused before the model is loaded."""

import argparse
import importlib.util
import signal

from ..about import pip_install
from .address import add_address_options, bind
from .checks import check_adapters, local_model
from .draw import load, load_options
from .model_options import add_model_options
from .values import number


def add_web(commands):
    """The command and its options."""
    parser = commands.add_parser(
        "web",
        help="serve a page on which every task is a tab",
        description=f"Serve a page on which every task is a tab. It needs `{pip_install('web')}`.",
    )
    parser.set_defaults(run=web, scheduler=None)
    group = parser.add_argument_group("address")
    add_address_options(group, port=7860, others="without a password")
    many = number(int, at_least=1, at_most=1024)
    group.add_argument(
        "--at-once", type=many, default=1, metavar="N", help="pictures drawn at once; others wait (default: %(default)s)"
    )
    add_model_options(parser.add_argument_group("model"))


def web(args: argparse.Namespace):
    """Load the model and serve its page until Ctrl-C or SIGTERM."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(f"web needs Gradio: {pip_install('web')}")
    check_adapters(args)
    local_model(args)
    with bind(args.host, args.port) as listener:  # or it is refused
        port = listener.getsockname()[1]
    pipe = load(args)

    from ..apps.web import Page, launch

    page = Page(pipe, args.at_once, load_options(args), adapters_code(args))
    on_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C
    try:
        _, address, _ = launch(page.blocks, args.host, port, quiet=True, prevent_thread_lock=True)
        print(f"The page is at {address} until Ctrl-C.", flush=True)
        page.blocks.block_thread()
    finally:
        page.close()
        signal.signal(signal.SIGTERM, on_sigterm)


def adapters_code(args: argparse.Namespace) -> list[str]:
    """The lines of Python that load the adapters as `load` does."""
    if not args.lora:
        return []
    names = [f"lora_{number}" for number in range(len(args.lora))]
    load = [f"pipe.load_lora_weights({source!r}, adapter_name={name!r})" for name, source in zip(names, args.lora)]
    return [*load, f"pipe.set_adapters({names}, {args.lora_scale or [1.0] * len(names)})"]
