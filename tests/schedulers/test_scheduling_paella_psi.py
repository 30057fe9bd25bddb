"""κ = 0 is renoising, κ = 1 ancestral sampling; the exact distributions are computed, not sampled."""

import itertools

import pytest
import torch
from diffusers import DiscreteDDIMScheduler
from scipy.stats import chi2_contingency
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.schedulers import ExactPosterior, exact_pipeline
from paella_diffusers import PaellaPsiScheduler, PaellaScheduler


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def logits_and_tokens(dtype=torch.float32):
    logits = torch.randn(2, 16, 6, 6, generator=seeded(1)) * 3
    return logits.to(dtype), torch.randint(16, (2, 6, 6), generator=seeded(2))


def transition(t: float, s: float, clean: torch.Tensor, kappa: float = 1.0) -> torch.Tensor:
    """
    The probabilities of the next token, `(..., V, V)` by present and next one, by the scheduler's routes from those of the
    prediction, `(..., V, V)` by present and predicted one.
    """
    size = clean.shape[-1]
    scheduler = PaellaPsiScheduler(kappa=kappa, num_vq_embeddings=size)
    scheduler.set_timesteps(timesteps=[t, s, s / 2])
    agrees = torch.eye(size, dtype=torch.bool)
    renoise, stay = (route.double() for route in scheduler._routes(0, agrees, size))
    given = torch.eye(size).double() * (1 - renoise - stay)[..., None] + renoise[..., None] / size  # present, x̂, next
    given = given + stay[..., None] * torch.eye(size).double()[:, None]
    return torch.einsum("...xc,xcy->...xy", clean, given)


def bayes(t: float, s: float, size: int) -> torch.Tensor:
    """q(x_s | x_t, x₀), `(V, V, V)` by x_t, x₀ and x_s, from the forward process alone."""
    kernel = lambda survival: torch.eye(size).double() * survival + (1 - survival) / size  # from rows to columns
    joint = kernel(1 - s)[None] * kernel((1 - t) / (1 - s)).T[:, None]  # x_t, x₀, x_s
    return joint / joint.sum(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kappa_zero_is_renoising_with_fresh_noise_draw_for_draw(dtype):
    psi, paella = PaellaPsiScheduler(kappa=0.0), PaellaScheduler(noise_source="fresh")
    logits, tokens = logits_and_tokens(dtype)
    mask = torch.rand(2, 6, 6, generator=seeded(3)) < 0.7
    for known, generators in itertools.product((None, mask), (lambda: seeded(), lambda: [seeded(4), seeded(5)])):
        ours, theirs = generators(), generators()
        for level in paella.timesteps:
            first = psi.step(logits, level, tokens, mask=known, generator=ours)
            second = paella.step(logits, level, tokens, mask=known, generator=theirs)
            assert torch.equal(first.prev_sample, second.prev_sample)
            assert torch.equal(first.sampled_tokens, second.sampled_tokens)
            tokens = second.prev_sample


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.7, 0.3), (0.05, 0.01)])
def test_kappa_one_is_the_posterior_of_the_noise_process(t, s):
    """As Bayes' rule gives it, and as `DiscreteDDIMScheduler` draws it."""
    for size in (2, 5, 8192 // 64):
        clean = torch.eye(size).double().expand(size, -1, -1).transpose(0, 1)  # each prediction with each present token
        ours = transition(t, s, clean)  # x₀, x_t, x_s
        torch.testing.assert_close(ours, bayes(t, s, size).transpose(0, 1), atol=1e-6, rtol=0)
        mixed = transition(t, s, clean, kappa=0.25)
        corrector = torch.eye(size).double()[:, None] * (1 - s) + s / size
        torch.testing.assert_close(mixed, 0.25 * ours + 0.75 * corrector.expand_as(ours), atol=1e-6, rtol=0)


class NoFloat64(TorchDispatchMode):
    """As on a device without float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim > 0:
            assert result.dtype != torch.float64, function
        return result


def test_routes_need_no_float64():
    scheduler = PaellaPsiScheduler(num_inference_steps=4, kappa=0.5)
    with NoFloat64():
        routes = scheduler._routes(1, torch.tensor([True, False]), 32)
    assert all(route.dtype == torch.float32 and route[0] != route[1] for route in routes)


def test_kappa_one_samples_as_discrete_ddim():
    """On the toy posterior: a χ² test does not tell three steps of the two apart; it does with κ = 0."""
    samples, model = 40_000, ExactPosterior()
    start = torch.randint(3, (samples, 2, 2), generator=seeded(1))
    ddim = DiscreteDDIMScheduler()
    ddim.set_timesteps(8)

    def counts(kappa=None, seed=0):
        tokens, generator = start, seeded(seed)
        psi = None if kappa is None else PaellaPsiScheduler(kappa=kappa, temperature=1.0, num_inference_steps=8)
        for index in (4, 5, 6):
            logits = model(tokens, 1 - index / 8).sample
            if psi is not None:
                tokens = psi.step(logits, psi.timesteps[index], tokens, generator=generator).prev_sample
            else:
                rows = logits.flatten(2).transpose(1, 2)
                tokens = ddim.step(rows, index, tokens.flatten(1), temperature=1.0, generator=generator).prev_sample
        return torch.bincount(model.states(tokens), minlength=81)

    theirs = counts()
    p_value = lambda kappa: chi2_contingency(torch.stack([counts(kappa, seed=2), theirs])).pvalue
    assert p_value(1.0) > 0.001
    assert p_value(0.0) < 1e-6


def test_all_of_a_run_is_ancestral_sampling_exactly():
    """On the toy posterior, without sampling: the distribution over the 81 grids, by the routes and by Bayes' rule."""
    model = ExactPosterior()
    grids, size = model.grids, 3
    levels = [1.0, 0.75, 0.5, 0.25]

    def run(step):
        share = torch.full((81,), 1 / 81).double()
        for t, s in itertools.pairwise(levels):
            clean = model(grids.view(-1, 2, 2), t).sample.double().softmax(1).flatten(2).transpose(1, 2)  # grid, place, x̂
            following = step(t, s, clean)  # grid, place, next token
            share = share @ torch.stack([following[:, place][:, grids[:, place]] for place in range(4)]).prod(0)
        return share

    def ours(kappa):
        def step(t, s, clean):
            by_present = transition(t, s, clean[:, :, None].expand(-1, -1, size, -1), kappa)
            return by_present.take_along_dim(grids[..., None, None], 2)[:, :, 0]

        return step

    def exact(t, s, clean):
        return torch.einsum("nlc,nlcy->nly", clean, bayes(t, s, size)[grids])

    torch.testing.assert_close(run(ours(1.0)), run(exact), atol=1e-6, rtol=0)
    assert 0.5 * (run(ours(0.0)) - run(exact)).abs().sum() > 0.01


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 32])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.5])
def test_leave_one_out_temperature_is_exact_for_a_token_alone(kappa, steps, temperature):
    """Without sampling: from the exact posterior of a prior p, the result is p^(1/T); plain temperature is biased."""
    prior = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).double()
    size, identity = len(prior), torch.eye(5).double()
    wanted = prior ** (1 / temperature) / (prior ** (1 / temperature)).sum()

    def result(leave_one_out):
        scheduler = PaellaPsiScheduler(
            steps, kappa=kappa, temperature=temperature, leave_one_out_temperature=leave_one_out, num_vq_embeddings=size
        )
        share = torch.full((size,), 1 / size).double()
        for index, t in enumerate(scheduler._levels[:-1]):
            likelihood = (1 - t) * identity + t / size  # present, clean
            logits = (likelihood * prior).log()[None]
            present = torch.arange(size)[None]
            clean = (scheduler._tempered(logits, present, index) / scheduler.temperatures[index]).softmax(-1)[0]
            if index + 1 == steps:
                return share @ clean
            share = share @ transition(t, scheduler._levels[index + 1], clean, kappa)

    torch.testing.assert_close(result(True), wanted, atol=1e-6, rtol=0)
    if temperature != 1 and steps > 1:
        assert 0.5 * (result(False) - wanted).abs().sum() > 0.01


def test_leave_one_out_temperature_at_high_temperatures_in_float16():
    """The present token's logit would be beyond the largest number: it gets its share, δ against all others."""
    scheduler = PaellaPsiScheduler(temperature=1e5, leave_one_out_temperature=True, kappa=0.0)
    scheduler.set_timesteps(timesteps=[0.5, 0.25])
    tokens = torch.zeros(1, 10_000, dtype=torch.long)
    drawn = scheduler.step(torch.zeros(1, 10_000, 16).half(), 0.5, tokens, generator=seeded()).sampled_tokens
    assert abs((drawn == 0).double().mean() - 17 / (17 + 15)) < 0.02


def test_leave_one_out_temperature_in_a_pipeline():
    """With several tokens it is not exact, but nearer to p^(1/T) than plain temperature."""
    pipe = exact_pipeline()
    wanted = pipe.unet.truth**2 / (pipe.unet.truth**2).sum()

    def distance(**settings):
        pipe.scheduler = PaellaPsiScheduler(kappa=1.0, num_vq_embeddings=3, temperature=0.5, **settings)
        tokens = pipe(
            prompt_embeds=torch.zeros(1, 1, 1),
            num_inference_steps=16,
            num_images_per_prompt=10_000,
            guidance_scale=None,
            generator=seeded(),
            output_type="latent",
        ).images
        share = torch.bincount(pipe.unet.states(tokens), minlength=81) / 10_000
        return 0.5 * (share - wanted).abs().sum().item()

    assert distance(leave_one_out_temperature=True) < 0.5 * distance()
