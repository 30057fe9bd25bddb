"""Perturbed-attention guidance: away from what the model would predict if image tokens did not look at each other."""

from diffusers.configuration_utils import register_to_config

from ...checks import check_number, is_integer
from ...models.attention import AttentionPerturbation
from ...models.unet_paella import PaellaUNet
from ..plan import Step
from .base import CONDITIONAL, UNCONDITIONAL, Branch
from .classifier_free_guidance import PaellaClassifierFreeGuidance


class PerturbedBranchGuidance(PaellaClassifierFreeGuidance):
    r"""
    Linear guidance with a third branch: the conditional one with weaker attention. With its logits p and its scale s,

        g = w c + (1 - w) u + s (c - p).

    It is linear: as in linear guidance, branches are mixed before the head. A `guidance_scale` of 1 or less leaves s (c - p)
    alone.
    """

    @property
    def perturbation(self) -> AttentionPerturbation:
        """How the attention of the third branch is weakened."""
        raise NotImplementedError

    @property
    def perturbed_scale(self) -> float:
        """s; with 0 there is no third branch."""
        raise NotImplementedError

    def check_model(self, unet: PaellaUNet) -> None:
        letters = unet.config.block_types
        with_attention = [level for level, types in enumerate(letters) if "A" in types]
        for level in self.config.perturbed_levels:
            if not (-len(letters) <= level < len(letters) and level % len(letters) in with_attention):
                raise ValueError(
                    f"`perturbed_levels` of `guider` names level {level}, but this U-Net has attention in the levels "
                    f"{with_attention} of {len(letters)}: name one of these."
                )

    def branches(self, step: Step, guidance_scale: float | None) -> tuple[Branch, ...]:
        branches = super().branches(step, guidance_scale)
        if guidance_scale is None or self.perturbed_scale == 0:
            return branches
        return (*branches, Branch("conditional", self.perturbation))

    def mixing_weights(
        self, guidance_scale: float, branches: tuple[Branch, ...] = (CONDITIONAL, UNCONDITIONAL)
    ) -> tuple[tuple[float, ...], ...]:
        if branches[-1].perturbation is None:
            return super().mixing_weights(guidance_scale, branches)
        guided = (guidance_scale, 1 - guidance_scale) if UNCONDITIONAL in branches else (1.0,)
        guided = (guided[0] + self.perturbed_scale, *guided[1:], -self.perturbed_scale)
        if self.config.plausibility_threshold is None:
            return (guided,)
        return guided, (1.0, *[0.0] * (len(guided) - 1))


class PaellaPerturbedAttentionGuidance(PerturbedBranchGuidance):
    r"""
    Perturbed-attention guidance, PAG (https://huggingface.co/papers/2403.17377), beside linear guidance:

        g = w c + (1 - w) u + s (c - p),

    where the logits p are those of the model with the prompt when, in the levels named, every image token attends to itself
    and to the conditioning but to no other image token. Moving away from them amplifies structure. It needs a U-Net with
    self-attention, such as the published one.

    Args:
        guidance_scale (`float` or `tuple[float, float]`, defaults to 8.0):
            w, or its first and last value, between which it changes linearly along the steps; at 1 or less, only the
            perturbed branch guides.
        perturbed_guidance_scale (`float`, defaults to 3.0): s; 0 is linear guidance.
        perturbed_levels (`tuple[int]`, defaults to `(-1,)`):
            The U-Net's levels whose attention is perturbed, by their index in `block_out_channels`; -1 is the lowest.
        plausibility_threshold (`float`, *optional*): As of [`PaellaClassifierFreeGuidance`].
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float | tuple[float, float] = 8.0,
        perturbed_guidance_scale: float = 3.0,
        perturbed_levels: tuple[int, ...] = (-1,),
        plausibility_threshold: float | None = None,
    ):
        super().__init__(guidance_scale, plausibility_threshold)
        check_number("perturbed_guidance_scale", perturbed_guidance_scale, at_least=0)
        check_levels(perturbed_levels)

    @property
    def perturbation(self) -> AttentionPerturbation:
        return AttentionPerturbation("identity", tuple(self.config.perturbed_levels))

    @property
    def perturbed_scale(self) -> float:
        return self.config.perturbed_guidance_scale

    def check_model(self, unet: PaellaUNet) -> None:
        super().check_model(unet)
        if not unet.config.self_attention:
            raise ValueError(
                "`guider`, a PaellaPerturbedAttentionGuidance, weakens the attention of image tokens to each other, which "
                "this U-Net has not (`self_attention=False`): take PaellaSmoothedEnergyGuidance."
            )


def check_levels(levels: object) -> None:
    """Refuse what is no list of level numbers."""
    if not isinstance(levels, tuple | list) or not levels or not all(is_integer(level) for level in levels):
        raise ValueError(f"`perturbed_levels` must be a list of at least one level, such as (-1,), got {levels!r}.")
