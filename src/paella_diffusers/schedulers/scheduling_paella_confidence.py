"""Re-noising the least confident tokens first, or in an order that covers the picture evenly."""

from functools import lru_cache

import torch
from diffusers.configuration_utils import register_to_config

from .categorical import rand_tensor, random_tokens, sample_tokens
from .scheduling_utils import PaellaSchedulerOutput, RenoisingSchedulerBase


class PaellaConfidenceScheduler(RenoisingSchedulerBase):
    r"""
    The renoising sampler, but the tokens to re-noise are not drawn. Each step draws a clean token x̂ᵢ for every position from
    `softmax(logits / temperature)`, ranks the L positions by

        log p(x̂ᵢ) + c · t_next · gᵢ,    gᵢ ~ Gumbel(0, 1),

    where c is the choice temperature, and makes noise again of the round(t_next · L) lowest (MaskGIT,
    https://huggingface.co/papers/2202.04200, section 3.2, where these are masked). With `ranking="halton"`, of those that
    come last in a Halton sequence over the grid (https://huggingface.co/papers/2503.17076), whatever the model says of them.

    Args:
        num_inference_steps (`int`, defaults to 12): Steps, unless `set_timesteps` says otherwise.
        t_start (`float`, defaults to 1.0): First noise level, in (0, 1].
        t_end (`float`, defaults to 0.0): Noise level after the last step, in [0, t_start).
        temperature (`float` or `tuple[float, float]`, defaults to `(0.7, 0.3)`):
            Sampling temperature, above 0: from the first step to the last, linearly.
        renoise_steps (`int`, *optional*): Only the first so many steps re-noise; all but the last unless given.
        noise_source (`str`, defaults to `"initial"`): As in [`PaellaScheduler`].
        ranking (`str`, defaults to `"confidence"`): `"confidence"` or `"halton"`.
        choice_temperature (`float`, defaults to 1.0): c, at least 0: how much chance there is in the ranking.
        num_vq_embeddings (`int`, defaults to 8192): Number of different tokens, for `add_noise` to draw from.
    """

    @register_to_config
    def __init__(
        self,
        num_inference_steps: int = 12,
        t_start: float = 1.0,
        t_end: float = 0.0,
        temperature: float | tuple[float, float] = (0.7, 0.3),
        renoise_steps: int | None = None,
        noise_source: str = "initial",
        ranking: str = "confidence",
        choice_temperature: float = 1.0,
        num_vq_embeddings: int = 8192,
    ):
        self._check_config()
        if ranking not in ("confidence", "halton"):
            raise ValueError(f"`ranking` must be 'confidence' or 'halton', got {ranking!r}.")
        if not choice_temperature >= 0:
            raise ValueError(f"`choice_temperature` must be at least 0, got {choice_temperature}.")
        self.set_timesteps(num_inference_steps)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.LongTensor,
        noise: torch.LongTensor | None = None,
        mask: torch.Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PaellaSchedulerOutput | tuple[torch.LongTensor, torch.LongTensor]:
        """
        Sample every token, then re-noise those that rank lowest.

        Args:
            model_output, timestep, sample, noise, mask, generator: As in [`PaellaScheduler.step`].
            grid_size (`tuple[int, int]`, *optional*): Height and width of a grid given as a sequence, for Halton's order.

        Raises:
            ValueError: If `timestep` is none of `timesteps`, or `noise` or `grid_size` is missing where it is needed.
        """
        index = self._index(timestep)
        logits = self._logits(model_output, sample)
        sampled_tokens = sample_tokens(logits, self.temperatures[index], generator)
        if mask is not None:
            sampled_tokens = torch.where(mask.bool(), sampled_tokens, sample)

        prev_sample = sampled_tokens
        if index < self.renoise_steps:
            level = self._levels[index + 1]
            rank = self._rank(logits, sampled_tokens, level, grid_size, generator).flatten(1)
            free = torch.ones_like(rank, dtype=torch.bool) if mask is None else mask.bool().flatten(1)
            count = (level * free.sum(1, keepdim=True)).round()
            place = rank.masked_fill(~free, torch.inf).argsort(1).argsort(1)
            renoise = (place < count).view_as(sample)
            noise = self._noise(sample, noise)
            if noise is None:
                noise = random_tokens(logits.shape[-1], sample.shape, generator, sample.device)
            prev_sample = torch.where(renoise, noise, sampled_tokens)

        if not return_dict:
            return (prev_sample, sampled_tokens)
        return PaellaSchedulerOutput(prev_sample=prev_sample, sampled_tokens=sampled_tokens)

    def _rank(self, logits, tokens, level, grid_size, generator) -> torch.Tensor:
        """What positions are ordered by, of the shape of `tokens`: the lowest are re-noised."""
        if self.config.ranking == "halton":
            grid_size = tuple(tokens.shape[1:]) if tokens.ndim == 3 else grid_size
            if grid_size is None or grid_size[0] * grid_size[1] != tokens[0].numel():
                raise ValueError(f"Halton's order needs `grid_size` for {tokens[0].numel()} tokens, got {grid_size}.")
            first = -halton_order(*grid_size).to(tokens.device, torch.float32)
            return first.view(tokens.shape[1:]).expand_as(tokens)
        logits = logits.float()
        confidence = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
        uniform = rand_tensor(tokens.shape, generator, tokens.device).clamp(1e-9, 1 - 1e-7)
        return confidence - self.config.choice_temperature * level * (-uniform.log()).log()


@lru_cache(maxsize=16)
def halton_order(height: int, width: int) -> torch.LongTensor:
    """The place of every position in the Halton sequence of bases 2 and 3, `(height, width)`: early ones cover the grid."""

    def radical_inverse(number: int, base: int) -> float:
        value, digit = 0.0, 1 / base
        while number:
            number, remainder = divmod(number, base)
            value, digit = value + remainder * digit, digit / base
        return value

    order, number = {}, 0
    while len(order) < height * width:
        cell = int(radical_inverse(number, 2) * height), int(radical_inverse(number, 3) * width)
        order.setdefault(cell, len(order))
        number += 1
    return torch.tensor([[order[row, column] for column in range(width)] for row in range(height)])
