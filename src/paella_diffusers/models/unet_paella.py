"""Paella's denoising U-Net: noisy tokens in, logits over all tokens at every position out."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..loaders.hub import PaellaHubMixin
from ..loaders.lora import PaellaPeftAdapterMixin, scale_adapters
from ..loaders.original_checkpoint import OriginalCheckpointMixin
from ..loaders.saving import AtomicSaveMixin
from .attention import AttentionPerturbation, LayerNorm, PaellaAttention, PaellaAttnBlock, tile_batch
from .caching import PaellaCacheMixin


@dataclass
class PaellaUNetOutput(BaseOutput):
    """
    Output of [`PaellaUNet`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, num_vq_embeddings, height, width)`):
            Logits for the clean token at every position; channels-last in memory.
    """

    sample: torch.Tensor


@dataclass
class PaellaConditioning:
    """
    What [`PaellaUNet.encode_conditioning`] makes of the conditioning, for any number of calls.

    Args:
        sequence (`torch.Tensor` of shape `(batch_size, length, cross_attention_dim)`): Text, CLIP text and CLIP images.
        attention_mask (`torch.BoolTensor` of shape `(batch_size, length)`, *optional*): False where it is padding.
        weights (`torch.Tensor` of shape `(batch_size, length)`, *optional*): Factors on the attention probabilities.
        keys_values (`list`, *optional*): For each block the keys and values of its attentions.
    """

    sequence: torch.Tensor
    attention_mask: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    keys_values: list[list[tuple[torch.Tensor, torch.Tensor]]] | None = None


def sinusoidal_embedding(timestep: torch.Tensor, dim: int) -> torch.Tensor:
    """Sines, then cosines, of times in [0, 1]: `(batch_size,)` to `(batch_size, dim)`, float32; an odd dim ends with 0."""
    half = dim // 2
    frequencies = torch.arange(half, device=timestep.device).float().mul(-math.log(10000) / (half - 1)).exp()
    angles = (timestep * 10000)[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def mix(branches: tuple[torch.Tensor, ...], weights: tuple[float, ...]) -> torch.Tensor:
    """The weighted sum of tensors."""
    mixed = weights[0] * branches[0]
    for weight, branch in zip(weights[1:], branches[1:]):
        mixed = mixed + weight * branch
    return mixed


# Inside the U-Net, hidden states are (batch, height, width, channels): norms, linears and attention then need no
# permutes, and the (batch, channels, height, width) views given to convolutions are what they call channels-last.


class GlobalResponseNorm(nn.Module):
    """Lets channels compete by their norm over the whole image (ConvNeXt V2, https://huggingface.co/papers/2301.00808)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == torch.float16:  # squares leave its range
            response = torch.linalg.vector_norm(hidden_states, dim=(1, 2), keepdim=True, dtype=torch.float32)
        else:  # over these dimensions torch sums several times faster than it takes norms on CPUs
            energy = hidden_states.square().sum(dim=(1, 2), keepdim=True)
            response = energy.clamp(min=1e-30).sqrt()  # a channel that is silent must not have an infinite gradient
        response = (response / (response.mean(dim=-1, keepdim=True) + 1e-6)).to(hidden_states.dtype)
        # parameters stay in float32 under autocast, which would take all of the hidden states there
        gamma, beta = self.gamma.to(hidden_states.dtype), self.beta.to(hidden_states.dtype)
        return torch.addcmul(beta, hidden_states, 1 + gamma * response)


class PaellaFeedForward(nn.Module):
    """Block "F": pixelwise MLP with a global response norm."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.norm = LayerNorm(channels)
        self.proj_in = nn.Linear(channels, channels * 4)
        self.grn = GlobalResponseNorm(channels * 4)
        self.dropout = nn.Dropout(dropout)
        self.proj_out = nn.Linear(channels * 4, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = F.gelu(self.proj_in(self.norm(hidden_states)))
        return hidden_states + self.proj_out(self.dropout(self.grn(inner)))


class PaellaResBlock(PaellaFeedForward):
    """
    Block "C": the feed-forward block behind a depthwise convolution, which also takes in the skip connection: of
    `cat([hidden_states, skip])`, channels 2k and 2k + 1 make output channel k.
    """

    def __init__(self, channels: int, kernel_size: int, dropout: float, has_skip: bool):
        super().__init__(channels, dropout)
        self.depthwise = nn.Conv2d(
            channels * (1 + has_skip), channels, kernel_size, padding=kernel_size // 2, groups=channels
        )

    def forward(self, hidden_states: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        inner = hidden_states
        if skip is not None:
            inner = torch.cat([hidden_states, tile_batch(skip, hidden_states.shape[0])], dim=-1)
        inner = self.depthwise(inner.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        inner = F.gelu(self.proj_in(self.norm(inner)))
        return hidden_states + self.proj_out(self.dropout(self.grn(inner)))


class PaellaTimestepBlock(nn.Module):
    """Block "T": scale and shift by the time embedding."""

    def __init__(self, channels: int, time_embed_dim: int):
        super().__init__()
        self.proj = nn.Linear(time_embed_dim, channels * 2)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        scale, shift = self.proj(temb[: hidden_states.shape[0]])[:, None, None].chunk(2, dim=-1)
        return torch.addcmul(shift, hidden_states, 1 + scale)


class PaellaBlock(nn.Module):
    """One repeat of a level's block letters, such as "CTA"."""

    def __init__(
        self,
        block_types: str,
        channels: int,
        heads: int,
        cross_attention_dim: int,
        time_embed_dim: int,
        kernel_size: int,
        dropout: float,
        self_attention: bool,
        has_skip: bool,
        level: int,
    ):
        super().__init__()
        self.block_types = block_types
        self.level = level
        self.layers = nn.ModuleList()
        for index, block_type in enumerate(block_types):
            if block_type == "C":
                layer = PaellaResBlock(channels, kernel_size, dropout, has_skip=has_skip and index == 0)
            elif block_type == "T":
                layer = PaellaTimestepBlock(channels, time_embed_dim)
            elif block_type == "A":
                layer = PaellaAttnBlock(channels, cross_attention_dim, heads, dropout, self_attention)
            else:
                layer = PaellaFeedForward(channels, dropout)
            self.layers.append(layer)

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        conditioning_weights: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
        keys_values: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        perturbation: AttentionPerturbation | None = None,
    ) -> torch.Tensor:
        remaining = iter(keys_values or [])  # of the attentions, in order
        if perturbation is not None and self.level not in perturbation.levels:
            perturbation = None
        for index, (block_type, layer) in enumerate(zip(self.block_types, self.layers)):
            if block_type == "C":
                hidden_states = layer(hidden_states, skip if index == 0 else None)
            elif block_type == "T":
                hidden_states = layer(hidden_states, temb)
            elif block_type == "A":
                key_value = next(remaining, None)
                hidden_states = layer(
                    hidden_states, encoder_hidden_states, attention_mask, conditioning_weights, key_value, perturbation
                )
            else:
                hidden_states = layer(hidden_states)
        return hidden_states


class PaellaDownsample(nn.Module):
    """Norm, then a 2×2 convolution with stride 2: to the next lower level."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm = LayerNorm(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(hidden_states).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PaellaUpsample(nn.Module):
    """Norm, then a 2×2 transposed convolution with stride 2: to the next higher level."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm = LayerNorm(in_channels)
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(hidden_states).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PaellaUNet(
    PaellaHubMixin,
    AtomicSaveMixin,
    ModelMixin,
    AttentionMixin,
    PaellaCacheMixin,
    ConfigMixin,
    PaellaPeftAdapterMixin,
    OriginalCheckpointMixin,
):
    r"""
    The denoiser of Paella (https://huggingface.co/papers/2211.07292, section 3.2; released version 3). The defaults are
    the released sizes: 1008 M parameters.

    Parameters:
        sample_size (`int`, defaults to 64): Tokens a side that pipelines generate unless told otherwise.
        num_vq_embeddings (`int`, defaults to 8192): Number of different tokens.
        token_embed_dim (`int`, defaults to 256): Channels of the token embedding and of the head's last layer.
        patch_size (`int`, defaults to 2): Side of the token patches folded into channels at both ends.
        time_embed_dim (`int`, defaults to 64): Channels of the time embedding.
        text_embed_dim (`int`, defaults to 2560): Channels of the text encoder's output (ByT5-XL: 2560).
        clip_embed_dim (`int`, defaults to 1024): Channels of CLIP text and image embeddings (ViT-H/14: 1024).
        clip_seq_len (`int`, defaults to 4): Conditioning tokens that one CLIP embedding becomes.
        cross_attention_dim (`int`, defaults to 1024): Channels of the conditioning sequence.
        block_out_channels (`tuple[int]`, defaults to `(640, 1280, 1280)`): Channels of each level, highest resolution first.
        layers_per_block (`tuple[int]`, defaults to `(6, 16, 6)`): Repeats of each level's block letters, down and up.
        block_types (`tuple[str]`, defaults to `("CT", "CTA", "CTA")`):
            Each level's block letters, C first: C, a depthwise residual block; T, time modulation; A, attention; F,
            feed-forward.
        num_attention_heads (`tuple[int]`, defaults to `(-1, 16, 16)`): Heads of each level; ignored in levels without A.
        kernel_size (`int`, defaults to 3): Kernel of the depthwise convolutions, odd.
        dropout (`float` or `tuple[float]`, defaults to 0.1): Dropout in C, F and A blocks, one number or one a level.
        self_attention (`bool`, defaults to `True`): Whether attention sees the image's own tokens beside the conditioning.
    """

    _original_checkpoint = "paella_v3.pt"
    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["PaellaBlock"]
    _repeated_blocks = ["PaellaBlock"]
    _skip_layerwise_casting_patterns = ["token_embedding"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        num_vq_embeddings: int = 8192,
        token_embed_dim: int = 256,
        patch_size: int = 2,
        time_embed_dim: int = 64,
        text_embed_dim: int = 2560,
        clip_embed_dim: int = 1024,
        clip_seq_len: int = 4,
        cross_attention_dim: int = 1024,
        block_out_channels: tuple[int, ...] = (640, 1280, 1280),
        layers_per_block: tuple[int, ...] = (6, 16, 6),
        block_types: tuple[str, ...] = ("CT", "CTA", "CTA"),
        num_attention_heads: tuple[int, ...] = (-1, 16, 16),
        kernel_size: int = 3,
        dropout: float | tuple[float, ...] = 0.1,
        self_attention: bool = True,
    ):
        super().__init__()
        levels = len(block_out_channels)
        dropouts = [dropout] * levels if isinstance(dropout, int | float) else dropout
        for name, value in {
            "layers_per_block": layers_per_block,
            "block_types": block_types,
            "num_attention_heads": num_attention_heads,
            "dropout": dropouts,
        }.items():
            if len(value) != levels:
                raise ValueError(f"`{name}` must have one entry a level, {levels} as `block_out_channels`: got {value}.")
        for letters in block_types:
            if not letters.startswith("C") or set(letters) - set("CTAF"):
                raise ValueError(f"`block_types` must begin with C and use only C, T, A and F, got {letters!r}.")
        if time_embed_dim < 4:
            raise ValueError(f"`time_embed_dim` must be at least 4, got {time_embed_dim}.")
        if kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, got {kernel_size}.")
        for letters, channels, heads in zip(block_types, block_out_channels, num_attention_heads):
            if "A" in letters and (heads < 1 or channels % heads):
                raise ValueError(
                    f"`num_attention_heads` must divide the {channels} channels of level {letters}, got {heads}."
                )

        def make_block(level: int, has_skip: bool = False) -> PaellaBlock:
            return PaellaBlock(
                block_types[level],
                block_out_channels[level],
                num_attention_heads[level],
                cross_attention_dim,
                time_embed_dim,
                kernel_size,
                dropouts[level],
                self_attention,
                has_skip,
                level,
            )

        # conditioning
        self.text_proj = nn.Linear(text_embed_dim, cross_attention_dim)
        self.clip_text_proj = nn.Linear(clip_embed_dim, cross_attention_dim * clip_seq_len)
        self.clip_image_proj = nn.Linear(clip_embed_dim, cross_attention_dim * clip_seq_len)
        self.cond_norm = LayerNorm(cross_attention_dim)

        # tokens in
        self.token_embedding = nn.Embedding(num_vq_embeddings, token_embed_dim)
        self.token_norm = LayerNorm(token_embed_dim)
        self.proj_in = nn.Linear(token_embed_dim * patch_size**2, block_out_channels[0])
        self.norm_in = LayerNorm(block_out_channels[0])

        # down, then up: the first block of a level on the way up takes the skip, but at the lowest there is none
        self.down_blocks = nn.ModuleList()
        for level in range(levels):
            if level > 0:
                self.down_blocks.append(PaellaDownsample(block_out_channels[level - 1], block_out_channels[level]))
            self.down_blocks.extend(make_block(level) for _ in range(layers_per_block[level]))
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            has_skip = level < levels - 1
            self.up_blocks.extend(make_block(level, has_skip and i == 0) for i in range(layers_per_block[level]))
            if level > 0:
                self.up_blocks.append(PaellaUpsample(block_out_channels[level], block_out_channels[level - 1]))

        # logits out
        self.norm_out = LayerNorm(block_out_channels[0])
        self.proj_out = nn.Linear(block_out_channels[0], token_embed_dim * patch_size**2)
        self.head_norm = LayerNorm(token_embed_dim)
        self.head = nn.Linear(token_embed_dim, num_vq_embeddings, bias=False)

        self.gradient_checkpointing = False
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as published."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):  # transposed convolutions keep torch's own
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, PaellaFeedForward):  # keep the variance of the residual stream near one
                module.proj_out.weight.data *= (1 / sum(self.config.layers_per_block)) ** 0.5
            elif isinstance(module, PaellaTimestepBlock):  # start without time modulation
                nn.init.zeros_(module.proj.weight)
            elif isinstance(module, PaellaAttention):  # as torch does for the three packed in one (3c, c) matrix
                for projection in (module.to_q, module.to_k, module.to_v):
                    nn.init.xavier_uniform_(projection.weight, gain=0.5**0.5)
        for projection in (self.text_proj, self.clip_text_proj, self.clip_image_proj):
            nn.init.normal_(projection.weight, std=0.02)
        # small inputs and zero outputs: the first predictions are uniform
        nn.init.xavier_uniform_(self.proj_in.weight, gain=0.02)
        nn.init.zeros_(self.proj_out.weight)
        # the head starts as a copy of the embedding
        nn.init.normal_(self.token_embedding.weight, std=(1 / self.config.num_vq_embeddings) ** 0.5)
        self.head.weight.data.copy_(self.token_embedding.weight.data)

    @property
    def sample_multiple(self) -> int:
        """Token grids must be divisible by this on both sides: 8 in the released model."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    @scale_adapters
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | PaellaConditioning,
        clip_text_embeds: torch.Tensor | None = None,
        clip_image_embeds: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        conditioning_weights: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        mixing_weights: tuple[tuple[float, ...], ...] | None = None,
        deep_features: list[torch.Tensor] | None = None,
        attention_perturbation: AttentionPerturbation | None = None,
        run_block: Callable | None = None,
        return_dict: bool = True,
    ) -> PaellaUNetOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.LongTensor` of shape `(batch_size, height, width)`):
                Noisy tokens in `[0, num_vq_embeddings)`; both sides divisible by `sample_multiple`. The conditioning has as
                many rows, or a multiple, for which the samples are tiled.
            timestep (`torch.Tensor` of shape `(batch_size,)`, or a scalar):
                The noise level in [0, 1]: the fraction of tokens that are noise.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, length, text_embed_dim)`):
                The text encoder's output (ByT5). Or, in place of it and the next four, what `encode_conditioning` gave.
            clip_text_embeds (`torch.Tensor` of shape `(batch_size, clip_embed_dim)`, *optional*):
                CLIP text embeddings, not normalised. Without them, their tokens are left out of the conditioning.
            clip_image_embeds (`torch.Tensor` of shape `(batch_size, [num_images,] clip_embed_dim)`, *optional*):
                CLIP image embeddings of one or several images, not normalised. Without them, their tokens are left out.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, length)`, *optional*):
                0 where `encoder_hidden_states` is padding; or `(batch_size, sequence_length)` over the whole conditioning
                sequence: text, then `clip_seq_len` tokens for the CLIP text, then as many for each image.
            conditioning_weights (`torch.Tensor` of shape `(n,)` or `(batch_size, n)`, *optional*):
                Factors on the attention probabilities of each row's last n attended conditioning tokens.
            cross_attention_kwargs (`dict`, *optional*): `{"scale": s}` scales LoRA adapters in this call.
            mixing_weights (`tuple[tuple[float]]`, *optional*):
                For guidance: the batch is n branches, one after the other, which differ in their conditioning only. Each
                row of n weights gives one weighted sum of their logits. What comes before the first attention is computed
                for one branch, and as the head is linear, branches are mixed before it.
            deep_features (`list[torch.Tensor]`, *optional*):
                An approximation after DeepCache (https://huggingface.co/papers/2312.00858): an empty list is given what
                comes up from the levels below the first, and a list with that takes their place in a later call.
            attention_perturbation ([`AttentionPerturbation`], *optional*):
                For guidance: weaker attention in some levels and some rows of the batch.
            run_block (`Callable`, *optional*):
                Calls a block, its first argument, with the others: for `pipe.optimize`, which marks what recurs.

        Raises:
            ValueError: If the token grid is not divisible by `sample_multiple`, or the rows of the conditioning are no
                multiple of the samples, or the mask or the weights do not fit the conditioning sequence.
        """
        height, width = sample.shape[1:]
        if height % self.sample_multiple or width % self.sample_multiple:
            raise ValueError(
                f"`sample` is a token grid of {height}×{width}, but both sides must be divisible by {self.sample_multiple}."
            )

        # 1. time and conditioning
        conditioning = encoder_hidden_states
        if not isinstance(conditioning, PaellaConditioning):
            conditioning = self._condition(
                encoder_hidden_states, clip_text_embeds, clip_image_embeds, encoder_attention_mask, conditioning_weights
            )
        batch_size = conditioning.sequence.shape[0]
        if batch_size % sample.shape[0]:
            raise ValueError(
                f"The conditioning has {batch_size} rows for {sample.shape[0]} samples: pass as many, or a multiple."
            )
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(sample.shape[0])
        temb = sinusoidal_embedding(timestep, self.config.time_embed_dim).to(conditioning.sequence.dtype)
        temb = tile_batch(temb, batch_size)

        # 2. tokens in
        if mixing_weights is not None:
            sample = sample[: batch_size // len(mixing_weights[0])]
        hidden_states = self.token_norm(self.token_embedding(sample)).permute(0, 3, 1, 2)
        hidden_states = F.pixel_unshuffle(hidden_states, self.config.patch_size).permute(0, 2, 3, 1)
        hidden_states = self.norm_in(self.proj_in(hidden_states))
        if self._caches_all_blocks:  # what the first block and the last make must have one shape
            hidden_states = tile_batch(hidden_states, batch_size)

        # 3. down and up
        def run(block, *args):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                return self._gradient_checkpointing_func(block, *args)
            return block(*args) if run_block is None else run_block(block, *args)

        perturbation = attention_perturbation
        if perturbation is not None:
            levels = (level % len(self.config.block_out_channels) for level in perturbation.levels)
            perturbation = replace(perturbation, levels=tuple(levels))
        down_blocks, up_blocks, keys_values = self.down_blocks, self.up_blocks, conditioning.keys_values or []
        if deep_features:
            above = self.config.layers_per_block[0]
            down_blocks, up_blocks = down_blocks[:above], up_blocks[len(up_blocks) - above :]
            keys_values = keys_values[:above] + keys_values[len(keys_values) - above :]
        keys_values = iter(keys_values)
        conditioning = (temb, conditioning.sequence, conditioning.attention_mask, conditioning.weights)
        skips = []
        for block in down_blocks:
            if isinstance(block, PaellaDownsample):
                skips.append(hidden_states)
                hidden_states = block(hidden_states)
            else:
                hidden_states = run(block, hidden_states, *conditioning, None, next(keys_values, None), perturbation)
        skip = None
        if deep_features:
            hidden_states, skip = deep_features[0], hidden_states
        for block in up_blocks:
            if isinstance(block, PaellaUpsample):
                hidden_states = block(hidden_states)
                skip = skips.pop()
                if deep_features is not None and not skips:
                    deep_features.append(hidden_states)
            else:
                hidden_states = run(block, hidden_states, *conditioning, skip, next(keys_values, None), perturbation)
                skip = None

        # 4. logits out
        hidden_states = self.proj_out(self.norm_out(hidden_states)).permute(0, 3, 1, 2)
        hidden_states = F.pixel_shuffle(hidden_states, self.config.patch_size).permute(0, 2, 3, 1)
        hidden_states = self.head_norm(tile_batch(hidden_states, batch_size))
        if mixing_weights is not None:
            branches = hidden_states.chunk(len(mixing_weights[0]))
            hidden_states = torch.cat([mix(branches, weights) for weights in mixing_weights])
        logits = self.head(hidden_states).permute(0, 3, 1, 2)

        if not return_dict:
            return (logits,)
        return PaellaUNetOutput(sample=logits)

    @apply_forward_hook
    @scale_adapters
    def encode_conditioning(
        self,
        encoder_hidden_states: torch.Tensor,
        clip_text_embeds: torch.Tensor | None = None,
        clip_image_embeds: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        conditioning_weights: torch.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
    ) -> PaellaConditioning:
        """
        All that the conditioning alone determines, down to the keys and values of every attention, to be computed once
        rather than in every call; in place of the arguments of `forward`, with the same names and meanings.
        """
        conditioning = self._condition(
            encoder_hidden_states, clip_text_embeds, clip_image_embeds, encoder_attention_mask, conditioning_weights
        )
        conditioning.keys_values = [
            [layer.key_value(conditioning.sequence) for layer in block.layers if isinstance(layer, PaellaAttnBlock)]
            for block in (*self.down_blocks, *self.up_blocks)
            if isinstance(block, PaellaBlock)
        ]
        return conditioning

    def _condition(
        self, encoder_hidden_states, clip_text_embeds, clip_image_embeds, encoder_attention_mask, conditioning_weights
    ) -> PaellaConditioning:
        sequence = [self.text_proj(encoder_hidden_states)]
        for projection, embeds in ((self.clip_text_proj, clip_text_embeds), (self.clip_image_proj, clip_image_embeds)):
            if embeds is not None:
                sequence.append(projection(embeds).view(embeds.shape[0], -1, self.config.cross_attention_dim))
        mask = self._expand_mask(encoder_attention_mask, sequence)
        sequence = self.cond_norm(torch.cat(sequence, dim=1))
        return PaellaConditioning(sequence, mask, self._align_weights(conditioning_weights, mask, sequence))

    @staticmethod
    def _expand_mask(mask: torch.Tensor | None, sequence: list[torch.Tensor]) -> torch.Tensor | None:
        """A mask over the text or over the whole conditioning sequence, as booleans over the whole sequence."""
        if mask is None:
            return None
        text_length, length = sequence[0].shape[1], sum(part.shape[1] for part in sequence)
        if mask.shape[1] not in (text_length, length):
            raise ValueError(
                f"`encoder_attention_mask` has {mask.shape[1]} columns, but the text has {text_length} tokens and the whole "
                f"conditioning sequence {length}."
            )
        return F.pad(mask.bool(), (0, length - mask.shape[1]), value=True)

    @staticmethod
    def _align_weights(weights: torch.Tensor | None, mask: torch.Tensor | None, sequence: torch.Tensor):
        """Weights for a row's last n attended tokens, as weights for the whole sequence: 1 elsewhere."""
        if weights is None:
            return None
        batch_size, length = sequence.shape[:2]
        if weights.shape[-1] > length:
            raise ValueError(
                f"`conditioning_weights` has {weights.shape[-1]} entries for a conditioning sequence of {length} tokens."
            )
        if weights.ndim == 2 and len(weights) not in (1, batch_size):
            raise ValueError(f"`conditioning_weights` has {len(weights)} rows for a batch of {batch_size}.")
        weights = weights.to(sequence).expand(batch_size, -1)
        if mask is None:
            return F.pad(weights, (length - weights.shape[1], 0), value=1.0)
        from_end = mask.long().flip(1).cumsum(1).flip(1)  # 1 at the last attended token, 2 at the one before
        index = weights.shape[1] - from_end
        return torch.where(mask & (index >= 0), weights.gather(1, index.clamp(0, weights.shape[1] - 1)), 1.0)
