"""Classifier-free guidance of discrete tokens, as published, with an optional cut of implausible tokens."""

import math

import torch
from diffusers.configuration_utils import register_to_config

from ...checks import check_number, check_ramp
from ..plan import Step
from .base import CONDITIONAL, UNCONDITIONAL, Branch, GuidanceMixin


class PaellaClassifierFreeGuidance(GuidanceMixin):
    r"""
    Linear classifier-free guidance (https://huggingface.co/papers/2207.12598) of logits, the published method: with the
    conditional logits c, the unconditional ones u and the scale w,

        g = w c + (1 - w) u.

    Sampling from g is sampling from p_c^w p_u^(1-w), renormalised. A high scale also amplifies what is noise in tokens that
    both branches find next to impossible, so that these may win. `plausibility_threshold`, α, cuts them off: after the
    adaptive plausibility constraint of contrastive decoding (https://huggingface.co/papers/2210.15097, section 3.3), only
    tokens whose conditional probability is at least α times that of the most likely one may be drawn,

        g = -∞ where c < max c + log α.

    Args:
        guidance_scale (`float` or `tuple[float, float]`, defaults to 8.0):
            w, or its first and last value, between which it changes linearly along the steps; 1 or less is no guidance.
        plausibility_threshold (`float`, *optional*): α in (0, 1]; no token is cut off unless given.
    """

    @register_to_config
    def __init__(self, guidance_scale: float | tuple[float, float] = 8.0, plausibility_threshold: float | None = None):
        check_ramp("guidance_scale", guidance_scale)
        if plausibility_threshold is not None:
            check_number("plausibility_threshold", plausibility_threshold, above=0, at_most=1)

    def mixing_weights(
        self, guidance_scale: float, branches: tuple[Branch, ...] = (CONDITIONAL, UNCONDITIONAL)
    ) -> tuple[tuple[float, ...], ...]:
        guided = (guidance_scale, 1 - guidance_scale)
        return (guided,) if self.config.plausibility_threshold is None else (guided, (1.0, 0.0))

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
        # the lowest finite number: of -inf, diffusers' schedulers would make NaN when they take entropies
        return guided.masked_fill(~plausible(conditional, self.config.plausibility_threshold), torch.finfo(guided.dtype).min)


def plausible(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which tokens are at least `threshold` times as likely as the likeliest, by logits `(batch_size, num_tokens, ...)`."""
    return logits >= logits.amax(1, keepdim=True) + math.log(threshold)
