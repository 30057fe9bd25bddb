"""From a batch of pictures and captions, or of what was computed from them before, to what the U-Net is trained on."""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import is_bf16_available

from ..pipelines.pipeline_paella import PaellaPipeline


def drop_conditioning(
    generator: torch.Generator | None = None,
    text_dropout: float = 0.05,
    clip_text_dropout: float = 0.9,
    clip_image_dropout: float = 0.9,
) -> tuple[bool, bool, bool]:
    """
    What a batch is trained without, for classifier-free guidance and because CLIP may be missing when sampling: the ByT5
    prompt, the CLIP text (both become ""), and the CLIP image (left out). As published, drawn once a batch, each for itself.

    Returns:
        Three booleans, true where dropped.
    """
    draws = torch.rand(3, generator=generator).tolist()
    return tuple(draw < share for draw, share in zip(draws, (text_dropout, clip_text_dropout, clip_image_dropout)))


class Encoder:
    """
    The frozen parts of a pipeline at work on batches of [`collate`]: VQGAN, text encoders, image encoder. What a batch has
    already is taken from there.

    Args:
        pipe ([`PaellaPipeline`]): Of which the encoders may be None if batches have all that they would give.
        empty (`dict[str, torch.Tensor]`, *optional*):
            `prompt_embeds` and `clip_text_embeds` of "", with one row; computed by the text encoders unless given.
    """

    def __init__(self, pipe: PaellaPipeline, empty: dict[str, torch.Tensor | None] | None = None):
        self.pipe = pipe
        for part in (pipe.vqgan, pipe.text_encoder, pipe.text_encoder_2, pipe.image_encoder):
            if part is not None:
                part.eval().requires_grad_(False)
        self._empty = empty

    @property
    def empty(self) -> dict[str, torch.Tensor | None]:
        """`prompt_embeds` and `clip_text_embeds` of ""."""
        if self._empty is None:
            inputs = self.conditioning({"text": [""]}, (False, False, True))
            self._empty = {
                "prompt_embeds": inputs["encoder_hidden_states"],
                "clip_text_embeds": inputs["clip_text_embeds"],
            }
        return self._empty

    def to(self, device: torch.device | str, half: bool = False) -> "Encoder":
        """Move the frozen parts; with `half`, encoders to bfloat16 where the device has it (in float16 T5 overflows)."""
        dtype = torch.bfloat16 if half and is_bf16_available(ignore_tpu=True) else None
        for part in (self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.image_encoder):
            if part is not None:
                part.to(device, dtype)
        if self.pipe.vqgan is not None:
            self.pipe.vqgan.to(device)
        if self._empty is not None:
            self._empty = {name: None if value is None else value.to(device) for name, value in self._empty.items()}
        return self

    @torch.no_grad()
    def tokens(self, batch: dict[str, Any]) -> torch.Tensor:
        """`(batch_size, height, width)`, int64."""
        if "tokens" in batch:
            return batch["tokens"].long()
        if "pixels" not in batch:
            raise ValueError("The data have neither pictures nor tokens: let precompute.py write `tokens`, too.")
        return self.pipe.vqgan.encode(batch["pixels"].to(self.pipe.vqgan.dtype)).indices

    @torch.no_grad()
    def conditioning(
        self, batch: dict[str, Any], dropped: tuple[bool, bool, bool] = (False, False, False)
    ) -> dict[str, Any]:
        """
        What [`PaellaUNet`] takes beside tokens and time: `encoder_hidden_states`, `encoder_attention_mask`,
        `clip_text_embeds` and `clip_image_embeds`: embeddings in float32, None without an encoder, or where dropped.
        """
        no_text, no_clip_text, no_clip_image = dropped
        size = len(batch["text"])
        text, mask, clip_text = (batch.get(name) for name in ("prompt_embeds", "prompt_attention_mask", "clip_text_embeds"))
        if no_text:
            text, mask = self.empty["prompt_embeds"].expand(size, -1, -1), None
        if no_clip_text and self.empty["clip_text_embeds"] is not None:
            clip_text = self.empty["clip_text_embeds"].expand(size, -1)
        text, _, mask, _, clip_text, _ = self.pipe.encode_prompt(
            batch["text"],
            do_classifier_free_guidance=False,
            prompt_embeds=text,
            prompt_attention_mask=mask,
            clip_text_embeds=clip_text,
        )
        return {
            "encoder_hidden_states": text.float(),
            "encoder_attention_mask": mask,
            "clip_text_embeds": None if clip_text is None else clip_text.float(),
            "clip_image_embeds": None if no_clip_image else self.clip_image_embeds(batch),
        }

    @torch.no_grad()
    def clip_image_embeds(self, batch: dict[str, Any]) -> torch.Tensor | None:
        """`(batch_size, clip_embed_dim)`; None without an image encoder."""
        if "clip_image_embeds" in batch:
            return batch["clip_image_embeds"].float()
        if self.pipe.image_encoder is None or "pixels" not in batch:
            return None
        size, processor = self.pipe.image_encoder.config.image_size, self.pipe.feature_extractor
        pixels = F.interpolate(batch["pixels"], (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (pixels.new_tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
        pixels = ((pixels - mean) / std).to(self.pipe.image_encoder.dtype)
        return self.pipe.image_encoder(pixels).image_embeds.float()
