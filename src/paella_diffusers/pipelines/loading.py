"""How Paella's pipelines are loaded and saved."""

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DDPMWuerstchenScheduler, DiffusionPipeline
from diffusers.utils import logging
from transformers import PreTrainedModel

from .. import registration
from ..loaders.atomic import atomic_update
from ..loaders.config_check import check_sizes
from ..loaders.hub import PaellaHubMixin
from ..loaders.hub_files import HUB_OPTIONS, connection_errors, find_file, loading_errors, read_json
from ..loaders.low_memory import leave_on_disk, weights_on_disk
from ..loaders.original_repo import has_original_layout, load_encoder, read_original_config
from ..loaders.quiet import ignore_message, no_inner_bars
from ..loaders.saving import AtomicSaveMixin, refuse_adapters, superseded_weights
from ..models.prior_paella import PaellaPrior
from ..models.unet_paella import PaellaUNet
from ..models.vq_model import PaellaVQModel
from ..schedulers.scheduling_paella import PaellaScheduler

logger = logging.get_logger(__name__)

LIBRARIES = ("diffusers", "transformers", registration.LIBRARY)  # whose classes `low_memory` loads
ORIGINAL_MODELS: dict[str, tuple[type, str]] = {  # and what the published code calls them
    "unet": (PaellaUNet, "paella"),
    "vqgan": (PaellaVQModel, "vqgan"),
    "prior": (PaellaPrior, "prior"),
}
COMPANIONS = {  # of no use without the other
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "image_encoder": "feature_extractor",
    "prior": "prior_scheduler",
}


class LoadingMixin(PaellaHubMixin):
    """`from_pretrained`, `from_pipe`, `save_pretrained` and `to` of pipelines; comes before `DiffusionPipeline`."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        recorded = getattr(self, "config", {})
        if name in recorded:
            # diffusers would record the module path of our classes, here and when a component is swapped
            names = registration.library_names({name: value})
            if not names and value is not None and recorded[name] in ([None, None], (None, None)):
                # and nothing of what takes the place of a component that was None
                names = {name: (type(value).__module__.split(".")[0], type(value).__name__)}
            self.register_to_config(**names)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """
        A pipeline of this class from the components and settings of another. The components are shared, not copied; `kwargs`
        replace some. Dtypes stay as they are unless `dtype` is given.
        """
        dtypes = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        if any(dtypes):
            return super().from_pipe(pipeline, dtype=dtypes[0] or dtypes[1], **kwargs)
        settings = dict(pipeline.config) | pipeline.components
        taken = {name: settings[name] for name in inspect.signature(cls).parameters if name in settings}
        made = cls(**taken | kwargs)
        if "_name_or_path" in pipeline.config:
            made.register_to_config(_name_or_path=pipeline.config._name_or_path)
        return made

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """
        Load a pipeline from a Hub repository or a folder, in diffusers' layout or in the published one.

        The published layout (`dome272/Paella`) is three files, `paella_v3.pt`, `vqgan_f4.pt` and `prior_v1.pt`, without a
        `model_index.json`; the encoders are then loaded from `google/byt5-xl` and `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
        In both layouts any component can be passed in, and an optional one left out with `None`, such as `prior=None`.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A Hub id or a folder.
            dtype (`torch.dtype` or `dict`, defaults to `torch.float32`):
                Of the weights, or by component name. The dtype in which they are stored has no influence.
            low_memory (`bool`, defaults to `False`):
                Leave the models' weights in their files, which must be safetensors in diffusers' layout, and map them into
                memory only while they are needed, one model at a time: encode, release, denoise, release, decode. Slower by
                reading them again in each call; calls from several threads wait for each other. `to` says on which device
                the weights are needed.
            kwargs:
                As for `DiffusionPipeline.from_pretrained`: components, `cache_dir`, `token`, `local_files_only`, `revision`.
                In the published layout, `revision` is that of the Paella repository, and `original_config` has the published
                constructors' arguments under `paella`, `vqgan` and `prior` if they are not the released model's.

        Raises:
            ValueError: If the repository is in neither layout, or a checkpoint does not fit its model.
            OSError: If a file is missing or out of reach, or the folder was left by an interrupted save.
        """
        earlier_name = kwargs.pop("torch_dtype", None)
        # without a dtype, transformers would keep the stored one
        kwargs["dtype"] = kwargs.get("dtype") or earlier_name or torch.float32
        source = pretrained_model_name_or_path
        low_memory = kwargs.pop("low_memory", False)
        with loading_errors(str(source), cls.config_name, kwargs.get("revision")):
            original = has_original_layout(source, **kwargs)
            folder = source if original or Path(source).is_dir() else cls.download(source, **kwargs)
        with no_inner_bars, ignore_message("transformers.utils.import_utils", "requires torchvision"):
            if original:
                return cls._from_original(source, low_memory, **kwargs)
            return cls._from_folder(Path(folder), str(source), low_memory, **kwargs)

    @classmethod
    def _from_original(cls, source, low_memory: bool, **kwargs):
        if low_memory:
            raise ValueError(
                f"`low_memory` needs diffusers' layout: first `paella-diffusers convert {source} FOLDER --dtype bfloat16`."
            )
        components = {}
        with connection_errors(f"{source} was loaded", "Call again: whole files are kept."):
            parts = original_components(source, component_names(cls), **kwargs)
            for name, (load, _) in logging.tqdm(parts.items(), desc="Loading pipeline components..."):
                components[name] = load()
        pipeline = cls(**components)
        pipeline.register_to_config(_name_or_path=str(source))
        return pipeline

    @classmethod
    def _from_folder(cls, folder: Path, source: str, low_memory: bool, **kwargs):
        classes = component_classes(cls.load_config(folder), component_names(cls), folder)
        classes = {name: part for name, part in classes.items() if name not in kwargs}
        for name, part in classes.items():
            config = folder / name / "config.json"
            if issubclass(part, PreTrainedModel) and config.is_file():
                check_sizes(f"{name} ({part.__name__})", read_json(config), layers_only=True)
        if low_memory:
            own = {name: part for name, part in classes.items() if issubclass(part, torch.nn.Module)}
            own = {name: part for name, part in own.items() if part.__module__.split(".")[0] in LIBRARIES}
            kwargs |= leave_on_disk(folder, own, kwargs["dtype"], kwargs.get("variant"))
        # diffusers would warn, and print them whole, of models that are not its own
        given = {name: part for name, part in kwargs.items() if type(part).__module__.startswith("paella_diffusers.models")}
        pipeline = super().from_pretrained(folder, **kwargs | dict.fromkeys(given))
        pipeline.register_modules(**given)
        pipeline._prepare_for_images()
        pipeline.register_to_config(_name_or_path=source)
        return pipeline

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """
        As `DiffusionPipeline.to`, with one warning for all models in float16 on a CPU; with `low_memory`, it says where
        models shall be while they are called.
        """
        hooks = weights_on_disk(self)
        given = [*args, *kwargs.values()]
        if not hooks:
            silent = kwargs.pop("silence_dtype_warnings", False)
            super().to(*args, silence_dtype_warnings=True, **kwargs)
            half = [n for n, part in self.components.items() if getattr(part, "dtype", None) == torch.float16]
            if half and not silent and any(str(value) == "cpu" for value in given):
                logger.warning(
                    f"{', '.join(half)}: float16 is slow on most CPUs. `to(torch.bfloat16)` needs as little memory."
                )
            return self
        if any(isinstance(value, torch.dtype) for value in given):
            raise ValueError("With `low_memory`, weights are read in one dtype: pass `dtype` to `from_pretrained`.")
        device = next((value for value in given if isinstance(value, str | torch.device)), None)
        if device is None:
            raise ValueError(f"`to` needs a device, such as 'cuda', got {given}.")
        for hook in hooks:
            hook.release()
            hook.execution_device = torch.device(device)
        return self

    def maybe_free_model_hooks(self) -> None:
        """As `DiffusionPipeline.maybe_free_model_hooks`; with `low_memory`, releases the last model's weights too."""
        for hook in weights_on_disk(self):
            hook.release()
        super().maybe_free_model_hooks()

    def remove_all_hooks(self) -> None:
        """As `DiffusionPipeline.remove_all_hooks`, with which offloading begins; refused with `low_memory`."""
        if weights_on_disk(self):
            raise ValueError("With `low_memory` models are offloaded already: to offload in another way, load without it.")
        super().remove_all_hooks()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        As `DiffusionPipeline.save_pretrained`, but whole or not at all: a process that is killed at any moment leaves the
        earlier pipeline or the new one; see [`~loaders.atomic.atomic_update`] for systems other than Linux. Other files in
        the folder stay.

        Weights are stored in the dtypes that they have, and load in float32 unless `dtype` is given to `from_pretrained`.
        """
        for component in self.components.values():
            if isinstance(component, AtomicSaveMixin):
                component.check_savable()
            refuse_adapters(component)
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        with atomic_update(save_directory, self.config_name, superseded_weights(variant)) as unfinished, no_inner_bars:
            super().save_pretrained(unfinished, **options)
            for name in component_names(type(self)):
                load_in_float32(unfinished / name)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).resolve().name)
            self.push_to_hub(repo_id, **options, **kwargs)


def component_names(cls: Any) -> list[str]:
    """The components of a pipeline class: its arguments that are required or declared optional components."""
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.default is p.empty or p.name in cls._optional_components]


def component_classes(index: dict[str, Any], names: list[str], folder: str | Path) -> dict[str, type]:
    """
    The classes that a `model_index.json` names, of `LIBRARIES` or of what was imported before; nothing else is imported, and
    other entries are left to diffusers, which refuses them.

    Args:
        index (`dict`): The contents of `model_index.json`.
        names (`list[str]`): The components.
        folder (`str` or `Path`): Where it is, for errors.

    Raises:
        ValueError: If an entry is no pair of names, or does not name a class.
    """
    classes = {}
    for name in names:
        entry = index.get(name)
        if entry is None or entry in ([None, None], (None, None)):
            continue
        what = f"{folder} names {str(entry)[:80]} as the {name} in `model_index.json`"
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise ValueError(f"{what}, which should be a library and a class.")
        library, class_name = entry
        module = importlib.import_module(library) if library in LIBRARIES else sys.modules.get(library)
        if hasattr(module, class_name):
            classes[name] = getattr(module, class_name)
            if not isinstance(classes[name], type) or not hasattr(classes[name], "from_pretrained"):
                raise ValueError(f"{what}, which is no class that can be loaded.")
    return classes


def load_in_float32(folder: Path) -> None:
    """Let transformers load a saved model in float32 unless told otherwise, as diffusers does, whatever its weights are."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    if "dtype" in config:
        path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def original_components(
    path: str | Path,
    names: list[str],
    dtype: torch.dtype | dict[str, torch.dtype],
    revision: str | None = None,
    original_config: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, tuple[Callable[[], Any], Callable[[Path], None] | None]]:
    """
    For every component a function that loads it from the published layout, and, for the models of this package, one that
    converts it to a folder without loading it whole. Components in `kwargs` are taken as they are, None included.

    Args:
        path (`str` or `Path`): A folder or Hub repository with `paella_v3.pt`, `vqgan_f4.pt` and `prior_v1.pt`.
        names (`list[str]`): The pipeline's components.
        dtype (`torch.dtype` or `dict`): Of the weights, or by component name, with `"default"`.
        original_config (`dict`, *optional*):
            The published constructors' arguments under `paella`, `vqgan` and `prior`, where they differ from the released
            model's; read from the repository's `config.json` if it has one.
    """
    if kwargs.pop("variant", None) is not None:
        raise ValueError("The published layout has no variants: leave `variant` out, and pass `dtype` for half precision.")
    given = {name: kwargs.pop(name) for name in names if name in kwargs}
    options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    if kwargs:
        logger.warning(f"Keyword arguments {sorted(kwargs)} have no effect in the published layout and are ignored.")
    for encoder, companion in COMPANIONS.items():
        if encoder in given and given[encoder] is None:
            given.setdefault(companion, None)
    if original_config is None:
        original_config = read_original_config(path, revision, options)

    def component(name: str) -> tuple[Callable, Callable | None]:
        wanted = dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
        if name in given:
            return lambda: given[name], None
        if name in ORIGINAL_MODELS:
            cls, config_name = ORIGINAL_MODELS[name]

            def arguments(*folder):
                file = find_file(path, cls._original_checkpoint, revision, options)
                return file, *folder, original_config.get(config_name), wanted

            return lambda: cls.from_single_file(*arguments()), lambda folder: cls.convert_single_file(*arguments(folder))
        if name == "scheduler":
            num_labels = original_config.get("paella", {}).get("num_labels", 8192)
            unet = given.get("unet")
            tokens = unet.config.num_vq_embeddings if unet else num_labels
            # as published and by default, but given: else a scheduler that it is swapped for would not get it
            return lambda: PaellaScheduler(num_vq_embeddings=tokens, temperature=(0.7, 0.3)), None
        if name == "prior_scheduler":
            return DDPMWuerstchenScheduler, None
        if name in COMPANIONS or name in COMPANIONS.values():
            return lambda: load_encoder(name, wanted, options), None
        return lambda: None, None  # an optional component that the published model has not

    return {name: component(name) for name in names}
