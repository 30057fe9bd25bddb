"""diffusers' own guiders in the place of a guidance method of ours."""

import copy

import torch
from diffusers.guiders.guider_utils import BaseGuidance

from .base import identity


class DiffusersGuidance:
    """
    Runs one of diffusers' guiders (`diffusers.guiders`) that takes the predictions of two branches: their interface is
    experimental, and this is the one place that knows it. The predictions are logits.

    Args:
        guider (`BaseGuidance`): The guider; a copy of it is used.

    Raises:
        ValueError: If the guider needs other predictions than the conditional and the unconditional one, or has no scale.
    """

    def __init__(self, guider: BaseGuidance):
        if guider._input_predictions != ["pred_cond", "pred_uncond"]:
            raise ValueError(
                f"`guider`, a {type(guider).__name__}, needs the predictions {guider._input_predictions}, but a conditional "
                "and an unconditional one are there: take another guider."
            )
        if not hasattr(guider, "guidance_scale"):
            raise ValueError(f"`guider`, a {type(guider).__name__}, has no `guidance_scale` to set: take another guider.")
        self.guider = copy.deepcopy(guider)

    @property
    def guidance_scale(self) -> float:
        return self.guider.guidance_scale

    def needs_unconditional(self, guidance_scale) -> bool:
        return self.guider._enabled

    def num_branches(self, step, guidance_scale: float | None) -> int:
        if guidance_scale is None:
            return 1
        self.guider.guidance_scale = guidance_scale
        self.guider.set_state(step=step.index, num_inference_steps=step.num_steps, timestep=step.timestep)
        return self.guider.num_conditions

    def mixing_weights(self, guidance_scale: float, num_branches: int):
        return identity(num_branches)

    def forward(self, *logits: torch.Tensor, step, guidance_scale: float) -> torch.Tensor:
        return self.guider.forward(**dict(zip(self.guider._input_predictions, logits))).pred
