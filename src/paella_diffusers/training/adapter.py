"""LoRA adapters in training: of the U-Net, of the text encoders beside it, or of the prior."""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from ..loaders.lora import TEXT_ENCODERS, WEIGHT_NAMES
from ..pipelines.pipeline_paella import PaellaPipeline
from .captions import CaptionedUNet, CaptionParts, CaptionsLeft
from .run import Trained, TrainingRun
from .unet import FrozenParts

# attention, and the pixelwise layers of the other blocks
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]
# attention, in T5's names and in CLIP's
TEXT_TARGETS = {"text_encoder": ["q", "k", "v", "o"], "text_encoder_2": ["q_proj", "k_proj", "v_proj", "out_proj"]}


def add_lora_arguments(parser: argparse.ArgumentParser, rank: int | None = None, help: str | None = None) -> None:
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


def add_text_encoder_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train-text-encoder", action="store_true", help="also train adapters of the text encoders")


def lora_config(args: argparse.Namespace, targets: list[str] | None) -> LoraConfig:
    """What these arguments ask for, of layers with such names."""
    options = dict(lora_dropout=args.dropout, use_dora=args.use_dora, target_modules=targets)
    return LoraConfig(r=args.rank, lora_alpha=args.alpha or args.rank, **options)


class Adapter:
    """
    A new adapter of some models, which alone is then trained; written and read in the form that `load_lora_weights` takes.

    Args:
        models (`dict[str, nn.Module]`): To be adapted, in place, by their names in a pipeline.
        args (`argparse.Namespace`): Of [`add_lora_arguments`].
        whole (`nn.Module`, *optional*): The module in which they are trained; the only one of them unless given.
    """

    def __init__(self, models: dict[str, Any], args: argparse.Namespace, whole: nn.Module | None = None):
        stored: dict[str, torch.Tensor] = {}
        self.metadata: dict[str, Any] = {}
        for name, model in models.items():
            model.requires_grad_(False)
            model.add_adapter(lora_config(args, TEXT_TARGETS.get(name, args.targets)))
            cast_training_params(model, torch.float32)  # a frozen encoder may be in half precision
            self.metadata[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
            trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
            part = get_peft_model_state_dict(model, trained, adapter_name="default")
            stored |= {f"{name}.{key}": parameter for key, parameter in part.items()}
        whole = next(iter(models.values())) if whole is None else whole
        identities = {id(parameter): name for name, parameter in whole.named_parameters()}
        self.names: dict[str, str] = {key: identities[id(parameter)] for key, parameter in stored.items()}

    def write(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write `pytorch_lora_weights.safetensors` to a folder from the trained weights by their names in the module."""
        layers = {}
        for key, name in self.names.items():
            component, _, key = key.partition(".")
            layers.setdefault(f"{component}_lora_layers", {})[key] = weights[name]
        PaellaPipeline.save_lora_weights(folder, **layers, **self.metadata)

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """The weights by their names in the module."""
        return {self.names.get(key, key): weight for key, weight in load_file(folder / WEIGHT_NAMES[0]).items()}


class AdaptedUNet(CaptionedUNet):
    """A U-Net and text encoders, all with adapters."""

    def __init__(self, pipe: PaellaPipeline):
        super().__init__(pipe)
        names = [name for name in ("unet", *TEXT_ENCODERS) if getattr(pipe, name) is not None]
        self.models: Any = nn.ModuleDict({name: getattr(pipe, name) for name in names})

    def enable_gradient_checkpointing(self) -> None:
        for name, model in self.models.items():
            model.enable_gradient_checkpointing() if name == "unet" else model.gradient_checkpointing_enable()


def prepare_adapter(run: TrainingRun) -> tuple[FrozenParts, Adapter, Trained]:
    """A new adapter of the pretrained U-Net and, with `--train-text-encoder`, of its text encoders."""
    args = run.args
    if args.train_text_encoder:
        frozen = CaptionParts(run)
        frozen.leave_captions(CaptionsLeft(frozen.pipe))
        model = AdaptedUNet(frozen.pipe)
        adapter = Adapter(dict(model.models), args, model)
    else:
        frozen = FrozenParts(run)
        model = frozen.pipe.unet
        adapter = Adapter({"unet": model}, args)
    shard = not args.train_text_encoder  # FSDP does not know where to cut a model with encoders
    return frozen, adapter, run.prepare("unet_lora", model, adapter.write, adapter.read, frozen=False, shard=shard)
