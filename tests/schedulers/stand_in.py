"""
A discrete scheduler with the interface that https://github.com/huggingface/diffusers/pull/14741 gives all of diffusers':
timesteps that descend in (0, 1], a temperature of the scheduler's own, one output class, and a state that `step` advances.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput


@dataclass
class DiscreteSchedulerOutput(BaseOutput):
    """
    Args:
        prev_sample (`torch.LongTensor` of shape `(batch_size, length)`): The next input of the model.
        pred_original_sample (`torch.LongTensor` of shape `(batch_size, length)`): The clean tokens that were drawn.
        sampled_probs (`torch.Tensor` of shape `(batch_size, length)`): Their probabilities, at temperature 1.
        pred_logits (`torch.Tensor` of shape `(batch_size, length, num_tokens)`): What they were drawn from.
        committed_mask (`torch.BoolTensor` of shape `(batch_size, length)`): Where `prev_sample` took the clean token.
        edited_mask (`torch.BoolTensor`, *optional*): Only schedulers that revise earlier choices have one.
    """

    prev_sample: torch.LongTensor
    pred_original_sample: torch.LongTensor
    sampled_probs: torch.Tensor
    pred_logits: torch.Tensor
    committed_mask: torch.BoolTensor
    edited_mask: torch.BoolTensor | None = None


class DescendingDDIMScheduler(SchedulerMixin, ConfigMixin):
    """Ancestral sampling of the uniform corruption process (https://huggingface.co/papers/2107.03006), α(t) = 1 - t."""

    order = 1

    @register_to_config
    def __init__(
        self, num_inference_steps: int = 32, temperature: float = 0.0, corrector_steps: int = 0, corrector_k: int = 1
    ):
        self.set_timesteps(num_inference_steps)

    @property
    def step_index(self) -> int | None:
        """The number of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0):
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None):
        if num_inference_steps <= 0:
            raise ValueError(f"`num_inference_steps` must be > 0, got {num_inference_steps}.")
        self.num_inference_steps = num_inference_steps
        self.timesteps = 1 - torch.arange(num_inference_steps, device=device, dtype=torch.float32) / num_inference_steps
        self._step_index = self._begin_index = None

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        return (self.timesteps == timestep).nonzero()[0].item()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.LongTensor,
        *,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DiscreteSchedulerOutput | tuple:
        """
        Draw x₀ from the logits `(batch_size, length, num_tokens)`, then x_s from
        q(x_s | x_t, x₀) ∝ q(x_t | x_s) q(x_s | x₀), from the level t of this step to the level s of the next.
        """
        if self.step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
        num_tokens, temperature = model_output.shape[-1], self.config.temperature
        clean = model_output.argmax(-1) if temperature == 0 else _draw((model_output / temperature).softmax(-1), generator)
        alpha_t, alpha_s = (index / self.num_inference_steps for index in (self.step_index, self.step_index + 1))
        kept = alpha_t / alpha_s
        likelihood = kept * F.one_hot(sample, num_tokens) + (1 - kept) / num_tokens
        following = alpha_s * F.one_hot(clean, num_tokens) + (1 - alpha_s) / num_tokens
        prev_sample = _draw(likelihood * following, generator)
        self._step_index += 1
        return self._output(prev_sample, clean, model_output.softmax(-1), model_output, prev_sample == clean, return_dict)

    def step_correct(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.LongTensor,
        *,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DiscreteSchedulerOutput | tuple:
        """
        After the step from `timestep`, draw `corrector_k` tokens anew, at random positions, given all the others
        (https://huggingface.co/papers/2605.22765, equation 13).
        """
        alpha = (self.index_for_timestep(timestep) + 1) / self.num_inference_steps
        num_tokens = model_output.shape[-1]
        logits = model_output.double()
        if alpha < 1:
            own = F.one_hot(sample, num_tokens) * math.log1p(num_tokens * alpha / (1 - alpha))
            logits = logits - own  # the prediction without its own token
        probabilities = alpha * logits.softmax(-1) + (1 - alpha) / num_tokens
        order = torch.rand(sample.shape, generator=generator, device=sample.device)
        chosen = torch.zeros_like(sample, dtype=torch.bool).scatter_(-1, order.topk(self.config.corrector_k).indices, True)
        prev_sample = torch.where(chosen, _draw(probabilities, generator), sample)
        return self._output(prev_sample, prev_sample, probabilities, model_output, chosen, return_dict)

    @staticmethod
    def _output(prev_sample, clean, probabilities, logits, committed, return_dict):
        fields = (prev_sample, clean, probabilities.gather(-1, clean[..., None])[..., 0], logits, committed)
        return DiscreteSchedulerOutput(*fields) if return_dict else (*fields, None)


def _draw(probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.LongTensor:
    return torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator).view(probabilities.shape[:-1])
