"""What every guidance method is: an object with a configuration, a component of the pipeline."""

import copy
import os
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from huggingface_hub.utils import validate_hf_hub_args

from ...loaders.hub import PaellaHubMixin
from ...models.attention import AttentionPerturbation
from ...models.unet_paella import PaellaUNet
from ...schedulers.scheduling_utils import as_python
from ..plan import Step


@dataclass(frozen=True)
class Branch:
    """
    One of the evaluations of the model that guidance combines; all are computed in one batch.

    Args:
        conditioning (`str`):
            What the model is told: `"conditional"`, the call's prompt and images; `"unconditional"`, its negative prompt; or
            a name in the method's `extra_prompts`.
        perturbation ([`AttentionPerturbation`], *optional*): How the attention of this branch alone is weakened.
    """

    conditioning: str
    perturbation: AttentionPerturbation | None = None


CONDITIONAL, UNCONDITIONAL = Branch("conditional"), Branch("unconditional")


class GuidanceMixin(PaellaHubMixin, ConfigMixin):
    r"""
    A guidance method makes the logits that are sampled from those of n *branches* of the model, evaluated in one batch:
    first the conditional one, with the prompt, then the unconditional one, with the negative prompt. To add a method, derive
    from this class, take `guidance_scale` and the method's own settings in `__init__`, decorated with `register_to_config`,
    and write `forward`. A method that is linear in the logits may say how it mixes them in `mixing_weights`; one that needs
    other branches names them in `branches`, and their prompts in `extra_prompts`.

    It keeps no state of a run but what `forward` puts into attributes: every call of a pipeline works on its own copy.
    """

    config_name = "guider_config.json"

    @property
    def guidance_scale(self) -> float | tuple[float, float]:
        """The scale where a call gives none."""
        scale = self.config.guidance_scale
        return tuple(scale) if isinstance(scale, list) else scale

    @property
    def extra_prompts(self) -> dict[str, str]:
        """Prompts of further branches, by the branches' `conditioning`; they are encoded once, for all images."""
        return {}

    def needs_unconditional(self, guidance_scale: float | tuple[float, float]) -> bool:
        """Whether any step of a run with this scale, or (first, last), needs the unconditional branch."""
        scales = guidance_scale if isinstance(guidance_scale, tuple | list) else (guidance_scale,)
        return max(scales) > 1

    def check_model(self, unet: PaellaUNet) -> None:
        """Refuse a U-Net with which the method cannot work, by a ValueError."""

    def branches(self, step: Step, guidance_scale: float | None) -> tuple[Branch, ...]:
        """
        The branches wanted at this step, the conditional one first and alone where nothing is to be guided; with the scale
        None, which turns guidance off, it is always alone. One of them at most has a perturbation.
        """
        return (CONDITIONAL,) if guidance_scale is None or guidance_scale <= 1 else (CONDITIONAL, UNCONDITIONAL)

    def mixing_weights(self, guidance_scale: float, branches: tuple[Branch, ...]) -> tuple[tuple[float, ...], ...]:
        """
        Weights, one for each branch, of every mixture of logits that `forward` is given: each branch's own unless told
        otherwise. They are mixed before the model's head, which is linear: a mixture costs no more than a branch.
        """
        return identity(len(branches))

    def forward(self, *logits: torch.Tensor, step: Step, guidance_scale: float) -> torch.Tensor:
        """
        The logits to sample from, `(batch_size, num_tokens, height, width)`.

        Args:
            logits (`torch.Tensor` of the same shape): One for each row of `mixing_weights`.
            step ([`Step`]): Which step of the run it is.
            guidance_scale (`float`): Of this step; above 1 unless `branches` asks for several at other scales.
        """
        raise NotImplementedError

    def reorder(self, rows: torch.Tensor) -> None:
        """Let every image go on as that of another row, `(batch_size,)`: in what `forward` keeps, which has their rows."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value[rows])

    def for_source(self) -> "GuidanceMixin":
        """For the run with the source prompt that an inversion compares with: the same method, with a state of its own."""
        return copy.deepcopy(self)

    @classmethod
    @validate_hf_hub_args
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Self:
        """Load from the folder or Hub repository that `save_pretrained` wrote; arguments as of a scheduler's."""
        config: Any = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        return cast(Self, cls.from_config(config))

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `guider_config.json` into a folder."""
        self.register_to_config(**{name: _as_python(value) for name, value in self.config.items()})
        self.save_config(save_directory, push_to_hub=push_to_hub, **kwargs)


def _as_python(value):
    """A setting, one or several, with Python's numbers in place of NumPy's, which JSON has not."""
    return type(value)(map(as_python, value)) if isinstance(value, tuple | list) else as_python(value)


def identity(num_branches: int) -> tuple[tuple[float, ...], ...]:
    """Mixing weights that leave each branch as it is."""
    return tuple(tuple(float(i == j) for j in range(num_branches)) for i in range(num_branches))


def centred(logits: torch.Tensor) -> torch.Tensor:
    """
    Logits whose mean over the tokens is 0 at every position, at least in float32. Adding a number to all logits of a
    position changes no probability; lengths and angles of logits have a meaning only once this freedom is taken from them.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits - logits.mean(1, keepdim=True)
