import math

import pytest
import torch
from diffusers import DiscreteDDIMScheduler
from flow_matching.path import MixtureDiscreteProbPath
from flow_matching.path.scheduler import PolynomialConvexScheduler
from flow_matching.solver import MixtureDiscreteEulerSolver
from flow_matching.utils import ModelWrapper
from scipy.stats import chi2_contingency

from benchmarks.schedulers import ExactPosterior, exact_pipeline, temperature_bias, total_variation
from paella_diffusers import PaellaFlowMatchEulerScheduler, PaellaScheduler


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def certain(tokens: torch.LongTensor, num_tokens: int = 8) -> torch.Tensor:
    return torch.nn.functional.one_hot(tokens, num_tokens) * 100.0


def test_share_of_tokens_that_jump():
    scheduler = PaellaFlowMatchEulerScheduler(num_vq_embeddings=8)
    scheduler.set_timesteps(4)
    sample, clean = torch.full((2, 20_000), 5), torch.full((2, 20_000), 3)
    for level, expected in zip(scheduler.timesteps, (1 / 4, 1 / 3, 1 / 2, 1)):
        output = scheduler.step(certain(clean), level, sample, generator=seeded())
        assert (output.sampled_tokens == 3).all()
        share = (output.prev_sample == 3).float().mean().item()
        assert share == pytest.approx(expected, abs=0.01)


def test_corrector_draws_anew_from_the_path():
    rate, levels = 3.0, (1.0, 0.75)
    scheduler = PaellaFlowMatchEulerScheduler(corrector_rate=rate, num_vq_embeddings=8)
    scheduler.set_timesteps(4)
    sample, clean = torch.full((1, 50_000), 5), torch.full((1, 50_000), 3)
    following = scheduler.step(certain(clean), 1.0, sample, generator=seeded()).prev_sample
    corrected = 1 - math.exp(-rate * (levels[0] - levels[1]))
    for token, jumped, anew in ((3, 0.25, 0.25 + 0.75 / 8), (5, 0.75, 0.75 / 8), (0, 0.0, 0.75 / 8)):
        expected = (1 - corrected) * jumped + corrected * anew
        assert (following == token).float().mean().item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0, 0.75, 0.5, 0.25]),
        ({"time_grid": "cosine"}, [math.cos(math.pi * i / 8) for i in range(4)]),
        ({"time_grid": "polynomial", "time_power": 2.0}, [1.0, 15 / 16, 3 / 4, 7 / 16]),
        ({"time_grid": "polynomial", "time_power": 1.0, "t_start": 0.8}, [0.8, 0.6, 0.4, 0.2]),
    ],
)
def test_time_grids(settings, expected):
    scheduler = PaellaFlowMatchEulerScheduler(**settings)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx(expected)


def test_known_tokens_stay():
    scheduler = PaellaFlowMatchEulerScheduler(corrector_rate=5.0, num_vq_embeddings=8)
    sample, mask = torch.full((2, 6, 6), 5), torch.zeros(2, 6, 6)
    mask[:, :3] = 1
    output = scheduler.step(torch.randn(2, 8, 6, 6), scheduler.timesteps[0], sample, mask=mask, generator=seeded())
    for tokens in (output.prev_sample, output.sampled_tokens):
        assert (tokens[:, 3:] == 5).all() and not (tokens[:, :3] == 5).all()


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_leave_one_out_temperature_is_exact_for_a_token_alone(steps):
    """Without sampling: from the exact posterior of a prior p, the result is p^(1/T), renormalised."""
    assert temperature_bias(steps, 0.3, leave_one_out=True) < 1e-6
    if steps > 1:
        assert temperature_bias(steps, 0.3, leave_one_out=False) > 0.1


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        (PaellaFlowMatchEulerScheduler, {}),
        (PaellaFlowMatchEulerScheduler, {"time_grid": "cosine"}),
        (PaellaFlowMatchEulerScheduler, {"corrector_rate": 4.0}),
        (DiscreteDDIMScheduler, {}),
    ],
)
def test_converges_to_the_truth(scheduler, settings):
    pipe = exact_pipeline()
    base = PaellaScheduler(num_vq_embeddings=3, temperature=1.0).config
    pipe.scheduler = scheduler.from_config(base, **settings)
    assert total_variation(pipe, steps=1, samples=20_000) > 0.1  # independent tokens are not the truth
    assert total_variation(pipe, steps=64, samples=20_000) < 0.035
    if scheduler is PaellaFlowMatchEulerScheduler:  # and it can be told from what is near
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, temperature=0.7, **settings)
        assert total_variation(pipe, steps=64, samples=20_000) > 0.035


def test_agrees_with_the_flow_matching_package():
    """The same posterior through its solver and through ours: a χ² test does not tell the samples apart."""
    steps, samples = 128, 20_000
    pipe = exact_pipeline()
    pipe.scheduler = PaellaFlowMatchEulerScheduler.from_config(pipe.scheduler.config, temperature=1.0)
    call = {"num_inference_steps": steps, "guidance_scale": None, "output_type": "latent"}
    ours = pipe(prompt_embeds=torch.zeros(1, 1, 1), num_images_per_prompt=samples, generator=seeded(), **call).images

    class Posterior(ModelWrapper):
        def forward(self, x, t, **extras):
            return self.model(x, 1 - t[0].item()).sample.softmax(1).movedim(1, -1)

    torch.manual_seed(0)
    path = MixtureDiscreteProbPath(PolynomialConvexScheduler(n=1.0))
    model = ExactPosterior()
    solver = MixtureDiscreteEulerSolver(Posterior(model), path, model.config.num_vq_embeddings)
    theirs = solver.sample(torch.randint(model.config.num_vq_embeddings, ours.shape), step_size=1 / steps)

    def p_value(first, second) -> float:
        counts = torch.stack([torch.bincount(model.states(x), minlength=81) for x in (first, second)])
        return chi2_contingency(counts[:, counts.sum(0) >= 20]).pvalue  # where the approximation holds

    assert p_value(ours, theirs) > 0.001
    pipe.scheduler = PaellaFlowMatchEulerScheduler.from_config(pipe.scheduler.config, temperature=0.7)
    near = pipe(prompt_embeds=torch.zeros(1, 1, 1), num_images_per_prompt=samples, generator=seeded(), **call).images
    assert p_value(near, theirs) < 1e-6  # and it could have
