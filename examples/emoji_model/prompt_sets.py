"""What the benchmarks ask of the model: names, objects in a style that is new for them, and sentences."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from . import data
from .captions import BENCHMARK, Captions
from .data import Icons


@dataclass
class PromptSet:
    """
    Prompts, and what they ask for.

    Args:
        icons ([`Icons`]): All pictures.
        prompts (`list[str]`): What to draw.
        styles (`list[int]`): The style that each prompt asks for.
        objects (`list[list[int]]`): The objects that count as right for each prompt.
    """

    icons: Icons
    prompts: list[str]
    styles: list[int]
    objects: list[list[int]]

    def measure(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        For pictures `(n, 3, 64, 64)` in [0, 1], one of each prompt: 1.0 for each that is right, else 0.0; and the PSNR to
        the nearest of the pictures that count as right, in dB.
        """
        right, psnr = torch.empty(len(pictures)), torch.empty(len(pictures))
        for style in set(self.styles):
            rows = [row for row, one in enumerate(self.styles) if one == style]
            objects = [self.objects[row] for row in rows]
            apart = data.distances(pictures[rows], self.icons.images(style))
            right[rows] = data.is_nearest(apart, objects).float()
            psnr[rows] = torch.stack([-20 * one[index].amin().clamp(min=1e-3).log10() for one, index in zip(apart, objects)])
        return right, psnr


def names_of(icons: Icons, rows: list[int]) -> PromptSet:
    """Flat icons by their names."""
    return PromptSet(icons, [icons.names[row] for row in rows], [0] * len(rows), [[row] for row in rows])


def names(icons: Icons, cells: torch.BoolTensor, count: int) -> PromptSet:
    """Flat icons that were trained on, by their names; drawn once and for all."""
    known = cells[0].nonzero().flatten().tolist()
    return names_of(icons, random.Random(0).sample(known, min(count, len(known))))


def new_styles(icons: Icons, cells: torch.BoolTensor, count: int) -> PromptSet:
    """Objects in the style in which they were held out of training."""
    pairs = (~cells).nonzero().tolist()
    pairs = random.Random(0).sample(pairs, min(count, len(pairs)))
    prompts = [Captions.named(icons.names[row], style) for style, row in pairs]
    return PromptSet(icons, prompts, [style for style, _ in pairs], [[row] for _, row in pairs])


def sentences(icons: Icons, count: int) -> PromptSet:
    """Of the 80 sentences that training never saw, each with the icons that count as right."""
    meanings = json.loads(BENCHMARK.read_text())
    prompts = random.Random(0).sample(list(meanings), min(count, len(meanings)))
    objects = [[icons.names.index(name) for name in meanings[prompt]] for prompt in prompts]
    return PromptSet(icons, prompts, [0] * len(prompts), objects)


def load(work_dir: Path, count: int = 200) -> dict[str, PromptSet]:
    """The three sets, of at most `count` prompts each; the icons are in `work_dir`, or go there."""
    work_dir.mkdir(parents=True, exist_ok=True)
    icons = data.load(work_dir)
    cells = data.training_cells(icons, data.HELD_OUT)
    return {
        "names": names(icons, cells, count),
        "new styles": new_styles(icons, cells, count),
        "sentences": sentences(icons, count),
    }
