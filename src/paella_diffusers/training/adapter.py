"""A LoRA adapter in training."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from ..loaders.lora import WEIGHT_NAMES
from ..models.unet_paella import PaellaUNet
from ..pipelines.pipeline_paella import PaellaPipeline


class Adapter:
    """
    A new adapter of a U-Net, which alone is then trained; written and read in the form that `load_lora_weights` takes.

    Args:
        unet ([`PaellaUNet`]): To be adapted, in place.
        config (`LoraConfig`): Of the adapter.
    """

    def __init__(self, unet: PaellaUNet, config: LoraConfig):
        unet.requires_grad_(False)
        unet.add_adapter(config)
        self.unet, self.metadata = unet, unet.peft_config["default"].to_dict()
        trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
        identities = {id(parameter): name for name, parameter in trained.items()}
        stored = get_peft_model_state_dict(unet, trained)
        self.names = {f"unet.{key}": identities[id(parameter)] for key, parameter in stored.items()}  # stored: within U-Net

    def write(self, weights: dict[str, torch.Tensor], folder: Path):
        """Write `pytorch_lora_weights.safetensors` to a folder from the trained weights by their names in the U-Net."""
        stored = {key.removeprefix("unet."): weights[name] for key, name in self.names.items()}
        PaellaPipeline.save_lora_weights(folder, stored, unet_lora_adapter_metadata=self.metadata)

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """The weights by their names in the U-Net."""
        return {self.names.get(key, key): weight for key, weight in load_file(folder / WEIGHT_NAMES[0]).items()}
