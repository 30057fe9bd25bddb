"""What options take: argparse calls these, so that a wrong value is refused in its option's name."""

import argparse
import ast
import difflib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

SCHEDULERS = {  # and the files that define them
    "PaellaScheduler": "paella_diffusers/schedulers/scheduling_paella.py",
    "PaellaConfidenceScheduler": "paella_diffusers/schedulers/scheduling_paella_confidence.py",
    "PaellaFlowMatchEulerScheduler": "paella_diffusers/schedulers/scheduling_paella_flow_match_euler.py",
    "PaellaFlowMatchTrapezoidalScheduler": "paella_diffusers/schedulers/scheduling_paella_flow_match_trapezoidal.py",
    "PaellaPsiScheduler": "paella_diffusers/schedulers/scheduling_paella_psi.py",
    "DiscreteDDIMScheduler": "diffusers/schedulers/scheduling_discrete_ddim.py",
    "EntropyBoundScheduler": "diffusers/schedulers/scheduling_entropy_bound.py",
}
ORDER = "prompts come before the options"


def number(kind: type, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf) -> Callable:
    """A reader of finite numbers of a kind, `int` or `float`, within bounds."""
    what = "an integer" if kind is int else "a number"
    if at_most < math.inf:
        what += f" from {at_least} to {at_most}" if above == -math.inf else f" above {above} and up to {at_most}"
    elif at_least > -math.inf:
        what += f" of at least {at_least}"
    elif above > -math.inf:
        what += f" above {above}"

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (at_least <= value <= at_most and above < value) or value in (math.inf, -math.inf):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return read


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels."""
    parts = text.lower().split("x")
    try:
        sides = [int(part) for part in parts]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor WIDTHxHEIGHT")
    return sides[0], sides[-1]


def device(text: str) -> str:
    """A device's name; whether this machine has it is known once torch is imported."""
    if text.partition(":")[0] == "meta":
        raise argparse.ArgumentTypeError("meta computes nothing: try cpu")
    return text


class Temperature(argparse.Action):
    """One number above 0, or the first step's and the last's."""

    def __call__(self, parser, namespace, values: list[str], option_string=None):
        read = number(float, above=0)
        try:
            ramp = [read(value) for value in values]
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, f"{error}; {ORDER}") from None
        if len(ramp) > 2:
            raise argparse.ArgumentError(self, f"takes one number or two, got {len(ramp)}")
        setattr(namespace, self.dest, tuple(ramp) if len(ramp) == 2 else ramp[0])


class Scheduler(argparse.Action):
    """A scheduler's name and its settings, NAME=VALUE."""

    def __call__(self, parser, namespace, values: list[str], option_string=None):
        name, *settings = values
        if name not in SCHEDULERS:
            raise argparse.ArgumentError(self, f"there is no {name!r}: {one_of(name, SCHEDULERS)}")
        known = scheduler_settings(name)
        read = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals:
                raise argparse.ArgumentError(self, f"{setting!r} is not of the form SETTING=VALUE; {ORDER}")
            if key not in known:
                raise argparse.ArgumentError(self, f"{name} has no setting {key!r}: {one_of(key, known)}")
            read[key] = _literal(value)
        setattr(namespace, self.dest, (name, read))


def scheduler_settings(name: str) -> list[str]:
    """The settings of a scheduler, from its source: to import it would take seconds."""
    package, _, path = SCHEDULERS[name].partition("/")
    source = Path(importlib.util.find_spec(package).submodule_search_locations[0], path).read_text(encoding="utf-8")
    body = next(node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    init = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return [argument.arg for argument in init.args.args[1:]]


def one_of(name: str, known) -> str:
    """The known names, or of these the one that was probably meant."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"


def _literal(text: str):
    """Numbers, None, True and False, or several of these between commas, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
