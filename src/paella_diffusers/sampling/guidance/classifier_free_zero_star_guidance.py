"""CFG-Zero*: the unconditional prediction is scaled to the conditional one before they are compared."""

import torch
from diffusers.configuration_utils import register_to_config

from ...checks import check_ramp
from ..plan import Step
from .base import GuidanceMixin, centred


class PaellaClassifierFreeZeroStarGuidance(GuidanceMixin):
    r"""
    CFG-Zero* (https://huggingface.co/papers/2503.18886, section 4.1) of the distribution at each position. With centred
    logits c and u, u is scaled so that it comes as near to c as it can,

        s = ⟨c, u⟩ / ⟨u, u⟩,   g = w c + (1 - w) s u.

    Scaling logits is taking another temperature: only what tells p_c from p_u at any temperature is amplified. Where c and u
    agree but for a scale, g = c, whatever w is.

    The paper's "zero-init", a zero prediction in the first steps (diffusers' `zero_init_steps=1`), is left out. It holds a
    velocity still; zero logits would be the uniform distribution, from which a step would draw nothing but noise.

    Args:
        guidance_scale (`float` or `tuple[float, float]`, defaults to 8.0):
            w, or its first and last value, between which it changes linearly along the steps; 1 or less is no guidance.
    """

    @register_to_config
    def __init__(self, guidance_scale: float | tuple[float, float] = 8.0):
        check_ramp("guidance_scale", guidance_scale)

    def forward(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, *, step: Step, guidance_scale: float
    ) -> torch.Tensor:
        dtype, conditional, unconditional = conditional.dtype, centred(conditional), centred(unconditional)
        square = unconditional.square().sum(1, keepdim=True).clamp(min=1e-12)
        unconditional = unconditional * ((conditional * unconditional).sum(1, keepdim=True) / square)
        return torch.lerp(unconditional, conditional, guidance_scale).to(dtype)
