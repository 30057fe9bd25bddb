"""Attention of Paella's U-Net, from image tokens to image and conditioning tokens: its block "A"."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

# without AVX-512, x86 has no fast products of bfloat16, and chunked attention would take many times as long as torch's own
HAS_FAST_BFLOAT16 = torch.backends.cpu.get_cpu_capability() != "AVX2"


def tile_batch(hidden_states: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Tile the whole batch to `batch_size` rows, which must be a multiple of its own: row i repeats as i + n, i + 2n, …"""
    if hidden_states.shape[0] == batch_size:
        return hidden_states
    return hidden_states.repeat(batch_size // hidden_states.shape[0], *[1] * (hidden_states.ndim - 1))


class LayerNorm(nn.LayerNorm):
    """Every norm of the U-Net: over channels, not affine, eps 1e-6."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6, elementwise_affine=False)


@torch.library.custom_op("paella_diffusers::chunked_attention", mutates_args=())  # compiled code calls it as it is
def chunked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Scaled dot-product attention of `(batch_size, length, heads, channels)`, with a mask `(batch_size, key_length)`: some
    heads and some queries at a time, so many that their scores, in the dtype of the states, stay in the cache. On CPUs with
    fast products of bfloat16, in that dtype, this takes down to 0.6 of the time of torch's own.
    """
    batch_size, length, heads, channels = query.shape
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    bias = query.new_zeros(len(query), 1, key.shape[1])
    if attention_mask is not None:
        bias.masked_fill_(~attention_mask.repeat_interleave(heads, dim=0)[:, None], -torch.inf)
    rows = min(length, 256)
    together = max(2, 2**19 // (rows * key.shape[1]))
    attended = torch.empty_like(query)
    for first in range(0, len(query), together):
        some = slice(first, first + together)
        for row in range(0, length, rows):
            part = slice(row, row + rows)
            scores = torch.baddbmm(bias[some], query[some, part], key[some].mT, alpha=channels**-0.5)
            attended[some, part] = torch.bmm(scores.softmax(-1), value[some])
    return attended.unflatten(0, (batch_size, heads)).transpose(1, 2).contiguous()


@chunked_attention.register_fake
def _(query, key, value, attention_mask=None):
    return query.new_empty(query.shape)


@dataclass(frozen=True)
class AttentionPerturbation:
    """
    Attention made weaker in some rows of the batch: what guidance by a perturbed branch moves away from.

    Args:
        kind (`str`):
            `"identity"`: image tokens attend to themselves and to the conditioning only, as in perturbed-attention guidance
            (https://huggingface.co/papers/2403.17377). `"blur"`: queries are blurred over the image, as in smoothed energy
            guidance (https://huggingface.co/papers/2408.00760).
        levels (`tuple[int]`): The U-Net's levels where it is so, by their index in `block_out_channels`; -1 is the lowest.
        blur_sigma (`float`, defaults to infinity):
            The Gaussian's standard deviation, in tokens of the level; infinity gives all queries their mean.
        rows (`tuple[int, int]`, *optional*): The first of these rows of the batch, and the one after the last.
    """

    kind: str
    levels: tuple[int, ...] = (-1,)
    blur_sigma: float = torch.inf
    rows: tuple[int, int] | None = None

    def __call__(
        self, query: torch.Tensor, mask: torch.Tensor | None, num_keys: int, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The weaker attention's query and mask.

        Args:
            query (`torch.Tensor` of shape `(batch_size, height * width, heads, channels)`): Of the perturbed rows.
            mask (`torch.BoolTensor` of shape `(batch_size, num_keys)`, *optional*): False where a key is not attended to.
            num_keys (`int`): First the image's own, if the model has self-attention, then the conditioning's.
            size (`tuple[int, int]`): Height and width of the image.
        """
        length = query.shape[1]
        if self.kind == "blur":
            return gaussian_blur(query.unflatten(1, size), self.blur_sigma).flatten(1, 2), mask
        allowed = torch.ones(length, num_keys, dtype=torch.bool, device=query.device)
        allowed[:, :length] = torch.eye(length, dtype=torch.bool, device=query.device)
        allowed = allowed.expand(len(query), -1, -1)
        return query, allowed if mask is None else allowed & mask[:, None]


def gaussian_blur(states: torch.Tensor, sigma: float) -> torch.Tensor:
    """A Gaussian blur of `(batch_size, height, width, ...)` over the image; its weights sum to 1 at the edges, too."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    for dim in (1, 2):
        place = torch.arange(states.shape[dim], device=states.device, dtype=dtype)
        weights = (-0.5 * ((place - place[:, None]) / sigma).square()).softmax(-1)
        states = torch.tensordot(weights.to(states), states, dims=cast(Any, ([1], [dim]))).movedim(0, dim)
    return states


class PaellaAttnProcessor:
    """Attention from image tokens to image tokens (with `self_attention`) and conditioning tokens."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "PaellaAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        conditioning_weights: torch.Tensor | None = None,
        key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
        perturbation: AttentionPerturbation | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        query = attn.to_q(hidden_states)
        if key_value is None:
            key_value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        key, value = key_value
        if conditioning_weights is not None:
            # a weight on a key's attention probability, after the softmax, is a weight on its value
            value = value * conditioning_weights[..., None]
        if attn.self_attention:
            key = torch.cat([attn.to_k(hidden_states), key], dim=1)
            value = torch.cat([attn.to_v(hidden_states), value], dim=1)
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (hidden_states.shape[1], 0), value=True)
        query, key, value = (states.unflatten(-1, (attn.heads, -1)) for states in (query, key, value))
        attended = self.attend(attn, query, key, value, attention_mask)
        if perturbation is not None:
            first, end = cast(tuple[int, int], perturbation.rows)
            mask = None if attention_mask is None else attention_mask[first:end]
            weak_query, mask = perturbation(query[first:end], mask, key.shape[1], cast(tuple[int, int], image_size))
            weak = self.attend(attn, weak_query, key[first:end], value[first:end], mask)
            attended = torch.cat([attended[:first], weak, attended[end:]])
        return attn.to_out[0](attended.flatten(2))

    def attend(
        self,
        attn: "PaellaAttention",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of `(batch_size, length, heads, channels)`, with a mask `(batch_size, [length,] num_keys)`."""
        on_cpu = query.device.type == "cpu" and self._attention_backend is None
        chunked = on_cpu and query.dtype == torch.bfloat16 and HAS_FAST_BFLOAT16
        if chunked and not torch.is_grad_enabled() and (mask is None or mask.ndim == 2):
            return chunked_attention(query, key, value, mask)
        if mask is not None:
            mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=attn.dropout if attn.training else 0.0,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


class PaellaAttention(nn.Module, AttentionModuleMixin):
    processor: Any
    _default_processor_cls: Any = PaellaAttnProcessor
    _available_processors = [PaellaAttnProcessor]
    _supports_qkv_fusion = False  # queries come from the image, keys and values from two sources

    def __init__(self, channels: int, heads: int, dropout: float, self_attention: bool):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.self_attention = self_attention
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.set_processor(self._default_processor_cls())

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states, **kwargs)


class PaellaAttnBlock(nn.Module):
    """Block "A": attention to the conditioning and, with `self_attention`, to the image itself."""

    def __init__(self, channels: int, cross_attention_dim: int, heads: int, dropout: float, self_attention: bool):
        super().__init__()
        self.norm = LayerNorm(channels)
        self.cond_proj = nn.Linear(cross_attention_dim, channels)
        self.attention = PaellaAttention(channels, heads, dropout, self_attention)

    def key_value(self, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the conditioning, which no image and no time changes."""
        conditioning = self.cond_proj(F.silu(encoder_hidden_states))
        return self.attention.to_k(conditioning), self.attention.to_v(conditioning)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        conditioning_weights: torch.Tensor | None = None,
        key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
        perturbation: AttentionPerturbation | None = None,
    ) -> torch.Tensor:
        # before the first attention, rows that differ in their conditioning only are equal
        hidden_states = tile_batch(hidden_states, encoder_hidden_states.shape[0])
        perturbed = {} if perturbation is None else {"perturbation": perturbation, "image_size": hidden_states.shape[1:3]}
        attended = self.attention(
            self.norm(hidden_states).flatten(1, 2),
            self.cond_proj(F.silu(encoder_hidden_states)) if key_value is None else None,
            attention_mask=attention_mask,
            conditioning_weights=conditioning_weights,
            key_value=key_value,
            **perturbed,
        )
        return hidden_states + attended.view_as(hidden_states)
