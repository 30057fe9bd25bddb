"""Adaptive projected guidance: without the part that only sharpens the prediction."""

import torch
from diffusers.configuration_utils import register_to_config

from ...checks import check_number, check_ramp
from ..plan import Step
from .base import GuidanceMixin, centred


class PaellaAdaptiveProjectedGuidance(GuidanceMixin):
    r"""
    Adaptive projected guidance, APG (https://huggingface.co/papers/2410.02416, algorithm 1), of the distribution at each
    position. With centred logits c and u, their difference d = c - u, which gathers momentum along the steps and is at most
    as long as a threshold, is split into a part along c and one at a right angle to it:

        d ← d + β d_before,   d ← d min(1, r / σ(d)),   d∥ = (⟨d, c⟩ / ⟨c, c⟩) c,   g = c + (w - 1) (d - d∥ + η d∥).

    The part along c makes p_c sharper or flatter, as another temperature would, and nothing else. The length σ(d) is the
    standard deviation over the tokens, so that r does not depend on their number. η = 1, without momentum and threshold, is
    linear guidance. The defaults of momentum and η are the paper's. The paper's r limits other quantities, so the default
    of r was chosen on the embedded model.

    Args:
        guidance_scale (`float` or `tuple[float, float]`, defaults to 8.0):
            w, or its first and last value, between which it changes linearly along the steps; 1 or less is no guidance.
        eta (`float`, defaults to 0.0): η, the share that is kept of the part along c.
        momentum (`float`, defaults to -0.5): β in (-1, 1); below 0, each step moves away from the directions before it.
        norm_threshold (`float`, *optional*, defaults to 0.5):
            r, above 0: the greatest standard deviation of the difference at a position; None is no limit.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float | tuple[float, float] = 8.0,
        eta: float = 0.0,
        momentum: float = -0.5,
        norm_threshold: float | None = 0.5,
    ):
        check_ramp("guidance_scale", guidance_scale)
        check_number("eta", eta)
        check_number("momentum", momentum, above=-1, below=1)
        if norm_threshold is not None:
            check_number("norm_threshold", norm_threshold, above=0)
        self._difference = 0.0  # of the steps before, summed up

    def forward(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, *, step: Step, guidance_scale: float
    ) -> torch.Tensor:
        config, dtype = self.config, conditional.dtype
        conditional = centred(conditional)
        difference = conditional - centred(unconditional)
        if config.momentum != 0:
            difference = self._difference = difference + config.momentum * self._difference
        if config.norm_threshold is not None:
            deviation = difference.square().mean(1, keepdim=True).sqrt()
            difference = difference * (config.norm_threshold / deviation).clamp(max=1)
        share = (difference * conditional).sum(1, keepdim=True) / conditional.square().sum(1, keepdim=True).clamp(min=1e-12)
        update = difference - (1 - config.eta) * share * conditional
        return (conditional + (guidance_scale - 1) * update).to(dtype)
