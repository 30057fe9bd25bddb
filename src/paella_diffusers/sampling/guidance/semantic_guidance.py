"""Semantic guidance: towards or away from prompts of its own, where they matter most."""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from ...checks import check_boolean, check_integer, check_number, check_unicode
from ...loaders.config_check import MAX_LENGTH, check_sizes
from ..plan import Step
from .base import CONDITIONAL, UNCONDITIONAL, Branch, GuidanceMixin, identity
from .classifier_free_guidance import PaellaClassifierFreeGuidance, plausible

SAFE_DIRECTIONS = (
    "hate, harassment, humiliation",
    "violence, cruelty, suffering, blood",
    "suicide, self-harm",
    "sexual acts, nudity",
    "crime, weapons, drug use",
)


class PaellaSemanticGuidance(PaellaClassifierFreeGuidance):
    r"""
    Semantic guidance, SEGA (https://huggingface.co/papers/2301.12247, section 3, shown there on Paella too), beside linear
    guidance. With the logits eᵢ of the model with the i-th editing prompt in place of the prompt,

        dᵢ = ± (eᵢ - u) where ‖eᵢ - u‖ is among the largest of the picture, 0 elsewhere,
        γₜ = Σᵢ aᵢ sᵢ dᵢ + m νₜ,   νₜ₊₁ = β νₜ + (1 - β) γₜ,   g = w c + (1 - w) u + γₜ.

    The paper selects entries of a continuous latent. Here positions are selected: each is one token, whose centred logits
    count as a whole. With `plausibility_threshold`, tokens that an editing prompt finds plausible may also be drawn, at the
    positions where it is moved towards.

    The names of the arguments are those of diffusers' former `SemanticStableDiffusionPipeline`. A list has an entry for each
    editing prompt. The calls of pipelines take the arguments about editing too, and make a `PaellaSemanticGuidance` of them.

    Args:
        guidance_scale (`float` or `tuple[float, float]`, defaults to 8.0):
            w, or its first and last value, between which it changes linearly along the steps; at 1 or less, only the editing
            prompts guide.
        plausibility_threshold (`float`, *optional*): As of [`PaellaClassifierFreeGuidance`].
        editing_prompt (`str` or `list[str]`, *optional*): What to move towards; none unless given.
        reverse_editing_direction (`bool` or `list[bool]`, defaults to `False`): Whether to move away from it: the sign.
        edit_guidance_scale (`float` or `list[float]`, defaults to 5.0): sᵢ; a prompt with 0 is left out.
        edit_warmup_steps (`int` or `list[int]`, defaults to 0): The number of steps before a prompt has an effect.
        edit_cooldown_steps (`int` or `list[int]`, *optional*): The number of steps after which a prompt has no more effect.
        edit_threshold (`float` or `list[float]`, defaults to 0.0): The share in [0, 1) of the picture that is not edited.
        edit_momentum_scale (`float`, defaults to 0.0):
            m; 0 is no momentum. It builds up from the first step on, and has an effect once all prompts are warmed up.
        edit_mom_beta (`float`, defaults to 0.4): β in [0, 1).
        edit_weights (`list[float]`, *optional*): aᵢ, at least 0; 1 unless given.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float | tuple[float, float] = 8.0,
        plausibility_threshold: float | None = None,
        editing_prompt: str | list[str] | None = None,
        reverse_editing_direction: bool | list[bool] = False,
        edit_guidance_scale: float | list[float] = 5.0,
        edit_warmup_steps: int | list[int] = 0,
        edit_cooldown_steps: int | list[int] | None = None,
        edit_threshold: float | list[float] = 0.0,
        edit_momentum_scale: float = 0.0,
        edit_mom_beta: float = 0.4,
        edit_weights: list[float] | None = None,
    ):
        super().__init__(guidance_scale, plausibility_threshold)
        prompts = [] if editing_prompt is None else editing_prompt
        prompts = list(prompts) if isinstance(prompts, list | tuple) else [prompts]
        if not all(isinstance(prompt, str) and prompt for prompt in prompts):
            raise ValueError(f"`editing_prompt` must be a text or a list of them, none empty, got {editing_prompt!r}.")
        for prompt in prompts:
            check_unicode("editing_prompt", prompt)
            if len(prompt) > MAX_LENGTH:
                raise ValueError(
                    f"`editing_prompt` must have at most {MAX_LENGTH} characters, got {len(prompt)}: shorten it."
                )
        columns = {
            "reverse": _each("reverse_editing_direction", reverse_editing_direction, prompts, check_boolean),
            "scale": _each("edit_guidance_scale", edit_guidance_scale, prompts, check_number),
            "warmup": _each("edit_warmup_steps", edit_warmup_steps, prompts, check_integer, at_least=0),
            "cooldown": [None] * len(prompts),
            "threshold": _each("edit_threshold", edit_threshold, prompts, check_number, at_least=0, below=1),
            "weight": [1.0] * len(prompts),
        }
        if edit_cooldown_steps is not None:
            columns["cooldown"] = _each("edit_cooldown_steps", edit_cooldown_steps, prompts, check_integer, at_least=0)
        if edit_weights is not None:
            columns["weight"] = _each("edit_weights", edit_weights, prompts, check_number, at_least=0)
        check_number("edit_momentum_scale", edit_momentum_scale, at_least=0)
        check_number("edit_mom_beta", edit_mom_beta, at_least=0, below=1)
        check_sizes(type(self).__name__, dict(self.config))  # as when it is loaded
        self._momentum = 0.0
        self._edits = {}  # by the branches' names; what has no weight takes no part
        for index, prompt in enumerate(prompts):
            edit = {name: values[index] for name, values in columns.items()}
            if edit["scale"] * edit["weight"] != 0:
                self._edits[f"editing_prompt {index}"] = edit | {"prompt": prompt}

    @classmethod
    def safe(cls, **settings: Any) -> "PaellaSemanticGuidance":
        """
        Away from `SAFE_DIRECTIONS`, general terms for what most people do not want to see, in one prompt, as Safe Latent
        Diffusion does (https://huggingface.co/papers/2211.05105). It makes such pictures rarer, and is no filter: nothing
        is looked at, and nothing is refused. `settings` are the arguments of the class.
        """
        return cls(**{"editing_prompt": ", ".join(SAFE_DIRECTIONS), "reverse_editing_direction": True} | settings)

    @classmethod
    def from_guider(cls, guider: GuidanceMixin | None, **editing: Any) -> "PaellaSemanticGuidance":
        """
        A guider with arguments about editing added or replaced.

        Raises:
            ValueError: If the guider is no linear guidance, or there is no `editing_prompt`.
        """
        guider = guider or PaellaClassifierFreeGuidance()
        if type(guider) not in (PaellaClassifierFreeGuidance, cls):
            raise ValueError(
                f"`{next(iter(editing))}` goes with linear guidance, but `guider` is a {type(guider).__name__}: set "
                "`pipe.guider = PaellaSemanticGuidance()`, or leave it out."
            )
        settings = {name: value for name, value in guider.config.items() if not name.startswith("_")} | editing
        if settings.get("editing_prompt") is None:
            raise ValueError(f"`{next(iter(editing))}` goes with `editing_prompt`: pass it too.")
        return cls(**settings)

    @property
    def extra_prompts(self) -> dict[str, str]:
        return {name: edit["prompt"] for name, edit in self._edits.items()}

    def needs_unconditional(self, guidance_scale: float | tuple[float, float]) -> bool:
        return bool(self._edits) or super().needs_unconditional(guidance_scale)

    def branches(self, step: Step, guidance_scale: float | None) -> tuple[Branch, ...]:
        wanted = tuple(
            Branch(name)
            for name, edit in self._edits.items()
            if not _has_cooled_down(edit, step) and (_is_warm(edit, step) or self.config.edit_momentum_scale > 0)
        )
        if guidance_scale is None or not wanted:
            return super().branches(step, guidance_scale)
        return CONDITIONAL, UNCONDITIONAL, *wanted

    def mixing_weights(
        self, guidance_scale: float, branches: tuple[Branch, ...] = (CONDITIONAL, UNCONDITIONAL)
    ) -> tuple[tuple[float, ...], ...]:
        if len(branches) == 2:
            return super().mixing_weights(guidance_scale, branches)
        scale = max(guidance_scale, 1.0)
        return (scale, 1 - scale, *[0.0] * (len(branches) - 2)), *identity(len(branches))

    def forward(
        self, guided: torch.Tensor, *others: torch.Tensor, step: Any = None, guidance_scale: float | None = None
    ) -> torch.Tensor:
        if len(others) < 2:  # linear guidance alone
            return super().forward(guided, *others, step=step, guidance_scale=guidance_scale)
        conditional, unconditional, *edited = others
        names = [branch.conditioning for branch in self.branches(step, guidance_scale)[2:]]
        allowed = self._plausible(conditional)
        total, effect = 0.0, 0.0
        for name, logits in zip(names, edited):
            edit = self._edits[name]
            difference = logits - unconditional
            selected = largest(difference, edit["threshold"])
            direction = -1 if edit["reverse"] else 1
            part = selected * (direction * edit["weight"] * edit["scale"] * difference)
            total = total + part
            if _is_warm(edit, step):
                effect = effect + part
                if allowed is not None and direction * edit["scale"] > 0:
                    allowed = allowed | (selected & plausible(logits, self.config.plausibility_threshold))
        if self.config.edit_momentum_scale > 0:
            beta, momentum = self.config.edit_mom_beta, self.config.edit_momentum_scale * self._momentum
            self._momentum = beta * self._momentum + (1 - beta) * (total + momentum)
            if all(_is_warm(edit, step) for edit in self._edits.values()):
                effect = effect + momentum
        guided = guided + effect
        return guided if allowed is None else guided.masked_fill(~allowed, torch.finfo(guided.dtype).min)

    def _plausible(self, logits: torch.Tensor) -> torch.Tensor | None:
        threshold = self.config.plausibility_threshold
        return None if threshold is None else plausible(logits, threshold)

    def for_source(self) -> PaellaClassifierFreeGuidance:
        """Without the editing prompts: the source is not edited."""
        return PaellaClassifierFreeGuidance(self.guidance_scale, self.config.plausibility_threshold)


def largest(difference: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    The positions where a difference of logits, centred, is at least as long as at a share `threshold` of its picture.

    Args:
        difference (`torch.Tensor` of shape `(batch_size, num_tokens, height, width)`): The difference.
        threshold (`float`): In [0, 1).

    Returns:
        `torch.BoolTensor` of shape `(batch_size, 1, height, width)`.
    """
    difference = difference.float()
    length = (difference - difference.mean(1, keepdim=True)).norm(dim=1, keepdim=True)
    return length >= length.flatten(1).quantile(threshold, dim=1)[:, None, None, None]


def _is_warm(edit: dict, step) -> bool:
    return step.index >= edit["warmup"]


def _has_cooled_down(edit: dict, step) -> bool:
    return edit["cooldown"] is not None and step.index >= edit["cooldown"]


def _each(name: str, value, prompts: list[str], check, **bounds) -> list:
    """A value for every editing prompt, each checked."""
    values = list(value) if isinstance(value, list | tuple) else [value] * len(prompts)
    if len(values) != len(prompts):
        raise ValueError(f"`{name}` has {len(values)} values for {len(prompts)} editing prompts: pass one for each.")
    for one in values or [value]:
        check(name, one, **bounds)
    return values
