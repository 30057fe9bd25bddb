"""Paella's VQGAN: pixels to discrete tokens and back, four pixels a token side (f4)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..checks import check_number
from ..loaders.hub import PaellaHubMixin
from ..loaders.original_checkpoint import OriginalCheckpointMixin
from ..loaders.saving import AtomicSaveMixin


@dataclass
class VQEncoderOutput(BaseOutput):
    """
    Output of [`PaellaVQModel.encode`].

    Args:
        latents (`torch.Tensor` of shape `(batch_size, latent_channels, height / 4, width / 4)`):
            The encoder's output before quantization, divided by `scale_factor`.
        quantized (`torch.Tensor` of the same shape):
            Each latent's nearest codebook entry, divided by `scale_factor`.
        indices (`torch.LongTensor` of shape `(batch_size, height / 4, width / 4)`):
            The tokens: the positions of those entries in the codebook, in `[0, num_vq_embeddings)`.
    """

    latents: torch.Tensor
    quantized: torch.Tensor
    indices: torch.Tensor


@dataclass
class VQDecoderOutput(BaseOutput):
    """
    Output of [`PaellaVQModel.decode`] and [`PaellaVQModel.decode_indices`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
            The decoded image, in [0, 1] up to over- and undershoot: clamp it before use.
        commit_loss (`torch.Tensor`, *optional*):
            From `forward` only: codebook loss + 0.25 · commitment loss, a scalar.
        indices (`torch.LongTensor`, *optional*):
            From `forward` only: the tokens, `(batch_size, height / 4, width / 4)`.
    """

    sample: torch.Tensor
    commit_loss: torch.Tensor | None = None
    indices: torch.Tensor | None = None


class VectorQuantizer(nn.Module):
    """Nearest codebook entry by squared distance, with the straight-through gradient (van den Oord et al., 2017)."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # |z - e|^2 without |z|^2, which no choice of e changes; float32, as half precision merges neighbouring codes
        codebook = self.codebook(latents.device).detach().float()
        bias = codebook.square().sum(1)
        flat = latents.permute(0, 2, 3, 1).float().flatten(0, 2)
        # in chunks: a megapixel image has 65,536 latents, times 8,192 codes
        with torch.autocast(latents.device.type, enabled=False):  # which would round them all the same
            indices = torch.cat([torch.addmm(bias, z, codebook.T, alpha=-2).argmin(1) for z in flat.split(8192)])
        indices = indices.view(latents.shape[0], *latents.shape[2:])
        quantized = self.embedding(indices).permute(0, 3, 1, 2)
        loss = F.mse_loss(quantized, latents.detach()) + 0.25 * F.mse_loss(latents, quantized.detach())
        return latents + (quantized - latents).detach(), indices, loss

    def codebook(self, device: str | torch.device) -> torch.Tensor:
        """All codes, by a call of the embedding rather than from its weight: offloading hooks act on calls."""
        return self.embedding(torch.arange(self.embedding.num_embeddings, device=device))


class ReplicationPad(nn.Module):
    """`nn.ReplicationPad2d(1)` by concatenation, which stays channels-last when compiled (torch's own fails in backward)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for dim in (2, 3):
            first, last = hidden_states.narrow(dim, 0, 1), hidden_states.narrow(dim, -1, 1)
            hidden_states = torch.cat([first, hidden_states, last], dim=dim)
        return hidden_states


class MixingResidualBlock(nn.Module):
    """Depthwise 3×3 convolution, then a pixelwise MLP; six scalar gains modulate both (zero at the start)."""

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.depthwise = nn.Sequential(ReplicationPad(), nn.Conv2d(channels, channels, kernel_size=3, groups=channels))
        self.norm2 = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.channelwise = nn.Sequential(
            nn.Linear(channels, hidden_channels), nn.GELU(), nn.Linear(hidden_channels, channels)
        )
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # NCHW in channels-last memory: the permutes below are views that leave the norms and linears contiguous
        scale1, shift1, gain1, scale2, shift2, gain2 = self.gammas
        norm = self.norm1(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        hidden_states = hidden_states + self.depthwise(norm * (1 + scale1) + shift1) * gain1
        norm = self.norm2(hidden_states.permute(0, 2, 3, 1))
        return hidden_states + self.channelwise(norm * (1 + scale2) + shift2).permute(0, 3, 1, 2) * gain2


class PaellaVQModel(PaellaHubMixin, AtomicSaveMixin, ModelMixin, AutoencoderMixin, ConfigMixin, OriginalCheckpointMixin):
    r"""
    The VQGAN of Paella (https://huggingface.co/papers/2211.07292, section 3.1). Weights and configuration have the
    names of diffusers' `PaellaVQModel`: either class reads the other's folder. Calls differ: this one scales latents.

    Images of more than `tile_from_tokens` tokens are encoded and decoded tile by tile, which bounds the memory: what comes
    out is the same up to rounding, as tiles overlap by all that the convolutions see. `enable_tiling()` does so for smaller
    ones too, `disable_tiling()` for none, and `enable_slicing()` takes the images of a batch one by one.

    Parameters:
        in_channels (`int`, defaults to 3): Channels of the input image.
        out_channels (`int`, defaults to 3): Channels of the decoded image.
        up_down_scale_factor (`int`, defaults to 2): Side of the pixel blocks folded into channels at both ends.
        levels (`int`, defaults to 2): Resolution levels, each but the last halving the sides.
        bottleneck_blocks (`int`, defaults to 12): Mixing blocks of the decoder at the lowest resolution.
        embed_dim (`int`, defaults to 384): Channels at the lowest resolution, halving upwards.
        latent_channels (`int`, defaults to 4): Channels of a codebook entry.
        num_vq_embeddings (`int`, defaults to 8192): Codebook entries, that is, different tokens.
        scale_factor (`float`, defaults to 0.3764):
            `encode` divides latents by it, `decode` multiplies; from 1e-6 to 1e6.

    Raises:
        ValueError: If `scale_factor` is not a number in its range.
    """

    _original_checkpoint = "vqgan_f4.pt"
    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _group_offload_block_modules = ["vquantizer", "embedding"]  # the embedding is called apart from its parent
    _no_split_modules = ["MixingResidualBlock", "VectorQuantizer"]
    _repeated_blocks = ["MixingResidualBlock"]
    _skip_layerwise_casting_patterns = ["vquantizer"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        up_down_scale_factor: int = 2,
        levels: int = 2,
        bottleneck_blocks: int = 12,
        embed_dim: int = 384,
        latent_channels: int = 4,
        num_vq_embeddings: int = 8192,
        scale_factor: float = 0.3764,
    ):
        super().__init__()
        check_number("scale_factor", scale_factor, at_least=1e-6, at_most=1e6)
        self.register_to_config(scale_factor=float(scale_factor))  # NumPy's numbers cannot be saved
        channels = [embed_dim // 2**level for level in reversed(range(levels))]  # from pixels to latents

        self.in_block = nn.Sequential(
            nn.PixelUnshuffle(up_down_scale_factor),
            nn.Conv2d(in_channels * up_down_scale_factor**2, channels[0], kernel_size=1),
        )
        down_blocks: list[nn.Module] = [MixingResidualBlock(channels[0], channels[0] * 4)]
        for level in range(1, levels):
            down_blocks.append(
                nn.Conv2d(channels[level - 1], channels[level], kernel_size=4, stride=2, padding=1),
            )
            down_blocks.append(MixingResidualBlock(channels[level], channels[level] * 4))
        to_latents = nn.Conv2d(channels[-1], latent_channels, kernel_size=1, bias=False)
        self.down_blocks = nn.Sequential(*down_blocks, nn.Sequential(to_latents, nn.BatchNorm2d(latent_channels)))

        self.vquantizer = VectorQuantizer(num_vq_embeddings, latent_channels)

        up_blocks: list[nn.Module] = [nn.Sequential(nn.Conv2d(latent_channels, channels[-1], kernel_size=1))]
        up_blocks += [MixingResidualBlock(channels[-1], channels[-1] * 4) for _ in range(bottleneck_blocks)]
        for level in reversed(range(levels - 1)):
            up_blocks.append(nn.ConvTranspose2d(channels[level + 1], channels[level], kernel_size=4, stride=2, padding=1))
            up_blocks.append(MixingResidualBlock(channels[level], channels[level] * 4))
        self.up_blocks = nn.Sequential(*up_blocks)
        self.out_block = nn.Sequential(
            nn.Conv2d(channels[0], out_channels * up_down_scale_factor**2, kernel_size=1),
            nn.PixelShuffle(up_down_scale_factor),
        )
        self.gradient_checkpointing = False
        self.use_slicing = False
        self.use_tiling: bool | None = None  # of large images only, and not in training, where norms see the whole batch
        self.tile_latent_min_size = 128  # tokens a side, without the overlap
        self.tile_from_tokens = 256 * 256  # 1024 × 1024 pixels
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as published."""
        for block in self.modules():
            if isinstance(block, MixingResidualBlock):  # all other layers keep torch's own initialisation
                layers: list[Any] = [block.depthwise[1], block.channelwise[0], block.channelwise[2]]
                for layer in layers:
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        # small codes, so that all are near the first latents
        bound = 1 / self.config.num_vq_embeddings
        nn.init.uniform_(self.vquantizer.embedding.weight, -bound, bound)

    @property
    def patch_size(self) -> int:
        """Pixels a token covers, a side: 4 in the published model."""
        return self.config.up_down_scale_factor * 2 ** (self.config.levels - 1)

    @apply_forward_hook
    def encode(self, pixels: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[torch.Tensor, ...]:
        """
        Images to latents and tokens.

        Args:
            pixels (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                Images in [0, 1]; both sides divisible by `patch_size`.

        Raises:
            ValueError: If a side is not divisible by `patch_size`.
        """
        latents, quantized, indices, _ = self._encode(pixels)
        latents, quantized = latents / self.config.scale_factor, quantized / self.config.scale_factor
        if not return_dict:
            return (latents, quantized, indices)
        return VQEncoderOutput(latents=latents, quantized=quantized, indices=indices)

    def _encode(self, pixels):
        height, width = pixels.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"`pixels` are {width}×{height}, but both sides must be divisible by {self.patch_size}: resize or crop."
            )
        latents = self._in_parts(self._encode_part, pixels, (self.patch_size, 1), halo=3)
        return latents, *self.vquantizer(latents)

    def _encode_part(self, pixels):
        return self._run(self.down_blocks, self.in_block(pixels.contiguous(memory_format=torch.channels_last)))

    def _decode_part(self, codes):
        return self.out_block(self._run(self.up_blocks, codes.contiguous(memory_format=torch.channels_last)))

    def _in_parts(self, function, sample, scales: tuple[int, int], halo: int):
        """
        A function of images, slice by slice and tile by tile if these are on. It takes and returns `scales` pixels a token;
        `halo` tokens around a tile are all that a convolution's result within can depend on.
        """
        if self.use_slicing and len(sample) > 1:
            return torch.cat([self._in_parts(function, image, scales, halo) for image in sample.split(1)])
        before, after = scales
        height, width = (side // before for side in sample.shape[-2:])
        size = self.tile_latent_min_size
        tiled = self.use_tiling
        if tiled is None:
            tiled = height * width > self.tile_from_tokens and not self.training
        if not tiled or max(height, width) <= size:
            return function(sample)

        def spans(length):  # of the tile, and of what it is made from
            for first in range(0, length, size):
                last = min(first + size, length)
                yield first, last, max(first - halo, 0), min(last + halo, length)

        rows = []
        for top, bottom, upper, lower in spans(height):
            row = []
            for left, right, leftmost, rightmost in spans(width):
                tile = sample[..., upper * before : lower * before, leftmost * before : rightmost * before]
                inner = slice((top - upper) * after, (bottom - upper) * after)
                row.append(function(tile)[..., inner, (left - leftmost) * after : (right - leftmost) * after])
            rows.append(torch.cat(row, dim=-1))
        return torch.cat(rows, dim=-2)

    def _run(self, blocks, hidden_states):
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing and isinstance(block, MixingResidualBlock):
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return hidden_states

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> VQDecoderOutput | tuple[torch.Tensor, ...]:
        """
        Latents as `encode` returns them, quantized or not, `(batch_size, latent_channels, height, width)`, to images.
        """
        return self._decode(latents * self.config.scale_factor, return_dict)

    @apply_forward_hook
    def decode_indices(self, indices: torch.Tensor, return_dict: bool = True) -> VQDecoderOutput | tuple[torch.Tensor, ...]:
        """Tokens `(batch_size, height, width)`, int64 in `[0, num_vq_embeddings)`, to images."""
        return self._decode(self.vquantizer.embedding(indices).permute(0, 3, 1, 2), return_dict)

    def _decode(self, codes, return_dict):
        halo = self.config.bottleneck_blocks + 3
        sample = self._in_parts(self._decode_part, codes, (1, self.patch_size), halo)
        return VQDecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def codebook(self, device: str | torch.device) -> torch.Tensor:
        """The codes that tokens stand for, `(num_vq_embeddings, latent_channels)`, not scaled."""
        return self.vquantizer.codebook(device)

    def forward(
        self, sample: torch.Tensor, quantize: bool = True, return_dict: bool = True
    ) -> VQDecoderOutput | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Images in [0, 1] to their reconstruction, with the loss that trains the codebook beside the pixel loss, and tokens.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Images; both sides divisible by `patch_size`.
            quantize (`bool`, defaults to `True`): Whether to decode codes, or else the latents before quantization.
        """
        latents, quantized, indices, commit_loss = self._encode(sample)
        reconstruction = self._decode(quantized if quantize else latents, return_dict=True).sample
        if not return_dict:
            return (reconstruction, commit_loss, indices)
        return VQDecoderOutput(sample=reconstruction, commit_loss=commit_loss, indices=indices)


# A config that said "VQModel" would be read as diffusers' own class of that name.
VQModel = PaellaVQModel
