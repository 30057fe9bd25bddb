"""LoRA adapters of the U-Net, the text encoders and the prior, through diffusers' mixins and PEFT (the extra `lora`)."""

import functools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import apply_lora_scale, convert_unet_state_dict_to_peft, is_peft_available
from huggingface_hub import list_repo_files
from safetensors import safe_open

from ..about import pip_install
from .atomic import atomic_file
from .hub import push_lora
from .hub_files import HUB_OPTIONS, find_file
from .offloading import without_offloading
from .weights import TensorInfo, check_tensors, read_state_dict, shorten

WEIGHT_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
MAX_RANK = 2**16
MAX_ALPHA = 10**6


class PaellaPeftAdapterMixin(PeftAdapterMixin):
    """Adapters of a model of ours, with a scale for each block of a U-Net."""

    def set_adapters(
        self,
        adapter_names: str | list[str],
        weights: float | dict[str, Any] | list[Any] | None = None,
    ) -> None:
        """
        Make adapters active.

        Args:
            adapter_names (`str` or `list[str]`): Which.
            weights (`float`, `dict` or a list of one for each adapter, *optional*):
                Their scales, 1 unless given. A dictionary has scales of parts of the U-Net, by the beginnings of their
                layers' names, of which the longest counts: `{"down": 0.5, "up_blocks.3": 0.7}`; or as in other U-Nets of
                diffusers, `{"down": 0.5, "up": {"block_3": 0.7}}`, where `block_3` is `up_blocks[3]`. Other layers have 1.

        Raises:
            ValueError: If there is no such adapter, the numbers of adapters and weights differ, a scale is no number, or an
                adapter has no layer in a part that is named.
        """
        adapter_names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        scales = [_scales_by_layer(w) for w in (weights if isinstance(weights, list) else [weights] * len(adapter_names))]
        layers = {name: layer for name, layer in self.named_modules() if hasattr(layer, "set_scale")}
        changes = []
        for adapter, by_layer in zip(adapter_names, scales):
            adapted = [name for name, layer in layers.items() if adapter in layer.scaling]
            for beginning in sorted(by_layer.keys() - {""}, key=len):  # the longest is set last
                inside = [name for name in adapted if f"{name}.".startswith(f"{beginning}.")]
                if adapted and not inside:
                    raise ValueError(f"The adapter {adapter!r} has no layers in {beginning!r}, but in {_parts(adapted)}.")
                changes += [(layers[name], adapter, by_layer[beginning]) for name in inside]
        super().set_adapters(adapter_names, [by_layer.get("", 1.0) for by_layer in scales])
        for layer, adapter, scale in changes:
            layer.set_scale(adapter, scale)


def _scales_by_layer(weights: float | dict[str, Any] | None, beginning: str = "") -> dict[str, float]:
    """Scales by the beginnings of layers' names, "" for all, from nested dictionaries with diffusers' names of blocks."""
    if not isinstance(weights, dict):
        scale = 1.0 if weights is None else weights
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"The scale of {beginning or 'an adapter'} must be a finite number, got {scale!r}.")
        return {beginning: float(scale)}
    scales = {}
    for name, value in weights.items():
        name = {"down": "down_blocks", "up": "up_blocks"}.get(name, name) if not beginning else name.removeprefix("block_")
        scales |= _scales_by_layer(value, f"{beginning}.{name}" if beginning else name)
    return scales


def _parts(layers) -> list[str]:
    return sorted({re.match(r"(?:(?:down|up)_blocks\.\d+|[^.]+)", name)[0] for name in layers})


class PaellaLoraLoaderMixin(LoraBaseMixin):
    """
    Loads LoRA adapters (https://huggingface.co/papers/2106.09685) into `unet`, `text_encoder`, ByT5, `text_encoder_2`, CLIP,
    and `prior`, and saves them. One file may have parts for several of them; weights' names begin with the component's.
    """

    _lora_loadable_modules = ["unet", "text_encoder", "text_encoder_2", "prior"]
    unet_name = "unet"

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Any], **kwargs: Any
    ) -> Any:
        """
        An adapter's weights, and, with `return_lora_metadata=True`, its configuration.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `Path` or `dict`):
                A Hub id, a folder, a `.safetensors` file, or the weights themselves. Pickles (`.bin`) are read only if there
                is no such file and `use_safetensors` is not True, and nothing in them is executed.
            kwargs:
                `use_safetensors`, `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`,
                `force_download`.
        """
        return_lora_metadata = kwargs.pop("return_lora_metadata", False)
        use_safetensors = kwargs.pop("use_safetensors", None)
        place = {name: kwargs.pop(name, None) for name in ("weight_name", "subfolder", "revision")}
        options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        source = pretrained_model_name_or_path_or_dict
        metadata = None
        if isinstance(source, dict):
            state_dict = dict(source)  # loading takes entries out of it
        else:
            path = _adapter_file(source, use_safetensors, **place, options=options)
            state_dict = read_state_dict(path)
            if path.endswith(".safetensors"):
                metadata = _read_metadata(path)
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Attach an adapter to the components that it has weights for, and make it active.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `Path` or `dict`): As for `lora_state_dict`, like `kwargs`.
            adapter_name (`str`, *optional*): What to call it; `default_0` and so on unless given.
            hotswap (`bool`, defaults to `False`): Replace the adapter of that name in place.

        Raises:
            ValueError: If the file holds anything but a LoRA adapter of these components.
        """
        if not is_peft_available():
            raise ValueError(f"LoRA adapters need PEFT: {pip_install('lora')}")
        if hasattr(self.unet, "weights_on_disk"):
            raise ValueError("The U-Net has its weights on disk: load the pipeline without `low_memory` to attach adapters.")
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", True)
        source = pretrained_model_name_or_path_or_dict
        state_dict, metadata = self.lora_state_dict(source, return_lora_metadata=True, **kwargs)
        foreign = sorted(
            key for key in state_dict if "lora" not in key or _component(key) not in self._lora_loadable_modules
        )
        if foreign or not state_dict:
            raise ValueError(
                f"This is no LoRA adapter of a Paella: its keys should begin with 'unet.' or another of "
                f"{self._lora_loadable_modules} and contain 'lora', unlike {foreign[:3] or 'an empty file'}."
            )
        parts = {}
        for name in dict.fromkeys(map(_component, state_dict)):
            weights = {key: tensor for key, tensor in state_dict.items() if _component(key) == name}
            parts[name] = self._check_part(name, weights, metadata or {})
        if hotswap and parts.keys() - {"unet", "prior"}:
            raise ValueError(f"`hotswap` replaces adapters of the U-Net and the prior only, got one of {sorted(parts)}.")
        if adapter_name is None:
            taken = {name for names in self.get_list_adapters().values() for name in names}
            adapter_name = next(name for number in count() if (name := f"default_{number}") not in taken)
        with without_offloading(self):
            for name, (weights, config) in parts.items():
                options: dict[str, Any] = dict(adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
                if name in TEXT_ENCODERS:
                    self.load_lora_into_text_encoder(weights, getattr(self, name), config, **options)
                else:
                    options |= dict(metadata=config, _pipeline=self, hotswap=hotswap)
                    self.load_lora_into_model(weights, getattr(self, name), **options)

    def _check_part(self, name: str, state_dict: dict, metadata: dict) -> tuple[dict, dict]:
        """A component's part of an adapter, checked: weights by their names in the component, and PEFT's configuration."""
        model, prefix = getattr(self, name, None), f"{name}."
        if model is None:
            raise ValueError(f"The adapter has weights for `{name}`, which this pipeline does not have.")
        weights = {key.removeprefix(prefix): tensor for key, tensor in convert_unet_state_dict_to_peft(state_dict).items()}
        _check_fits(model, weights, "U-Net" if name == "unet" else f"`{name}`")
        config = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        return weights, _adapter_config(weights, config)

    @classmethod
    def load_lora_into_unet(
        cls,
        state_dict: dict[str, torch.Tensor],
        unet: PeftAdapterMixin,
        adapter_name: str | None = None,
        metadata: dict[str, Any] | None = None,
        _pipeline: DiffusionPipeline | None = None,
        **kwargs: Any,
    ) -> None:
        """Attach an adapter, given as weights whose names begin with `unet.`, to `unet`."""
        options: dict[str, Any] = dict(adapter_name=adapter_name, metadata=metadata, _pipeline=_pipeline, **kwargs)
        unet.load_lora_adapter(state_dict, prefix=cls.unet_name, network_alphas=None, **options)

    @classmethod
    def load_lora_into_model(cls, state_dict: dict[str, torch.Tensor], model: Any, **kwargs: Any) -> None:
        """Attach an adapter, given as weights by their names in the model, to a U-Net or a prior."""
        model.load_lora_adapter(state_dict, prefix=None, network_alphas=None, **kwargs)

    @classmethod
    def load_lora_into_text_encoder(
        cls, state_dict: dict[str, torch.Tensor], text_encoder: Any, config: dict[str, Any], **kwargs: Any
    ) -> None:
        """Attach an adapter, given as weights by their names in a text encoder and PEFT's configuration."""
        from peft import LoraConfig

        text_encoder.load_adapter(adapter_state_dict=state_dict, peft_config=LoraConfig(**config), **kwargs)
        text_encoder.to(device=text_encoder.device, dtype=text_encoder.dtype)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        unet_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        text_encoder_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        text_encoder_2_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        prior_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: dict[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: dict[str, Any] | None = None,
        text_encoder_2_lora_adapter_metadata: dict[str, Any] | None = None,
        prior_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """
        Write an adapter to `save_directory/pytorch_lora_weights.safetensors`, whole or not at all.

        Args:
            unet_lora_layers, text_encoder_lora_layers, text_encoder_2_lora_layers, prior_lora_layers (`dict`, *optional*):
                `peft.get_peft_model_state_dict(pipe.unet, adapter_name)`, and so on.
            unet_lora_adapter_metadata, ..., prior_lora_adapter_metadata (`dict`, *optional*):
                `pipe.unet.peft_config[adapter_name].to_dict()`, and so on.
        """
        layers = [unet_lora_layers, text_encoder_lora_layers, text_encoder_2_lora_layers, prior_lora_layers]
        metadata = [unet_lora_adapter_metadata, text_encoder_lora_adapter_metadata, text_encoder_2_lora_adapter_metadata]
        metadata.append(prior_lora_adapter_metadata)
        given = {name: part for name, part in zip(cls._lora_loadable_modules, layers) if part}
        if not given:
            raise ValueError("Pass `unet_lora_layers` or those of another component: an adapter without weights is none.")
        if not is_main_process:
            return
        name = weight_name or WEIGHT_NAMES[0 if safe_serialization else 1]
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(save_directory) / name) as unfinished:
            cls._save_lora_weights(
                save_directory=unfinished.parent,
                lora_layers=given,
                lora_metadata={name: part for name, part in zip(cls._lora_loadable_modules, metadata) if name in given},
                is_main_process=True,
                weight_name=unfinished.name,
                save_function=cast(Any, save_function),
                safe_serialization=safe_serialization,
            )

    def push_lora_to_hub(self, repo_id: str, adapter_name: str | None = None, **kwargs: Any) -> str:
        """
        Upload an adapter to a Hub repository.

        Args:
            repo_id (`str`): `owner/name`.
            adapter_name (`str`, *optional*): Which, if several are attached.
            kwargs:
                `commit_message`, `private`, `token`, `create_pr` and `subfolder` of [`PaellaHubMixin.push_to_hub`], and what
                goes into the card: see [`model_card`].
        """
        return push_lora(self, repo_id, adapter_name, **kwargs)

    def fuse_lora(
        self,
        components: list[str] = _lora_loadable_modules,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the active adapters, times `lora_scale`, to the weights themselves."""
        super().fuse_lora(components, lora_scale, safe_fusing, adapter_names, **kwargs)
        self._forget_prompts()

    def unfuse_lora(self, components: list[str] = _lora_loadable_modules, **kwargs: Any) -> None:
        """Take them out again."""
        super().unfuse_lora(components, **kwargs)
        self._forget_prompts()

    def _forget_prompts(self):
        if self._prompt_cache is not None:
            self._prompt_cache.clear()  # PEFT sets weights through `.data`


def scale_adapters(function: Callable) -> Callable:
    """diffusers' `apply_lora_scale`, which after a call with the scale 0 would leave the layers' own scales at 1."""
    scaled = apply_lora_scale("cross_attention_kwargs")(function)

    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        if (kwargs.get("cross_attention_kwargs") or {}).get("scale", 1.0) != 0:
            return scaled(self, *args, **kwargs)
        scales = [layer.scaling for layer in self.modules() if isinstance(getattr(layer, "scaling", None), dict)]
        before = [dict(by_adapter) for by_adapter in scales]
        try:
            return scaled(self, *args, **kwargs)
        finally:
            for by_adapter, own in zip(scales, before):
                by_adapter.update(own)

    return wrapper


def _adapter_file(source, use_safetensors: bool | None, weight_name, subfolder, revision, options: dict) -> str:
    """The file with an adapter's weights: of the usual names, or the only `.safetensors`."""
    if Path(source).is_file():
        if use_safetensors and not str(source).endswith(".safetensors"):
            raise OSError(f"{source} is a pickle, which `use_safetensors=True` rules out.")
        return str(source)
    folder = f"{subfolder}/" if subfolder else ""
    wanted = {None: WEIGHT_NAMES, True: WEIGHT_NAMES[:1], False: WEIGHT_NAMES[1:]}[use_safetensors]
    missing = FileNotFoundError(source)
    for name in [weight_name] if weight_name else wanted:
        try:
            return find_file(source, folder + name, revision, options)
        except FileNotFoundError as error:
            missing = error
    if weight_name or use_safetensors is False:
        raise missing
    if Path(source).is_dir():
        names = [path.name for path in Path(source, folder).glob("*.safetensors")]
    elif options.get("local_files_only"):
        raise missing
    else:
        files = list_repo_files(source, revision=revision, token=options.get("token"))
        names = [file.removeprefix(folder) for file in files if file.startswith(folder) and file.endswith(".safetensors")]
    if len(names) != 1:
        found = f"several files that may be meant, {sorted(names)}" if names else f"neither {' nor '.join(wanted)}"
        raise FileNotFoundError(f"{source}/{folder} has {found}: pass `weight_name`.") from missing
    return find_file(source, folder + names[0], revision, options)


def _read_metadata(path: str) -> dict | None:
    """The configuration that an adapter's safetensors file carries, if any."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "null")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has metadata that are not JSON: {text[:80]!r}.") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"{path} has metadata that are no dictionary: {text[:80]!r}.")
    return metadata


def _component(key: str) -> str:
    """The component that a weight of an adapter is for."""
    return key.partition(".")[0]


def _check_fits(model: torch.nn.Module, state_dict: dict[str, torch.Tensor], what: str):
    """Refuse an adapter of another model, one that lacks half of a pair, or has values that are not finite."""
    modules, expected = dict(model.named_modules()), {}
    found = {key: TensorInfo.of(tensor) for key, tensor in state_dict.items()}
    for name in dict.fromkeys(key.partition(".lora_")[0] for key in found):
        layer = modules.get(name)
        shapes = _adapter_shapes(getattr(layer, "base_layer", layer), name, found)
        expected |= {f"{name}.lora_{part}": TensorInfo(shape, True) for part, shape in shapes.items()}
    check_tensors(found, expected, "The adapter", f"this {what}")
    damaged = [key for key, tensor in state_dict.items() if not tensor.isfinite().all()]
    if damaged:
        raise ValueError(f"The adapter has NaN or infinite values in {shorten(damaged)}: save or download it again.")


def _adapter_shapes(layer: torch.nn.Module | None, name: str, found: dict[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """The shapes that an adapter's tensors of some rank must have for a layer; none if there is no such layer."""
    part = "embedding_A" if isinstance(layer, torch.nn.Embedding) else "A.weight"
    rank = next(iter(found.get(f"{name}.lora_{part}", TensorInfo((), True)).shape), 1)
    if isinstance(layer, torch.nn.Embedding):
        return {"embedding_A": (rank, layer.num_embeddings), "embedding_B": (layer.embedding_dim, rank)}
    if isinstance(layer, torch.nn.Linear):
        shapes = {"A.weight": (rank, layer.in_features), "B.weight": (layer.out_features, rank)}
        more = {"B.bias": (layer.out_features,), "magnitude_vector": (layer.out_features,)}
    elif isinstance(layer, torch.nn.Conv2d):
        ones, channels = (1, 1), layer.out_channels
        shapes = {
            "A.weight": (rank, layer.in_channels, *layer.kernel_size),
            "B.weight": (channels, rank // layer.groups, *ones),
        }
        more = {"B.bias": (channels,), "magnitude_vector": (1, channels, *ones)}
    else:
        return {}
    return shapes | {part: shape for part, shape in more.items() if f"{name}.lora_{part}" in found}


def _adapter_config(state_dict: dict[str, torch.Tensor], metadata: dict) -> dict:
    """
    PEFT's configuration of an adapter: layers and ranks are those of its weights, which fit the model; its scale and dropout
    are those of the metadata. Regular expressions in the metadata are not evaluated, as they can be made to take for ever.
    """
    kind = metadata.get("peft_type") or "LORA"
    if kind != "LORA":
        raise ValueError(f"The adapter must be a LoRA, got {kind!r} in its metadata.")
    patterns = {name: metadata.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict) or not all(re.fullmatch(r"\^?[\w.]+", key) for key in pattern):
            raise ValueError(f"`{name}` in the adapter's metadata must have names of layers, got {str(pattern)[:80]}.")
    for rank in (metadata.get("r") or 1, *patterns["rank_pattern"].values()):
        if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
            raise ValueError(f"The rank in the adapter's metadata must be in [1, {MAX_RANK}], got {rank!r}.")
    ranks = {}
    for key, tensor in state_dict.items():
        name, _, part = key.partition(".lora_")
        if part in ("A.weight", "embedding_A"):
            ranks[name] = tensor.shape[0]
    default = metadata.get("lora_alpha")
    alphas = {name: _of_layer(name, patterns["alpha_pattern"], default) or rank for name, rank in ranks.items()}
    for alpha in alphas.values():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= MAX_ALPHA:
            raise ValueError(
                f"`lora_alpha` in the adapter's metadata must be a finite number up to {MAX_ALPHA} in size, got {alpha!r}."
            )
    dropout = metadata.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"`lora_dropout` in the adapter's metadata must be in [0, 1), got {dropout!r}.")
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "lora_dropout": dropout,
        "use_rslora": metadata.get("use_rslora") is True,
        "use_dora": any("lora_magnitude_vector" in key for key in state_dict),
        "lora_bias": any(key.endswith("lora_B.bias") for key in state_dict),
    }


def _of_layer(name: str, pattern: dict[str, float], default):
    """A layer's value in one of PEFT's patterns: of its whole name (`^NAME`) or of the end of it."""
    for key, value in pattern.items():
        if name == key.removeprefix("^") or (not key.startswith("^") and name.endswith(f".{key}")):
            return value
    return default
