"""Captions that are encoded in each pass, because something in the text encoders is trained."""

from typing import Any

import torch
from PIL import Image
from torch import nn

from ..pipelines.pipeline_paella import PaellaPipeline
from .conditioning import Encoder
from .unet import FrozenParts


class CaptionedUNet(nn.Module):
    """
    A pipeline's U-Net, which takes captions. Subclasses have the parameters that are trained.

    Args:
        pipe ([`PaellaPipeline`]): With text encoders.
    """

    def __init__(self, pipe: PaellaPipeline):
        super().__init__()
        self.pipe = pipe

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        text: list[str],
        dropped: tuple[bool, bool, bool],
        **conditioning: Any,
    ) -> Any:
        """The U-Net's output for captions; where they are dropped, for ""."""
        byt5, clip = ([""] * len(text) if drop else text for drop in dropped[:2])
        embeds, mask = self.pipe._encode_byt5(byt5, 768, sample.device)
        clip = None if self.pipe.text_encoder_2 is None else self.pipe._encode_clip(clip, sample.device).float()
        options = dict(clip_text_embeds=clip, encoder_attention_mask=mask)
        return self.pipe.unet(sample, timestep, embeds.float(), **options, **conditioning)


class CaptionsLeft(Encoder):
    """An encoder that leaves captions to [`CaptionedUNet`]."""

    def conditioning(
        self, batch: dict[str, Any], dropped: tuple[bool, bool, bool] = (False, False, False)
    ) -> dict[str, Any]:
        image = None if dropped[2] else self.clip_image_embeds(batch)
        return {"text": batch["text"], "dropped": dropped, "clip_image_embeds": image}


class CaptionParts(FrozenParts):
    """The pipeline around a [`CaptionedUNet`]: what it draws on sheets is encoded anew."""

    def leave_captions(self, encoder: CaptionsLeft) -> None:
        """
        Have an encoder leave captions to what is trained.

        Raises:
            ValueError: If the data have embeddings in place of captions.
        """
        if self.pipe.text_encoder is None:
            raise ValueError(f"{self.run.args.data} has computed embeddings, but the captions must be encoded in each step.")
        self.encoder = encoder

    def draw(self) -> Image.Image:
        self.encode_prompts()
        return super().draw()
