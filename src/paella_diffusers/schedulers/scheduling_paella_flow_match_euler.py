"""Discrete flow matching: each token jumps from noise to the prediction at a random time of its own."""

import math

import torch
from diffusers.configuration_utils import register_to_config

from ..checks import check_boolean, check_choice, check_number
from .categorical import add_uniform_noise, rand_tensor, sample_tokens
from .scheduling_utils import PaellaSchedulerBase, PaellaSchedulerOutput


class FlowMatchSchedulerBase(PaellaSchedulerBase):
    """Samplers that follow the path by jumps of tokens: `time_grid`, `time_power` and `leave_one_out_temperature`."""

    def _check_config(self):
        super()._check_config()
        check_choice("time_grid", self.config.time_grid, ("linear", "cosine", "polynomial"))
        check_number("time_power", self.config.time_power, above=0)
        check_boolean("leave_one_out_temperature", self.config.leave_one_out_temperature)

    def _descent(self, steps: int, t_start: float, t_end: float) -> torch.Tensor:
        if self.config.time_grid == "linear":
            return super()._descent(steps, t_start, t_end)
        done = torch.linspace(0, 1, steps + 1)
        descent = (done * math.pi / 2).cos() if self.config.time_grid == "cosine" else 1 - done**self.config.time_power
        return t_end + (t_start - t_end) * descent.clamp(min=0)


class PaellaFlowMatchEulerScheduler(FlowMatchSchedulerBase):
    r"""
    Discrete flow matching (https://huggingface.co/papers/2407.15595, section 3; https://huggingface.co/papers/2402.04997) on
    the path that mixes data with uniform noise in the proportion t:

        p_t(x | x̂) = (1 - t) δ(x, x̂) + t / V.

    Its continuous-time Markov chain makes a token jump to x̂ ~ `softmax(logits / temperature)` at the rate -dt / t. A step
    from t to t_next keeps x̂ fixed, for which this is the exact solution:

        x' = x̂ with probability 1 - t_next / t, else x.

    Tokens that have jumped may jump again, which corrects errors of early steps. The corrector, whose rate leaves p_t
    unchanged, does more of this: with probability 1 - exp(-η (t - t_next)) a token is sampled anew from p_{t_next}(x | x̂).

    With temperature 1 and many steps this samples from the model's distribution. For a single token it does so with any
    number of steps: the mean of the predictions over p_t is the data's distribution.

    Args:
        num_inference_steps (`int`, defaults to 12): Number of steps if `set_timesteps` is not given one, up to 10,000.
        t_start (`float`, defaults to 1.0): First noise level, in (0, 1].
        t_end (`float`, defaults to 0.0): Where the noise level descends to, in [0, t_start). The last step ends at 0.
        temperature (`float` or `tuple[float, float]`, defaults to 1.0):
            Sampling temperature, from 1e-6 to 1e6. A pair is a linear ramp from the first step to the last.
        time_grid (`str`, defaults to `"linear"`):
            How t descends with u, the fraction of steps done: `"linear"`, 1 - u; `"cosine"`, cos(πu / 2), whose first steps
            are small; `"polynomial"`, 1 - uⁿ.
        time_power (`float`, defaults to 2.0): n, above 0.
        corrector_rate (`float`, defaults to 0.0): η, at least 0.
        leave_one_out_temperature (`bool`, defaults to `False`):
            Apply the temperature to what the other tokens say of each token only, as [`leave_one_out_shift`] explains. Plain
            temperature also sharpens the evidence of the noisy token itself, which is biased: more so with more steps.
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
        temperature: float | tuple[float, float] = 1.0,
        time_grid: str = "linear",
        time_power: float = 2.0,
        corrector_rate: float = 0.0,
        leave_one_out_temperature: bool = False,
        num_vq_embeddings: int = 8192,
    ):
        self._check_config()
        check_number("corrector_rate", corrector_rate, at_least=0)
        self.set_timesteps(num_inference_steps)

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
        Sample a prediction for every token; each token jumps to its own with probability 1 - t_next / t.

        Args:
            model_output, timestep, sample, mask, generator: As in [`PaellaScheduler.step`].

        Returns:
            [`PaellaSchedulerOutput`], or a tuple of its two tensors if `return_dict` is `False`.

        Raises:
            ValueError, TypeError: As [`PaellaScheduler.step`].
        """
        index = self._index(timestep)
        logits, mask = self._check_step(model_output, sample, mask=mask, generator=generator)
        level, next_level = self._levels[index], self._levels[index + 1]
        if index + 1 == self.num_inference_steps:  # the picture is the prediction, whatever `t_end` is
            next_level = 0.0

        logits = self._tempered(logits, sample, index)
        sampled_tokens = sample_tokens(logits, self.temperatures[index], generator)
        jump = rand_tensor(sample.shape, generator, sample.device) < 1 - next_level / level
        prev_sample = torch.where(jump, sampled_tokens, sample)
        if self.config.corrector_rate > 0:
            chance = 1 - math.exp(-self.config.corrector_rate * (level - next_level))
            correct = rand_tensor(sample.shape, generator, sample.device) < chance
            noised, _ = add_uniform_noise(sampled_tokens, next_level, logits.shape[-1], generator=generator)
            prev_sample = torch.where(correct, noised, prev_sample)
        if mask is not None:
            prev_sample, sampled_tokens = (torch.where(mask, x, sample) for x in (prev_sample, sampled_tokens))

        if not return_dict:
            return (prev_sample, sampled_tokens)
        return PaellaSchedulerOutput(prev_sample=prev_sample, sampled_tokens=sampled_tokens)
