"""Models whose weights stay in their files, and are mapped into memory only while they are called."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel


class MappedWeights(Mapping):
    """
    The weights in a folder of safetensors, whole or in shards. A tensor by its key has a memory mapping of its own, so that
    what was read of it leaves memory with it; with `load`, all share one.

    Args:
        find (`Callable`): From the name of a file to its path, or `FileNotFoundError`.
        stems (`tuple[str]`): What the files may be called: `STEM.safetensors`, or `STEM.safetensors.index.json` and shards.
        variant (`str`, *optional*): As in `STEM.VARIANT.safetensors`.
    """

    def __init__(self, find: Callable[[str], str], stems: tuple[str, ...], variant: str | None = None):
        part = f".{variant}" if variant else ""
        self.files, self.shapes, self.is_floating_point = {}, {}, {}
        for path in map(find, self._names(find, stems, part)):
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 - it is no dictionary
                        entry = file.get_slice(key)
                        self.files[key], self.shapes[key] = path, tuple(entry.get_shape())
                        self.is_floating_point[key] = "F" in entry.get_dtype()  # unlike integers and BOOL
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}): save or download it again.") from error

    @staticmethod
    def _names(find, stems, part) -> list[str]:
        for stem in stems:
            try:
                index = json.loads(Path(find(f"{stem}.safetensors.index{part}.json")).read_text())
                return sorted(set(index["weight_map"].values()))
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


class WeightsOnDisk(ModelHook):
    """Gives a model its weights when it is called, having taken those of the `others` away."""

    def __init__(self, model: torch.nn.Module, weights: MappedWeights, others: list["WeightsOnDisk"]):
        self.model, self.weights, self.others = model, weights, others
        self.empty = model.state_dict()
        self.execution_device = torch.device("cpu")
        self.loaded = False
        others.append(self)
        add_hook_to_module(model, self)

    def pre_forward(self, module, *args, **kwargs):
        if not self.loaded:
            for other in self.others:
                other.release()
            device, weights = self.execution_device, self.weights.load()
            self._assign({key: weights[key].to(device, self.empty[key].dtype) for key in weights})
            for buffer in self.model.buffers():  # those that are not among the weights
                buffer.data = buffer.data.to(self.execution_device)
            self.loaded = True
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)

    def release(self):
        """Take the weights away."""
        if self.loaded:
            self._assign(self.empty)
            self.loaded = False

    def _assign(self, state_dict: dict[str, torch.Tensor]):
        self.model.load_state_dict(state_dict, strict=False, assign=True)
        _tie(self.model)


def leave_on_disk(folder: Path, classes: dict[str, type], dtype, variant: str | None = None) -> dict[str, torch.nn.Module]:
    """
    Models without weights, which they get while they are called, one at a time.

    Args:
        folder (`Path`): Of a pipeline in diffusers' layout.
        classes (`dict[str, type]`): Each model's, by name.
        dtype (`torch.dtype` or `dict`): Of the weights, or by name; in another than theirs they are copies, not mapped.

    Raises:
        ValueError: If a model's folder has not all of its weights as safetensors.
    """
    models, hooks = {}, []
    for name, cls in classes.items():
        place = folder / name
        with init_empty_weights():
            if issubclass(cls, PreTrainedModel):
                model = cls(cls.config_class.from_pretrained(place))
            else:
                model = cls.from_config(cls.load_config(place))
        wanted = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
        torch.nn.Module.to(model, wanted).eval().requires_grad_(False)  # diffusers' own `to` would warn
        _tie(model)

        def find(filename, place=place):
            if not (place / filename).is_file():
                raise FileNotFoundError(f"{place} has no {filename}: `low_memory` maps safetensors, in diffusers' layout.")
            return str(place / filename)

        weights = MappedWeights(find, ("diffusion_pytorch_model", "model"), variant)
        check_weights(model, weights, place)
        WeightsOnDisk(model, weights, hooks)
        models[name] = model
    return models


def weights_on_disk(pipeline) -> list[WeightsOnDisk]:
    """The hooks of a pipeline's models whose weights are left on disk."""
    hooks = [getattr(component, "_hf_hook", None) for component in pipeline.components.values()]
    return [hook for hook in hooks if isinstance(hook, WeightsOnDisk)]


def _tie(model):
    if hasattr(model, "tie_weights"):
        model.tie_weights()


def check_weights(model: torch.nn.Module, weights: MappedWeights, where: str | Path):
    """Refuse weights that are not the model's, which need not hold any."""
    expected = model.state_dict()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    stored = {id(tensor) for key, tensor in named if key in weights}  # of tied ones, one is enough
    missing = sorted(key for key, tensor in named if key in expected and id(tensor) not in stored)
    unexpected = sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{where} is no whole {type(model).__name__}: missing keys {missing[:5]}, unexpected keys {unexpected[:5]}."
        )
    for key, shape in weights.shapes.items():
        wanted = expected[key]
        if shape != wanted.shape or weights.is_floating_point[key] != wanted.is_floating_point():
            kind = "floating point" if weights.is_floating_point[key] else "integer"
            raise ValueError(
                f"{where} does not fit {type(model).__name__}: {key} is {kind} {list(shape)}, not {wanted.dtype} "
                f"{list(wanted.shape)}."
            )
