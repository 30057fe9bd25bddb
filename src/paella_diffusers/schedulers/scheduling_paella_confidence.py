"""Re-noise the least confident tokens first, or in an order that covers the picture evenly."""

from functools import lru_cache

import torch
from diffusers.configuration_utils import register_to_config

from ..checks import check_choice, check_integer, check_number
from .categorical import rand_tensor, random_tokens, sample_tokens
from .scheduling_utils import PaellaSchedulerOutput, RenoisingSchedulerBase


class PaellaConfidenceScheduler(RenoisingSchedulerBase):
    r"""
    The sampler of [`PaellaScheduler`], except that the tokens to re-noise are ranked rather than chosen independently
    (MaskGIT, https://huggingface.co/papers/2202.04200, section 3.2, where they are masked). In step i

    1. every position's clean token x̂ is sampled from `softmax(logits / temperature)`;
    2. if i < `renoise_steps`, the L positions are ranked by

           log p(x̂) + c · t_{i+1} · g,    g ~ Gumbel(0, 1),

       where p is the softmax at temperature 1 and c the choice temperature, and noise replaces the round(t_{i+1} · L)
       lowest.

    With `ranking="halton"` noise replaces those that come last in a Halton sequence over the grid
    (https://huggingface.co/papers/2503.17076), regardless of the logits.

    Args:
        num_inference_steps (`int`, defaults to 12): Number of steps if `set_timesteps` is not given one, up to 10,000.
        t_start (`float`, defaults to 1.0): First noise level, in (0, 1].
        t_end (`float`, defaults to 0.0): Noise level after the last step, in [0, t_start).
        temperature (`float` or `tuple[float, float]`, defaults to `(0.7, 0.3)`):
            Sampling temperature, from 1e-6 to 1e6. A pair is a linear ramp from the first step to the last.
        renoise_steps (`int`, *optional*): Number of steps, from the first, that re-noise. By default all but the last.
        noise_source (`str`, defaults to `"initial"`): As in [`PaellaScheduler`].
        ranking (`str`, defaults to `"confidence"`): `"confidence"` or `"halton"`.
        choice_temperature (`float`, defaults to 1.0): c, from 0, a ranking by confidence alone, to 1e6, a random one.
        num_vq_embeddings (`int`, defaults to 8192): Number of different tokens, for `add_noise` to draw from.

    Raises:
        ValueError: If a value is not in its range, or not a number where it must be one.
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
        check_choice("ranking", ranking, ("confidence", "halton"))
        check_number("choice_temperature", choice_temperature, at_least=0, at_most=1e6)
        self.set_timesteps(num_inference_steps)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PaellaSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Sample every token, then replace those that rank lowest by noise.

        Args:
            model_output, timestep, sample, noise, mask, generator: As in [`PaellaScheduler.step`].
            grid_size (`tuple[int, int]`, *optional*):
                Height and width of the grid, for `ranking="halton"` if `sample` is a sequence.

        Returns:
            [`PaellaSchedulerOutput`], or a tuple of its two tensors if `return_dict` is `False`.

        Raises:
            ValueError, TypeError: As [`PaellaScheduler.step`], or if `grid_size` is missing where it is needed.
        """
        index = self._index(timestep)
        logits, mask = self._check_step(model_output, sample, noise, mask, generator)
        renoises = index < self.renoise_steps

        # 1. sample every position; known tokens are put back
        temperature = self.temperatures[index]
        if renoises and self.config.ranking == "confidence":
            sampled_tokens, log_probs = sample_tokens(logits, temperature, generator, return_log_probs=True)
        else:
            sampled_tokens, log_probs = sample_tokens(logits, temperature, generator), None
        if mask is not None:
            sampled_tokens = torch.where(mask, sampled_tokens, sample)

        # 2. re-noise the lowest of those that are generated
        prev_sample = sampled_tokens
        if renoises:
            next_level = self._levels[index + 1]
            rank = self._rank(sample, log_probs, next_level, grid_size, generator).flatten(1)
            generated = torch.ones_like(rank, dtype=torch.bool) if mask is None else mask.flatten(1)
            count = (next_level * generated.sum(1, keepdim=True)).round()
            place = rank.masked_fill(~generated, torch.inf).argsort(1).argsort(1)
            renoise = ((place < count) & generated).view_as(sample)
            noise = self._noise(sample, noise)
            if noise is None:
                noise = random_tokens(logits.shape[-1], sample.shape, generator, sample.device)
            prev_sample = torch.where(renoise, noise, sampled_tokens)

        if not return_dict:
            return (prev_sample, sampled_tokens)
        return PaellaSchedulerOutput(prev_sample=prev_sample, sampled_tokens=sampled_tokens)

    def _rank(self, sample, log_probs, next_level, grid_size, generator) -> torch.Tensor:
        """The values, of the shape of `sample`, by which positions are ranked: the lowest are re-noised."""
        if self.config.ranking == "halton":
            order = halton_order(*check_grid_size(grid_size, sample)).to(sample.device, torch.float32)
            return -order.view(sample.shape[1:]).expand_as(sample)
        uniform = rand_tensor(sample.shape, generator, sample.device).clamp(1e-9, 1 - 1e-7)
        gumbel = -(-uniform.log()).log()
        return log_probs + self.config.choice_temperature * next_level * gumbel


def check_grid_size(grid_size: tuple[int, int] | None, sample: torch.Tensor) -> tuple[int, int]:
    """Height and width of the sample, which a sequence does not show."""
    if sample.ndim == 3:
        return sample.shape[1], sample.shape[2]
    length = sample.shape[1]
    if not isinstance(grid_size, tuple | list) or len(grid_size) != 2:
        raise ValueError(f"Halton's order needs `grid_size`, (height, width) of the {length} tokens, got {grid_size!r}.")
    for side in grid_size:
        check_integer("grid_size", side, 1)
    if grid_size[0] * grid_size[1] != length:
        raise ValueError(f"`grid_size` must have {length} tokens, as `sample` has, got {grid_size}.")
    return int(grid_size[0]), int(grid_size[1])


@lru_cache(maxsize=16)
def halton_order(height: int, width: int) -> torch.Tensor:
    """The rank of each position in the Halton sequence of bases 2 and 3, `(height, width)`: the first cover the grid."""

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
