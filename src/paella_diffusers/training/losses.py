"""What Paella is trained to do: to say the clean tokens from noisy ones."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..schedulers.categorical import add_uniform_noise


def corrupt(
    tokens: torch.Tensor,
    timestep: torch.Tensor,
    num_tokens: int,
    generator: torch.Generator | None = None,
    part: tuple[int, int] = (0, 1),
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Replace each token by a uniformly random one with probability t (https://huggingface.co/papers/2211.07292, section 3.2).

    Args:
        tokens (`torch.LongTensor` of shape `(batch_size, height, width)`): Clean tokens.
        timestep (`torch.Tensor` of shape `(batch_size,)`): Noise levels in [0, 1].
        num_tokens (`int`): Number of different tokens.
        generator (`torch.Generator`, *optional*): The source of randomness: the mask first, then the tokens.
        part (`tuple[int, int]`, defaults to `(0, 1)`):
            `(index, count)` if the batch is every `count`-th row, from `index` on, of one that is spread over processes:
            with the same generator everywhere the rows get the noise that they would get in one process.
        noise (`torch.LongTensor` of the shape of `tokens`, *optional*): The replacements; uniformly random unless given.

    Returns:
        The noised tokens and the mask, 1 where noised, both of the shape of `tokens`, int64.
    """
    index, count = part  # of each group of `count` rows, only one is used: all processes draw the whole batch's numbers
    tokens, timestep = (x.repeat_interleave(count, 0) for x in (tokens, timestep))
    noise = None if noise is None else noise.repeat_interleave(count, 0)
    noised, mask = add_uniform_noise(tokens, timestep, num_tokens, noise, generator)
    return noised[index::count], mask[index::count].long()


def draw_timesteps(
    batch_size: int,
    generator: torch.Generator | None = None,
    part: tuple[int, int] = (0, 1),
    levels: Sequence[float] | None = None,
) -> torch.Tensor:
    """
    Noise levels `(batch_size,)`, as published: uniform in [0.001, 1], and 1 a little more often. With `levels`, they are
    drawn from these, all with the same probability. `part` is as in `corrupt`.
    """
    index, count = part
    draws = torch.rand(batch_size * count, generator=generator)[index::count]
    if levels is not None:
        return torch.tensor(levels)[(draws * len(levels)).long()]
    return (1.001 - draws).clamp(0.001, 1)


def loss_weights(mask: torch.Tensor, timestep: torch.Tensor, clean_weight: float = 0.3) -> torch.Tensor:
    """
    Weight of each position: 1 where noised; elsewhere from `clean_weight` at t=0 to 1 at t=1, as at high noise the model
    cannot tell which tokens are clean. `(batch_size, height, width)`, not normalised.
    """
    return 1 - (1 - mask) * (1 - timestep[:, None, None]) * (1 - clean_weight)


class SmoothedCrossEntropy(torch.autograd.Function):
    """
    `F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")` with a gradient of its own. The logits of
    a few pictures are gigabytes. torch's function keeps five tensors of this size, this one two. It computes in float32,
    part by part, whatever the logits' dtype.
    """

    PART = 2**19  # logits; 2 MB in float32, which stay in a processor's cache

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        for rows, target, loss in SmoothedCrossEntropy.parts(logits, targets, losses):
            rows = torch.log_softmax(rows, 1, dtype=torch.float32)
            mean = rows.mean(1) if smoothing else 0.0
            loss.copy_((smoothing - 1) * rows.gather(1, target[:, None])[:, 0] - smoothing * mean)
        ctx.save_for_backward(logits, targets)
        ctx.smoothing = smoothing
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, targets = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows, target, factor, out in SmoothedCrossEntropy.parts(logits, targets, grad, result):
            rows = torch.softmax(rows, 1, dtype=torch.float32)  # less (1 - smoothing) · one-hot + smoothing / V
            rows.scatter_add_(1, target[:, None], rows.new_full((len(rows), 1), ctx.smoothing - 1))
            if ctx.smoothing:
                rows.sub_(ctx.smoothing / rows.shape[1])
            torch.mul(rows, factor[:, None], out=out)
        return result, None, None

    @staticmethod
    def parts(logits: torch.Tensor, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        size = max(1, SmoothedCrossEntropy.PART // logits.shape[1])
        return zip(*(tensor.split(size) for tensor in (logits, *tensors)))


def paella_loss(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    timestep: torch.Tensor,
    label_smoothing: float = 0.1,
    clean_weight: float = 0.3,
    image_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Weighted cross-entropy to the clean tokens, a scalar: the mean over positions by `loss_weights`, then over images.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_tokens, height, width)`): The U-Net's output.
        tokens (`torch.LongTensor` of shape `(batch_size, height, width)`): Clean tokens.
        mask (`torch.Tensor` of the shape of `tokens`): 1 where the U-Net was given noise.
        timestep (`torch.Tensor` of shape `(batch_size,)`): Noise levels in [0, 1].
        label_smoothing (`float`, defaults to 0.1): As in `torch.nn.functional.cross_entropy`.
        clean_weight (`float`, defaults to 0.3): See `loss_weights`.
        image_weights (`torch.Tensor` of shape `(batch_size,)`, *optional*): Of the images in the mean; equal unless given.
    """
    rows = logits.movedim(1, -1).flatten(0, -2)  # a view of the U-Net's channels-last logits, and contiguous
    loss = SmoothedCrossEntropy.apply(rows, tokens.flatten(), label_smoothing).view(tokens.shape)
    weights = loss_weights(mask, timestep, clean_weight)
    losses = (loss * weights).sum((1, 2)) / weights.sum((1, 2))
    return losses.mean() if image_weights is None else (losses * image_weights).sum() / image_weights.sum()
