"""The published layout of Paella's checkpoints, in and out: a pickled flat state dict for each model."""

import inspect
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import safetensors.torch
import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download, split_torch_state_dict_into_shards
from huggingface_hub.constants import ENDPOINT

from .atomic import atomic_update
from .config_check import check_config
from .hub_files import download
from .saving import superseded_weights
from .weights import TensorInfo, check_tensors, read_state_dict

SHARD = "diffusion_pytorch_model{suffix}.safetensors"
HUB_URL = re.compile(
    r"(?:https?://)?([^/]+)/([^/]+/[^/]+)/(?:resolve|blob)/(refs/(?:pr|convert)/[^/]+|[^/]+)/([^?]+)(?:[?].*)?"
)


class OriginalCheckpointMixin:
    """For a model that has a published layout: `from_single_file` reads it, `to_original_state_dict` writes it."""

    _original_checkpoint: str  # the published file's name, which selects the layout

    @classmethod
    def from_single_file(
        cls,
        path_or_hub_url: str | Path,
        original_config: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        **hub_kwargs: Any,
    ) -> Self:
        """
        Load a checkpoint in the published layout.

        Args:
            path_or_hub_url (`str` or `Path`):
                A `.pt` or `.safetensors` file, or its address on the Hub, such as
                `https://huggingface.co/dome272/Paella/resolve/main/paella_v3.pt`. Training checkpoints, which nest the
                weights under `ema_state_dict` (preferred) or `state_dict`, are read too. Pickles are opened with
                `weights_only=True`, memory-mapped.
            original_config (`dict`, *optional*):
                The published constructor's keyword arguments, where they differ from the released model's.
            dtype (`torch.dtype`, *optional*): Of the model's weights; float32 unless given. `torch_dtype` is the same.
            hub_kwargs: `cache_dir`, `token`, `local_files_only`, `revision`, … for `huggingface_hub.hf_hub_download`.

        Raises:
            ValueError: If the file is no state dict, or a key is missing, unexpected or of the wrong shape.
            TypeError: If it is given any other argument.
        """
        earlier_name = hub_kwargs.pop("torch_dtype", None)
        dtype = dtype or earlier_name
        unknown = sorted(hub_kwargs.keys() - inspect.signature(hf_hub_download).parameters.keys())
        if unknown:
            raise TypeError(f"`from_single_file` takes no {unknown}: leave them out.")
        path = _resolve(path_or_hub_url, hub_kwargs)
        model, state_dict = cls._empty_and_state_dict(path, original_config)
        dtype = dtype or torch.float32
        if all(tensor.dtype == dtype for tensor in state_dict.values() if tensor.is_floating_point()):
            pass  # they stay in the mapped file
        elif zipfile.is_zipfile(path):
            state_dict = _cast(model, path, state_dict, dtype)
        else:
            state_dict = {key: t.to(dtype) if t.is_floating_point() else t for key, t in state_dict.items()}
        model.load_state_dict(state_dict, assign=True)
        model.requires_grad_(True)  # assigned tensors bring their own flag
        return model.eval()

    @classmethod
    def convert_single_file(
        cls,
        path: str | Path,
        save_directory: str | Path,
        original_config: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "512MB",
    ) -> None:
        """
        Convert a checkpoint in the published layout to a folder in diffusers', file by file: beside the mapped checkpoint,
        only one file of at most `max_shard_size` is in memory. Other arguments and errors: see `from_single_file`.
        """
        model, state_dict = cls._empty_and_state_dict(path, original_config)
        dtypes = {key: dtype or torch.float32 if t.is_floating_point() else t.dtype for key, t in state_dict.items()}
        empty = {key: torch.empty(t.shape, dtype=dtypes[key], device="meta") for key, t in state_dict.items()}
        split = split_torch_state_dict_into_shards(empty, filename_pattern=SHARD, max_shard_size=max_shard_size)
        with atomic_update(save_directory, cls.config_name, superseded_weights(None)) as unfinished:
            model.save_config(unfinished)
            for filename, keys in split.filename_to_tensors.items():
                shard = {key: state_dict[key].to(dtypes[key]).contiguous() for key in keys}
                safetensors.torch.save_file(shard, unfinished / filename, metadata={"format": "pt"})
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                path = unfinished / f"{SHARD.format(suffix='')}.index.json"
                path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    @classmethod
    def _empty_and_state_dict(cls, path, original_config: dict | None):
        """The model without weights, and its weights: views of the mapped file."""
        original = read_state_dict(path)
        config = _translate_config(cls._original_checkpoint, original_config or {})
        check_config(cls, config)
        with init_empty_weights():
            model = cls(**config)
        return model, _from_original(model, original, path)

    def to_original_config(self) -> dict[str, Any]:
        """The published constructor's keyword arguments."""
        names = CONFIG_NAMES[self._original_checkpoint]
        config = {original: self.config[ours] for original, ours in names.items()}
        return config | {"c_out": config["c_in"]} if "c_in" in config else config

    def to_original_state_dict(self) -> dict[str, torch.Tensor]:
        """
        The weights under the published names and shapes, as the published code loads them strictly.

        Raises:
            ValueError: If adapters are attached.
        """
        if getattr(self, "peft_config", None):
            raise ValueError("The published layout has no adapters: first fuse them into the weights, and unload them.")
        return to_original(self, self.state_dict())


def to_original(
    model: OriginalCheckpointMixin, state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """
    A state dict of `model`, which need not hold it, under the published names and shapes; views where possible.
    Floating-point tensors become `dtype`, if given.
    """
    original = {}
    for key, (original_key, part, is_conv) in _original_keys(model).items():
        tensor = state_dict[key]
        tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        if part is None:
            original[original_key] = tensor[:, :, None, None] if is_conv else tensor
            continue
        parts = original.setdefault(original_key, [])
        parts.append(tensor)
        if len(parts) == 3:  # query, key and value; none is kept beside the whole
            original[original_key] = torch.cat(parts)
    return original


def _resolve(path_or_hub_url, hub_kwargs) -> str:
    """A local path for a path or a Hub address."""
    url = HUB_URL.fullmatch(str(path_or_hub_url))
    if url is None:
        if not Path(path_or_hub_url).is_file():
            raise FileNotFoundError(
                f"{path_or_hub_url} is neither a file nor an address like https://huggingface.co/OWNER/NAME/resolve/main/FILE."
            )
        return str(path_or_hub_url)
    host, repo_id, revision, filename = url.groups()
    hosts = {"huggingface.co", "hf.co", urlsplit(ENDPOINT).netloc}
    if host not in hosts:
        raise ValueError(
            f"{path_or_hub_url} is not on the Hub ({', '.join(sorted(hosts))}): download the file, and pass its path."
        )
    revision = hub_kwargs.pop("revision", None) or unquote(revision)
    return download(repo_id, unquote(filename), revision, hub_kwargs)


def _from_original(model, original, path) -> dict[str, torch.Tensor]:
    """The published state dict under our names and shapes; views, not copies."""
    keys, expected = _original_keys(model), {}
    for key, tensor in model.state_dict().items():
        original_key, part, is_conv = keys[key]
        shape = tuple(tensor.shape) + (1, 1) * is_conv
        if part is not None:
            shape = (shape[0] * 3, *shape[1:])
        expected[original_key] = TensorInfo(shape, tensor.is_floating_point())
    found = {key: TensorInfo.of(tensor) for key, tensor in original.items()}
    remedy = "`original_config` takes the published constructor's arguments where they differ from the released model's."
    check_tensors(found, expected, path, f"{type(model).__name__} in the given configuration", remedy)
    state_dict = {}
    for key, (original_key, part, is_conv) in keys.items():
        tensor = original[original_key]
        tensor = tensor if part is None else tensor.chunk(3)[part]
        state_dict[key] = tensor.flatten(1) if is_conv else tensor
    return state_dict


def _cast(model, path, state_dict, dtype: torch.dtype, at_once: int = 2**28) -> dict[str, torch.Tensor]:
    """In another dtype. From time to time the file is mapped anew, so that what was read of it leaves memory."""
    cast, read = {}, 0
    for key in list(state_dict):
        if read > at_once:
            state_dict.clear()
            state_dict.update(_from_original(model, read_state_dict(path), path))
            read = 0
        tensor = state_dict.pop(key)
        read += tensor.nbytes
        cast[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()
    return cast


# ------------------------------------------------------------------------------------------------ published names

CONFIG_NAMES = {
    "paella_v3.pt": {
        "c_in": "token_embed_dim",
        "num_labels": "num_vq_embeddings",
        "c_r": "time_embed_dim",
        "patch_size": "patch_size",
        "c_cond": "cross_attention_dim",
        "c_hidden": "block_out_channels",
        "nhead": "num_attention_heads",
        "blocks": "layers_per_block",
        "level_config": "block_types",
        "clip_embd": "clip_embed_dim",
        "byt5_embd": "text_embed_dim",
        "clip_seq_len": "clip_seq_len",
        "kernel_size": "kernel_size",
        "dropout": "dropout",
        "self_attn": "self_attention",
    },
    "vqgan_f4.pt": {
        "levels": "levels",
        "bottleneck_blocks": "bottleneck_blocks",
        "c_hidden": "embed_dim",
        "c_latent": "latent_channels",
        "codebook_size": "num_vq_embeddings",
        "scale_factor": "scale_factor",
    },
    "prior_v1.pt": {
        "clip_r": "embedding_dim",
        "c_hidden": "hidden_dim",
        "c_r": "time_embed_dim",
        "num_blocks": "num_layers",
    },
}


def _translate_config(checkpoint: str, original_config: dict) -> dict:
    original_config = dict(original_config)
    if checkpoint == "paella_v3.pt" and "c_out" in original_config:
        c_in, c_out = original_config.get("c_in", 256), original_config.pop("c_out")
        if c_in != c_out:
            raise ValueError(f"`original_config` must have c_in equal to c_out, got {c_in} and {c_out}.")
    names = CONFIG_NAMES[checkpoint]
    unknown = original_config.keys() - names.keys()
    if unknown:
        raise ValueError(f"`original_config` has unknown arguments {sorted(unknown)}; known are {sorted(names)}.")
    return {names[name]: value for name, value in original_config.items()}


def _original_keys(model) -> dict[str, tuple[str, int | None, bool]]:
    """For each of our keys: the published one, which third of it (None: all), and whether it is a 1×1 convolution."""
    prefixes = list(PREFIXES[model._original_checkpoint](model.config))
    keys = {}
    for key in model.state_dict():
        # the longest prefix, so that "proj_in" does not take "blocks.0.proj_in"
        ours, original = max((p for p in prefixes if key.startswith(p[0])), key=lambda p: len(p[0]))
        part = next((i for i, name in enumerate(("to_q.", "to_k.", "to_v.")) if name in key), None)
        is_conv = original in ("embedding.1.", "clf.1.", "out_mapper.1.") and key.endswith("weight")
        keys[key] = (original + key.removeprefix(ours), part, is_conv)
    return keys


def _unet_prefixes(config) -> Iterator[tuple[str, str]]:
    yield from [
        ("text_proj.", "byt5_mapper."),
        ("clip_text_proj.", "clip_mapper."),
        ("clip_image_proj.", "clip_image_mapper."),
        ("token_embedding.", "in_mapper.0."),
        ("proj_in.", "embedding.1."),
        ("proj_out.", "clf.1."),
        ("head.", "out_mapper.1."),
    ]
    inside = {
        "depthwise.": "depthwise.",
        "proj_in.": "channelwise.0.",
        "grn.": "channelwise.2.",
        "proj_out.": "channelwise.4.",
        "proj.": "mapper.",
        "cond_proj.": "kv_mapper.1.",
        "attention.to_q.": "attention.attn.in_proj_",
        "attention.to_k.": "attention.attn.in_proj_",
        "attention.to_v.": "attention.attn.in_proj_",
        "attention.to_out.0.": "attention.attn.out_proj.",
    }
    levels = len(config.block_out_channels)
    for direction in ("down", "up"):
        index = 0  # of our flat list; the published lists count anew in each level
        for level in range(levels):
            config_level = level if direction == "down" else levels - 1 - level
            position = 0
            if direction == "down" and level > 0:
                yield f"down_blocks.{index}.conv.", f"down_blocks.{level}.0.1."
                index, position = index + 1, 1
            for _ in range(config.layers_per_block[config_level]):
                for layer in range(len(config.block_types[config_level])):
                    for ours, original in inside.items():
                        yield (
                            f"{direction}_blocks.{index}.layers.{layer}.{ours}",
                            f"{direction}_blocks.{level}.{position}.{original}",
                        )
                    position += 1
                index += 1
            if direction == "up" and level < levels - 1:
                yield f"up_blocks.{index}.conv.", f"up_blocks.{level}.{position}.1."
                index += 1


def _vqgan_prefixes(config) -> Iterator[tuple[str, str]]:
    yield from [("", ""), ("vquantizer.embedding.", "vquantizer.codebook.")]


def _prior_prefixes(config) -> Iterator[tuple[str, str]]:
    yield "proj_in.", "blocks.0."
    for block in range(config.num_layers):
        for ours, original in {"proj_in.": "0.", "norm_in.": "1.", "proj_out.": "3.", "norm_out.": "4."}.items():
            yield f"blocks.{block}.{ours}", f"blocks.{block + 1}.{original}"
    yield "proj_out.", f"blocks.{config.num_layers + 1}."


PREFIXES: dict[str, Callable[..., Any]] = {
    "paella_v3.pt": _unet_prefixes,
    "vqgan_f4.pt": _vqgan_prefixes,
    "prior_v1.pt": _prior_prefixes,
}
