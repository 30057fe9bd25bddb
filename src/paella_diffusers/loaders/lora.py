"""LoRA adapters of the U-Net, through diffusers' mixin and PEFT (the extra `[train]`)."""

import functools
import os
from collections.abc import Callable

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin, _fetch_state_dict
from diffusers.loaders.lora_pipeline import _LOW_CPU_MEM_USAGE_DEFAULT_LORA
from diffusers.utils import is_peft_available

from .hub import push_lora


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
        hub_kwargs = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
        fetch = functools.partial(
            _fetch_state_dict,
            pretrained_model_name_or_path_or_dict=pretrained_model_name_or_path_or_dict,
            use_safetensors=use_safetensors is not False,
            allow_pickle=use_safetensors is None,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            **{name: kwargs.pop(name, None) for name in hub_kwargs},
        )
        weight_name = kwargs.pop("weight_name", None)
        try:  # diffusers guesses a name only online, at the top of a repository, and without `token`
            usual = weight_name or LORA_WEIGHT_NAME_SAFE
            state_dict, metadata = fetch(weight_name=usual if use_safetensors is not False else weight_name)
        except OSError:
            if weight_name is not None:
                raise
            state_dict, metadata = fetch(weight_name=None)
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
            raise ValueError("LoRA adapters need PEFT: pip install 'paella-diffusers[train]'.")
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", _LOW_CPU_MEM_USAGE_DEFAULT_LORA)
        source = pretrained_model_name_or_path_or_dict
        source = dict(source) if isinstance(source, dict) else source  # loading takes entries out of it
        state_dict, metadata = self.lora_state_dict(source, return_lora_metadata=True, **kwargs)
        foreign = sorted(key for key in state_dict if "lora" not in key or not key.startswith(f"{self.unet_name}."))
        if foreign or not state_dict:
            raise ValueError(
                f"This is no LoRA adapter of Paella's U-Net: its keys should begin with 'unet.' and contain 'lora', unlike "
                f"{foreign[:3] or 'an empty file'}."
            )
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
