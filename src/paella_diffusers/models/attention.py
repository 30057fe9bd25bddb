"""Attention of Paella's U-Net, from image tokens to image and conditioning tokens: its block "A"."""

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn


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
    heads and some queries at a time, so many that their scores, in the dtype of the states, stay in the cache. On CPUs, in
    bfloat16, this takes down to 0.6 of the time of torch's own.
    """
    batch_size, length, heads, channels = query.shape
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    query = query * channels**-0.5
    if attention_mask is not None:
        bias = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, -torch.inf)
        bias = bias.repeat_interleave(heads, dim=0)[:, None]
    rows = min(length, 256)
    together = max(2, 2**19 // (rows * key.shape[1]))
    attended = torch.empty_like(query)
    for first in range(0, len(query), together):
        some = slice(first, first + together)
        for row in range(0, length, rows):
            part = slice(row, row + rows)
            scores = torch.bmm(query[some, part], key[some].mT)
            if attention_mask is not None:
                scores += bias[some]
            attended[some, part] = torch.bmm(scores.softmax(-1), value[some])
    return attended.unflatten(0, (batch_size, heads)).transpose(1, 2).contiguous()


@chunked_attention.register_fake
def _(query, key, value, attention_mask=None):
    return query.new_empty(query.shape)


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
        chunked = query.device.type == "cpu" and query.dtype == torch.bfloat16 and self._attention_backend is None
        if chunked and not torch.is_grad_enabled():
            hidden_states = chunked_attention(query, key, value, attention_mask)
        else:
            hidden_states = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=None if attention_mask is None else attention_mask[:, None, None],
                dropout_p=attn.dropout if attn.training else 0.0,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        return attn.to_out[0](hidden_states.flatten(2))


class PaellaAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = PaellaAttnProcessor
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

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None, **kwargs) -> torch.Tensor:
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
    ) -> torch.Tensor:
        # before the first attention, rows that differ in their conditioning only are equal
        hidden_states = tile_batch(hidden_states, encoder_hidden_states.shape[0])
        attended = self.attention(
            self.norm(hidden_states).flatten(1, 2),
            self.cond_proj(F.silu(encoder_hidden_states)) if key_value is None else None,
            attention_mask=attention_mask,
            conditioning_weights=conditioning_weights,
            key_value=key_value,
        )
        return hidden_states + attended.view_as(hidden_states)
