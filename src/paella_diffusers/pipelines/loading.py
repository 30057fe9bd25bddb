"""How Paella's pipelines are loaded and saved."""

import importlib
import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from .. import registration
from ..loaders.hub import PaellaHubMixin, WholeOrNotAtAllMixin, connection_errors, loading_errors
from .low_memory import leave_on_disk, weights_on_disk
from .original_repo import has_original_layout, load_original_components


class LoadingMixin(PaellaHubMixin):
    """`from_pretrained`, `from_pipe`, `save_pretrained` and `to` of pipelines; comes before `DiffusionPipeline`."""

    def __setattr__(self, name: str, value):
        super().__setattr__(name, value)
        # diffusers would record the module path of our classes, here and when a component is swapped
        if name in self.__dict__.get("_internal_dict", {}):
            self.register_to_config(**registration.library_names({name: value}))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """
        A pipeline of this class from the components of another, which are shared, not copied; `kwargs` replace some. Dtypes
        stay as they are unless `dtype` is given.
        """
        dtypes = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        if any(dtypes):
            return super().from_pipe(pipeline, dtype=dtypes[0] or dtypes[1], **kwargs)
        names, _ = cls._get_signature_keys(cls)
        components = {name: component for name, component in pipeline.components.items() if name in names}
        made = cls(**components | kwargs)
        if "_name_or_path" in pipeline.config:
            made.register_to_config(_name_or_path=pipeline.config._name_or_path)
        return made

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        Load a pipeline from a Hub repository or a folder, in diffusers' layout or in the published one.

        The published layout (`dome272/Paella`) is three files, `paella_v3.pt`, `vqgan_f4.pt` and `prior_v1.pt`, without a
        `model_index.json`; the encoders are then loaded from `google/byt5-xl` and `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
        In both layouts any component can be passed in, and an optional one left out with `None`, such as `prior=None`.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A Hub id or a folder.
            dtype (`torch.dtype` or `dict`, defaults to `torch.float32`): Of the weights, or by component name.
            low_memory (`bool`, defaults to `False`):
                Leave the models' weights in their files, which must be safetensors in diffusers' layout, and map them into
                memory only while they are needed, one model at a time: encode, release, denoise, release, decode. Slower by
                reading them again in each call. On any device: `to` says where they are needed.
            kwargs:
                As for `DiffusionPipeline.from_pretrained`: components, `cache_dir`, `token`, `local_files_only`, `revision`.
                In the published layout, `revision` is that of the Paella repository, and `original_config` has the published
                constructors' arguments under `paella`, `vqgan` and `prior` if they are not the released model's.

        Raises:
            ValueError: If the repository is in neither layout, or a checkpoint does not fit its model.
        """
        earlier_name = kwargs.pop("torch_dtype", None)
        # without a dtype, transformers would keep the stored one
        kwargs["dtype"] = kwargs.get("dtype") or earlier_name or torch.float32
        source = pretrained_model_name_or_path
        low_memory = kwargs.pop("low_memory", False)
        with loading_errors(str(source), cls.config_name, kwargs.get("revision")):
            original = has_original_layout(source, **kwargs)
            if low_memory and not original and not Path(source).is_dir():
                source = cls.download(source, **kwargs)
        if original and low_memory:
            raise ValueError(
                f"`low_memory` needs diffusers' layout: first `paella-diffusers convert {source} FOLDER --dtype bfloat16`."
            )
        if original:
            modules, _ = cls._get_signature_keys(cls)
            with connection_errors(f"{source} was loaded", "Call again: whole files are kept."):
                pipeline = cls(**load_original_components(source, modules, **kwargs))
            pipeline.register_to_config(_name_or_path=str(source))
            return pipeline
        if low_memory:
            classes = {
                name: getattr(importlib.import_module(entry[0]), entry[1])
                for name, entry in cls.load_config(source).items()
                if isinstance(entry, list) and entry[0] and name not in kwargs
            }
            classes = {name: part for name, part in classes.items() if issubclass(part, torch.nn.Module)}
            kwargs |= leave_on_disk(Path(source), classes, kwargs["dtype"], kwargs.get("variant"))
        # diffusers would warn, and print them whole, of models that are not its own
        given = {name: part for name, part in kwargs.items() if type(part).__module__.startswith("paella_diffusers.models")}
        pipeline = super().from_pretrained(source, **kwargs | dict.fromkeys(given))
        pipeline.register_modules(**given)
        pipeline._prepare_for_images()
        if low_memory:
            pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    def to(self, *args, **kwargs):
        """As `DiffusionPipeline.to`; with `low_memory`, it says where models shall be while they are called."""
        hooks = weights_on_disk(self)
        if not hooks:
            return super().to(*args, **kwargs)
        given = [*args, *kwargs.values()]
        if any(isinstance(value, torch.dtype) for value in given):
            raise ValueError("With `low_memory`, weights are read in one dtype: pass `dtype` to `from_pretrained`.")
        device = next((value for value in given if isinstance(value, str | torch.device)), None)
        if device is None:
            raise ValueError(f"`to` needs a device, such as 'cuda', got {given}.")
        for hook in hooks:
            hook.release()
            hook.execution_device = torch.device(device)
        return self

    def maybe_free_model_hooks(self):
        """As `DiffusionPipeline.maybe_free_model_hooks`; with `low_memory`, takes away the last model's weights too."""
        super().maybe_free_model_hooks()
        for hook in weights_on_disk(self):
            hook.release()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """
        As `DiffusionPipeline.save_pretrained`. Until it returns there is no `model_index.json`: nothing loads the folder.
        """
        for component in self.components.values():
            if isinstance(component, WholeOrNotAtAllMixin):
                component.check_savable()
        Path(save_directory, self.config_name).unlink(missing_ok=True)
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        super().save_pretrained(save_directory, **options)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **options, **kwargs)
