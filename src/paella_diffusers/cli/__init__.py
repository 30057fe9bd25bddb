"""The command line: `paella-diffusers generate "red heart" --out heart.png`, and one command for each other task."""

import logging
import sys

from .messages import Warnings, is_out_of_memory, one_line
from .options import make_parser


def main(argv: list[str] | None = None) -> int:
    """
    Run a command.

    Returns:
        `int`: The exit status: 0; 1 after an error that was not foreseen; 2 if the input was refused; 130 after Ctrl-C.
    """
    args = make_parser().parse_args(argv)
    logger, warnings = logging.getLogger("paella_diffusers"), Warnings(logging.WARNING)
    logger.addHandler(warnings)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.traceback:
            raise
        refused, name = isinstance(error, ValueError | OSError), f"paella-diffusers {args.command}"
        if is_out_of_memory(error):
            print(
                f"{name}: out of memory. Less is needed with a smaller --size or --batch-size, or --dtype bfloat16.",
                file=sys.stderr,
            )
        elif refused:
            print(f"{name}: {one_line(error)}", file=sys.stderr)
        else:
            hint = "`paella-diffusers --traceback …` shows where."
            print(f"{name}: {type(error).__name__}: {one_line(error)} ({hint})", file=sys.stderr)
        return 2 if refused else 1
    finally:
        logger.removeHandler(warnings)
    return 0
