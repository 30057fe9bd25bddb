"""What Paella is trained to do: to say the clean tokens from noisy ones."""

import torch
import torch.nn.functional as F


def corrupt(
    tokens: torch.LongTensor,
    timestep: torch.Tensor,
    num_tokens: int,
    generator: torch.Generator | None = None,
    part: tuple[int, int] = (0, 1),
) -> tuple[torch.LongTensor, torch.LongTensor]:
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

    Returns:
        The noised tokens and the mask, 1 where noised, both of the shape of `tokens`, int64.
    """
    index, count = part
    device = generator.device if generator is not None else tokens.device
    shape = (len(tokens) * count, *tokens.shape[1:])
    mask = torch.rand(shape, generator=generator, device=device)[index::count].to(tokens.device) <= timestep[:, None, None]
    random_tokens = torch.randint(num_tokens, shape, generator=generator, device=device)[index::count].to(tokens.device)
    return torch.where(mask, random_tokens, tokens), mask.long()


def draw_timesteps(
    batch_size: int, generator: torch.Generator | None = None, part: tuple[int, int] = (0, 1)
) -> torch.Tensor:
    """Noise levels as published: uniform in [0.001, 1], a little more often 1. `(batch_size,)`; `part` as in `corrupt`."""
    index, count = part
    return (1.001 - torch.rand(batch_size * count, generator=generator)[index::count]).clamp(0.001, 1)


def loss_weights(mask: torch.Tensor, timestep: torch.Tensor, clean_weight: float = 0.3) -> torch.Tensor:
    """
    Weight of each position: 1 where noised; elsewhere from `clean_weight` at t=0 to 1 at t=1, as at high noise the model
    cannot tell which tokens are clean. `(batch_size, height, width)`, not normalised.
    """
    return 1 - (1 - mask) * (1 - timestep[:, None, None]) * (1 - clean_weight)


def paella_loss(
    logits: torch.Tensor,
    tokens: torch.LongTensor,
    mask: torch.Tensor,
    timestep: torch.Tensor,
    label_smoothing: float = 0.1,
    clean_weight: float = 0.3,
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
    """
    rows = logits.movedim(1, -1).flatten(0, -2)  # a view of the U-Net's channels-last logits, and contiguous
    loss = F.cross_entropy(rows, tokens.flatten(), label_smoothing=label_smoothing, reduction="none").view(tokens.shape)
    weights = loss_weights(mask, timestep, clean_weight)
    return ((loss * weights).sum((1, 2)) / weights.sum((1, 2))).mean()
