"""Discrete flow matching: tokens jump from noise to the prediction, each at its own time."""

import math

import torch
from diffusers.configuration_utils import register_to_config

from .categorical import add_uniform_noise, rand_tensor, sample_tokens
from .scheduling_utils import PaellaSchedulerBase, PaellaSchedulerOutput


class PaellaFlowMatchEulerScheduler(PaellaSchedulerBase):
    r"""
    Discrete flow matching (https://huggingface.co/papers/2407.15595, section 3; https://huggingface.co/papers/2402.04997) on
    the path that mixes data with uniform noise, of which t is the share:

        p_t(x | x̂) = (1 - t) δ(x, x̂) + t / V.

    Its continuous-time Markov chain makes a token jump to x̂ ~ `softmax(logits / temperature)` at the rate -dt / t. A step
    from t to t_next holds x̂ and integrates that exactly:

        xᵢ' = x̂ᵢ with probability 1 - t_next / t, else xᵢ.

    Tokens that have jumped may jump again, so errors of early steps are mended. The corrector, whose rate leaves p_t as it
    is, does more of this: with probability 1 - exp(-η (t - t_next)) a token is drawn anew from p_{t_next}(x | x̂ᵢ).

    With temperature 1 and many steps this samples from the model's distribution.

    Args:
        num_inference_steps (`int`, defaults to 12): Steps, unless `set_timesteps` says otherwise.
        t_start (`float`, defaults to 1.0): First noise level, in (0, 1].
        t_end (`float`, defaults to 0.0): Where the noise level descends to, in [0, t_start); the last step ends at 0.
        temperature (`float` or `tuple[float, float]`, defaults to 1.0):
            Sampling temperature, above 0: from the first step to the last, linearly.
        time_grid (`str`, defaults to `"linear"`):
            How t descends with the share u of steps done: `"linear"`, 1 - u; `"cosine"`, cos(πu / 2), whose steps begin
            small; `"polynomial"`, 1 - uⁿ.
        time_power (`float`, defaults to 2.0): n, above 0.
        corrector_rate (`float`, defaults to 0.0): η, at least 0.
        num_vq_embeddings (`int`, defaults to 8192): Number of different tokens, for `add_noise` to draw from.
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
        num_vq_embeddings: int = 8192,
    ):
        self._check_config()
        if time_grid not in ("linear", "cosine", "polynomial"):
            raise ValueError(f"`time_grid` must be 'linear', 'cosine' or 'polynomial', got {time_grid!r}.")
        if not time_power > 0:
            raise ValueError(f"`time_power` must be above 0, got {time_power}.")
        if not corrector_rate >= 0:
            raise ValueError(f"`corrector_rate` must be at least 0, got {corrector_rate}.")
        self.set_timesteps(num_inference_steps)

    def _descent(self, steps: int, t_start: float, t_end: float) -> torch.Tensor:
        if self.config.time_grid == "linear":
            return super()._descent(steps, t_start, t_end)
        done = torch.linspace(0, 1, steps + 1)
        descent = (done * math.pi / 2).cos() if self.config.time_grid == "cosine" else 1 - done**self.config.time_power
        return t_end + (t_start - t_end) * descent.clamp(min=0)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.LongTensor,
        mask: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PaellaSchedulerOutput | tuple[torch.LongTensor, torch.LongTensor]:
        """
        Draw a prediction for every token, to which some jump.

        Args:
            model_output, timestep, sample, mask, generator: As in [`PaellaScheduler.step`].

        Raises:
            ValueError: If `timestep` is none of `timesteps`, or the logits are not finite.
        """
        index = self._index(timestep)
        level, next_level = self._levels[index], self._levels[index + 1]
        logits = self._logits(model_output, sample)
        sampled_tokens = sample_tokens(logits, self.temperatures[index], generator)

        if index + 1 == self.num_inference_steps:  # the picture is the prediction, whatever `t_end` is
            next_level = 0.0
        jump = rand_tensor(sample.shape, generator, sample.device) < 1 - next_level / level
        prev_sample = torch.where(jump, sampled_tokens, sample)
        if self.config.corrector_rate > 0:
            chance = 1 - math.exp(-self.config.corrector_rate * (level - next_level))
            correct = rand_tensor(sample.shape, generator, sample.device) < chance
            noised, _ = add_uniform_noise(sampled_tokens, next_level, logits.shape[-1], generator=generator)
            prev_sample = torch.where(correct, noised, prev_sample)
        if mask is not None:
            prev_sample, sampled_tokens = (torch.where(mask.bool(), x, sample) for x in (prev_sample, sampled_tokens))

        if not return_dict:
            return (prev_sample, sampled_tokens)
        return PaellaSchedulerOutput(prev_sample=prev_sample, sampled_tokens=sampled_tokens)
