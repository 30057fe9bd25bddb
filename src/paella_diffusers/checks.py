"""Refusing bad values by name: every error says which argument, what it got and what it takes."""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any


def is_number(value: object) -> bool:
    """Whether it is a finite real number, of Python or NumPy, and no boolean. Integers that no float holds are none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_integer(value: object) -> bool:
    """Whether it is an integer, of Python or NumPy, and no boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_boolean(value: object) -> bool:
    """Whether it is a boolean, of Python or NumPy, which this module does not import."""
    kind = type(value)
    return isinstance(value, bool) or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))


def check_unicode(name: str, text: str) -> None:
    """Refuse a text that cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` must be Unicode text, but {text!r} has a lone surrogate: {error.reason}.") from error


def check_boolean(name: str, value: object) -> None:
    """Refuse what is no boolean: "no" would count as True."""
    if not is_boolean(value):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_number(
    name: str,
    value: Any,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
    remedy: str = "",
) -> None:
    """
    Refuse what is no finite number within the bounds.

    Raises:
        ValueError: Naming the argument, its range, the value, and the `remedy`, if there is one.
    """
    if not (is_number(value) and above < value < below and at_least <= value <= at_most):
        least = f"[{at_least:g}" if at_least > -math.inf else f"({above:g}"
        most = f"{at_most:g}]" if at_most < math.inf else f"{below:g})"
        bounds = f"a number in {least}, {most}"
        if most == "inf)":
            bounds = "a finite number" + (f" of at least {at_least:g}" if at_least > -math.inf else "")
            bounds += f" above {above:g}" if above > -math.inf else ""
        raise ValueError(f"`{name}` must be {bounds}, got {value!r}.{remedy and ' '}{remedy}")


def check_ramp(name: str, value: object, remedy: str = "", **bounds: float) -> None:
    """Refuse what is neither one finite number within the bounds nor two of them, (first, last)."""
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ValueError(f"`{name}` must be a number or (first, last), got {value!r}.")
        for end in value:
            check_number(name, end, remedy=remedy, **bounds)
    else:
        check_number(name, value, remedy=remedy, **bounds)


def check_integer(name: str, value: Any, at_least: int, at_most: float = math.inf, remedy: str = "") -> None:
    """Refuse what is no integer within the bounds; errors as `check_number`."""
    if not (is_integer(value) and at_least <= value <= at_most):
        bound = f"at most {at_most}" if is_integer(value) and value > at_most else f"at least {at_least}"
        raise ValueError(f"`{name}` must be an integer of {bound}, got {value!r}.{remedy and ' '}{remedy}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse what is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def suggest_arguments(function: Callable) -> Callable:
    """For a function with an explicit signature: the error for an unknown argument also names the nearest known one."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        check_arguments(function, kwargs)
        return function(*args, **kwargs)

    return wrapper


def check_arguments(function: Callable, names: Iterable[str]) -> None:
    """Refuse arguments that a function does not take, and name the nearest that it does."""
    known = list(inspect.signature(function).parameters)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean `{near[0]}`?" if near else f". It takes {', '.join(known[1:])}."
            raise TypeError(f"{function.__qualname__} takes no argument `{name}`{hint}")
