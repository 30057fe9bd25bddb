"""From tokens to guided logits: the U-Net with its conditioning, guidance, prompts for regions and feature cache."""

from collections.abc import Callable, Sequence

import torch


class Denoiser:
    """
    log p(x0 | x_t, c), guided.

    Args:
        unet ([`PaellaUNet`]): The model.
        branches (sequence of [`Conditioning`]):
            What each branch of the guidance is conditioned on: the conditional one, then the unconditional one if it was
            encoded. Each has a row for every image; with regions, a row for every image of the first region, and so on.
        guidance ([`GuidanceMixin`] or [`DiffusersGuidance`]): Makes one prediction of the branches'.
        guidance_scale (`Callable`): From a step to its scale; None for no guidance.
        regions (`torch.Tensor` of shape `(num_regions, height, width)`, *optional*):
            The share of every region's prompt at every token; logits are blended by it.
        deep_feature_interval (`int`, defaults to 1):
            DeepCache (https://huggingface.co/papers/2312.00858): only every so many steps the levels below the first are
            computed.
        cross_attention_kwargs (`dict`, *optional*): Of the U-Net.
    """

    def __init__(
        self,
        unet,
        branches: Sequence,
        guidance,
        guidance_scale: Callable,
        regions: torch.Tensor | None = None,
        deep_feature_interval: int = 1,
        cross_attention_kwargs: dict | None = None,
    ):
        self.unet, self.guidance, self.guidance_scale, self.regions = unet, guidance, guidance_scale, regions
        self.deep_feature_interval = deep_feature_interval
        self.unet_kwargs = {"cross_attention_kwargs": cross_attention_kwargs}
        self.deep_features, self._cached_branches = None, 0
        self.set_branches(branches)

    def set_branches(self, branches: Sequence):
        """Take other conditioning from now on."""
        self.branches, self._encoded = list(branches), {}

    def __call__(self, tokens: torch.LongTensor, step) -> torch.Tensor:
        """Guided logits `(batch_size, num_tokens, height, width)` for the clean token at every position of `tokens`."""
        scale = self.guidance_scale(step)
        # a callback cannot turn on guidance by what was not encoded
        num_branches = min(self.guidance.num_branches(step, scale), len(self.branches))
        weights = self.guidance.mixing_weights(scale, num_branches) if num_branches > 1 else None
        rows = num_branches * (1 if self.regions is None else len(self.regions))
        logits = self.unet(
            tokens.repeat(rows, 1, 1),
            step.level,
            **self._conditioning(num_branches),
            mixing_weights=weights,
            deep_features=self._deep_features(step, num_branches),
            **self.unet_kwargs,
        ).sample
        if self.regions is not None:  # rows are branches, then regions, then images
            logits = logits.unflatten(0, (-1, len(self.regions), len(tokens)))
            logits = (self.regions.to(logits)[:, None, None] * logits).sum(1).flatten(0, 1)
        if num_branches == 1:
            return logits
        parts = logits.chunk(len(logits) // len(tokens))
        return self.guidance.forward(*parts, step=step, guidance_scale=scale)

    def _conditioning(self, num_branches: int) -> dict:
        """The U-Net's conditioning arguments for the first branches, in one batch; keys and values are computed once."""
        if num_branches not in self._encoded:
            first, *others = self.branches[:num_branches]
            arguments = first.cat(*others).arguments()
            if not is_offloaded(self.unet):  # the parts of an offloaded model work only when they are called in turn
                arguments = {"encoder_hidden_states": self.unet.encode_conditioning(**arguments, **self.unet_kwargs)}
            self._encoded[num_branches] = arguments
        return self._encoded[num_branches]

    def _deep_features(self, step, num_branches: int) -> list[torch.Tensor] | None:
        """The U-Net's feature cache for this step: empty when it is to be filled, None where it is not used."""
        if self.deep_feature_interval == 1 or step.is_sweep:
            return None
        if step.index % self.deep_feature_interval == 0 or self._cached_branches != num_branches:
            self.deep_features, self._cached_branches = [], num_branches  # also when guidance began or ended
        return self.deep_features


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers move the parts of a model about, or change them, when they are called."""
    return any(
        module is not model and (hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"))
        for module in model.modules()
    )
