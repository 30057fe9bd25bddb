"""
Do rewards steer? Exactly, on grids whose distribution is known, and in pictures of the embedded model.

    pip install ".[emoji]"
    python benchmarks/steering.py truth
    python benchmarks/steering.py emoji --log steering.jsonl

`truth` steers grids of 2 × 2 tokens towards a reward that each grid has, and prints the total variation distance between what
comes out and p(x) exp(r(x)), renormalised. For sequential Monte Carlo and best of n, p is what the sampler draws without a
reward, computed from its transition matrices. For iterative refinement it is the distribution that the model knows, since it
does not follow the sampler alone.

`emoji` draws sentences that the model was not trained on, and counts a picture as right if the nearest icon, in pixels, is one
that the sentence means. `clip` rewards similarity with the sentence, by the model's own CLIP; `judge` rewards nearness to the
icons that count as right, as a reward that knows what is wanted. Each picture is kept in the log as soon as it is drawn: a
second run goes on where the first was stopped.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.utils import make_image_grid

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from benchmarks.schedulers import TOKENS, ExactPosterior, plot, table

from paella_diffusers import (
    EMOJI_MODEL,
    BestOfN,
    ClipReward,
    IterativeRefinement,
    PaellaFlowMatchEulerScheduler,
    PaellaPipeline,
    PaellaScheduler,
    SequentialMonteCarlo,
)
from paella_diffusers.sampling.loop import sample
from paella_diffusers.sampling.steering import Steering
from paella_diffusers.sampling.steppers import make_stepper

# -------------------------------------------------------------------------------------------------- what is known exactly

FRESH = PaellaScheduler(num_vq_embeddings=TOKENS, temperature=1.0, noise_source="fresh")
EULER = PaellaFlowMatchEulerScheduler(num_vq_embeddings=TOKENS, temperature=1.0)


class ExactDenoiser:
    """The posterior of an `ExactPosterior`, without guidance."""

    def __init__(self):
        self.unet = ExactPosterior()

    def __call__(self, tokens, step):
        return self.unet(tokens, step.level).sample

    def reorder(self, rows):
        """Nothing is kept."""


def grid_rewards(unet: ExactPosterior) -> torch.Tensor:
    """A reward for each grid: tokens like to be the largest, and each grid has a taste of its own."""
    tastes = torch.randn(len(unet.grids), generator=torch.Generator().manual_seed(1))
    return (unet.grids == TOKENS - 1).sum(1) + 0.7 * tastes.double()


def sampler_distribution(unet: ExactPosterior, scheduler, steps: int) -> torch.Tensor:
    """The share of each grid in what the sampler draws, from the matrices of its steps."""
    side = unet.config.sample_size
    grids = unet.grids.view(-1, side, side)
    present = F.one_hot(unet.grids, TOKENS).double()
    share = torch.full((len(grids),), 1 / len(grids)).double()
    for step in make_stepper(scheduler).plan(steps):
        predicted = unet(grids, step.level).sample.double().softmax(1).flatten(2).transpose(1, 2)
        level, after = float(step.level), step.next_level
        if scheduler is FRESH:
            tokens = (1 - after) * predicted + after / TOKENS
        else:
            tokens = (1 - after / level) * predicted + after / level * present
        chosen = torch.stack([tokens[:, place, unet.grids[:, place]] for place in range(side**2)])  # place, before, after
        share = share @ chosen.prod(0)
    return share


def tilted(share: torch.Tensor, rewards: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return (share.double().log() + rewards / temperature).softmax(0)


def steered_distribution(method, scheduler, steps: int, num_particles: int, num_images: int, seed: int = 0) -> torch.Tensor:
    """The mean, over images, of the probabilities by which a picture is drawn from the particles: a share for each grid."""
    denoiser, stepper = ExactDenoiser(), make_stepper(scheduler)
    unet = denoiser.unet
    generator = torch.Generator().manual_seed(seed)
    rows, side = num_images * num_particles, unet.config.sample_size
    rewards = grid_rewards(unet)
    steering = Steering(
        method,
        lambda tokens: rewards[unet.states(tokens)],
        num_particles,
        [generator] * num_images,
        generator,
        denoiser,
        stepper,
    )
    noise = torch.randint(TOKENS, (rows, side, side), generator=generator)
    tokens = sample(denoiser, stepper, stepper.plan(steps), noise, noise, generator=generator, steer=steering)
    weights = method.final_log_weights(steering, steering.rewards(tokens)).softmax(1).flatten()
    return torch.zeros(len(rewards)).double().index_add(0, unet.states(tokens), weights) / num_images


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return 0.5 * (one - other).abs().sum().item()


def truth(args):
    """Tables of total variation distances; with their statistical part: half of the images against the other half."""
    unet = ExactPosterior()
    rewards = grid_rewards(unet)
    particles = [1, 2, 4, 8, 16, 32, 64, 128]
    methods = {
        "SMC, resampled at half": SequentialMonteCarlo(),
        "SMC, resampled at each step": SequentialMonteCarlo(resample_threshold=1.0),
        "importance sampling": SequentialMonteCarlo(resample_threshold=0.0),
        "best of n": BestOfN(),
    }
    curves = {}
    for scheduler, steps in itertools.product((FRESH, EULER), (4, 16)):
        target = tilted(sampler_distribution(unet, scheduler, steps), rewards)
        rule = "PaellaScheduler, fresh noise" if scheduler is FRESH else "PaellaFlowMatchEulerScheduler"
        print(f"\n{rule}, {steps} steps:\n")

        def rows(scheduler=scheduler, steps=steps, target=target, rule=rule):
            for name, method in methods.items():
                values = []
                for count in particles:
                    images = max(args.samples // count, 1)
                    halves = [steered_distribution(method, scheduler, steps, count, images // 2, seed) for seed in (0, 1)]
                    values.append((distance(sum(halves) / 2, target), distance(*halves) / 2))
                if scheduler is FRESH and steps == 4:
                    curves[name] = [value for value, _ in values]
                yield [name, *(f"{value:.3f} ± {error:.3f}" for value, error in values)]

        table(["TV with particles", *particles], rows())

    print("\nIterative refinement with 4 particles, PaellaScheduler with fresh noise:\n")
    target, numbers = tilted(unet.truth, rewards), [0, 1, 2, 4, 8, 16]

    def refined():
        for steps in (4, 16, 64):
            shares = [
                steered_distribution(IterativeRefinement(num_refinements=n), FRESH, steps, 4, args.samples // 40)
                for n in numbers
            ]
            without = distance(tilted(sampler_distribution(unet, FRESH, steps), rewards), target)
            yield [steps, *(f"{distance(share, target):.3f}" for share in shares), f"{without:.3f}"]

    table(["TV: steps, refinements", *numbers, "the sampler's own p, tilted"], refined())
    if args.plot:
        plot(args.plot, particles, curves, "total variation distance to p(x) exp(r(x))", log=True, xlabel="particles")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["truth"])
    parser.add_argument("--samples", type=int, default=200_000, help="truth: particles in all for each figure")
    parser.add_argument("--plot", type=Path, help="truth: write a plot there, such as docs/steering/truth.png")
    args = parser.parse_args()
    with torch.no_grad():
        {"truth": truth}[args.what](args)


if __name__ == "__main__":
    main()
