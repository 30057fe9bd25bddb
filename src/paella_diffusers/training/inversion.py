"""Textual inversion (https://huggingface.co/papers/2208.01618): vectors of new tokens in training, and nothing else."""

import math
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from ..loaders.textual_inversion import TOKENIZERS, WEIGHT_NAMES
from ..pipelines.pipeline_paella import PaellaPipeline
from .captions import CaptionedUNet, CaptionParts, CaptionsLeft
from .run import TrainingRun

# captions of pictures that have none, as in the paper's code; {} is the token
TEMPLATES = {
    "object": ["{}", "a {}", "a photo of a {}", "a picture of a {}", "the photo of a {}", "a close-up photo of a {}"],
    "style": ["a picture in the style of {}", "a painting in the style of {}", "a drawing in the style of {}", "{}"],
}


class NewRows(nn.Module):
    """An embedding's weight with rows for new tokens, `rows * unit`: a parametrization of it."""

    def __init__(self, ids: list[int], rows: nn.Parameter, unit: float):
        super().__init__()
        self.rows: list[nn.Parameter] = [rows]  # in a list: the rows are the parameters of one module only
        self.count: int = max(ids) + 1
        self.ids = ids
        self.unit = unit

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        missing = weight.new_zeros(max(0, self.count - len(weight)), weight.shape[1])
        ids = torch.tensor(self.ids, device=weight.device)
        return torch.cat([weight, missing]).index_copy(0, ids, (self.rows[0] * self.unit).to(weight.dtype))


class LearnedTokens(CaptionedUNet):
    """
    A token's vectors for each text encoder of a pipeline. The encoders then know the token, and only its vectors are
    trained.

    Each encoder's vectors are trained in a unit of their own, about the size of the entries that they begin with: these may
    be many times larger in one encoder than in the other, and both have one learning rate. The unit is a power of two, so
    that vectors are written and read without rounding.

    Args:
        pipe ([`PaellaPipeline`]): It is changed in place.
        token (`str`): The token's name, such as `"<horse>"`.
        initializer (`str`): The word whose vectors the token's are at first.
        num_vectors (`int`, defaults to 1): Number of vectors. ByT5 has one for each byte of a word.
        scale (`float`, defaults to 1.0): How many times as large as the initializer's the vectors are at first. The encoders
            normalise what their layers read and add to it what these compute: the larger a vector, the less it is changed.

    Raises:
        ValueError: If a tokenizer knows the token already, or the initializer has no tokens.
    """

    def __init__(self, pipe: PaellaPipeline, token: str, initializer: str, num_vectors: int = 1, scale: float = 1.0):
        super().__init__(pipe)
        self.token = token
        pipe.unet.requires_grad_(False)
        vectors = {}
        self.units: dict[str, float] = {}
        for name in TOKENIZERS:
            encoder, tokenizer = getattr(pipe, name), getattr(pipe, TOKENIZERS[name])
            if encoder is None:
                continue
            encoder.requires_grad_(False)
            start = tokenizer(initializer, add_special_tokens=False).input_ids
            if not start:
                raise ValueError(f"--initializer-token {initializer!r} has no tokens of `{TOKENIZERS[name]}`: give a word.")
            tokens = [token, *(f"{token}_{i}" for i in range(1, num_vectors))]
            if tokenizer.add_tokens(tokens) != num_vectors:
                raise ValueError(f"`{TOKENIZERS[name]}` knows {token} already: take another --placeholder-token.")
            weight = encoder.get_input_embeddings().weight
            rows = weight[[start[i % len(start)] for i in range(num_vectors)]].detach().float() * scale
            self.units[name] = 2.0 ** round(math.log2(rows.square().mean().sqrt().clamp_min(1e-6)))
            vectors[name] = nn.Parameter(rows / self.units[name])
            rows = NewRows(tokenizer.convert_tokens_to_ids(tokens), vectors[name], self.units[name])
            # T5 has its embedding twice, with one weight
            tables = [part for part in encoder.modules() if isinstance(part, nn.Embedding) and part.weight is weight]
            for table in tables:
                parametrize.register_parametrization(table, "weight", rows, unsafe=True)  # unsafe: the shape changes
        self.vectors = nn.ParameterDict(vectors)

    def write(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write the vectors as `load_textual_inversion` reads them, with a file for each text encoder."""
        folder.mkdir(parents=True, exist_ok=True)
        for key, vectors in weights.items():
            name = key.removeprefix("vectors.")
            save_file({self.token: vectors * self.units[name]}, folder / WEIGHT_NAMES[name])

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """The vectors by the names of this module's parameters."""
        stored = {name: load_file(folder / WEIGHT_NAMES[name])[self.token] for name in self.vectors}
        return {f"vectors.{name}": vectors / self.units[name] for name, vectors in stored.items()}


class TemplateCaptions(CaptionsLeft):
    """Captions for pictures that have none: one of the templates."""

    def __init__(self, run: TrainingRun, pipe: PaellaPipeline, token: str, templates: list[str]):
        super().__init__(pipe)
        self.run = run
        self.token = token
        self.templates = templates

    def conditioning(
        self, batch: dict[str, Any], dropped: tuple[bool, bool, bool] = (False, False, False)
    ) -> dict[str, Any]:
        index, count = self.run.part
        rng = random.Random(f"{self.run.args.seed} {self.run.passes} 0")  # for the batch of all, as the first process did
        templates = [rng.choice(self.templates) for _ in range(len(batch["text"]) * count)][index::count]
        text = [caption or template.format(self.token) for caption, template in zip(batch["text"], templates)]
        return super().conditioning(batch | {"text": text}, dropped)


class InversionParts(CaptionParts):
    """The pipeline around tokens in training: all of it is frozen, the U-Net too."""

    def leave_captions_of(self, learned: LearnedTokens, templates: list[str]) -> None:
        """Have the captions encoded in each pass, with the vectors as they then are."""
        self.leave_captions(TemplateCaptions(self.run, self.pipe, learned.token, templates))
        unet = self.pipe.unet.eval().to(self.run.accelerator.device)
        if self.run.args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
