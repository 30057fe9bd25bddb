"""The order of the steps, computed exactly, without sampling."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.schedulers import ExactPosterior, exact_pipeline, total_variation
from paella_diffusers import PaellaFlowMatchEulerScheduler, PaellaFlowMatchTrapezoidalScheduler, PaellaScheduler

T_END = 0.1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Toy:
    """A distribution over grids of tokens: its exact posterior, and its noised distribution at every level."""

    def __init__(self, grids, truth):
        self.grids, self.truth, self.size = grids, truth.double(), int(grids.max()) + 1
        self.same = (grids[:, None] == grids).double()

    def likelihood(self, t):
        return ((1 - t) * self.same + t / self.size).prod(-1)

    def noised(self, t):
        return self.likelihood(t) @ self.truth

    def logits(self, t):
        joint = self.likelihood(t) * self.truth
        clean = torch.einsum("nc,clv->nlv", joint, torch.nn.functional.one_hot(self.grids, self.size).double())
        return (clean / joint.sum(1)[:, None, None]).log()

    def joint(self, by_token):
        """Probabilities of all grids from those of each token, `(..., length, size)`: tokens jump independently."""
        return torch.stack([by_token[..., place, :][..., self.grids[:, place]] for place in range(by_token.shape[-2])]).prod(
            0
        )

    def stage(self, scheduler, index, logits):
        """Probabilities of all next grids from every grid, `(grids, grids)`, after a stage."""
        log_rates, jump, _ = scheduler._jumps(logits, index, self.grids)
        by_token = jump[..., None] * log_rates.softmax(-1)
        return self.joint(by_token.scatter_add(-1, self.grids[..., None], 1 - jump[..., None]))

    def trapezoidal(self, steps, grid="linear", theta=0.5):
        """The distribution at `T_END` after so many steps of two evaluations."""
        even = torch.linspace(0, 1, steps + 1).double()
        levels = 1 - even * (1 - T_END) if grid == "linear" else T_END**even
        middles = levels[:-1] ** (1 - theta) * levels[1:] ** theta
        scheduler = PaellaFlowMatchTrapezoidalScheduler(theta=theta, num_vq_embeddings=self.size)
        scheduler.set_timesteps(timesteps=[*torch.stack([levels[:-1], middles], 1).flatten().tolist(), T_END])
        share = self.noised(1.0)
        for index in range(0, 2 * steps, 2):
            before, middle = scheduler._levels[index : index + 2]
            start_logits, logits = self.logits(before), self.logits(middle)
            first = self.stage(scheduler, index, start_logits)
            following = torch.zeros_like(share)
            for row, (weight, start) in enumerate(
                zip(share, self.grids)
            ):  # the second stage depends on where the first began
                scheduler._jumps(start_logits[row].expand_as(logits), index, start.expand_as(self.grids))
                following += weight * first[row] @ self.stage(scheduler, index + 1, logits)
            share = following
        return share

    def error(self, share):
        return 0.5 * (share - self.noised(T_END)).abs().sum().item()


ONE_TOKEN = Toy(torch.arange(5)[:, None], torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]))


@pytest.mark.parametrize("grid", ["linear", "logarithmic"])
@pytest.mark.parametrize("theta", [0.5, 0.4])
def test_second_order_on_one_token(grid, theta):
    steps = [8, 16, 32, 64]
    errors = [ONE_TOKEN.error(ONE_TOKEN.trapezoidal(n, grid, theta)) for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope <= -1.8, errors


def test_nearer_than_euler_with_as_many_evaluations():
    """On 2 × 2 tokens, where jumps of one token change the predictions of others."""
    model = ExactPosterior()
    toy, evaluations = Toy(model.grids, model.truth), 16
    euler = toy.noised(1.0)
    levels = torch.linspace(1, T_END, evaluations + 1).double().tolist()
    for before, after in pairwise(levels):
        jump = 1 - after / before
        by_token = jump * toy.logits(before).softmax(-1)
        own = torch.full_like(by_token[..., :1], 1 - jump)
        euler = euler @ toy.joint(by_token.scatter_add(-1, toy.grids[..., None], own))
    assert toy.error(toy.trapezoidal(evaluations // 2)) < 0.1 * toy.error(euler)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_draw_from_the_rates(dtype):
    """Both stages and the last step, with tokens that jumped and tokens that did not."""
    scheduler, size, samples = PaellaFlowMatchTrapezoidalScheduler(), 4, 40_000
    scheduler.set_timesteps(3)
    first, second = torch.tensor([0.5, 1.0, 0.0, -1.0]), torch.tensor([0.0, 1.0, 1.0, -1.0])
    start, moved = torch.zeros(1, samples, dtype=torch.long), torch.zeros(1, samples, dtype=torch.long)
    moved[:, samples // 2 :] = 2
    logits = lambda row: row.to(dtype).expand(1, samples, size)
    share = lambda tokens: torch.bincount(tokens, minlength=size) / len(tokens)
    p, q = first.softmax(0), second.softmax(0)
    t, middle, s = scheduler._levels[:3]

    def expected(rates, own, level, following):
        rates = rates.index_fill(0, torch.tensor(own), 0)
        jump = 1 - (following / level) ** rates.sum()
        return (jump * rates / rates.sum()).index_fill(0, torch.tensor(own), 1 - jump)

    output = scheduler.step(logits(first), t, start, generator=seeded())
    close = lambda tokens, shares: torch.testing.assert_close(share(tokens), shares, atol=0.015, rtol=0)
    close(output.prev_sample[0], expected(p, 0, t, middle))
    close(output.sampled_tokens[0], p)
    output = scheduler.step(logits(second), middle, moved, generator=seeded(1)).prev_sample[0]
    close(output[: samples // 2], expected((2 * q - p).clamp(min=0), 0, middle, s))
    close(output[samples // 2 :], expected(2 * q, 2, middle, s))
    output = scheduler.step(logits(second), s, moved, generator=seeded(2))
    assert torch.equal(output.prev_sample, output.sampled_tokens)
    close(output.prev_sample[0], q)


def test_levels_of_the_evaluations():
    """Two for each step; the last step has one if the number is odd."""
    scheduler = PaellaFlowMatchTrapezoidalScheduler(t_start=0.9)
    for number, levels in (
        (1, [0.9]),
        (2, [0.9, 0.45]),
        (5, [0.9, 0.54**0.5, 0.6, 0.18**0.5, 0.3]),
        (6, [0.9, 0.54**0.5, 0.6, 0.18**0.5, 0.3, 0.15]),
    ):
        scheduler.set_timesteps(number)
        assert scheduler.timesteps.tolist() == pytest.approx(levels)
    scheduler = PaellaFlowMatchTrapezoidalScheduler(theta=0.25, t_end=0.2, time_grid="polynomial")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx([1.0, 0.8**0.25, 0.8, 0.8**0.75 * 0.2**0.25])


def test_a_certain_prediction_is_taken():
    """Where every other token has probability 0, tokens stay."""
    scheduler = PaellaFlowMatchTrapezoidalScheduler()
    sample = torch.randint(8, (2, 30), generator=seeded())
    logits = torch.full((2, 30, 8), -torch.inf).scatter(-1, sample[..., None], 0.0)
    for level in scheduler.timesteps:
        output = scheduler.step(logits, level, sample, generator=seeded())
        assert torch.equal(output.prev_sample, sample) and torch.equal(output.sampled_tokens, sample)


def test_a_second_stage_follows_its_first():
    scheduler = PaellaFlowMatchTrapezoidalScheduler()
    logits, tokens = torch.randn(1, 9, 8), torch.zeros(1, 9, dtype=torch.long)
    second = scheduler.timesteps[1]
    with pytest.raises(ValueError, match="is the second stage of a step: call `step` with its first stage, 1, before"):
        scheduler.step(logits, second, tokens)
    scheduler.step(logits, 1.0, tokens)
    scheduler.step(logits, second, tokens)
    with pytest.raises(ValueError, match="is the second stage of a step"):  # of another, by now
        scheduler.step(logits, second, tokens)


def test_converges_to_the_truth_in_fewer_evaluations():
    pipe = exact_pipeline()
    base = PaellaScheduler(num_vq_embeddings=3, temperature=1.0).config
    pipe.scheduler = PaellaFlowMatchEulerScheduler.from_config(base)
    assert total_variation(pipe, steps=16, samples=20_000) > 0.025
    pipe.scheduler = PaellaFlowMatchTrapezoidalScheduler.from_config(base)
    for steps in (16, 17):
        assert total_variation(pipe, steps=steps, samples=20_000) < 0.025
