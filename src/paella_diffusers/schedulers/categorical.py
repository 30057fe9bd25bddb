"""Random numbers of the discrete samplers: uniform tokens, forward noising, and draws from a softmax."""

import math
from collections.abc import Callable
from typing import Literal, cast, overload

import torch
import torch.nn.functional as F

LOG2_E = math.log2(math.e)

Generators = torch.Generator | list[torch.Generator] | None  # one for all images, one for each, or torch's own


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
) -> torch.Tensor:
    """Uniform tokens in `[0, num_tokens)`, int64; the other arguments are those of [`rand_tensor`]."""
    return _random(lambda size, **kwargs: torch.randint(num_tokens, size, **kwargs), shape, generator, device)


def _random(function: Callable, shape, generator, device) -> torch.Tensor:
    check_generators(generator, shape[0])
    if isinstance(generator, list):
        return torch.cat([_random(function, (1, *shape[1:]), one, device) for one in generator])
    return function(shape, generator=generator, device=generator.device if generator else device).to(device)


def check_generators(generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> None:
    """Refuse what is neither a generator nor None nor a list with one generator for each image."""
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"`generator` is a list of {len(generator)} for a batch of {batch_size}: pass one for each image.")


def add_uniform_noise(
    tokens: torch.Tensor,
    noise_level: float | torch.Tensor,
    num_tokens: int | None = None,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
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
        noise = random_tokens(cast(int, num_tokens), tokens.shape, generator, tokens.device)
    return torch.where(replaced, noise, tokens), replaced


@overload
def sample_tokens(
    logits: torch.Tensor, temperature: float, generator: Generators = None, return_log_probs: Literal[False] = False
) -> torch.Tensor: ...
@overload
def sample_tokens(
    logits: torch.Tensor, temperature: float, generator: Generators = None, *, return_log_probs: Literal[True]
) -> tuple[torch.Tensor, torch.Tensor]: ...
def sample_tokens(
    logits: torch.Tensor,
    temperature: float,
    generator: torch.Generator | list[torch.Generator] | None = None,
    return_log_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    Draw each position's token from `softmax(logits / temperature)`, independently.

    In float32 the tokens are those of the published code, which needs a random number for every logit. In half precision one
    random number a position is drawn, which is several times faster.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, ..., num_tokens)`): -inf excludes a token.
        temperature (`float`): Above 0.
        generator (`torch.Generator` or a list with one for each row of the batch, *optional*): See [`rand_tensor`].
        return_log_probs (`bool`, defaults to `False`):
            Also return the tokens' log-probabilities at temperature 1, in at least float32.

    Returns:
        Tokens `(batch_size, ...)`, int64; with `return_log_probs` a tuple of them and their log-probabilities.

    Raises:
        ValueError: If logits are NaN or +inf, or all of a position are -inf.
    """
    check_generators(generator, len(logits))
    rows, shape = logits.flatten(0, -2), logits.shape[:-1]
    if logits.dtype in (torch.bfloat16, torch.float16):
        uniform = 1 - rand_tensor(shape, generator, logits.device).flatten()  # in (0, 1]
        tokens, log_probs = _sample_by_inverse_cdf(rows, temperature, uniform, return_log_probs)
    else:
        if isinstance(generator, list):
            images = zip(logits.split(1), generator)
            tokens = torch.cat([_sample_as_multinomial(image, temperature, one) for image, one in images])
        else:
            tokens = _sample_as_multinomial(logits, temperature, generator)
        log_probs = _log_probs(rows, tokens.flatten()) if return_log_probs else None
    return (tokens.view(shape), log_probs.view(shape)) if return_log_probs else tokens.view(shape)


def leave_one_out_shift(logits: torch.Tensor, tokens: torch.Tensor, noise_level: float, temperature: float) -> torch.Tensor:
    r"""
    Logits for the leave-one-out temperature (https://huggingface.co/papers/2605.22765): it is applied to what the *other*
    tokens say of a clean token, and not to what its own noisy token says. The posterior is the product of the two,

        p(x₀ | x_t) ∝ p(x₀ | other tokens) q(own token | x₀),

    where the noisy token v is favoured by q(v | v) / q(v | not v) = 1 + V (1 - t) / t = exp(δ) (equation 13). The product
    p(x₀ | other tokens)^(1/T) q(own token | x₀) has the logits l / T, plus (1 - 1/T) δ for v. This function returns T times
    that, so that the caller divides by T as always.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, ..., num_tokens)`): l, also of guided predictions.
        tokens (`torch.LongTensor` of shape `(batch_size, ...)`): x_t.
        noise_level (`float`): t in (0, 1].
        temperature (`float`): T.
    """
    delta = math.log1p(logits.shape[-1] * (1 - noise_level) / noise_level)
    shift = (temperature - 1) * delta
    if abs(shift) > torch.finfo(logits.dtype).max / 2:  # in float16, at high temperatures
        logits = logits.float()
    return logits.scatter_add(-1, tokens[..., None], logits.new_full((*tokens.shape, 1), shift))


def _log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, `(rows,)`, of a token of each row."""
    size = _rows_per_chunk(logits.shape[1], logits.device)
    chunks = zip(logits.split(size), tokens[:, None].split(size))
    return torch.cat([rows.gather(1, token)[:, 0] - rows.logsumexp(1) for rows, token in chunks])


def check_logits(logits: torch.Tensor, dim: int = -1) -> None:
    """Refuse logits that `sample_tokens` would refuse, for samplers that would not notice; `dim` is that of the tokens."""
    check_finite(logits.amax(dim))


def check_finite(values: torch.Tensor) -> None:
    """Raise if one of them is NaN or infinite: each stands for a row of logits, whose fault it shows."""
    if not values.isfinite().all():
        raise ValueError(
            "The model's output has NaN or infinite logits. If it runs in float16, use bfloat16 or float32; if not, its "
            "weights are at fault."
        )


def _rows_per_chunk(row_length: int, device: torch.device) -> int:
    """How many rows to work on at a time: on a CPU 2 MB of float32, which stay in its cache, elsewhere 256 MB."""
    return max(1, 2 ** (19 if device.type == "cpu" else 26) // row_length)


# ----------------------------------------------------------------------------- float32: the tokens of `torch.multinomial`


def _sample_as_multinomial(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """
    The tokens, `(batch_size, ...)`, that `torch.multinomial` draws from rows in the memory order of the published code: of a
    single image's grid it passes a transposed view.
    """
    rows = logits.flatten(0, -2)
    if (generator.device if generator else logits.device).type != "cpu":
        rows = rows.to(generator.device) if generator else rows
        probabilities = (rows / temperature).softmax(-1)
        check_finite(probabilities[:, 0])
        tokens = torch.multinomial(probabilities, 1, generator=generator)
    elif logits.ndim == 4 and len(logits) == 1:
        tokens = _exponential_race_by_token(rows.cpu(), temperature, generator)
    else:
        chunks = rows.cpu().split(_rows_per_chunk(rows.shape[1], torch.device("cpu")))
        tokens = torch.cat([_exponential_race(chunk, temperature, generator) for chunk in chunks])
    return tokens.view(logits.shape[:-1]).to(logits.device)


def _exponential_race(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """
    Exactly the tokens that `torch.multinomial` draws for each row, several times faster: argmaxᵢ pᵢ / Eᵢ with Eᵢ ~ Exp(1),
    the exponential race (the Gumbel-max trick without its logarithm).
    """
    probabilities = (logits / temperature).softmax(-1)
    check_finite(probabilities[:, 0])  # a row with NaN or +inf, or with -inf alone, has become NaN throughout
    return probabilities.div_(_standard_exponential(logits.shape, generator)).argmax(-1)


def _exponential_race_by_token(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """The exponential race with random numbers in another order: of all rows for token 0, then for token 1, and so on."""
    best, tokens = logits.new_full(logits.shape[:1], -torch.inf), torch.zeros(len(logits), dtype=torch.long)
    highest = logits.amax(-1, keepdim=True) / temperature
    check_finite(highest)
    first = 0
    for part in logits.split(_rows_per_chunk(len(logits), logits.device), dim=1):
        waiting = _standard_exponential(part.T.shape, generator).T.contiguous()
        race = (part / temperature).sub_(highest).exp_().div_(waiting)
        value, index = race.max(-1)
        tokens = torch.where(value > best, first + index, tokens)
        best = torch.maximum(best, value)
        first += part.shape[1]
    return tokens


def _standard_exponential(shape, generator: torch.Generator | None) -> torch.Tensor:
    """Exp(1) in float32, bit for bit as torch's `exponential_` draws it, from one uniform float64 each."""
    return torch.rand(shape, dtype=torch.float64, generator=generator).neg_().log1p_().neg_().float()


# ---------------------------------------------------------------------------- half precision: inverse transform sampling


def _sample_by_inverse_cdf(
    logits: torch.Tensor, temperature: float, uniform: torch.Tensor, return_log_probs: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    A token of each row, `(rows,)`, and its log-probability at temperature 1 if wanted, in float32. This takes a second sum
    of exponentials, which is taken in base 2: exp2 needs about half the time of exp.
    """
    size = _rows_per_chunk(logits.shape[1], logits.device)
    weights = logits.new_empty((min(size, len(logits)), logits.shape[1]), dtype=torch.float32)
    powers = torch.empty_like(weights) if return_log_probs else None  # allocated once, as fresh memory costs page faults
    tokens, log_probs = [], []
    for rows, u in zip(logits.split(size), uniform.split(size)):
        x = weights[: len(rows)].copy_(rows)
        highest = x.amax(-1, keepdim=True)
        x.sub_(highest)
        if not return_log_probs:
            tokens.append(_inverse_cdf(x.div_(temperature).exp_(), u))
            continue
        total = torch.exp2(x.mul_(LOG2_E), out=powers[: len(rows)]).sum(-1)
        tokens.append(_inverse_cdf(x.div_(temperature).exp2_(), u))
        log_probs.append((rows.gather(1, tokens[-1][:, None]) - highest)[:, 0] - total.log())
    return torch.cat(tokens), torch.cat(log_probs) if return_log_probs else None


def _inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor, block: int = 128) -> torch.Tensor:
    """
    The first token of each row, `(rows, num_tokens)`, up to which the weights sum to the share `uniform`, in (0, 1], of the
    row's total: first the block of tokens is found by the sums of blocks, then the token within it.
    """
    if weights.shape[-1] % block:
        weights = F.pad(weights, (0, -weights.shape[-1] % block))
    weights = weights.unflatten(-1, (-1, block))

    def first(cumulative, point):  # that reaches the point; one of weight 0 never is
        return (cumulative < torch.minimum(point, cumulative[:, -1:])).sum(-1, keepdim=True)

    sums = weights.sum(-1)
    cumulative = sums.cumsum(-1)
    check_finite(cumulative[:, -1])
    point = uniform[:, None] * cumulative[:, -1:]
    chosen = first(cumulative, point)
    within = weights.take_along_dim(chosen[..., None], 1)[:, 0].cumsum(-1)
    rest = point - (cumulative - sums).gather(-1, chosen)
    tiny = torch.finfo(rest.dtype).tiny  # rounding may leave less than nothing
    return (chosen * block + first(within, rest.clamp(min=tiny)))[:, 0]
