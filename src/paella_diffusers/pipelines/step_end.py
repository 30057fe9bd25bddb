"""What follows each step of a pipeline's loop: progress, and the user's callback."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm import tqdm

from ..sampling.denoiser import Denoiser
from ..sampling.plan import Step
from .call_state import CallState
from .conditioning import Conditioning
from .inputs import OutputInputs, check_tokens, tensor_of

if TYPE_CHECKING:
    from .pipeline_base import PaellaPipelineBase

# the names by which callbacks get and replace conditioning: which branch's, and the argument of the U-Net
CONDITIONING_TENSORS = {
    "prompt_embeds": ("conditional", "encoder_hidden_states"),
    "negative_prompt_embeds": ("unconditional", "encoder_hidden_states"),
    "prompt_attention_mask": ("conditional", "encoder_attention_mask"),
    "negative_prompt_attention_mask": ("unconditional", "encoder_attention_mask"),
    "clip_text_embeds": ("conditional", "clip_text_embeds"),
    "negative_clip_text_embeds": ("unconditional", "clip_text_embeds"),
    "clip_image_embeds": ("conditional", "clip_image_embeds"),
    "conditioning_weights": ("conditional", "conditioning_weights"),
}


class StepEnd:
    """
    What follows each step of a pipeline's loop: progress, and the user's callback, which may replace the tokens and the
    conditioning.
    """

    def __init__(
        self,
        pipe: "PaellaPipelineBase",
        state: CallState,
        denoiser: Denoiser,
        progress_bar: "tqdm[Any]",
        output: OutputInputs,
    ):
        self.pipe = pipe
        self.state = state
        self.denoiser = denoiser
        self.progress_bar = progress_bar
        self.callback: Callable[..., Any] | None = output.callback_on_step_end
        self.wanted: Any = output.callback_on_step_end_tensor_inputs
        self.evaluations = 0  # of the U-Net, so far

    def __call__(self, step: Step, tokens: torch.Tensor, clean: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The tokens to go on with, and whether to stop here."""
        self.evaluations += 1 + step.num_sweeps
        self.progress_bar.update(1 + step.num_sweeps)
        if self.callback is not None:
            given = {name: self._tensor(name, tokens, clean) for name in self.wanted}
            versions = {name: _version(tensor) for name, tensor in given.items()}
            returned = self.callback(self.pipe, step.index, step.timestep, dict(given))
            if returned is not None and not isinstance(returned, dict):
                raise ValueError(
                    f"`callback_on_step_end` must return a dictionary of tensors, or None, got {type(returned).__name__}."
                )
            changed = {name: tensor for name, tensor in given.items() if _version(tensor) != versions[name]}  # in place
            changed |= {name: value for name, value in (returned or {}).items() if value is not given.get(name)}
            latents = cast(torch.Tensor, changed.pop("latents", tokens))
            check_tokens("latents", latents, tuple(tokens.shape), self.pipe.unet.config.num_vq_embeddings)
            self._replace_conditioning({name: changed[name] for name in changed if name in CONDITIONING_TENSORS})
            tokens = latents.to(tokens.device)
        return tokens, self.state.interrupt

    def _tensor(self, name: str, tokens, clean) -> torch.Tensor | None:
        if name in CONDITIONING_TENSORS:
            branch, argument = CONDITIONING_TENSORS[name]
            return getattr(self.denoiser.conditioning.get(branch), argument, None)
        return {"latents": tokens, "pred_original_sample": clean}[name]

    def _replace_conditioning(self, changed: dict[str, torch.Tensor | None]):
        conditioning = dict(self.denoiser.conditioning)
        for name, value in changed.items():
            branch, argument = CONDITIONING_TENSORS[name]
            before = getattr(conditioning.get(branch), argument, None)
            if before is None or value is None:
                raise ValueError(f"`callback_on_step_end` returned `{name}`, which this call has not: leave it out.")
            value = tensor_of(name, value).to(before.device, before.dtype)
            if len(value) == 1 < len(before) and (before == before[:1]).all():  # all rows were the same
                value = value.expand(len(before), *value.shape[1:])
            has_fixed_width = argument != "encoder_attention_mask"  # which is as long as the text
            if (value.ndim, len(value)) != (before.ndim, len(before)) or (
                has_fixed_width and value.shape[-1] != before.shape[-1]
            ):
                raise ValueError(
                    f"`callback_on_step_end` returned `{name}` of shape {tuple(value.shape)}, in place of "
                    f"{tuple(before.shape)}."
                )
            conditioning[branch] = replace(conditioning[branch], **{argument: value})
        for branch in {CONDITIONING_TENSORS[name][0] for name in changed}:
            _check_length(conditioning[branch], "" if branch == "conditional" else "negative_")
        if changed:
            self.denoiser.set_conditioning(conditioning)


def _version(tensor: torch.Tensor | None) -> int | None:
    """How often a tensor was changed in place; torch does not count that of inference tensors."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _check_length(conditioning: Conditioning, prefix: str):
    """Refuse text and a mask of different lengths."""
    mask, length = conditioning.encoder_attention_mask, conditioning.encoder_hidden_states.shape[1]
    if mask is not None and mask.shape[1] not in (length, length + conditioning.clip_length):
        raise ValueError(
            f"`callback_on_step_end` left `{prefix}prompt_embeds` of length {length} with `{prefix}prompt_attention_mask` "
            f"of length {mask.shape[1]}: return both, of one length."
        )
