"""What the U-Net is conditioned on: the encoders' embeddings, and their rows for the branches of a guided batch."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F


class PromptEmbeds(NamedTuple):
    """
    Embeddings of prompts and negative prompts, by the names that the pipelines' calls take.

    Args:
        prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(batch_size, length, text_embed_dim)`):
            Outputs of the text encoder (ByT5); the lengths may differ. Without guidance, there is no negative one.
        prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
            0 where these are padding; None where nothing is.
        clip_text_embeds, negative_clip_text_embeds (`torch.Tensor` of shape `(batch_size, clip_embed_dim)`, *optional*):
            CLIP text embeddings, not normalised; None without CLIP.
    """

    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None
    prompt_attention_mask: torch.Tensor | None
    negative_prompt_attention_mask: torch.Tensor | None
    clip_text_embeds: torch.Tensor | None
    negative_clip_text_embeds: torch.Tensor | None


@dataclass(frozen=True)
class Conditioning:
    """
    The U-Net's conditioning arguments: of one branch of the guidance, a row an image, or of several, one after the other.

    Args:
        clip_seq_len (`int`): Conditioning tokens that one CLIP embedding becomes.
        encoder_hidden_states, clip_text_embeds, clip_image_embeds, encoder_attention_mask, conditioning_weights:
            As of [`PaellaUNet.forward`]; CLIP images `(batch_size, num_images, clip_embed_dim)`, weights `(batch_size, n)`.
    """

    clip_seq_len: int
    encoder_hidden_states: torch.Tensor
    clip_text_embeds: torch.Tensor | None = None
    clip_image_embeds: torch.Tensor | None = None
    encoder_attention_mask: torch.Tensor | None = None
    conditioning_weights: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    def arguments(self) -> dict[str, torch.Tensor | None]:
        """By the names of [`PaellaUNet.forward`]'s arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "clip_seq_len"}

    def _map(self, function) -> "Conditioning":
        tensors = {name: None if value is None else function(value) for name, value in self.arguments().items()}
        return replace(self, **tensors)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        """On another device, and its floating-point tensors in another dtype."""
        return self._map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def repeat(self, batch_size: int, num_images_per_prompt: int = 1) -> "Conditioning":
        """A row for every image, from a row for every prompt, or from one for all."""
        return self._map(lambda tensor: repeat_rows(tensor, batch_size, num_images_per_prompt))

    def select(self, images: slice, num_regions: int = 1) -> "Conditioning":
        """The rows of some images, of those of each region."""
        rows = torch.arange(len(self)).view(num_regions, -1)[:, images].flatten()
        return self if len(rows) == len(self) else self._map(lambda tensor: tensor[rows])

    def cat(self, *others: "Conditioning") -> "Conditioning":
        """
        Branches in one batch, one after the other. One that has shorter text, no CLIP text or fewer CLIP images is padded
        and the padding masked; where nothing is padded there is no mask.
        """
        branches = (self, *others)
        if len(branches) == 1:
            return self
        length = max(branch.encoder_hidden_states.shape[1] for branch in branches)
        has_text = any(branch.clip_text_embeds is not None for branch in branches)
        num_images = max(branch.num_images for branch in branches)
        mask = torch.cat([branch._mask(length, has_text, num_images) for branch in branches])
        text = [F.pad(b.encoder_hidden_states, (0, 0, 0, length - b.encoder_hidden_states.shape[1])) for b in branches]
        weights = [branch.conditioning_weights for branch in branches]
        return Conditioning(
            self.clip_seq_len,
            torch.cat(text),
            _cat([branch.clip_text_embeds for branch in branches], branches),
            _cat([branch._padded_images(num_images) for branch in branches], branches),
            None if mask.all() else mask,
            _cat_weights(weights, branches),
        )

    def weigh_images(self, weights: torch.Tensor) -> "Conditioning":
        """With factors `(batch_size, num_images)` on the attention paid to each CLIP image; 0 leaves an image out."""
        weights = weights.to(self.clip_image_embeds.device)
        kept = (weights > 0).any(0)
        weights = weights[:, kept]
        if not kept.any():
            return replace(self, clip_image_embeds=None)
        images = replace(self, clip_image_embeds=self.clip_image_embeds[:, kept])
        there = weights > 0
        if not there.all():  # some rows leave out more than others
            mask = images._mask(self.encoder_hidden_states.shape[1], self.clip_text_embeds is not None, images.num_images)
            mask[:, -images.num_images * self.clip_seq_len :] &= there.repeat_interleave(self.clip_seq_len, dim=1)
            images = replace(images, encoder_attention_mask=mask)
            # weights count from a row's last attended key
            weights = weights.gather(1, there.long().sort(dim=1, stable=True).indices)
            weights = torch.where(weights > 0, weights, 1.0)
        return replace(images, conditioning_weights=weights.repeat_interleave(self.clip_seq_len, dim=1))

    @property
    def num_images(self) -> int:
        """CLIP image embeddings a row."""
        return 0 if self.clip_image_embeds is None else self.clip_image_embeds.shape[1]

    def _mask(self, length: int, has_text: bool, num_images: int) -> torch.Tensor:
        """Over the whole conditioning sequence when padded to so much: False where this has nothing."""
        embeds, mask = self.encoder_hidden_states, self.encoder_attention_mask
        own_length = embeds.shape[1]
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
        clip = mask[:, own_length:]  # there if the mask is over the whole sequence
        own_text = self.clip_seq_len * (self.clip_text_embeds is not None)
        if mask.shape[1] == own_length:
            clip = mask.new_ones(len(mask), own_text + self.clip_seq_len * self.num_images)
        parts = [F.pad(mask[:, :own_length], (0, length - own_length))]
        if has_text:
            parts.append(F.pad(clip[:, :own_text], (0, self.clip_seq_len - own_text)))
        parts.append(F.pad(clip[:, own_text:], (0, self.clip_seq_len * (num_images - self.num_images))))
        return torch.cat(parts, dim=1)

    @property
    def clip_length(self) -> int:
        """Conditioning tokens behind the text's."""
        return self.clip_seq_len * ((self.clip_text_embeds is not None) + self.num_images)

    def _padded_images(self, num_images: int) -> torch.Tensor | None:
        images = self.clip_image_embeds
        return None if images is None else F.pad(images, (0, 0, 0, num_images - images.shape[1]))


def _cat(tensors: list[torch.Tensor | None], branches) -> torch.Tensor | None:
    """Rows of all branches; zeros for a branch that has none."""
    there = next((tensor for tensor in tensors if tensor is not None), None)
    if there is None:
        return None
    zeros = [there.new_zeros(len(branch), *there.shape[1:]) for branch in branches]
    return torch.cat([zero if tensor is None else tensor for tensor, zero in zip(tensors, zeros)])


def _cat_weights(weights: list[torch.Tensor | None], branches) -> torch.Tensor | None:
    """Weights of all branches, of a row's last keys: 1 where a branch has none or fewer."""
    count = max((tensor.shape[1] for tensor in weights if tensor is not None), default=0)
    if count == 0:
        return None
    there = next(tensor for tensor in weights if tensor is not None)
    rows = [there.new_ones(len(branch), 0) if w is None else w for w, branch in zip(weights, branches)]
    return torch.cat([F.pad(w, (count - w.shape[1], 0), value=1.0) for w in rows])


def repeat_rows(rows: torch.Tensor, batch_size: int, num_images_per_prompt: int = 1) -> torch.Tensor:
    """A row for every image, prompt by prompt, from a row for every prompt, or from one for all."""
    rows = rows.expand(batch_size, *rows.shape[1:]) if len(rows) == 1 else rows
    return rows.repeat_interleave(num_images_per_prompt, dim=0)
