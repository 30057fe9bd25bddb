"""From tokens to guided logits: the U-Net with its conditioning, guidance, prompts for regions and feature cache."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ..models.caching import has_other_hooks
from .guidance.base import CONDITIONAL, Branch


class Denoiser:
    """
    log p(x0 | x_t, c), guided.

    Args:
        unet ([`PaellaUNet`]): The model.
        conditioning (mapping from `str` to [`Conditioning`]):
            What the branches of the guidance are told, by [`Branch`]'s names: `"conditional"`, and all others that were
            encoded. Each has a row for every image; with regions, a row for every image of the first region, and so on.
        guidance ([`GuidanceMixin`] or [`DiffusersGuidance`]): Makes one prediction of the branches'.
        guidance_scale (`Callable`): From a step to its scale; None for no guidance.
        regions (`torch.Tensor` of shape `(num_regions, height, width)`, *optional*):
            The share of every region's prompt at every token; logits are blended by it.
        deep_feature_interval (`int`, defaults to 1):
            DeepCache (https://huggingface.co/papers/2312.00858): once in this many steps the levels below the first are
            computed.
        cross_attention_kwargs (`dict`, *optional*): Of the U-Net.
    """

    def __init__(
        self,
        unet,
        conditioning: Mapping,
        guidance,
        guidance_scale: Callable,
        regions: torch.Tensor | None = None,
        deep_feature_interval: int = 1,
        cross_attention_kwargs: dict | None = None,
    ):
        self.unet, self.guidance, self.guidance_scale, self.regions = unet, guidance, guidance_scale, regions
        self.deep_feature_interval = deep_feature_interval
        self.unet_kwargs = {"cross_attention_kwargs": cross_attention_kwargs}
        self.deep_features, self._cached_branches, self._context_branches = None, (), ()
        self.set_conditioning(conditioning)

    def set_conditioning(self, conditioning: Mapping):
        """Take other conditioning from now on."""
        self.conditioning, self._encoded = dict(conditioning), {}

    def __call__(self, tokens: torch.LongTensor, step) -> torch.Tensor:
        """Guided logits `(batch_size, num_tokens, height, width)` for the clean token at every position of `tokens`."""
        scale = self.guidance_scale(step)
        branches = self.guidance.branches(step, scale)
        if any(branch.conditioning not in self.conditioning for branch in branches):
            branches = (CONDITIONAL,)  # a callback cannot turn on guidance by what was not encoded
        weights = self.guidance.mixing_weights(scale, branches) if len(branches) > 1 else None
        rows = len(branches) * (1 if self.regions is None else len(self.regions))
        with self._cache_context(step, branches):
            logits = self.unet(
                tokens.repeat(rows, 1, 1),
                step.level,
                **self._arguments(branches),
                mixing_weights=weights,
                deep_features=self._deep_features(step, branches),
                **self.unet_kwargs,
            ).sample
        if self.regions is not None:  # rows are branches, then regions, then images
            logits = logits.unflatten(0, (-1, len(self.regions), len(tokens)))
            logits = (self.regions.to(logits)[:, None, None] * logits).sum(1).flatten(0, 1)
        if len(branches) == 1:
            return logits
        parts = logits.chunk(len(logits) // len(tokens))
        return self.guidance.forward(*parts, step=step, guidance_scale=scale)

    def _arguments(self, branches: tuple[Branch, ...]) -> dict:
        """The U-Net's arguments that tell branches apart, in one batch; keys and values are computed once."""
        if branches not in self._encoded:
            first, *others = (self.conditioning[branch.conditioning] for branch in branches)
            arguments = first.cat(*others).arguments()
            if not is_offloaded(self.unet):  # the parts of an offloaded model work only when they are called in turn
                arguments = {"encoder_hidden_states": self.unet.encode_conditioning(**arguments, **self.unet_kwargs)}
            for index, branch in enumerate(branches):
                if branch.perturbation is not None:
                    rows = (index * len(first), (index + 1) * len(first))
                    arguments["attention_perturbation"] = replace(branch.perturbation, rows=rows)
            self._encoded[branches] = arguments
        return self._encoded[branches]

    def _cache_context(self, step, branches: tuple[Branch, ...]):
        """Where diffusers' caches, if one is enabled, keep what they reuse: it is dropped when the batch changes."""
        if not getattr(self.unet, "is_cache_enabled", False):
            return contextlib.nullcontext()
        if self._context_branches != branches:
            self.unet._reset_stateful_cache()
            self._context_branches = branches
        return self.unet.cache_context("denoiser", step_index=step.index, sigma=float(step.level))

    def _deep_features(self, step, branches: tuple[Branch, ...]) -> list[torch.Tensor] | None:
        """The U-Net's feature cache for this step: empty when it is to be filled, None where it is not used."""
        if self.deep_feature_interval == 1 or step.is_sweep:
            return None
        if step.index % self.deep_feature_interval == 0 or self._cached_branches != branches:
            self.deep_features, self._cached_branches = [], branches  # also when guidance began or ended
        return self.deep_features


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers move the parts of a model about, or change them, when they are called."""
    return any(
        module is not model and (hasattr(module, "_hf_hook") or has_other_hooks(module)) for module in model.modules()
    )
