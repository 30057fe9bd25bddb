"""LoRA adapters of the U-Net, through diffusers' mixin and PEFT (the extra `lora`)."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import convert_unet_state_dict_to_peft, is_peft_available
from huggingface_hub import list_repo_files
from safetensors import safe_open

from ..about import pip_install
from .hub import HUB_OPTIONS, find_file, push_lora
from .original_checkpoint import read_state_dict

WEIGHT_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


class PaellaLoraLoaderMixin(LoraBaseMixin):
    """Loads LoRA adapters into `unet`, and saves them: https://huggingface.co/papers/2106.09685."""

    _lora_loadable_modules = ["unet"]
    unet_name = "unet"

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict, **kwargs):
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
                with safe_open(path, framework="pt") as file:
                    metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "null"))
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs,
    ):
        """
        Attach an adapter to the U-Net and make it active.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `Path` or `dict`): As for `lora_state_dict`, like `kwargs`.
            adapter_name (`str`, *optional*): What to call it; `default_0` and so on unless given.
            hotswap (`bool`, defaults to `False`): Replace the adapter of that name in place.

        Raises:
            ValueError: If the file holds anything but a LoRA adapter of this U-Net.
        """
        if not is_peft_available():
            raise ValueError(f"LoRA adapters need PEFT: {pip_install('lora')}")
        if any(parameter.is_meta for parameter in self.unet.parameters()):
            raise ValueError("The U-Net has its weights on disk: load the pipeline without `low_memory` to attach adapters.")
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", True)
        source = pretrained_model_name_or_path_or_dict
        state_dict, metadata = self.lora_state_dict(source, return_lora_metadata=True, **kwargs)
        foreign = sorted(key for key in state_dict if "lora" not in key or not key.startswith(f"{self.unet_name}."))
        if foreign or not state_dict:
            raise ValueError(
                f"This is no LoRA adapter of Paella's U-Net: its keys should begin with 'unet.' and contain 'lora', unlike "
                f"{foreign[:3] or 'an empty file'}."
            )
        state_dict = convert_unet_state_dict_to_peft(state_dict)
        _check_fits(self.unet, {key.removeprefix(f"{self.unet_name}."): t for key, t in state_dict.items()})
        self.load_lora_into_unet(
            state_dict,
            unet=self.unet,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

    @classmethod
    def load_lora_into_unet(cls, state_dict, unet, adapter_name=None, metadata=None, _pipeline=None, **kwargs):
        """Attach an adapter, given as weights whose names begin with `unet.`, to `unet`."""
        unet.load_lora_adapter(
            state_dict,
            prefix=cls.unet_name,
            network_alphas=None,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=_pipeline,
            **kwargs,
        )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        unet_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: dict | None = None,
    ):
        """
        Write an adapter to `save_directory/pytorch_lora_weights.safetensors`.

        Args:
            unet_lora_layers (`dict`): `peft.get_peft_model_state_dict(pipe.unet, adapter_name)`.
            unet_lora_adapter_metadata (`dict`, *optional*): `pipe.unet.peft_config[adapter_name].to_dict()`.
        """
        if not unet_lora_layers:
            raise ValueError("Pass `unet_lora_layers`: an adapter without weights is none.")
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={cls.unet_name: unet_lora_layers},
            lora_metadata={cls.unet_name: unet_lora_adapter_metadata},
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    def push_lora_to_hub(self, repo_id: str, adapter_name: str | None = None, **kwargs) -> str:
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
        components: list[str] = ["unet"],
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs,
    ):
        """Add the active adapters, times `lora_scale`, to the weights themselves."""
        super().fuse_lora(components, lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] = ["unet"], **kwargs):
        """Take them out again."""
        super().unfuse_lora(components, **kwargs)


def _adapter_file(source, use_safetensors: bool | None, weight_name, subfolder, revision, options: dict) -> str:
    """The file with an adapter's weights: of the usual names, or the only `.safetensors`."""
    if Path(source).is_file():
        if use_safetensors and not str(source).endswith(".safetensors"):
            raise OSError(f"{source} is a pickle, which `use_safetensors=True` rules out.")
        return str(source)
    folder = f"{subfolder}/" if subfolder else ""
    wanted = {None: WEIGHT_NAMES, True: WEIGHT_NAMES[:1], False: WEIGHT_NAMES[1:]}[use_safetensors]
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


def _check_fits(unet: torch.nn.Module, state_dict: dict[str, torch.Tensor]):
    """Refuse an adapter with half of a pair, or of another model."""
    modules = dict(unet.named_modules())
    strange, shapes = [], {}
    for key, tensor in state_dict.items():
        name, _, part = key.partition(".lora_")
        if name not in modules or not tensor.is_floating_point():
            strange.append(f"{key} {tensor.dtype}")
        elif part in ("A.weight", "B.weight"):
            shapes.setdefault(name, {})[part[0]] = tuple(tensor.shape)
    if strange:
        raise ValueError(f"The adapter does not fit this U-Net, which has no such layers, or no such dtypes: {strange[:5]}.")
    for name, pair in shapes.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"The adapter is incomplete: {name} has no lora_{({'A', 'B'} - pair.keys()).pop()}.weight.")
        rank, weight = pair["A"][0], modules[name].weight.shape
        is_linear = len(weight) == 2  # grouped convolutions' are of other shapes
        if pair["B"][:2] != (weight[0], rank) or (is_linear and pair["A"][1:] != weight[1:]):
            raise ValueError(
                f"The adapter does not fit this U-Net: {name} has weights {tuple(weight)}, for which lora_A {pair['A']} and "
                f"lora_B {pair['B']} are not."
            )
