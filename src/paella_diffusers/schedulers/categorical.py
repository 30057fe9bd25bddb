"""Random numbers of the discrete samplers: uniform tokens, forward noising, and draws from a softmax."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def rand_tensor(
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """
    Uniform float32 numbers in [0, 1), as diffusers' `randn_tensor` makes normal ones.

    Args:
        shape (`tuple[int, ...]`): Shape of the result; the batch comes first.
        generator (`torch.Generator` or a list with one for each row of the batch, *optional*):
            Numbers are drawn on the generator's device, then moved to `device`.
        device (`str` or `torch.device`, *optional*): Where the result lies.

    Raises:
        ValueError: If there is not one generator for each row.
    """
    return _random(torch.rand, shape, generator, device)


def random_tokens(
    num_tokens: int,
    shape: tuple[int, ...],
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: str | torch.device | None = None,
) -> torch.LongTensor:
    """Uniform tokens in `[0, num_tokens)`, int64; the other arguments are those of [`rand_tensor`]."""
    return _random(lambda size, **kwargs: torch.randint(num_tokens, size, **kwargs), shape, generator, device)


def _random(function: Callable, shape, generator, device) -> torch.Tensor:
    if isinstance(generator, list):
        check_generators(generator, shape[0])
        return torch.cat([_random(function, (1, *shape[1:]), one, device) for one in generator])
    return function(shape, generator=generator, device=generator.device if generator else device).to(device)


def check_generators(generators: list, batch_size: int):
    if len(generators) != batch_size:
        raise ValueError(f"`generator` is a list of {len(generators)} for a batch of {batch_size}: pass one for each image.")


def add_uniform_noise(
    tokens: torch.LongTensor,
    noise_level: float | torch.Tensor,
    num_tokens: int | None = None,
    noise: torch.LongTensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """
    The forward process q(x_t | x₀) (https://huggingface.co/papers/2211.07292, section 3.2): each token is replaced with
    probability t, independently. Random numbers are drawn in this order: which tokens are replaced, then the noise.

    Args:
        tokens (`torch.LongTensor` of shape `(batch_size, ...)`): x₀.
        noise_level (`float` or `torch.Tensor` of shape `(batch_size,)`): t in [0, 1].
        num_tokens (`int`, *optional*): Number of different tokens, for noise that is drawn.
        noise (`torch.LongTensor` of the shape of `tokens`, *optional*): The replacements; uniformly random unless given.
        generator (`torch.Generator` or a list with one for each row of the batch, *optional*): See [`rand_tensor`].

    Returns:
        x_t, and where tokens were replaced, both of the shape of `tokens`.
    """
    noise_level = torch.as_tensor(noise_level, dtype=torch.float32, device=tokens.device)
    replaced = rand_tensor(tokens.shape, generator, tokens.device) <= noise_level.view(-1, *[1] * (tokens.ndim - 1))
    if noise is None:
        noise = random_tokens(num_tokens, tokens.shape, generator, tokens.device)
    return torch.where(replaced, noise, tokens), replaced


def check_logits(logits: torch.Tensor):
    if not torch.stack(torch.aminmax(logits)).isfinite().all():
        raise ValueError(
            "The model's output has NaN or infinite logits. If it runs in float16, use bfloat16 or float32; if not, its "
            "weights are at fault."
        )


def sample_tokens(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | list[torch.Generator] | None
) -> torch.LongTensor:
    """
    Tokens `(batch_size, ...)`, each drawn from `softmax(logits / temperature)`, `(batch_size, ..., num_tokens)`,
    independently: in float32 as the published code draws them, in half precision with one random number a token, much
    faster.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        chance = 1 - rand_tensor(logits.shape[:-1], generator, logits.device)  # in (0, 1]
        rows = zip(logits.flatten(0, -2).split(64), chance.flatten().split(64))  # so many at a time stay in the cache
        return torch.cat([_inverse_cdf(part, temperature, u) for part, u in rows]).view(logits.shape[:-1])
    if isinstance(generator, list):
        check_generators(generator, len(logits))
        return torch.cat([sample_tokens(image, temperature, g) for image, g in zip(logits.split(1), generator)])
    rows = logits.flatten(0, -2)
    if (generator.device if generator else logits.device).type != "cpu":
        tokens = torch.multinomial((rows / temperature).softmax(-1), 1, generator=generator)
    elif logits.ndim == 4 and len(logits) == 1:
        tokens = _token_major_race(rows.cpu(), temperature, generator)
    else:
        tokens = torch.cat(
            [_exponential_race(part, temperature, generator) for part in rows.cpu().split(_rows_per_chunk(rows.shape[1]))]
        )
    return tokens.view(logits.shape[:-1]).to(logits.device)


def _exponential_race(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.LongTensor:
    """
    Exactly the tokens that `torch.multinomial` draws for each row, several times faster: argmaxᵢ pᵢ / Eᵢ with Eᵢ ~ Exp(1),
    the exponential race (the Gumbel-max trick without its logarithm).
    """
    return (logits / temperature).softmax(-1).div_(_standard_exponential(logits.shape, generator)).argmax(-1)


def _token_major_race(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.LongTensor:
    """
    The exponential race with random numbers in another order: those of all rows for token 0, then for token 1, and so on.
    For a single image the published code passes a transposed view to `torch.multinomial`, which draws in memory order.
    """
    best, tokens = logits.new_full(logits.shape[:1], -torch.inf), torch.zeros(len(logits), dtype=torch.long)
    highest = logits.amax(-1, keepdim=True) / temperature
    first = 0
    for part in logits.split(_rows_per_chunk(len(logits)), dim=1):
        waiting = _standard_exponential(part.T.shape, generator).T.contiguous()
        race = (part / temperature).sub_(highest).exp_().div_(waiting)
        value, index = race.max(-1)
        tokens = torch.where(value > best, first + index, tokens)
        best = torch.maximum(best, value)
        first += part.shape[1]
    return tokens


def _rows_per_chunk(row_length: int) -> int:
    """How many rows of float32 stay in the processor's cache together: 2 MB."""
    return max(1, 2**19 // row_length)


def _standard_exponential(shape, generator: torch.Generator | None) -> torch.Tensor:
    """Exp(1) in float32, bit for bit as torch's `exponential_` draws it, from one uniform float64 each."""
    return torch.rand(shape, dtype=torch.float64, generator=generator).neg_().log1p_().neg_().float()


def _inverse_cdf(logits: torch.Tensor, temperature: float, chance: torch.Tensor, block: int = 128) -> torch.LongTensor:
    """
    The first token of each row, `(rows, num_tokens)`, up to which the probabilities sum to `chance`, in (0, 1]; found by the
    sums of blocks of tokens, and then within one.
    """
    if logits.shape[-1] % block:
        logits = F.pad(logits, (0, -logits.shape[-1] % block), value=-torch.inf)
    weights = logits.float()
    weights = weights.sub_(weights.amax(-1, keepdim=True)).div_(temperature).exp_().unflatten(-1, (-1, block))

    def first(cumulative, point):  # that reaches the point; one of weight 0 never is
        return (cumulative < torch.minimum(point, cumulative[:, -1:])).sum(-1, keepdim=True)

    sums = weights.sum(-1)
    cumulative = sums.cumsum(-1)
    point = chance[:, None] * cumulative[:, -1:]
    chosen = first(cumulative, point)
    within = weights.take_along_dim(chosen[..., None], 1)[:, 0].cumsum(-1)
    rest = point - (cumulative - sums).gather(-1, chosen)
    tiny = torch.finfo(rest.dtype).tiny  # rounding may leave less than nothing
    return (chosen * block + first(within, rest.clamp(min=tiny)))[:, 0]
