"""What the samplers of discrete tokens share: noise levels, temperatures, re-noising."""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from ..loaders.hub import PaellaHubMixin
from .categorical import add_uniform_noise, check_logits


@dataclass
class PaellaSchedulerOutput(BaseOutput):
    """
    Output of a scheduler's `step`.

    Args:
        prev_sample (`torch.LongTensor` of the shape of `sample`): The re-noised tokens, the next input of the model.
        sampled_tokens (`torch.LongTensor` of the same shape): The predicted clean tokens, before re-noising.
    """

    prev_sample: torch.LongTensor
    sampled_tokens: torch.LongTensor


class PaellaSchedulerBase(PaellaHubMixin, SchedulerMixin, ConfigMixin):
    """
    A run descends through the noise levels `timesteps`, the fractions of tokens that are noise. Samplers add `__init__`,
    which has in its configuration what the methods below read from it, and `step`.
    """

    order = 1
    _compatibles = [
        "PaellaScheduler",
        "PaellaConfidenceScheduler",
        "PaellaFlowMatchEulerScheduler",
        "DiscreteDDIMScheduler",
        "EntropyBoundScheduler",
    ]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | torch.Tensor | None = None,
        temperature: float | tuple[float, float] | None = None,
        t_start: float | None = None,
    ):
        """
        Prepare a run. What is not given comes from the configuration, which no argument changes.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps, at least 1.
            device (`str` or `torch.device`, *optional*): Where `timesteps` lie.
            timesteps (`list[float]` or `torch.Tensor`, *optional*):
                The noise level of every step, descending, in (0, 1], in place of the configured descent.
            temperature (`float` or `tuple[float, float]`, *optional*): Replaces the configured one in this run.
            t_start (`float`, *optional*): Likewise; a configured `t_end` above it counts as it.

        Raises:
            ValueError: If a value is out of its range, or `timesteps` do not descend.
        """
        if timesteps is None:
            steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
            if steps < 1:
                raise ValueError(f"`num_inference_steps` must be at least 1, got {steps}.")
            t_start = self.config.t_start if t_start is None else t_start
            if not 0 < t_start <= 1:
                raise ValueError(f"`t_start` must be in (0, 1], got {t_start}.")
            levels = self._descent(steps, t_start, min(self.config.t_end, t_start))
        else:
            levels = torch.as_tensor(timesteps, dtype=torch.float32).cpu()
            steps = len(levels)
            if steps < 1 or num_inference_steps not in (None, steps):
                raise ValueError(f"`timesteps` must have `num_inference_steps`={num_inference_steps} entries, got {steps}.")
            if not (levels[-1] > 0 and levels[0] <= 1 and (levels.diff() < 0).all()):
                raise ValueError(f"`timesteps` must descend within (0, 1], got {levels.tolist()}.")
            levels = torch.cat([levels, levels.new_tensor([min(self.config.t_end, levels[-1])])])

        if steps > 1 and not (levels[:-1].diff() < 0).all():
            raise ValueError(f"{steps} steps are too many for this descent: neighbours have the same level in float32.")

        temperature = self.config.temperature if temperature is None else temperature
        ramp = temperature if isinstance(temperature, tuple | list) else (temperature, temperature)
        if len(ramp) != 2 or not all(value > 0 for value in ramp):  # a NaN is not above 0 either
            raise ValueError(
                f"`temperature` must be above 0, one number or (first, last), got {temperature}; "
                "`sampling_rule='argmax'` is its limit at 0."
            )
        self.num_inference_steps = steps
        self.timesteps = levels[:-1].to(device)
        self.temperatures = torch.linspace(*ramp, steps).tolist()
        self._levels = levels.tolist()

    def _descent(self, steps: int, t_start: float, t_end: float) -> torch.Tensor:
        """The noise levels before the steps and after the last, `(steps + 1,)`."""
        return torch.linspace(t_start, t_end, steps + 1)

    def _check_config(self):
        self.register_to_config(_class_name=type(self).__name__)  # or diffusers' own would warn of our settings in a swap
        t_start, t_end = self.config.t_start, self.config.t_end
        if not 0 <= t_end < t_start <= 1:
            raise ValueError(f"`t_start` and `t_end` must satisfy 0 <= t_end < t_start <= 1, got {t_start} and {t_end}.")

    def _logits(self, model_output: torch.Tensor, sample: torch.LongTensor) -> torch.Tensor:
        """Logits of tokens, a sequence or a grid, as `(batch_size, ..., num_tokens)`."""
        logits = model_output.movedim(1, -1) if sample.ndim == 3 else model_output
        check_logits(logits)
        return logits

    def add_noise(
        self,
        original_samples: torch.LongTensor,
        noise: torch.LongTensor | None,
        timesteps: float | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.LongTensor:
        """
        Make noise of each token with probability t.

        Args:
            original_samples (`torch.LongTensor` of shape `(batch_size, ...)`): Clean tokens.
            noise (`torch.LongTensor` of the same shape, *optional*):
                What noised tokens become; drawn if None, uniformly from `num_vq_embeddings` tokens, after the mask.
            timesteps (`float` or `torch.Tensor` of shape `(batch_size,)`): Noise levels in [0, 1].
            generator (`torch.Generator` or a list with one for each image, *optional*): The source of randomness.
        """
        noised, _ = add_uniform_noise(original_samples, timesteps, self.config.num_vq_embeddings, noise, generator)
        return noised

    def _index(self, timestep: float | torch.Tensor) -> int:
        timestep = float(timestep)
        index = min(range(self.num_inference_steps), key=lambda i: abs(self._levels[i] - timestep))
        if abs(self._levels[index] - timestep) > 1e-5:
            raise ValueError(f"`timestep` must be one of `timesteps`, {self.timesteps.tolist()}, got {timestep}.")
        return index

    def __len__(self) -> int:
        return self.num_inference_steps


class RenoisingSchedulerBase(PaellaSchedulerBase):
    """Samplers that draw all tokens in each step and make noise again of some: `renoise_steps` and `noise_source`."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | torch.Tensor | None = None,
        temperature: float | tuple[float, float] | None = None,
        renoise_steps: int | None = None,
        t_start: float | None = None,
    ):
        """As [`PaellaSchedulerBase.set_timesteps`]; `renoise_steps` (`int`, *optional*) replaces the configured ones too."""
        renoise_steps = self.config.renoise_steps if renoise_steps is None else renoise_steps
        if renoise_steps is not None and renoise_steps < 0:
            raise ValueError(f"`renoise_steps` must be at least 0, got {renoise_steps}.")
        super().set_timesteps(num_inference_steps, device, timesteps, temperature, t_start)
        self.renoise_steps = self.num_inference_steps - 1 if renoise_steps is None else renoise_steps

    def _check_config(self):
        super()._check_config()
        noise_source = self.config.noise_source
        if noise_source not in ("initial", "fresh", "previous"):
            raise ValueError(f"`noise_source` must be 'initial', 'fresh' or 'previous', got {noise_source!r}.")

    def _noise(self, sample: torch.LongTensor, noise: torch.LongTensor | None) -> torch.LongTensor | None:
        """The tokens that replace re-noised ones; None for fresh random ones."""
        if self.config.noise_source == "fresh":
            return None
        if self.config.noise_source == "previous":
            return sample
        if noise is None:
            raise ValueError("`noise_source='initial'` needs `noise`, the tokens that sampling began with.")
        return noise
