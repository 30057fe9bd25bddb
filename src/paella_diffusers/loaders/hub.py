"""Saving whole or not at all, and pushing to the Hub: with a model card, and with what loads the repository elsewhere."""

import hashlib
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from safetensors import SafetensorError, safe_open

from ..about import pip_install

# what `hf_hub_download` takes beside the file
HUB_OPTIONS = ("cache_dir", "force_download", "token", "local_files_only")
CARD = """---
{{ card_data }}
---

# {{ name }}

{{ what }} for [Paella](https://huggingface.co/papers/2211.07292), text to image by renoising discrete tokens, in
[diffusers](https://github.com/huggingface/diffusers) with `paella-diffusers`.

```bash
{{ install }}
```

```python
{{ usage }}
```
{% if training %}
## Training

| setting | value |
|---|---|
{% for name, value in training.items() %}| {{ name }} | {{ value }} |
{% endfor %}{% endif %}{% if samples %}
## Samples

{% for sample in samples %}![{{ sample.prompt }}]({{ sample.path }}) “{{ sample.prompt }}”, seed {{ sample.seed }}

{% endfor %}{% endif %}"""
MARK = "\n<!-- made by paella-diffusers ({}): once edited, this card is kept as it is -->\n"
STUB = '''"""For diffusers where paella_diffusers was not imported: `custom_pipeline="{repo_id}", trust_remote_code=True`."""

try:
    from paella_diffusers import {name}  # noqa: F401
except ImportError as error:
    raise ImportError("{repo_id} needs paella-diffusers: {install}") from error
'''


@contextmanager
def loading_errors(repo_id: str, filename: str, revision: str | None = None):
    """
    Say which file of which repository cannot be had, and what to do, whatever wraps the client's error.

    Raises:
        FileNotFoundError: If the repository has no such file; `LocalEntryNotFoundError`, one of them, while offline.
        OSError: If the repository, its revision or access to it is missing, or the connection breaks.
    """
    with connection_errors(f"{repo_id} was loaded", "Call again: whole files are kept."):
        try:
            yield
        except RemoteEntryNotFoundError as error:
            raise FileNotFoundError(f"{repo_id} has no {filename}.") from error
        except Exception as error:
            for reason in _chain(error):
                if isinstance(reason, LocalEntryNotFoundError):
                    what = f"{filename} of {repo_id}" if reason is error else f"Some of {repo_id} ({error})"
                    raise LocalEntryNotFoundError(
                        f"{what} is not in the cache, and the Hub is out of reach: load it once while online, without "
                        "`local_files_only`, or pass the `cache_dir` that it is in."
                    ) from error
                message = _what_to_do(reason, repo_id, filename, revision)
                if message is not None:
                    raise OSError(message) from error
            raise


@contextmanager
def connection_errors(what: str, remedy: str):
    """Say what broke off and what to do, where the Hub's client would only name the HTTP library's error."""
    try:
        yield
    except LocalEntryNotFoundError:
        raise
    except Exception as error:
        if not any(map(_is_connection_error, _chain(error))):
            raise
        raise OSError(f"The connection to the Hub broke while {what} ({error}). {remedy}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from or while handling, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_connection_error(error: BaseException) -> bool:
    """Whether it is an `httpx.TransportError`; newer clients come with an httpx of another name."""
    kinds = type(error).__mro__
    return any(kind.__name__ == "TransportError" and kind.__module__.startswith("httpx") for kind in kinds)


def _what_to_do(error: BaseException, repo_id: str, filename: str, revision: str | None) -> str | None:
    if isinstance(error, HFValidationError):
        return f"{repo_id} is neither a folder nor a Hub id like owner/name."
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is gated: {filename} needs its owners' consent. Ask for it on {repo_id}'s page on the Hub, then log "
            "in with `hf auth login`, or pass `token`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no {repo_id} on the Hub, or it is private ({filename} was asked for). Check the name; for a private "
            "one log in with `hf auth login`, or pass `token`."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision} ({filename} was asked for)."
    return None


def download(repo_id: str, filename: str, revision: str | None, options: dict) -> str:
    """A file of a Hub repository, in the cache; raises as [`loading_errors`]."""
    with loading_errors(repo_id, filename, revision):
        return hf_hub_download(repo_id, filename, revision=revision, **options)


def find_file(path: str | Path, filename: str, revision: str | None, options: dict) -> str:
    """A file of a folder, or of a Hub repository, downloaded; raises as [`loading_errors`]."""
    if Path(path).is_dir():
        if not (Path(path) / filename).is_file():
            raise FileNotFoundError(f"{path} has no {filename}.")
        return str(Path(path) / filename)
    return download(str(path), filename, revision, options)


class PaellaHubMixin:
    """`from_pretrained` and `push_to_hub` of pipelines, models and schedulers."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As diffusers' `from_pretrained`, whose arguments it takes; errors say what to do."""
        with loading_errors(str(pretrained_model_name_or_path), cls.config_name, kwargs.get("revision")):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

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
        **card,
    ) -> str:
        """
        Upload to a Hub repository, which is made if it is not there, in diffusers' layout.

        Args:
            repo_id (`str`): `owner/name`.
            commit_message (`str`, *optional*): `Upload CLASS` unless given.
            private (`bool`, *optional*): Whether a new repository is private.
            token (`str`, *optional*): The stored one unless given.
            create_pr (`bool`, defaults to `False`): Open a pull request rather than commit.
            safe_serialization (`bool`, defaults to `True`): Write safetensors.
            variant (`str`, *optional*): Part of the weights' file names, such as `"bf16"`.
            subfolder (`str`, *optional*): Where in the repository; then no model card is written.
            max_shard_size (`int` or `str`, *optional*): Split weights into files of at most so many bytes, or `"2GB"`.
            card: For the model card, which is made anew unless someone has edited it: see [`model_card`].

        Returns:
            `str`: The address of the commit.
        """
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        options = {} if "Scheduler" in type(self).__name__ else {k: v for k, v in options.items() if v is not None}
        return _push(
            lambda folder: self.save_pretrained(folder, **options),
            self,
            repo_id,
            commit_message or f"Upload {type(self).__name__}",
            private,
            token,
            create_pr,
            subfolder,
            card,
        )


class WholeOrNotAtAllMixin:
    """
    `save_pretrained` of models: whenever it stops, the folder has the earlier model, the new one, or no `config.json`. And
    `from_pretrained` takes no integers for weights.
    """

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, *args, **kwargs):
        """
        What `from_pretrained` calls with the files it found. Where it would only log that a tensor is missing, and leave it
        empty, or take integers for weights, the files are refused.
        """
        if kwargs.get("hf_quantizer") is None and resolved_model_file:
            found = {}
            for path in resolved_model_file:
                found |= _stored_dtypes(path)
            expected = model.state_dict()
            missing = sorted(expected.keys() - found.keys())
            wrong = [
                f"{key} is {dtype}"
                for key, dtype in found.items()
                if key in expected and dtype.is_floating_point != expected[key].is_floating_point()
            ]
            where = Path(resolved_model_file[0]).parent
            if missing:
                raise ValueError(f"{where} is no whole {cls.__name__}: it has no {missing[:5]}.")
            if wrong:
                raise ValueError(f"{where} does not fit {cls.__name__}: integers and others are confused, {wrong[:5]}.")
        return super()._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)

    def check_savable(self):
        """Refuse to save with adapters attached, as the result would load as another model, and without weights."""
        if any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError(f"This {type(self).__name__} has its weights on disk: load it without `low_memory` to save it.")
        if getattr(self, "peft_config", None):
            raise ValueError(
                "Adapters are attached, with which the weights have other names: first `fuse_lora` and "
                "`unload_lora_weights`, or save the adapter alone with `save_lora_weights` or `push_lora_to_hub`."
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs,
    ):
        """As diffusers' `ModelMixin.save_pretrained`, with which it shares its arguments, but whole or not at all."""
        self.check_savable()
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"`save_directory` must be a folder, but {folder} is a file.")
        if not is_main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for abandoned in folder.glob(".unfinished-*"):
            shutil.rmtree(abandoned)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
        try:
            options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
            super().save_pretrained(unfinished, **options)
            config = folder / self.config_name
            config.unlink(missing_ok=True)  # from here to its return, nothing loads this folder
            for stale in _weights(folder, variant):
                stale.unlink()
            for path in sorted(unfinished.iterdir(), key=lambda path: path.name == config.name):
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", folder.name)
            self.push_to_hub(repo_id, **options, **kwargs)


def _stored_dtypes(path) -> dict[str, torch.dtype]:
    """The dtypes of the tensors in a file of weights."""
    if str(path).endswith(".safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118 - mapped, not read
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): save or download it again.") from error
    content = torch.load(path, map_location="meta", weights_only=True)
    return {key: tensor.dtype for key, tensor in content.items() if isinstance(tensor, torch.Tensor)}


def push_lora(pipeline, repo_id: str, adapter_name: str | None = None, **kwargs) -> str:
    """Upload an adapter of the pipeline's U-Net; see `PaellaLoraLoaderMixin.push_lora_to_hub`."""
    from peft import get_peft_model_state_dict

    adapters = list(getattr(pipeline.unet, "peft_config", {}))
    adapter_name = adapter_name or (adapters[0] if len(adapters) == 1 else None)
    if adapter_name not in adapters:
        raise ValueError(f"`adapter_name` must be one of the attached adapters, {adapters}, got {adapter_name!r}.")

    def save(folder: str):
        pipeline.save_lora_weights(
            folder,
            get_peft_model_state_dict(pipeline.unet, adapter_name=adapter_name),
            unet_lora_adapter_metadata=pipeline.unet.peft_config[adapter_name].to_dict(),
        )

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
            if earlier is None or _is_unedited(earlier):
                card = _earlier_details(earlier) | {name: value for name, value in card.items() if value is not None}
                card["samples"] = _save_samples(samples, folder)
                (folder / "README.md").write_text(model_card(thing, repo_id, **card))
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


def model_card(
    thing,
    repo_id: str,
    base_model: str | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
    training: dict | None = None,
    samples: list[dict] | None = None,
    is_lora: bool = False,
) -> str:
    """
    The model card of a pipeline, model, scheduler or adapter.

    Args:
        base_model (`str`, *optional*): The Hub id that it was finetuned from; where a pipeline was loaded from unless given.
        license (`str`, *optional*): A licence's identifier on the Hub, such as `"mit"`.
        tags (`list[str]`, *optional*): Beside `paella` and `text-to-image`.
        training (`dict`, *optional*): Settings of the training, for a table.
        samples (`list[dict]`, *optional*): `image` (PIL), `prompt` and `seed` of pictures to show.
    """
    class_name = type(thing).__name__
    origin = base_model or getattr(thing.config, "_name_or_path", "") or ""
    origin = "" if origin == repo_id else origin
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(origin)) and not Path(origin).exists()
    what = f"A `{class_name}`"
    usage = f'from paella_diffusers import {class_name}\n\n{class_name}.from_pretrained("{repo_id}")'
    if is_lora:
        what = "A LoRA adapter"
        base = origin if is_hub_id else "BASE_MODEL"
        usage = f'from paella_diffusers import PaellaPipeline\n\npipe = PaellaPipeline.from_pretrained("{base}")\n'
        usage += f'pipe.load_lora_weights("{repo_id}")\nimage = pipe("a prompt").images[0]'
    elif "Pipeline" in class_name:
        usage = f'from paella_diffusers import {class_name}\n\npipe = {class_name}.from_pretrained("{repo_id}")'
    samples = samples or []
    data = ModelCardData(
        base_model=origin if is_hub_id else None,
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["paella", "paella-diffusers", "text-to-image", *(["lora"] if is_lora else []), *(tags or [])],
        widget=[{"text": sample["prompt"], "output": {"url": sample["path"]}} for sample in samples] or None,
    )
    card = ModelCard.from_template(
        data,
        template_str=CARD,
        name=repo_id.split("/")[-1],
        what=what,
        install=pip_install(),
        usage=usage,
        training=training,
        samples=samples,
    )
    text = str(card)
    return text + MARK.format(_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _is_unedited(card: str) -> bool:
    text, _, rest = card.partition(MARK.split("{}")[0])
    return bool(rest) and rest.strip() == (_digest(text) + MARK.split("{}")[1]).strip()


def _earlier_details(card: str | None) -> dict:
    """What the card said that does not follow from what is pushed."""
    data = ModelCard(card).data.to_dict() if card else {}
    return {name: data[name] for name in ("base_model", "license") if data.get(name)}


def _read_card(repo_id: str, token: str | None) -> str | None:
    try:
        return Path(download(repo_id, "README.md", None, {"token": token})).read_text()
    except FileNotFoundError:
        return None


def _save_samples(samples: list[dict], folder: Path) -> list[dict]:
    saved = []
    for number, sample in enumerate(samples):
        (folder / "samples").mkdir(exist_ok=True)
        sample["image"].save(folder / "samples" / f"{number}.png")
        saved.append({"path": f"samples/{number}.png", "prompt": sample["prompt"], "seed": sample["seed"]})
    return saved


def _write_stubs(thing, repo_id: str, folder: Path):
    """`pipeline.py`, and `paella_diffusers.py` beside each of our components: diffusers runs them if allowed to."""
    if not hasattr(thing, "components"):
        return
    (folder / "pipeline.py").write_text(STUB.format(repo_id=repo_id, install=pip_install(), name=type(thing).__name__))
    for name, component in thing.components.items():
        if type(component).__module__.startswith("paella_diffusers."):
            stub = STUB.format(repo_id=repo_id, install=pip_install(), name=type(component).__name__)
            (folder / name / "paella_diffusers.py").write_text(stub)


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """The weights of this variant in a folder, whole or in shards, and their index."""
    part = f"[.]{re.escape(variant)}" if variant else ""
    weights = rf"diffusion_pytorch_model{part}(-\d{{5}}-of-\d{{5}})?[.](safetensors|bin)"
    index = rf"diffusion_pytorch_model[.](safetensors|bin)[.]index{part}[.]json"
    return [path for path in folder.iterdir() if re.fullmatch(f"{weights}|{index}", path.name)]
