"""Paella's prior: from a CLIP text embedding to a CLIP image embedding, by noise prediction."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from ..loaders.hub import PaellaHubMixin
from ..loaders.lora import PaellaPeftAdapterMixin
from ..loaders.original_checkpoint import OriginalCheckpointMixin
from ..loaders.saving import AtomicSaveMixin
from .unet_paella import sinusoidal_embedding


@dataclass
class PaellaPriorOutput(BaseOutput):
    """
    Output of [`PaellaPrior`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, embedding_dim)`): The predicted noise.
    """

    sample: torch.Tensor


class PaellaPriorBlock(nn.Module):
    """Residual MLP that is shown the text and the time again in every block."""

    def __init__(self, channels: int, conditioning_dim: int):
        super().__init__()
        self.proj_in = nn.Linear(channels + conditioning_dim, channels * 4, bias=False)
        self.norm_in = nn.LayerNorm(channels * 4)
        self.proj_out = nn.Linear(channels * 4, channels, bias=False)
        self.norm_out = nn.LayerNorm(channels)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        inner = self.proj_in(torch.cat([hidden_states, conditioning], dim=1))
        return hidden_states + self.norm_out(self.proj_out(F.gelu(self.norm_in(inner))))


class PaellaPrior(PaellaHubMixin, AtomicSaveMixin, ModelMixin, ConfigMixin, PaellaPeftAdapterMixin, OriginalCheckpointMixin):
    r"""
    The prior released beside Paella: a stack of residual MLPs that predicts the noise in a CLIP image embedding. Its
    noise schedule is the continuous cosine of diffusers' `DDPMWuerstchenScheduler`. Defaults: the released sizes, 900 M
    parameters.

    Parameters:
        embedding_dim (`int`, defaults to 1024): Channels of the CLIP text and image embeddings.
        hidden_dim (`int`, defaults to 1280):
            Channels between the blocks. With fewer than `embedding_dim`, the noise does not fit through.
        time_embed_dim (`int`, defaults to 64): Channels of the time embedding.
        num_layers (`int`, defaults to 48): Number of blocks.
    """

    _original_checkpoint = "prior_v1.pt"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["PaellaPriorBlock"]
    _repeated_blocks = ["PaellaPriorBlock"]

    @register_to_config
    def __init__(self, embedding_dim: int = 1024, hidden_dim: int = 1280, time_embed_dim: int = 64, num_layers: int = 48):
        super().__init__()
        if time_embed_dim < 4:
            raise ValueError(f"`time_embed_dim` must be at least 4, got {time_embed_dim}.")
        self.proj_in = nn.Linear(embedding_dim, hidden_dim)
        self.blocks = nn.ModuleList(PaellaPriorBlock(hidden_dim, embedding_dim + time_embed_dim) for _ in range(num_layers))
        self.proj_out = nn.Linear(hidden_dim, embedding_dim)
        self.gradient_checkpointing = False
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as published: torch's own, but smaller steps in a deeper stack."""
        for block in self.blocks:
            block.proj_in.weight.data *= (1 / len(self.blocks)) ** 0.5

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        clip_text_embeds: torch.Tensor,
        return_dict: bool = True,
    ) -> PaellaPriorOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape `(batch_size, embedding_dim)`): Noisy CLIP image embeddings.
            timestep (`torch.Tensor` of shape `(batch_size,)`, or a scalar): Time on the cosine schedule, in [0, 1].
            clip_text_embeds (`torch.Tensor` of shape `(batch_size, embedding_dim)`):
                CLIP text embeddings, not normalised; zeros for the unconditional pass.
        """
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(sample.shape[0])
        temb = sinusoidal_embedding(timestep, self.config.time_embed_dim).to(sample.dtype)
        conditioning = torch.cat([clip_text_embeds, temb], dim=1)

        hidden_states = self.proj_in(sample)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning)
            else:
                hidden_states = block(hidden_states, conditioning)
        sample = self.proj_out(hidden_states)

        if not return_dict:
            return (sample,)
        return PaellaPriorOutput(sample=sample)
