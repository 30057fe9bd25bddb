"""Pushing pipelines, models, schedulers and adapters to the Hub: with a model card, and with what loads them elsewhere."""

import inspect
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Self

from huggingface_hub import create_repo, upload_folder
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from ..about import pip_install, requirement
from .atomic import atomic_file, check_not_interrupted
from .config_check import check_config
from .hub_files import connection_errors, download, loading_errors, read_json
from .model_card import earlier_details, is_unedited, model_card, save_samples
from .space import write_space

STUB = '''"""For diffusers where paella_diffusers was not imported: `custom_pipeline="{repo_id}", trust_remote_code=True`."""

try:
    from paella_diffusers import {name}  # noqa: F401
except ImportError as error:
    raise ImportError("{repo_id} needs paella-diffusers: {install}") from error
'''


class PaellaHubMixin:
    """Configurations in and out, and `push_to_hub`, of pipelines, models, schedulers and guidance methods."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Self:
        """As diffusers' `from_pretrained`, whose arguments it takes; errors say what to do."""
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir() and not (folder / cls.config_name).is_file():
            check_not_interrupted(folder)
        with loading_errors(str(pretrained_model_name_or_path), cls.config_name, kwargs.get("revision")):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict:
        """What `load_config` reads; diffusers lets through what is no object, and nesting without end."""
        return read_json(json_file)

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """What `from_config` reads; values of other types than declared, and sizes that no model has, are refused."""
        name = config_dict.get("_class_name", "")
        if not isinstance(name, str | list):
            raise ValueError(f"The configuration of {cls.__name__} has _class_name={name!r:.80}, which is no class's name.")
        init_dict, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        check_config(cls, init_dict)
        return init_dict, unused, hidden

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As diffusers' `ConfigMixin.save_config`, but whole or not at all."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(save_directory, self.config_name)) as unfinished:
            self.to_json_file(unfinished)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).resolve().name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        max_shard_size: int | str | None = None,
        endpoint: bool = False,
        space: bool = False,
        **card: Any,
    ) -> str:
        """
        Upload to a Hub repository, in diffusers' layout. The repository is created if it does not exist.

        Args:
            repo_id (`str`): `owner/name`.
            commit_message (`str`, *optional*): `Upload CLASS` unless given.
            private (`bool`, *optional*): Whether a new repository is private.
            token (`str`, *optional*): The stored one unless given.
            create_pr (`bool`, defaults to `False`): Open a pull request rather than commit.
            safe_serialization (`bool`, defaults to `True`): Write safetensors.
            variant (`str`, *optional*): Part of the weights' file names, such as `"bf16"`.
            subfolder (`str`, *optional*): Where in the repository; then no model card is written.
            max_shard_size (`int` or `str`, *optional*): The largest file of weights, in bytes or such as `"2GB"`.
            endpoint (`bool`, defaults to `False`): Also write what Inference Endpoints run; for pipelines.
            space (`bool`, defaults to `False`):
                Also write the folder `space`, for pipelines: a Space with their page; its README.md says how to make it.
            card: Details for the model card, see [`model_card`]. A card that someone has edited is kept as it is.

        Returns:
            `str`: The address of the commit.
        """
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        accepted = inspect.signature(self.save_pretrained).parameters  # schedulers and guiders have no weights
        options = {name: value for name, value in options.items() if value is not None and name in accepted}
        if (endpoint or space) and (subfolder is not None or not hasattr(self, "components")):
            name = "endpoint" if endpoint else "space"
            raise ValueError(f"`{name}=True` is for a pipeline at the top of its repository: leave it out here.")

        def save(folder: str):
            self.save_pretrained(folder, **options)
            if endpoint:
                shutil.copyfile(Path(__file__).with_name("endpoint_handler.py"), Path(folder, "handler.py"))
                Path(folder, "requirements.txt").write_text(requirement() + "\n")
            if space:
                write_space(repo_id, Path(folder, "space"))

        return _push(
            save,
            self,
            repo_id,
            commit_message or f"Upload {type(self).__name__}",
            private,
            token,
            create_pr,
            subfolder,
            card,
        )


def push_lora(pipeline: Any, repo_id: str, adapter_name: str | None = None, **kwargs: Any) -> str:
    """Upload an adapter of the pipeline; see `PaellaLoraLoaderMixin.push_lora_to_hub`."""
    from peft import get_peft_model_state_dict

    adapted = pipeline.get_list_adapters()
    adapters = list(dict.fromkeys(name for names in adapted.values() for name in names))
    adapter_name = adapter_name or (adapters[0] if len(adapters) == 1 else None)
    if adapter_name is None or adapter_name not in adapters:
        raise ValueError(f"`adapter_name` must be one of the attached adapters, {adapters}, got {adapter_name!r}.")

    def save(folder: str):
        parts = {}
        for name in (name for name, names in adapted.items() if adapter_name in names):
            model = getattr(pipeline, name)
            parts[f"{name}_lora_layers"] = get_peft_model_state_dict(model, adapter_name=adapter_name)
            parts[f"{name}_lora_adapter_metadata"] = model.peft_config[adapter_name].to_dict()
        pipeline.save_lora_weights(folder, **parts)

    push = {name: kwargs.pop(name, None) for name in ("commit_message", "private", "token", "create_pr", "subfolder")}
    push["commit_message"] = push["commit_message"] or f"Upload LoRA adapter {adapter_name}"
    push["create_pr"] = bool(push["create_pr"])
    return _push(save, pipeline, repo_id, **push, card=kwargs | {"is_lora": True})


def _push(save, thing, repo_id, commit_message, private, token, create_pr, subfolder, card) -> str:
    unknown = card.keys() - inspect.signature(model_card).parameters.keys()
    if unknown:
        raise TypeError(f"Pushing takes no {sorted(unknown)}.")
    samples = card.pop("samples", None) or []
    for sample in samples:
        if not {"image", "prompt", "seed"} <= sample.keys() or not isinstance(sample["image"], Image.Image):
            raise ValueError("`samples` must be dictionaries with `image` (PIL), `prompt` and `seed`.")
    remedy = "Call again: nothing was committed, and files that arrived are kept."
    with tempfile.TemporaryDirectory() as name, connection_errors(f"{repo_id} was uploaded", remedy):
        folder = Path(name)
        save(name)  # before anything is made on the Hub
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if subfolder is None:
            earlier = _read_card(repo_id, token)
            if earlier is None or is_unedited(earlier):
                card = earlier_details(earlier) | {name: value for name, value in card.items() if value is not None}
                card["samples"] = save_samples(samples, folder)
                (folder / "README.md").write_text(model_card(thing, repo_id, **card), encoding="utf-8")
            if not card.get("is_lora"):
                _write_stubs(thing, repo_id, folder)
        return upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
            path_in_repo=subfolder,
        )


def _read_card(repo_id: str, token: str | None) -> str | None:
    try:
        return Path(download(repo_id, "README.md", None, {"token": token})).read_text("utf-8")
    except LocalEntryNotFoundError:  # the Hub is out of reach: there may be a card, which someone has edited
        raise
    except FileNotFoundError:
        return None


def _write_stubs(thing, repo_id: str, folder: Path):
    """`pipeline.py`, and `paella_diffusers.py` beside each of our components: diffusers runs them if allowed to."""
    if not hasattr(thing, "components"):
        return
    (folder / "pipeline.py").write_text(STUB.format(repo_id=repo_id, install=pip_install(), name=type(thing).__name__))
    for name, component in thing.components.items():
        if type(component).__module__.startswith("paella_diffusers."):
            stub = STUB.format(repo_id=repo_id, install=pip_install(), name=type(component).__name__)
            (folder / name / "paella_diffusers.py").write_text(stub)
