"""Rescaled classifier-free guidance: as spread out as the conditional prediction."""

import torch
from diffusers.configuration_utils import register_to_config

from ...checks import check_number, check_ramp
from ..plan import Step
from .base import CONDITIONAL, UNCONDITIONAL, Branch, GuidanceMixin, centred


class PaellaRescaledGuidance(GuidanceMixin):
    r"""
    Linear guidance, rescaled (https://huggingface.co/papers/2305.08891, section 3.4), of the distribution at each position.
    With σ the standard deviation of logits over the tokens,

        g = w c + (1 - w) u,   g' = φ (σ(c) / σ(g)) g + (1 - φ) g.

    A factor on logits is a temperature. With φ = 1, that of g is raised until its logits spread no wider than those of c.
    φ = 0 is linear guidance.

    Args:
        guidance_scale (`float` or `tuple[float, float]`, defaults to 8.0):
            w, or its first and last value, between which it changes linearly along the steps; 1 or less is no guidance.
        guidance_rescale (`float`, defaults to 0.7): φ in [0, 1].
    """

    @register_to_config
    def __init__(self, guidance_scale: float | tuple[float, float] = 8.0, guidance_rescale: float = 0.7):
        check_ramp("guidance_scale", guidance_scale)
        check_number("guidance_rescale", guidance_rescale, at_least=0, at_most=1)

    def mixing_weights(
        self, guidance_scale: float, branches: tuple[Branch, ...] = (CONDITIONAL, UNCONDITIONAL)
    ) -> tuple[tuple[float, ...], ...]:
        guided = (guidance_scale, 1 - guidance_scale)
        return (guided,) if self.config.guidance_rescale == 0 else (guided, (1.0, 0.0))

    def forward(
        self,
        guided: torch.Tensor,
        conditional: torch.Tensor | None = None,
        *,
        step: Step | None = None,
        guidance_scale: float | None = None,
    ) -> torch.Tensor:
        if conditional is None:
            return guided
        dtype, guided, conditional = guided.dtype, centred(guided), centred(conditional)
        ratio = conditional.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return (guided * torch.lerp(torch.ones_like(ratio), ratio, self.config.guidance_rescale)).to(dtype)
