"""Which of diffusers' caches run on Paella's U-Net, and how; the others are refused by name."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import HookRegistry, apply_first_block_cache, apply_mag_cache
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.cache_utils import CacheMixin
from torch import nn

SUPPORTED = (FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig, PyramidAttentionBroadcastConfig)
REFUSED = {
    "FasterCacheConfig": "it makes the unconditional prediction of frequencies of latents, but predictions are logits here; "
    "`guidance_steps` of a call saves unconditional passes",
    "SeaCacheConfig": "it compares frequencies of latents, but latents are tokens here",
    "TextKVCacheConfig": "pipelines compute the keys and values of the conditioning once for all steps as it is",
}
ATTENTIONS = [r".*\.attention"]  # by the names of modules


class PaellaCacheMixin(CacheMixin):
    """
    diffusers' caches, with `enable_cache(config)` and `disable_cache()`. They keep what they reuse in the model: pipelines
    that share it take turns, and each call begins anew. Their steps are evaluations of the model.
    """

    _noise_level = None  # in the present cache context
    _caches_all_blocks = False

    def enable_cache(
        self,
        config: FirstBlockCacheConfig | MagCacheConfig | PyramidAttentionBroadcastConfig | TaylorSeerCacheConfig,
    ) -> None:
        """
        Reuse parts of earlier steps in later ones: faster, and an approximation.

        Args:
            config: One of diffusers'

                - `FirstBlockCacheConfig`: all blocks but the first are skipped while the first changes little;
                - `MagCacheConfig`: all blocks are skipped while the expected error is small, by ratios that a run with
                  `calibrate=True` prints; its `num_inference_steps` are those of the calls;
                - `TaylorSeerCacheConfig`: attention, or what `cache_identifiers` match, is extrapolated from earlier
                  steps; with `use_lite_mode` all blocks together;
                - `PyramidAttentionBroadcastConfig`: attention is reused within a range of noise levels in [0, 1],
                  `spatial_attention_timestep_skip_range`; `current_timestep_callback` is left out.

        Raises:
            ValueError: If the cache does not work on this model, a cache is enabled already, or the configuration would do
                nothing.
        """
        if not isinstance(config, SUPPORTED):
            reason = REFUSED.get(type(config).__name__, "it is not known to work")
            names = ", ".join(supported.__name__ for supported in SUPPORTED)
            raise ValueError(f"{type(config).__name__} is refused by {type(self).__name__}: {reason}. Take one of {names}.")
        if self.is_cache_enabled:
            raise ValueError(f"A cache is enabled already, {type(self._cache_config).__name__}: call `disable_cache` first.")
        if isinstance(config, PyramidAttentionBroadcastConfig):
            super().enable_cache(self._by_noise_level(config))
        elif isinstance(config, TaylorSeerCacheConfig):
            patterns = config.cache_identifiers or config.skip_predict_identifiers
            if not patterns and not config.use_lite_mode:
                config = dataclasses.replace(config, cache_identifiers=ATTENTIONS)
            super().enable_cache(config)
        else:
            self._enable_for_all_blocks(config)
        if not any(type(config).__module__ in _files_of_hooks(module) for module in self.modules()):
            self.disable_cache()
            raise ValueError(f"{type(config).__name__} would do nothing: its identifiers match no part of the model.")

    def disable_cache(self) -> None:
        """Compute every step in full again."""
        super().disable_cache()
        self._caches_all_blocks = False

    @contextlib.contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """As diffusers'; `sigma` is the noise level."""
        self._noise_level = kwargs.get("sigma")
        with super().cache_context(name, **kwargs):
            yield

    def _reset_stateful_cache(self, recurse: bool = True):
        if self.is_cache_enabled:  # diffusers' own would leave a mark of hooks on any model
            super()._reset_stateful_cache(recurse)

    def _enable_for_all_blocks(self, config):
        """
        These two caches take blocks of one shape in a list. Ours are in two, with changes of resolution between, which are
        skipped like blocks: the first block and the last have one shape.
        """
        stack = nn.Module()
        stack.blocks = nn.ModuleList([*self.down_blocks, *self.up_blocks])
        for cls in {type(block) for block in stack.blocks}:
            TransformerBlockRegistry.register(cls, TransformerBlockMetadata(return_hidden_states_index=0))
        if isinstance(config, MagCacheConfig):
            apply_mag_cache(stack, config)
        else:
            apply_first_block_cache(stack, config)
        HookRegistry.check_if_exists_or_initialize(cast(nn.Module, self)).invalidate_child_registries_cache()
        self._cache_config, self._caches_all_blocks = config, True

    def _by_noise_level(self, config: PyramidAttentionBroadcastConfig) -> PyramidAttentionBroadcastConfig:
        if config.current_timestep_callback is not None:
            raise ValueError(
                "`current_timestep_callback` of PyramidAttentionBroadcastConfig is not used by this model, which knows its "
                "noise level: leave it out."
            )
        skip_range = config.spatial_attention_timestep_skip_range
        if not 0 <= skip_range[0] < skip_range[1] <= 1:
            raise ValueError(
                f"`spatial_attention_timestep_skip_range` must ascend within [0, 1], got {skip_range}: timesteps of this "
                "model are noise levels. Take for example (0.1, 0.9)."
            )
        skips = config.spatial_attention_block_skip_range or 2
        return dataclasses.replace(
            config, spatial_attention_block_skip_range=skips, current_timestep_callback=self._current_noise_level
        )

    def _current_noise_level(self) -> float:
        if self._noise_level is None:
            raise ValueError("Call the model in `with model.cache_context(name, sigma=noise_level):`, as pipelines do.")
        return self._noise_level


def has_other_hooks(module: nn.Module) -> bool:
    """Whether diffusers' hooks, other than those of caches, change a module when it is called."""
    return not _files_of_hooks(module) <= {config.__module__ for config in SUPPORTED}


def _files_of_hooks(module: nn.Module) -> set[str]:
    """The modules of diffusers that define the hooks on a part of a model; each cache has one, with its configuration."""
    registry = getattr(module, "_diffusers_hook", None)
    return set() if registry is None else {type(hook).__module__ for hook in registry.hooks.values()}
