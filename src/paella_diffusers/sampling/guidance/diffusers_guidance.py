"""diffusers' own guiders in the place of a guidance method of ours."""

import copy
from typing import Any, cast

import torch
from diffusers.guiders import MagnitudeAwareGuidance
from diffusers.guiders.guider_utils import BaseGuidance

from ...models.unet_paella import PaellaUNet
from ..plan import Step
from .base import CONDITIONAL, UNCONDITIONAL, Branch, identity

OURS = {  # instead of guiders that need more branches
    "PerturbedAttentionGuidance": "PaellaPerturbedAttentionGuidance",
    "SmoothedEnergyGuidance": "PaellaSmoothedEnergyGuidance",
}


class DiffusersGuidance:
    """
    Runs one of diffusers' guiders (`diffusers.guiders`) that takes the predictions of two branches: their interface is
    experimental, and this is the one place that knows it. The predictions are logits.

    Args:
        guider (`BaseGuidance`): The guider; a copy of it is used.

    Raises:
        ValueError: If the guider needs other predictions than the conditional and the unconditional one, changes the model,
            has no scale, or cannot take logits.
    """

    extra_prompts: dict[str, str] = {}

    def __init__(self, guider: BaseGuidance):
        name = type(guider).__name__
        reason = None
        if guider._input_predictions != ["pred_cond", "pred_uncond"]:
            reason = (
                f"needs the predictions {guider._input_predictions}, but a conditional and an unconditional one are there"
            )
        elif type(guider).prepare_models is not BaseGuidance.prepare_models:
            reason = "changes the model between its predictions, but both are computed in one batch"
        elif not hasattr(guider, "guidance_scale"):
            reason = "has no `guidance_scale` to set"
        elif isinstance(guider, MagnitudeAwareGuidance):
            reason = "cannot take the norm of logits, which have four dimensions"
        if reason is not None:
            raise ValueError(f"`guider`, a {name}, {reason}: take {OURS.get(name, 'another guider')}.")
        self.guider: BaseGuidance = copy.deepcopy(guider)
        self._is_prepared = False

    @property
    def guidance_scale(self) -> float:
        return self.guider.guidance_scale

    def needs_unconditional(self, guidance_scale: float | tuple[float, float]) -> bool:
        return self.guider._enabled

    def check_model(self, unet: PaellaUNet) -> None:
        """Any model will do."""

    def branches(self, step: Step, guidance_scale: float | None) -> tuple[Branch, ...]:
        if guidance_scale is None:
            return (CONDITIONAL,)
        self.guider.guidance_scale = guidance_scale
        if not self._is_prepared:  # what guiders keep along a run, such as momentum, they make in its first step
            self._set_state(0, step)
            self.guider.prepare_inputs(cast(Any, {}))
            self._is_prepared = True
        self._set_state(step.index, step)
        return (CONDITIONAL, UNCONDITIONAL)[: self.guider.num_conditions]

    def _set_state(self, index: int, step):
        self.guider.set_state(step=index, num_inference_steps=step.num_steps, timestep=step.timestep)

    def mixing_weights(self, guidance_scale: float, branches: tuple[Branch, ...]) -> tuple[tuple[float, ...], ...]:
        return identity(len(branches))

    def forward(self, *logits: torch.Tensor, step: Step, guidance_scale: float) -> torch.Tensor:
        return self.guider.forward(**dict(zip(self.guider._input_predictions or (), logits))).pred

    def reorder(self, rows: torch.Tensor) -> None:
        """As [`GuidanceMixin.reorder`]; these guiders keep at most a momentum."""
        buffer = getattr(self.guider, "momentum_buffer", None)
        if buffer is not None and isinstance(buffer.running_average, torch.Tensor):
            buffer.running_average = buffer.running_average[rows]

    def for_source(self) -> "DiffusersGuidance":
        return DiffusersGuidance(self.guider)
