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
        batch_size (`int`, *optional*): The U-Net is given so many images at a time, in each branch and region; all at once
            unless given.
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
        batch_size: int | None = None,
    ):
        self.unet, self.guidance, self.guidance_scale, self.regions = unet, guidance, guidance_scale, regions
        self.deep_feature_interval, self.batch_size = deep_feature_interval, batch_size
        self.unet_kwargs = {"cross_attention_kwargs": cross_attention_kwargs}
        self._deep_features = {}
        self.set_conditioning(conditioning)

    def set_conditioning(self, conditioning: Mapping):
        """Take other conditioning from now on."""
        self.conditioning, self._encoded = dict(conditioning), {}
        self._cached_branches = self._context_branches = ()  # what caches keep is of what was told before

    def __call__(self, tokens: torch.Tensor, step) -> torch.Tensor:
        """Guided logits `(batch_size, num_tokens, height, width)` for the clean token at every position of `tokens`."""
        scale = self.guidance_scale(step)
        branches = self.guidance.branches(step, scale)
        if any(branch.conditioning not in self.conditioning for branch in branches):
            branches = (CONDITIONAL,)  # a callback cannot turn on guidance by what was not encoded
        weights = self.guidance.mixing_weights(scale, branches) if len(branches) > 1 else None
        is_refilled = step.index % self.deep_feature_interval == 0 or self._cached_branches != branches
        if is_refilled and not step.is_sweep:
            self._deep_features, self._cached_branches = {}, branches  # also when guidance began or ended
        size = self.batch_size or len(tokens)
        parts = [
            self._mixtures(tokens[first : first + size], slice(first, first + size), step, branches, weights)
            for first in range(0, len(tokens), size)
        ]
        logits = parts[0] if len(parts) == 1 else [torch.cat(mixture) for mixture in zip(*parts)]
        if len(branches) == 1:
            return logits[0]
        return self.guidance.forward(*logits, step=step, guidance_scale=scale)

    def reorder(self, rows: torch.Tensor):
        """Let every image go on as that of another row, `(batch_size,)`, with the same conditioning."""
        self.guidance.reorder(rows)
        self._cached_branches = self._context_branches = ()  # what caches keep is of other images

    def _mixtures(self, tokens, images: slice, step, branches, weights) -> tuple[torch.Tensor, ...]:
        """What the guidance is given of some images; the rows of the U-Net are branches, then regions, then images."""
        num_regions = 1 if self.regions is None else len(self.regions)
        with self._cache_context(step, branches, images.start):
            logits = self.unet(
                tokens.repeat(len(branches) * num_regions, 1, 1),
                step.level,
                **self._arguments(branches, images, num_regions),
                mixing_weights=weights,
                deep_features=self._deep_features_of(images, step),
                **self.unet_kwargs,
            ).sample
        if self.regions is not None:
            logits = logits.unflatten(0, (-1, num_regions, len(tokens)))
            logits = (self.regions.to(logits)[:, None, None] * logits).sum(1).flatten(0, 1)
        return logits.split(len(tokens))

    def _arguments(self, branches: tuple[Branch, ...], images: slice, num_regions: int) -> dict:
        """The U-Net's arguments that tell branches apart, in one batch; keys and values are computed once."""
        key = branches, images.start
        if key not in self._encoded:
            first, *others = (self.conditioning[branch.conditioning].select(images, num_regions) for branch in branches)
            arguments = first.cat(*others).arguments()
            if not is_offloaded(self.unet):  # the parts of an offloaded model work only when they are called in turn
                arguments = {"encoder_hidden_states": self.unet.encode_conditioning(**arguments, **self.unet_kwargs)}
            for index, branch in enumerate(branches):
                if branch.perturbation is not None:
                    rows = (index * len(first), (index + 1) * len(first))
                    arguments["attention_perturbation"] = replace(branch.perturbation, rows=rows)
            self._encoded[key] = arguments
        return self._encoded[key]

    def _cache_context(self, step, branches: tuple[Branch, ...], part: int):
        """Where diffusers' caches, if one is enabled, keep what they reuse: it is dropped when the batch changes."""
        if not getattr(self.unet, "is_cache_enabled", False):
            return contextlib.nullcontext()
        if self._context_branches != branches:
            self.unet._reset_stateful_cache()
            self._context_branches = branches
        return self.unet.cache_context(f"denoiser {part}", step_index=step.index, sigma=float(step.level))

    def _deep_features_of(self, images: slice, step) -> list[torch.Tensor] | None:
        """The U-Net's feature cache for this step: empty when it is to be filled, None where it is not used."""
        if self.deep_feature_interval == 1 or step.is_sweep:
            return None
        return self._deep_features.setdefault(images.start, [])


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers move the parts of a model about, or change them, when they are called."""
    return any(
        module is not model and (hasattr(module, "_hf_hook") or has_other_hooks(module)) for module in model.modules()
    )
