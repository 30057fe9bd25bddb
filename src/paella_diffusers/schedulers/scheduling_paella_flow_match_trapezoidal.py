"""Discrete flow matching in steps of second order, with two evaluations of the model each."""

import math
from itertools import pairwise

import torch
from diffusers.configuration_utils import register_to_config

from ..checks import check_number
from .categorical import check_finite, rand_tensor, sample_tokens
from .scheduling_paella_flow_match_euler import FlowMatchSchedulerBase
from .scheduling_utils import PaellaSchedulerOutput


class PaellaFlowMatchTrapezoidalScheduler(FlowMatchSchedulerBase):
    r"""
    The Markov chain of [`PaellaFlowMatchEulerScheduler`] by the θ-trapezoidal method
    (https://huggingface.co/papers/2502.00234). In the time u = -log t, a token x jumps to y ≠ x at the rate
    μ(y | x_t) = p(x̂ = y | x_t), the softmax of logits / temperature. A step of length Δ, from t to t_next, has two stages,
    each with constant rates:

    1. from x_t, for θΔ, with the rates μ(y | x_t): to x*, at the level t* = t^(1-θ) t_next^θ;
    2. from x*, for (1 - θ)Δ, with the rates max(α₁ μ(y | x*) - α₂ μ(y | x_t), 0) of tokens that did not jump in stage 1, and
       α₁ μ(y | x*) of those that did, where α₁ = 1 / (2θ(1 - θ)) and α₂ = α₁ - 1.

    In a stage of length D a token jumps at most once, to y with probability (1 - exp(-RD)) μ(y) / R, R the sum of its rates.

    Down to a level t_end > 0, this is of second order in the number of steps where no rate is cut off at 0. With one token,
    no rate is. With several, a rate is cut off if a jump of another token lowers μ(y) to less than α₂ / α₁ of what it was;
    θ = 1/2 has the lowest such bound, 1/2. Down to 0 this is not of second order: near 0 a step from t to t_next covers a
    ratio t / t_next that more steps do not bring nearer to 1.

    `num_inference_steps` counts evaluations of the model, two for a step, and `timesteps` has the levels of all. The last
    step, to 0, is of first order, with two evaluations if their number is even and one if it is odd. It ends with x̂.

    Args:
        num_inference_steps (`int`, defaults to 12): Number of evaluations if `set_timesteps` is not given one, up to 10,000.
        t_start (`float`, defaults to 1.0): First noise level, in (0, 1].
        t_end (`float`, defaults to 0.0): Where the noise level descends to, in [0, t_start). The last step ends at 0.
        temperature (`float` or `tuple[float, float]`, defaults to 1.0):
            Sampling temperature, from 1e-6 to 1e6. A pair is a linear ramp from the first evaluation to the last.
        time_grid (`str`, defaults to `"linear"`), time_power (`float`, defaults to 2.0):
            How t descends from step to step, as in [`PaellaFlowMatchEulerScheduler`].
        theta (`float`, defaults to 0.5): θ in (0, 1).
        leave_one_out_temperature (`bool`, defaults to `False`): As in [`PaellaFlowMatchEulerScheduler`].
        num_vq_embeddings (`int`, defaults to 8192): Number of different tokens, for `add_noise` to draw from.

    Raises:
        ValueError: If a value is not in its range, or not a number where it must be one.
    """

    order = 2

    @register_to_config
    def __init__(
        self,
        num_inference_steps: int = 12,
        t_start: float = 1.0,
        t_end: float = 0.0,
        temperature: float | tuple[float, float] = 1.0,
        time_grid: str = "linear",
        time_power: float = 2.0,
        theta: float = 0.5,
        leave_one_out_temperature: bool = False,
        num_vq_embeddings: int = 8192,
    ):
        self._check_config()
        check_number("theta", theta, above=0, below=1)
        self._first_stage = None  # its index, and the tokens before it with their rates
        self.set_timesteps(num_inference_steps)

    def _descent(self, steps: int, t_start: float, t_end: float) -> torch.Tensor:
        grid = super()._descent((steps + 1) // 2, t_start, t_end).tolist()
        levels = []
        for level, following in pairwise(grid):
            levels += [level, level ** (1 - self.config.theta) * following**self.config.theta]
        if following == 0:
            levels[-1] = level * (1 - self.config.theta)
        return torch.tensor([*levels[:steps], t_end])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        mask: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PaellaSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        One stage: each token jumps or stays. The second stage of a step follows the first at once.

        Args:
            model_output, timestep, sample, mask, generator: As in [`PaellaScheduler.step`].

        Returns:
            [`PaellaSchedulerOutput`], or a tuple of its two tensors if `return_dict` is `False`.

        Raises:
            ValueError, TypeError: As [`PaellaScheduler.step`], or if a second stage does not follow its first.
        """
        index = self._index(timestep)
        logits, mask = self._check_step(model_output, sample, mask=mask, generator=generator)

        log_rates, jump, change = self._jumps(logits, index, sample)
        target = sample_tokens(log_rates.to(logits.dtype), 1.0, generator)
        uniform = rand_tensor(sample.shape, generator, sample.device)
        prev_sample = torch.where(uniform < jump, target, sample)
        sampled_tokens = torch.where(uniform < change, target, sample)
        if mask is not None:
            prev_sample, sampled_tokens = (torch.where(mask, x, sample) for x in (prev_sample, sampled_tokens))

        if not return_dict:
            return (prev_sample, sampled_tokens)
        return PaellaSchedulerOutput(prev_sample=prev_sample, sampled_tokens=sampled_tokens)

    def _jumps(
        self, logits: torch.Tensor, index: int, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The logarithms of each token's rates in this stage, of the shape of `logits`; the probability that it jumps; and the
        probability that its prediction is another token; in at least float32.
        """
        level, next_level = self._levels[index], self._levels[index + 1]
        logits = self._tempered(logits if logits.dtype == torch.float64 else logits.float(), sample, index)
        rates = (logits / self.temperatures[index]).softmax(-1)
        check_finite(rates[..., 0])
        own = sample[..., None]
        rates.scatter_(-1, own, 0)
        change = rates.sum(-1)
        if index + 1 == self.num_inference_steps:  # the picture is the prediction, whatever `t_end` is
            jump = change
        else:
            if index % 2:
                rates = self._extrapolated(rates, index, sample)
            else:
                self._first_stage = index, sample, rates
            jump = -torch.expm1(-rates.sum(-1) * math.log(level / next_level))
        stays = torch.where(rates.amax(-1, keepdim=True) > 0, -torch.inf, 0.0)  # where all rates are 0
        return rates.log().scatter_(-1, own, stays.to(rates)), jump, change

    def _extrapolated(self, rates: torch.Tensor, index: int, sample: torch.Tensor) -> torch.Tensor:
        """The rates of a second stage, from those at x* and those of the first stage."""
        if self._first_stage is None or self._first_stage[0] != index - 1 or self._first_stage[1].shape != sample.shape:
            raise ValueError(
                f"`timestep` {self._levels[index]:g} is the second stage of a step: call `step` with its first stage, "
                f"{self._levels[index - 1]:g}, before."
            )
        (_, start, first_rates), self._first_stage = self._first_stage, None
        before, level, after = self._levels[index - 1 : index + 2]
        theta = math.log(before / level) / math.log(before / after)
        weight = 1 / (2 * theta * (1 - theta))
        subtracted = torch.where((sample == start)[..., None], first_rates, 0)
        return (weight * rates - (weight - 1) * subtracted).clamp(min=0)
