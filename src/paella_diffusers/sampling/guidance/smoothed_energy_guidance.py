"""Smoothed energy guidance: away from what the model would predict if its attention were blurred."""

from diffusers.configuration_utils import register_to_config

from ...checks import check_number
from ...models.attention import AttentionPerturbation
from .perturbed_attention_guidance import PerturbedBranchGuidance, check_levels


class PaellaSmoothedEnergyGuidance(PerturbedBranchGuidance):
    r"""
    Smoothed energy guidance, SEG (https://huggingface.co/papers/2408.00760), beside linear guidance:

        g = w c + (1 - w) u + s (c - p),

    where the logits p are those of the model with the prompt when, in the levels named, the queries of the attention are
    blurred over the image by a Gaussian, which smooths the energy that attention descends. It works with and without
    self-attention.

    Args:
        guidance_scale (`float` or `tuple[float, float]`, defaults to 8.0):
            w, or its first and last value, between which it changes linearly along the steps; at 1 or less, only the
            perturbed branch guides.
        seg_guidance_scale (`float`, defaults to 3.0): s; 0 is linear guidance.
        seg_blur_sigma (`float`, *optional*):
            The Gaussian's standard deviation, in tokens of the level; unless given, all queries are their mean, the limit
            of a wide Gaussian, which the paper uses.
        perturbed_levels (`tuple[int]`, defaults to `(-1,)`):
            The U-Net's levels whose attention is blurred, by their index in `block_out_channels`; -1 is the lowest.
        plausibility_threshold (`float`, *optional*): As of [`PaellaClassifierFreeGuidance`].
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float | tuple[float, float] = 8.0,
        seg_guidance_scale: float = 3.0,
        seg_blur_sigma: float | None = None,
        perturbed_levels: tuple[int, ...] = (-1,),
        plausibility_threshold: float | None = None,
    ):
        super().__init__(guidance_scale, plausibility_threshold)
        check_number("seg_guidance_scale", seg_guidance_scale, at_least=0)
        if seg_blur_sigma is not None:
            check_number("seg_blur_sigma", seg_blur_sigma, above=0)
        check_levels(perturbed_levels)

    @property
    def perturbation(self) -> AttentionPerturbation:
        sigma = self.config.seg_blur_sigma
        options = {} if sigma is None else {"blur_sigma": sigma}
        return AttentionPerturbation("blur", tuple(self.config.perturbed_levels), **options)

    @property
    def perturbed_scale(self) -> float:
        return self.config.seg_guidance_scale
