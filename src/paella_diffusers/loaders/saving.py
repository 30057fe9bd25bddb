"""Saving models atomically, and loading them only if every tensor fits."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from diffusers import ModelMixin

from .atomic import atomic_update
from .quiet import ignore_message
from .weights import check_weights, read_shard_index, stored_tensors


def refuse_adapters(model: Any) -> None:
    """Raise a `ValueError` if adapters are attached: saved so, the model would load as another."""
    if getattr(model, "peft_config", None):
        raise ValueError(
            "Adapters are attached, with which the weights have other names: first `fuse_lora` and "
            "`unload_lora_weights`, or save the adapter alone with `save_lora_weights` or `push_lora_to_hub`."
        )


class AtomicSaveMixin:
    """
    `save_pretrained` of models: whenever it stops, the folder has the earlier model or the new one. `from_pretrained`
    refuses files that lack a tensor, have others, or have integers for weights.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(ModelMixin, "_load_pretrained_model"):  # private, and extended below
            raise ImportError(
                "This version of diffusers loads models in another way: paella-diffusers needs diffusers 0.42."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """As diffusers' `ModelMixin.from_pretrained`; a folder's index of shards is checked first."""
        folder, variant = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""), kwargs.get("variant")
        index = folder / f"diffusion_pytorch_model.safetensors.index{f'.{variant}' if variant else ''}.json"
        for name in read_shard_index(index) if index.is_file() else ():
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}, which {index.name} names.")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, *args, **kwargs):
        """
        What `from_pretrained` calls with the files it found. It would only log that a tensor is missing, and leave it empty,
        or take integers for weights; here such files are refused.
        """
        if kwargs.get("hf_quantizer") is None and resolved_model_file and not kwargs.get("ignore_mismatched_sizes"):
            found = {}
            for path in resolved_model_file:
                found |= stored_tensors(path)
            check_weights(model, found, Path(resolved_model_file[0]).parent)
        return super()._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `torch.nn.Module.to`. diffusers warns of modules to be kept in float32 even if there are none."""
        with ignore_message("diffusers.models.modeling_utils", "should be kept in float32: []"):
            return super().to(*args, **kwargs)

    def check_savable(self) -> None:
        """Refuse to save with adapters attached, as the result would load as another model, and without weights."""
        if any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError(f"This {type(self).__name__} has its weights on disk: load it without `low_memory` to save it.")
        refuse_adapters(self)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        As diffusers' `ModelMixin.save_pretrained`, with which it shares its arguments, but whole or not at all: see
        [`~loaders.atomic.atomic_update`]. Other files in the folder stay, weights of other variants among them.

        Raises:
            ValueError: If adapters are attached, or the weights are on disk.
            NotADirectoryError: If `save_directory` is a file.
        """
        self.check_savable()
        if not is_main_process:
            return
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        with atomic_update(save_directory, self.config_name, superseded_weights(variant)) as unfinished:
            super().save_pretrained(unfinished, **options)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).resolve().name)
            self.push_to_hub(repo_id, **options, **kwargs)


def superseded_weights(variant: str | None) -> Callable[[Path, Path], set[Path]]:
    """
    For `atomic_update`: wherever there are new weights, the earlier ones of the same variant, which may have been in other
    shards or another format.
    """
    stem, part = "(diffusion_pytorch_model|pytorch_model|model)", f"[.]{re.escape(variant)}" if variant else ""
    weights = rf"{stem}{part}(-\d{{5}}-of-\d{{5}})?[.](safetensors|bin)"
    index = rf"{stem}[.](safetensors|bin)[.]index{part}[.]json"
    is_weights = re.compile(f"{weights}|{index}").fullmatch

    def superseded(earlier: Path, new: Path) -> set[Path]:
        folders = {path.parent.relative_to(new) for path in new.rglob("*") if is_weights(path.name)}
        found = {folder / path.name for folder in folders for path in (earlier / folder).glob("*") if is_weights(path.name)}
        return {path for path in found if not (new / path).exists()}

    return superseded
