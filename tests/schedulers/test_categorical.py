import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from paella_diffusers import PaellaConfidenceScheduler, PaellaFlowMatchEulerScheduler, PaellaScheduler
from paella_diffusers.schedulers.categorical import add_uniform_noise, sample_tokens
from paella_diffusers.schedulers.scheduling_utils import MAX_TEMPERATURE, MIN_TEMPERATURE


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


class GeneratorElsewhere(torch.Generator):
    """Says that it is on an accelerator."""

    device = torch.device("cuda")


def test_elsewhere_than_on_a_cpu_torch_draws(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)  # there may be no such device here
    logits = torch.randn(2, 3, 7, generator=seeded(1))
    expected = torch.multinomial((logits / 0.5).softmax(-1).flatten(0, 1), 1, generator=seeded()).view(2, 3)
    assert torch.equal(sample_tokens(logits, 0.5, GeneratorElsewhere().manual_seed(0)), expected)
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        sample_tokens(logits.log(), 0.5, GeneratorElsewhere())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_temperatures(dtype):
    """The lowest that schedulers take gives the most likely token, the highest uniform tokens."""
    logits = (torch.randn(1, 20_000, 8, generator=seeded(1)) * 10_000).to(dtype)
    most_likely = logits == logits.amax(-1, keepdim=True)
    for return_log_probs in (False, True):
        low, high = (sample_tokens(logits, t, seeded(), return_log_probs) for t in (MIN_TEMPERATURE, MAX_TEMPERATURE))
        low, high = (low[0], high[0]) if return_log_probs else (low, high)
        assert most_likely.gather(-1, low[..., None]).all()
        assert (torch.bincount(high.flatten(), minlength=8) / 20_000 - 1 / 8).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_log_probs_are_those_at_temperature_one(dtype, temperature, monkeypatch):
    monkeypatch.setattr("paella_diffusers.schedulers.categorical._rows_per_chunk", lambda size, device: 7)
    logits = (torch.randn(2, 6, 5, 300, generator=seeded(1)) * 3).to(dtype)
    logits[..., 7] = -torch.inf
    tokens, log_probs = sample_tokens(logits, temperature, [seeded(2), seeded(3)], return_log_probs=True)
    expected = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(log_probs.double(), expected, atol=1e-5, rtol=1e-5)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(tokens, sample_tokens(logits, temperature, [seeded(2), seeded(3)]))


@pytest.mark.parametrize("scheduler", [PaellaScheduler, PaellaConfidenceScheduler, PaellaFlowMatchEulerScheduler])
def test_half_precision_logits_are_never_float32_all_at_once(scheduler):
    logits, tokens = torch.randn(1, 4096, 32, 32, generator=seeded()).bfloat16(), torch.zeros(1, 32, 32, dtype=torch.long)
    logits = logits.contiguous(memory_format=torch.channels_last)  # as the U-Net returns them
    noise = {} if scheduler is PaellaFlowMatchEulerScheduler else {"noise": tokens}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        scheduler().step(logits, 1.0, tokens, **noise)
    largest = max(event.cpu_memory_usage for event in profiler.events())
    assert 0 < largest <= 4 * logits.numel() / 8


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
    monkeypatch.setattr("paella_diffusers.schedulers.categorical._rows_per_chunk", lambda size, device: 3)
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
