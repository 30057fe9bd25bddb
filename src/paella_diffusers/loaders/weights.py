"""Files of weights: what is in them, whether it fits a model, and reading them without executing anything."""

import errno
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from .hub_files import read_json


class TensorInfo(NamedTuple):
    """What must fit of a tensor; its precision may differ."""

    shape: tuple[int, ...]
    is_floating_point: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "TensorInfo":
        return cls(tuple(tensor.shape), tensor.is_floating_point())

    def __str__(self) -> str:
        return f"{'floating point' if self.is_floating_point else 'integer'} {list(self.shape)}"


def check_tensors(
    found: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo], where: str | Path, model: str, remedy: str = ""
) -> None:
    """
    Refuse weights unless they are exactly those that are expected: by name, shape, and floating point or integer.

    Raises:
        ValueError: It names `where` the weights are, the `model`, and the first tensors that do not fit.
    """
    wrong = [
        f"{key} is {found[key]} instead of {expected[key]}"
        for key in sorted(found.keys() & expected.keys())
        if found[key] != expected[key]
    ]
    problems = {
        "missing keys": sorted(expected.keys() - found.keys()),
        "unexpected keys": sorted(found.keys() - expected.keys()),
        "wrong tensors": wrong,
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind} {shorten(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{where} does not fit {model}: {listed}.{remedy and ' '}{remedy}")


def check_weights(model: torch.nn.Module, found: Mapping[str, TensorInfo], where: str | Path) -> None:
    """As [`check_tensors`], for all of a model's weights; of tensors that are one in the model, one name is enough."""
    own = model.state_dict(keep_vars=True)
    stored = {id(own[key]) for key in found if key in own}
    expected = {key: TensorInfo.of(t) for key, t in own.items() if key in found or id(t) not in stored}
    check_tensors(found, expected, where, type(model).__name__)


def shorten(names: Iterable[str]) -> str:
    """The first five of some names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def stored_tensors(path: str | Path) -> dict[str, TensorInfo]:
    """
    What is in a file of weights; of safetensors only the header is read.

    Raises:
        ValueError: If the file is damaged or holds no weights.
    """
    if not str(path).endswith(".safetensors"):
        return {key: TensorInfo.of(tensor) for key, tensor in read_state_dict(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            entries = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
            return {key: TensorInfo(tuple(e.get_shape()), "F" in e.get_dtype()) for key, e in entries.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): save or download it again.") from error


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """
    The flat state dict in a `.pt` or `.safetensors` file, memory-mapped and without executing anything from a pickle.

    Raises:
        ValueError: If the file holds anything but a state dict.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"GGUF":
            raise ValueError(f"{path} is a GGUF file, which cannot be read here: pass a `.safetensors` or `.pt` file.")
    try:
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        # only zip archives, torch's format since 1.6, can be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged files raise whatever happens to come across
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: no such place in the file
            raise
        raise ValueError(
            f"{path} is not a state dict that can be loaded safely. Nothing in it was executed. It is damaged, or holds "
            "other objects: if you trust it, save its state dict alone with `torch.save(model.state_dict(), path)`. "
            f"({type(error).__name__}: {error})"
        ) from error
    for name in ("ema_state_dict", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict) and content[name]:
            content = content[name]
            break
    if not (
        isinstance(content, dict)
        and content
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())
    ):
        raise ValueError(f"{path} holds no state dict, that is, no dictionary from names to tensors.")
    without_values = [key for key, tensor in content.items() if tensor.layout != torch.strided or tensor.is_meta]
    if without_values:
        raise ValueError(f"{path} has sparse tensors or tensors without values: {shorten(without_values)}.")
    return content


def read_shard_index(path: str | Path) -> list[str]:
    """
    The files that an index of shards names.

    Raises:
        ValueError: If it is damaged, or names anything but files in its own folder.
    """
    index = read_json(path)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{path} is damaged: its `weight_map` must have a file for each tensor.")
    if not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{path} is damaged: its `metadata` must be an object.")
    names = sorted(set(shards.values()))
    elsewhere = [name for name in names if Path(name).name != name or name in ("", "..") or "\\" in name]
    if elsewhere:
        raise ValueError(f"{path} names files outside its folder, which are not read: {shorten(map(repr, elsewhere))}.")
    return names


class MappedWeights(Mapping[str, torch.Tensor]):
    """
    The weights in a folder of safetensors, whole or in shards. A tensor by its key has a memory mapping of its own, so that
    what was read of it leaves memory with it; with `load`, all share one.

    Args:
        find (`Callable`): From the name of a file to its path, or `FileNotFoundError`.
        stems (`tuple[str]`): What the files may be called: `STEM.safetensors`, or `STEM.safetensors.index.json` and shards.
        variant (`str`, *optional*): As in `STEM.VARIANT.safetensors`.

    Raises:
        FileNotFoundError: If there are no such files.
        ValueError: If one is damaged, or the index names files elsewhere.
    """

    def __init__(self, find: Callable[[str], str], stems: tuple[str, ...], variant: str | None = None):
        part = f".{variant}" if variant else ""
        self.files: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for path in map(find, self._names(find, stems, part)):
            found = stored_tensors(path)
            self.files |= dict.fromkeys(found, path)
            self.tensors |= found

    @classmethod
    def _names(cls, find, stems, part) -> list[str]:
        missing = FileNotFoundError()
        for stem in stems:
            try:
                return read_shard_index(find(f"{stem}.safetensors.index{part}.json"))
            except FileNotFoundError:
                pass
            try:
                find(f"{stem}{part}.safetensors")
                return [f"{stem}{part}.safetensors"]
            except FileNotFoundError as error:
                missing = error
        raise missing

    def __getitem__(self, key: str) -> torch.Tensor:
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_tensor(key)

    def load(self) -> dict[str, torch.Tensor]:
        """All tensors, mapped."""
        tensors = {}
        for path in dict.fromkeys(self.files.values()):
            with safe_open(path, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
