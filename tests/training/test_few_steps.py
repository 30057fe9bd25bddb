import itertools

import torch

from benchmarks import few_steps as benchmark
from benchmarks import steering
from paella_diffusers import PaellaFlowMatchEulerScheduler, PaellaScheduler

PAELLA = PaellaScheduler(num_vq_embeddings=2, temperature=1.0)
EULER = PaellaFlowMatchEulerScheduler(num_vq_embeddings=2, temperature=1.0)


def test_each_round_has_less_total_correlation_and_one_step_comes_nearer():
    """Exactly, for grids of 2 × 2 tokens out of two."""
    couplings = benchmark.Couplings(num_tokens=2)
    records = list(benchmark.rounds(couplings, EULER, steps=16, count=3))
    for before, after in itertools.pairwise(records):
        for name in ("total correlation", "one step, TV", "one step, KL", "two steps, TV"):
            assert after[name] < before[name], name
    # what is drawn independently is off by at most the total correlation, before noise is averaged over
    coupling = couplings.sampled(couplings.independent(), PAELLA, 4)
    drawn = couplings.sampled(coupling, PAELLA, 1).mean(0)
    assert benchmark.divergence(coupling.mean(0), drawn) < couplings.total_correlation(coupling)


def test_couplings_are_those_of_the_samplers():
    couplings = benchmark.Couplings()  # the vocabulary of the other benchmark
    unet = benchmark.ExactPosterior()
    posterior = unet(unet.grids.view(-1, 2, 2), 0.5).sample.softmax(1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(couplings.student(couplings.independent(), 0.5).float(), posterior)
    share = couplings.sampled(couplings.independent(), steering.EULER, 4).mean(0)
    torch.testing.assert_close(share, steering.sampler_distribution(unet, steering.EULER, 4), atol=1e-6, rtol=0)
    # noise that decides the picture leaves nothing to correlate, and one step draws as many do
    certain = torch.eye(len(couplings.grids)).double()
    assert abs(couplings.total_correlation(certain)) < 1e-12
    torch.testing.assert_close(couplings.sampled(certain, benchmark.PAELLA, 1), certain)
    torch.testing.assert_close(couplings.sampled(certain, benchmark.PAELLA, 2), certain)
