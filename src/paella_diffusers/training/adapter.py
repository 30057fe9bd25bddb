"""A LoRA adapter in training."""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from ..loaders.lora import WEIGHT_NAMES
from ..models.unet_paella import PaellaUNet
from ..pipelines.pipeline_paella import PaellaPipeline

# attention, and the pixelwise layers of the other blocks
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]


def add_lora_arguments(parser: argparse.ArgumentParser, rank: int | None, help: str | None = None):
    """The arguments of an adapter. `rank` is the default of `--rank`, and `help` what else is to be said of it."""
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=int, default=rank, help=help)
    add("--alpha", "--lora-alpha", type=float, help="the adapter's weight is alpha / rank; alpha is the rank unless given")
    add("--dropout", "--lora-dropout", type=float, default=0.0, help="share of an adapter's inputs left out")
    add(
        "--use-dora",
        action="store_true",
        help="also learn the matrices' magnitudes (https://huggingface.co/papers/2402.09353)",
    )
    add("--targets", nargs="+", default=TARGETS, help="names of the layers that are adapted")


def lora_config(args: argparse.Namespace) -> LoraConfig:
    """What these arguments ask for."""
    options = dict(lora_dropout=args.dropout, use_dora=args.use_dora, target_modules=args.targets)
    return LoraConfig(r=args.rank, lora_alpha=args.alpha or args.rank, **options)


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
