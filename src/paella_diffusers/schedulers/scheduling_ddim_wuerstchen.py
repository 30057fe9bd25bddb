"""The prior's deterministic sampler."""

import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.schedulers.scheduling_ddpm_wuerstchen import DDPMWuerstchenSchedulerOutput

from ..loaders.hub import PaellaHubMixin


class DDIMWuerstchenScheduler(PaellaHubMixin, DDPMWuerstchenScheduler):
    r"""
    DDIM (https://huggingface.co/papers/2010.02502, equation 12 with σ = 0) on the continuous cosine schedule of
    [`~diffusers.DDPMWuerstchenScheduler`], whose configuration it shares:

        x₀ = (x - √(1 - ᾱ) ε) / √ᾱ,    x' = √ᾱ' x₀ + √(1 - ᾱ') ε
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DDPMWuerstchenSchedulerOutput | tuple[torch.Tensor]:
        """
        Args:
            model_output (`torch.Tensor` of the shape of `sample`): The predicted noise ε.
            timestep (`torch.Tensor` of shape `(batch_size,)`): One of `timesteps`, for every row.
            sample (`torch.Tensor` of shape `(batch_size, ...)`): x.
            generator (`torch.Generator`, *optional*): Not used: nothing is drawn.
        """
        shape = (-1, *[1] * (sample.ndim - 1))
        alpha = self._alpha_cumprod(timestep, sample.device).view(shape)
        alpha_next = self._alpha_cumprod(self.previous_timestep(timestep), sample.device).view(shape)
        clean = (sample - (1 - alpha).sqrt() * model_output) / alpha.sqrt()
        previous = (alpha_next.sqrt() * clean + (1 - alpha_next).sqrt() * model_output).to(model_output.dtype)
        if not return_dict:
            return (previous,)
        return DDPMWuerstchenSchedulerOutput(prev_sample=previous)
