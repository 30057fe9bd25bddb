import pytest
import torch
from conftest import tiny_pipeline

from paella_diffusers import PaellaConfidenceScheduler, PaellaScheduler
from paella_diffusers.schedulers.scheduling_paella_confidence import halton_order


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def certain_logits(tokens: torch.LongTensor, confidence: torch.Tensor, num_tokens: int = 8) -> torch.Tensor:
    """Logits that at a low temperature give `tokens`, the surer the higher `confidence` is."""
    return torch.nn.functional.one_hot(tokens, num_tokens) * (3 + confidence[..., None])


def step(scheduler, level: int, **kwargs):
    """A step from level to next of four, on two rows of twenty tokens whose confidence rises along the row."""
    scheduler.set_timesteps(4, temperature=0.05)
    tokens, noise = torch.full((2, 20), 3), torch.full((2, 20), 5)
    confidence = torch.arange(20.0).expand(2, 20) / 10
    call = {"noise": noise, "generator": seeded()} | kwargs
    return scheduler.step(certain_logits(tokens, confidence), scheduler.timesteps[level], tokens, **call)


def test_the_least_confident_are_noise_again():
    scheduler = PaellaConfidenceScheduler(choice_temperature=0.0)
    for level, count in ((0, 15), (1, 10), (2, 5), (3, 0)):
        output = step(scheduler, level)
        assert (output.sampled_tokens == 3).all()
        assert (output.prev_sample[:, :count] == 5).all() and (output.prev_sample[:, count:] == 3).all()


def test_chance_in_the_ranking():
    ranked = step(PaellaConfidenceScheduler(choice_temperature=0.0), 1).prev_sample
    drawn = step(PaellaConfidenceScheduler(choice_temperature=50.0), 1).prev_sample
    assert (drawn == 5).sum(1).tolist() == [10, 10] and not torch.equal(drawn, ranked)
    assert not torch.equal(drawn[0], drawn[1])
    again = step(PaellaConfidenceScheduler(choice_temperature=50.0), 1, generator=[seeded(1), seeded(0)]).prev_sample
    alone = step(PaellaConfidenceScheduler(choice_temperature=50.0), 1, generator=[seeded(0), seeded(1)]).prev_sample
    assert torch.equal(again[1], alone[0])  # each image from its own generator


def test_known_tokens_are_never_noise():
    mask = torch.zeros(2, 20)
    mask[:, 4:8] = 1
    output = step(PaellaConfidenceScheduler(choice_temperature=0.0), 1, mask=mask)
    assert (output.prev_sample == 5).nonzero()[:, 1].tolist() == [4, 5, 4, 5]  # half of what is free


@pytest.mark.parametrize("size", [(4, 5), (8, 8), (1, 20), (5, 4)])
def test_halton_order_is_a_permutation_that_covers(size):
    order = halton_order(*size)
    assert sorted(order.flatten().tolist()) == list(range(order.numel()))
    if size == (8, 8):  # the first quarter has cells in every quadrant, the published method's point
        early = order < 16
        assert all(part.any() for half in early.chunk(2) for part in half.chunk(2, dim=1))


def test_halton_keeps_the_first_positions():
    scheduler = PaellaConfidenceScheduler(ranking="halton")
    output = step(scheduler, 1, grid_size=(4, 5))
    assert torch.equal(output.prev_sample[0].view(4, 5) == 3, halton_order(4, 5) < 10)
    for grid_size, message in (
        (None, r"needs `grid_size`, \(height, width\) of the 20 tokens, got None"),
        ("ab", "got 'ab'"),
        ((4, 4), "`grid_size` must have 20 tokens"),
        (("a", 5), "`grid_size` must be an integer of at least 1, got 'a'"),
        ((-4, -5), "`grid_size` must be an integer of at least 1, got -4"),
    ):
        with pytest.raises(ValueError, match=message):
            step(scheduler, 1, grid_size=grid_size)


def test_it_swaps_with_the_published_sampler_and_draws_in_every_ranking():
    pipe = tiny_pipeline(prior=None, prior_scheduler=None).to(torch.float64)
    pipe.scheduler = PaellaScheduler(num_vq_embeddings=32, temperature=(1.2, 0.2), noise_source="fresh")
    pipe.scheduler = PaellaConfidenceScheduler.from_config(pipe.scheduler.config)
    assert tuple(pipe.scheduler.config.temperature) == (1.2, 0.2) and pipe.scheduler.config.noise_source == "fresh"
    for ranking in ("confidence", "halton"):
        pipe.scheduler = PaellaConfidenceScheduler.from_config(pipe.scheduler.config, ranking=ranking)
        call = {"num_inference_steps": 3, "height": 16, "width": 48, "output_type": "latent"}
        both = pipe(["a", "b"], generator=[seeded(0), seeded(1)], **call).images
        assert torch.equal(both[1:], pipe("b", generator=[seeded(1)], **call).images)
