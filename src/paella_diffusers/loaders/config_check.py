"""Configurations from files: types, and sizes that no real model has, are refused before anything is built from them."""

import inspect
from numbers import Integral
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..checks import is_integer, is_number

MAX_LAYERS = 1000  # of a kind in a row: more would only keep the machine busy
MAX_INTEGER = 2**24  # sizes, steps and numbers of tokens
MAX_LENGTH = 1000  # of lists and texts
LAYER_COUNTS = (
    "layers_per_block",
    "num_layers",
    "bottleneck_blocks",
    "levels",
    "num_hidden_layers",
    "num_decoder_layers",
)


def check_config(cls: type, config: dict[str, Any]) -> None:
    """
    Refuse configuration values that are not of the types that the class's `__init__` declares, or too large.

    Raises:
        ValueError: It names the class, the value and what it should be.
    """
    hints = get_type_hints(cls.__init__)
    for name in inspect.signature(cls.__init__).parameters.keys() & config.keys():
        value, hint = config[name], hints.get(name, Any)
        if not _is_of_type(value, hint):
            expected = getattr(hint, "__name__", None) if get_origin(hint) is None else str(hint)
            raise ValueError(f"The configuration of {cls.__name__} has {name}={_show(value)}, which should be {expected}.")
    check_sizes(cls.__name__, config)


def check_sizes(class_name: str, config: Any, name: str = "", layers_only: bool = False) -> None:
    """
    Refuse numbers, lists and texts in a configuration, nested ones too, that no real model has.

    Args:
        layers_only (`bool`, defaults to `False`): Only look at numbers of layers, as for other libraries' models.
    """
    if isinstance(config, dict):
        for key, value in config.items():
            check_sizes(class_name, value, key, layers_only)
        return
    layers = name in LAYER_COUNTS
    limit = None
    if layers_only and not layers:
        return
    if isinstance(config, Integral) and not isinstance(config, bool):
        limit = MAX_LAYERS if layers else MAX_INTEGER
        limit = limit if abs(int(config)) > limit else None
    elif isinstance(config, list | tuple | str) and len(config) > MAX_LENGTH:
        limit = f"{MAX_LENGTH} entries"
    elif isinstance(config, list | tuple):
        for value in config:
            check_sizes(class_name, value, name, layers_only)
    if limit is not None:
        raise ValueError(
            f"The configuration of {class_name} has {name}={_show(config)}, more than {limit}, which no real model has."
        )


def _show(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _is_of_type(value, hint) -> bool:
    """Whether a value from a JSON file is of a declared type; declarations of other kinds than these are not checked."""
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of_type(value, part) for part in get_args(hint))
    if get_origin(hint) in (tuple, list):
        parts = [part for part in get_args(hint) if part is not ...]
        return isinstance(value, list | tuple) and (
            all(_is_of_type(item, parts[0]) for item in value)
            if len(set(parts)) == 1
            else len(value) == len(parts) and all(map(_is_of_type, value, parts))
        )
    if hint is bool or hint is str or hint is NoneType:
        return isinstance(value, hint)
    if hint is int:
        return is_integer(value)
    if hint is float:
        return is_number(value)
    return True
