"""Rewards to steer by: functions of pictures and their prompts. Any function with these two arguments is one."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import PIL.Image
import PIL.ImageColor
import torch
import torch.nn.functional as F

from ..checks import check_integer, check_number

if TYPE_CHECKING:
    from ..pipelines.pipeline_base import PaellaPipelineBase


class Reward:
    """
    A reward that may refuse a call before any model runs. Its values are log-likelihoods, or at least on their scale: at
    temperature 1, a picture whose reward is higher by 1 becomes e times as likely.
    """

    def __call__(self, images: torch.Tensor, prompts: list[str] | None) -> torch.Tensor:
        """
        Rewards of pictures, `(n,)`.

        Args:
            images (`torch.Tensor` of shape `(n, 3, height, width)`): In [0, 1].
            prompts (`list[str]`, *optional*): A prompt for each picture, if the call has prompts.
        """
        raise NotImplementedError

    def check(self, has_prompts: bool) -> None:
        """Refuse a call that the reward cannot judge, by a ValueError."""


class ClipReward(Reward):
    r"""
    How well a picture fits its prompt: `scale` times the cosine of their CLIP embeddings, by the models that the pipeline
    holds.

    Args:
        pipe ([`PaellaPipelineBase`]):
            With the components `text_encoder_2`, `tokenizer_2`, `image_encoder` and `feature_extractor`.
        prompt (`str`, *optional*): What all pictures are compared with; each with its call's own prompt unless given.
        scale (`float`, defaults to 100.0): That of CLIP's own training, which makes differences log-likelihood ratios.

    Raises:
        ValueError: If a component is missing.
    """

    def __init__(self, pipe: "PaellaPipelineBase", prompt: str | None = None, scale: float = 100.0):
        names = ("text_encoder_2", "tokenizer_2", "image_encoder", "feature_extractor")
        missing = [name for name in names if getattr(pipe, name) is None]
        if missing:
            raise ValueError(f"`ClipReward` needs the pipeline's components {missing}: load them, or take another reward.")
        check_number("scale", scale)
        self.pipe = pipe
        self.prompt = prompt
        self.scale = scale

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[str] | None) -> torch.Tensor:
        encoder, processor = self.pipe.image_encoder, self.pipe.feature_extractor
        pixels = F.interpolate(images.float(), [encoder.config.image_size] * 2, mode="bicubic", antialias=True)
        mean, std = (images.new_tensor(part)[:, None, None] for part in (processor.image_mean, processor.image_std))
        pixels = (pixels.clamp(0, 1) - mean) / std
        seen = encoder(pixels.to(self.pipe._execution_device, encoder.dtype)).image_embeds
        said = self.pipe._encode_clip(
            cast(list[str], prompts) if self.prompt is None else [self.prompt], self.pipe._execution_device
        )
        return self.scale * F.cosine_similarity(seen.float(), said.float(), dim=-1)

    def check(self, has_prompts: bool) -> None:
        if self.prompt is None and not has_prompts:
            raise ValueError("`ClipReward` compares with the prompt, but the call has none: give it its own, `prompt`.")


class LayoutReward(Reward):
    r"""
    How near a picture's colours are to a target's: the mean over cells and channels of -(picture - target)² / (2 σ²), where
    the picture has its mean colour in each cell.

    Args:
        target (`str`, `PIL.Image.Image` or `torch.Tensor` of shape `(3, rows, columns)`):
            A colour by name or "#rrggbb", for the mean of the whole picture; a picture, of which `grid` cells count; or the
            colour of each cell, in [0, 1].
        grid (`tuple[int, int]`, defaults to `(8, 8)`): Rows and columns of cells of a picture.
        sigma (`float`, defaults to 0.1): σ, above 0: the deviation that is tolerated, of colours in [0, 1].

    Raises:
        ValueError: If the target is none of these.
    """

    def __init__(self, target: str | PIL.Image.Image | torch.Tensor, grid: tuple[int, int] = (8, 8), sigma: float = 0.1):
        check_number("sigma", sigma, above=0)
        if isinstance(target, str):
            cells = torch.tensor(PIL.ImageColor.getrgb(target)[:3])[:, None, None] / 255
        elif isinstance(target, PIL.Image.Image):
            for side in grid:
                check_integer("grid", side, 1)
            pixels = torch.from_numpy(np.array(target.convert("RGB"))).movedim(-1, 0)
            cells = F.adaptive_avg_pool2d(pixels / 255, grid)
        else:
            cells = target
        if not isinstance(cells, torch.Tensor) or cells.ndim != 3 or len(cells) != 3 or not cells.is_floating_point():
            raise ValueError(
                "`target` must be a colour, a PIL image, or a floating-point tensor (3, rows, columns) in [0, 1], got "
                f"{tuple(target.shape) if isinstance(target, torch.Tensor) else type(target).__name__}."
            )
        self.cells: torch.Tensor = cells
        self.sigma = sigma

    def __call__(self, images: torch.Tensor, prompts: list[str] | None) -> torch.Tensor:
        rows, columns = self.cells.shape[-2:]
        cells = F.adaptive_avg_pool2d(images, (rows, columns))
        return -(cells - self.cells.to(cells)).square().mean((1, 2, 3)) / (2 * self.sigma**2)


class ClassifierReward(Reward):
    r"""
    The log-probability of a class. At temperature 1, pictures are steered to the posterior p(picture) p(class | picture).

    Args:
        classifier (`Callable`): From pictures `(n, 3, height, width)` in [0, 1] to logits `(n, num_classes)`.
        label (`int`): The class, from 0.
    """

    def __init__(self, classifier: Callable, label: int):
        check_integer("label", label, 0)
        self.classifier = classifier
        self.label = label

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[str] | None) -> torch.Tensor:
        return self.classifier(images).float().log_softmax(-1)[:, self.label]


class RewardSum(Reward):
    """
    The sum of several rewards, each times its weight.

    Args:
        rewards (sequence of `Callable`): Rewards, or functions like them.
        weights (sequence of `float`, *optional*): One for each; 1 unless given.

    Raises:
        ValueError: If there is not one weight for each.
    """

    def __init__(self, rewards: Sequence[Callable[..., Any]], weights: Sequence[float] | None = None):
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if not rewards or len(weights) != len(rewards):
            raise ValueError(f"`weights` must have one entry for each of `rewards`, got {len(weights)} for {len(rewards)}.")
        for weight in weights:
            check_number("weights", weight)
        self.rewards: list[Callable[..., Any]] = list(rewards)
        self.weights: list[float] = weights

    def __call__(self, images: torch.Tensor, prompts: list[str] | None) -> torch.Tensor:
        pairs = zip(self.weights, self.rewards)
        parts = [weight * torch.as_tensor(reward(images, prompts)).cpu() for weight, reward in pairs]
        return sum(parts[1:], start=parts[0])

    def check(self, has_prompts: bool) -> None:
        for reward in self.rewards:
            if isinstance(reward, Reward):
                reward.check(has_prompts)
