"""From the published layout to diffusers' and back, whole or not at all, without a whole pipeline in memory."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from tqdm import tqdm

from . import registration
from .loaders.atomic import atomic_folder
from .loaders.hub_files import find_file
from .loaders.original_checkpoint import to_original
from .loaders.original_repo import has_original_layout
from .loaders.quiet import ignore_message, no_inner_bars
from .loaders.weights import MappedWeights, check_weights
from .pipelines.loading import ORIGINAL_MODELS, component_names, load_in_float32, original_components
from .pipelines.pipeline_paella import PaellaPipeline


def convert_to_diffusers(
    source: str | Path,
    output_dir: str | Path,
    dtype: torch.dtype = torch.float32,
    leave_out: tuple[str, ...] = (),
    **kwargs: Any,
) -> None:
    """
    Convert a repository in the published layout, such as `dome272/Paella`, to a folder in diffusers' layout.

    Args:
        source (`str` or `Path`): A Hub id or a folder.
        output_dir (`str` or `Path`): A new folder; it is there once everything is in it.
        dtype (`torch.dtype`, defaults to `torch.float32`): Of the weights.
        leave_out (`tuple[str]`, *optional*): Optional components that shall be None, with their tokenizers and so on.
        kwargs: `revision`, `cache_dir`, `token`, … as for `PaellaPipeline.from_pretrained`.

    Raises:
        ValueError: If the source is not in the published layout, or a name is no optional component.
        FileExistsError: If there is something at `output_dir`.
    """
    names, optional = component_names(PaellaPipeline), PaellaPipeline._optional_components
    unknown = set(leave_out) - set(optional)
    if unknown:
        raise ValueError(f"Only optional components can be left out, {sorted(optional)}, not {sorted(unknown)}.")
    quiet = ignore_message("transformers.utils.import_utils", "requires torchvision")
    with atomic_folder(output_dir) as folder, no_inner_bars, quiet:
        if not has_original_layout(source, **kwargs):
            raise ValueError(f"{source} is in diffusers' layout already: it has a `model_index.json`.")
        index: dict[str, Any] = {"_class_name": "PaellaPipeline", "_diffusers_version": diffusers.__version__}
        parameters = inspect.signature(PaellaPipeline).parameters
        index |= {name: parameter.default for name, parameter in parameters.items() if name not in names}
        components = original_components(source, names, dtype, **dict.fromkeys(leave_out), **kwargs)
        for name, (load, convert) in tqdm(components.items(), desc="components"):
            if convert is not None:
                convert(folder / name)
                index[name] = (registration.LIBRARY, ORIGINAL_MODELS[name][0].__name__)
                continue
            component = load()
            if component is not None:
                component.save_pretrained(folder / name)
                load_in_float32(folder / name)
            index[name] = _library_name(name, component)
            del component  # before the next one is loaded
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def convert_to_original(
    source: str | Path, output_dir: str | Path, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> None:
    """
    Convert a pipeline's models in diffusers' layout to published checkpoints, which the published code loads strictly, with
    its constructors' arguments in `config.json`. Arguments and errors as for [`convert_to_diffusers`].
    """
    revision, options = kwargs.get("revision"), {name: value for name, value in kwargs.items() if name != "revision"}
    with atomic_folder(output_dir) as folder:
        original_config = {}
        index = PaellaPipeline.load_config(source, **kwargs)
        present = [name for name in ORIGINAL_MODELS if any(index.get(name) or ())]
        for name in tqdm(present, desc="models"):
            cls, config_name = ORIGINAL_MODELS[name]
            with init_empty_weights():
                model = cls.from_config(cls.load_config(source, subfolder=name, **kwargs))
            original_config[config_name] = model.to_original_config()
            find = lambda filename: find_file(source, f"{name}/{filename}", revision, options)  # noqa: B023
            weights = MappedWeights(find, ("diffusion_pytorch_model",))
            check_weights(model, weights.tensors, f"{source}/{name}")
            torch.save(to_original(model, weights, dtype), folder / cls._original_checkpoint)
        (folder / "config.json").write_text(json.dumps(original_config, indent=2) + "\n")


def _library_name(name: str, component) -> tuple[str | None, str | None]:
    """What `model_index.json` says of a component."""
    if component is None:
        return (None, None)
    ours = registration.library_names({name: component})
    return ours.get(name, (type(component).__module__.split(".")[0], type(component).__name__))
