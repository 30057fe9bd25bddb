"""What every guidance method is: an object with a configuration, a component of the pipeline."""

import os

import torch
from diffusers.configuration_utils import ConfigMixin
from huggingface_hub.utils import validate_hf_hub_args

from ...loaders.hub import PaellaHubMixin


class GuidanceMixin(PaellaHubMixin, ConfigMixin):
    r"""
    A guidance method makes the logits that are sampled from those of n *branches* of the model, evaluated in one batch:
    first the conditional one, with the prompt, then the unconditional one, with the negative prompt. To add a method, derive
    from this class, take `guidance_scale` and the method's own settings in `__init__`, decorated with `register_to_config`,
    and write `forward`; a method that is linear in the logits may say how it mixes them in `mixing_weights`.

    It keeps no state of a run but what `forward` puts into attributes: every call of a pipeline works on its own copy.
    """

    config_name = "guider_config.json"

    @property
    def guidance_scale(self) -> float | tuple[float, float]:
        """The scale where a call gives none."""
        scale = self.config.guidance_scale
        return tuple(scale) if isinstance(scale, list) else scale

    def needs_unconditional(self, guidance_scale: float | tuple[float, float]) -> bool:
        """Whether any step of a run with this scale, or (first, last), needs the unconditional branch."""
        scales = guidance_scale if isinstance(guidance_scale, tuple | list) else (guidance_scale,)
        return max(scales) > 1

    def num_branches(self, step, guidance_scale: float | None) -> int:
        """Branches wanted at this step: 2, or 1 where nothing is to be guided."""
        return 1 if guidance_scale is None or guidance_scale <= 1 else 2

    def mixing_weights(self, guidance_scale: float, num_branches: int) -> tuple[tuple[float, ...], ...]:
        """
        Weights, one for each branch, of every mixture of logits that `forward` is given: each branch's own unless told
        otherwise. They are mixed before the model's head, which is linear: a mixture costs no more than a branch.
        """
        return identity(num_branches)

    def forward(self, *logits: torch.Tensor, step, guidance_scale: float) -> torch.Tensor:
        """
        The logits to sample from, `(batch_size, num_tokens, height, width)`.

        Args:
            logits (`torch.Tensor` of the same shape): One for each row of `mixing_weights`.
            step ([`Step`]): Which step of the run it is.
            guidance_scale (`float`): Of this step, above 1.
        """
        raise NotImplementedError

    @classmethod
    @validate_hf_hub_args
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs):
        """Load from the folder or Hub repository that `save_pretrained` wrote; arguments as of a scheduler's."""
        config = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        return cls.from_config(config)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Write `guider_config.json` into a folder."""
        self.save_config(save_directory, push_to_hub=push_to_hub, **kwargs)


def identity(num_branches: int) -> tuple[tuple[float, ...], ...]:
    """Mixing weights that leave each branch as it is."""
    return tuple(tuple(float(i == j) for j in range(num_branches)) for i in range(num_branches))
