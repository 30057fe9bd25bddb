"""The long attack: `make fuzz`, or `python -m fuzz --minutes 10` with src/ and tests/ on the path. It prints a table."""

import argparse
import itertools
import logging
import resource
import sys
import time
import warnings

import psutil
import torch

from .outcomes import Report
from .subjects import SUBJECTS, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long to try (default: 10)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="subjects whose names have one of these words")
    parser.add_argument("--first", type=int, default=0, help="number of the first round; every number has other inputs")
    args = parser.parse_args()
    names = [name for name in SUBJECTS if not args.only or any(word in name for word in args.only)]
    _be_quiet()
    _limit_memory()
    report, end = Report(), time.monotonic() + 60 * args.minutes
    for number in itertools.count(args.first):
        for name in names:
            if time.monotonic() < end:
                run(name, report, number)
        if time.monotonic() >= end:
            break
    print(report.table())
    if failed := report.failed():
        print(f"\nFailed: {', '.join(failed)}.")
    return bool(failed)


def _be_quiet():
    """Warnings are not what is tried here."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # the models are too small for more


def _limit_memory(gigabytes: int = 8):
    """What asks for much more memory fails, rather than the machine."""
    limit = psutil.Process().memory_info().vms + gigabytes * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    sys.exit(main())
