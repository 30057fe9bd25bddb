import pytest
import torch

from paella_diffusers.schedulers.categorical import add_uniform_noise, sample_tokens


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [5, 128, 300])
def test_tokens_are_drawn_from_the_softmax(dtype, num_tokens):
    """Shares of 200,000 draws of one distribution, against its probabilities."""
    logits = (torch.randn(num_tokens, generator=seeded(1)) * 3).to(dtype)
    logits[3] = -1000.0
    tokens = sample_tokens(logits.expand(2, 100_000, num_tokens), 0.8, seeded())
    probabilities = (logits.double() / 0.8).softmax(0)
    share = torch.bincount(tokens.flatten(), minlength=num_tokens) / tokens.numel()
    assert share[3] == 0 and len(share) == num_tokens
    assert (share - probabilities).abs().sum() < 0.03


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-24])
def test_what_has_no_probability_is_never_drawn(monkeypatch, chance):
    """Whatever the random number: the first and the last tokens, and those before a block, are impossible here."""
    logits = torch.full((1, 3, 256), -1000.0)
    logits[:, :, 130:140] = 0.0
    monkeypatch.setattr(torch, "rand", lambda size, **kwargs: torch.full(size, chance))
    tokens = sample_tokens(logits.bfloat16(), 1.0, None)
    assert ((tokens >= 130) & (tokens < 140)).all()


def test_half_precision_draws_are_those_of_their_own_generators():
    logits = torch.randn(2, 50, 300, generator=seeded(1)).bfloat16()
    both = sample_tokens(logits, 1.0, [seeded(2), seeded(3)])
    assert torch.equal(both[1:], sample_tokens(logits[1:], 1.0, [seeded(3)]))
    assert torch.equal(both, sample_tokens(logits, 1.0, [seeded(2), seeded(3)]))


@pytest.mark.parametrize("shape", [(2, 7, 300), (1, 40, 300), (2, 6, 5, 300), (1, 6, 5, 300)])
def test_float32_draws_are_those_of_multinomial(monkeypatch, shape):
    """Token for token, in whatever parts; a single grid as a view, as the published code has it, of `(1, tokens, h, w)`."""
    logits = torch.randn(shape, generator=seeded(1)) * 3
    logits[..., 7] = -torch.inf
    rows = (logits / 0.7).softmax(-1).flatten(0, -2)
    if len(shape) == 4 and shape[0] == 1:
        rows = rows.T.contiguous().T
    generator, ours = seeded(), seeded()
    expected = torch.multinomial(rows, 1, generator=generator).view(shape[:-1])
    assert torch.equal(sample_tokens(logits, 0.7, ours), expected)
    assert torch.equal(generator.get_state(), ours.get_state())
    torch.manual_seed(5)
    expected = torch.multinomial(rows, 1).view(shape[:-1])
    monkeypatch.setattr("paella_diffusers.schedulers.categorical._rows_per_chunk", lambda size: 3)
    torch.manual_seed(5)
    assert torch.equal(sample_tokens(logits, 0.7, None), expected)


def test_forward_noising_draws_the_mask_then_the_noise():
    tokens, levels = torch.full((2, 8, 9), 40), torch.tensor([0.3, 0.9])
    noised, replaced = add_uniform_noise(tokens, levels, num_tokens=32, generator=seeded())
    generator = seeded()
    mask = torch.rand(2, 8, 9, generator=generator) <= levels[:, None, None]
    noise = torch.randint(32, (2, 8, 9), generator=generator)
    assert torch.equal(replaced, mask) and torch.equal(noised, torch.where(mask, noise, tokens))
    given, _ = add_uniform_noise(tokens, levels, noise=noise, generator=seeded())
    assert torch.equal(given, noised)
    rows, _ = add_uniform_noise(tokens, levels, num_tokens=32, generator=[seeded(1), seeded(2)])
    alone, _ = add_uniform_noise(tokens[1:], 0.9, num_tokens=32, generator=seeded(2))
    assert torch.equal(rows[1:], alone)
