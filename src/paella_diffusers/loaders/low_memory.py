"""Models whose weights stay in their files, and are mapped into memory only while they are called."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from .config_check import check_sizes
from .hub_files import read_json
from .weights import MappedWeights, check_weights


class WeightsOnDisk(ModelHook):
    """Loads a model's weights when it is called, and first releases those of the `others`; not for several threads."""

    def __init__(self, model: torch.nn.Module, weights: MappedWeights, others: list["WeightsOnDisk"]):
        self.model = model
        self.weights = weights
        self.others = others
        self.empty: dict[str, torch.Tensor] = model.state_dict()
        self.execution_device = torch.device("cpu")
        self.loaded = False
        others.append(self)
        add_hook_to_module(model, self)

    def init_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        module.weights_on_disk = self
        return module

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.loaded:
            for other in self.others:
                other.release()
            device, weights = self.execution_device, self.weights.load()
            weights = {key: tensor.to(device, self.empty[key].dtype) for key, tensor in weights.items()}
            self.loaded = True
            self._assign(weights)
            for buffer in self.model.buffers():  # those that are not among the weights
                buffer.data = buffer.data.to(device)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)

    def release(self) -> None:
        """Free the memory of the weights until the next call."""
        if self.loaded:
            self._assign(self.empty)
            self.loaded = False

    def _assign(self, state_dict: dict[str, torch.Tensor]):
        self.model.load_state_dict(state_dict, strict=False, assign=True)
        _tie(self.model)


def leave_on_disk(
    folder: Path, classes: dict[str, type], dtype: torch.dtype | dict[str, torch.dtype], variant: str | None = None
) -> dict[str, torch.nn.Module]:
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
        model = _without_weights(cls, place)
        wanted = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
        torch.nn.Module.to(model, wanted).eval().requires_grad_(False)
        if wanted == torch.float16:
            _keep_in_float32(model)
        _tie(model)

        def find(filename, place=place):
            if not (place / filename).is_file():
                raise FileNotFoundError(f"{place} has no {filename}: `low_memory` maps safetensors, in diffusers' layout.")
            return str(place / filename)

        weights = MappedWeights(find, ("diffusion_pytorch_model", "model"), variant)
        check_weights(model, weights.tensors, place)
        WeightsOnDisk(model, weights, hooks)
        models[name] = model
    return models


def weights_on_disk(pipeline: Any) -> list[WeightsOnDisk]:
    """The hooks of a pipeline's models whose weights are left on disk."""
    hooks = [getattr(component, "weights_on_disk", None) for component in pipeline.components.values()]
    return [hook for hook in hooks if isinstance(hook, WeightsOnDisk)]


def _without_weights(cls: type, folder: Path) -> torch.nn.Module:
    with init_empty_weights():
        if not issubclass(cls, PreTrainedModel):
            return cls.from_config(cls.load_config(folder))
        check_sizes(cls.__name__, read_json(folder / "config.json"), layers_only=True)
        return cls(cls.config_class.from_pretrained(folder))


def _keep_in_float32(model: torch.nn.Module):
    """As transformers does with parts that leave float16's range, such as one in T5's feed-forward layers."""
    names = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names:
            module.to(torch.float32)


def _tie(model):
    if hasattr(model, "tie_weights"):
        model.tie_weights()
