"""What pipelines rely on in diffusers' announced interface holds of the stand-in that they are tested with."""

import inspect

import pytest
import torch
from stand_in import DescendingDDIMScheduler, DiscreteSchedulerOutput

from benchmarks.schedulers import ExactPosterior


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_interface():
    """As in the change's own tests/schedulers/test_discrete_scheduler_contract.py."""
    scheduler = DescendingDDIMScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1.0, 0.75, 0.5, 0.25]
    logits, sample = torch.randn(2, 8, 16, generator=seeded()), torch.randint(16, (2, 8), generator=seeded())
    outputs = []
    for index, timestep in enumerate(scheduler.timesteps):
        outputs.append(scheduler.step(logits, timestep, sample, generator=seeded()))
        assert scheduler.step_index == index + 1 and scheduler.index_for_timestep(timestep) == index
    output = outputs[0]
    assert isinstance(output, DiscreteSchedulerOutput) and output.edited_mask is None
    assert output.prev_sample.shape == output.sampled_probs.shape == output.committed_mask.shape == sample.shape
    assert torch.equal(output.pred_original_sample, logits.argmax(-1))  # temperature 0
    assert torch.equal(outputs[-1].prev_sample, outputs[-1].pred_original_sample)
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None
    as_tuple = scheduler.step(logits, 1.0, sample, generator=seeded(), return_dict=False)
    assert len(as_tuple) == 6 and torch.equal(as_tuple[0], output.prev_sample)
    kinds = [(name, p.kind) for name, p in inspect.signature(scheduler.step).parameters.items()]
    assert [name for name, kind in kinds if kind is inspect.Parameter.KEYWORD_ONLY] == ["generator", "return_dict"]
    with pytest.raises(ValueError, match="`num_inference_steps` must be > 0, got 0"):
        scheduler.set_timesteps(0)


@pytest.mark.parametrize("corrector_steps", [0, 1])
def test_it_samples_from_the_truth(corrector_steps):
    """Tokens that depend on each other: right in many steps, and not in one."""
    model, samples, distances = ExactPosterior(), 20_000, {}
    for steps in (1, 64):
        generator = seeded()
        scheduler = DescendingDDIMScheduler(temperature=1.0, corrector_steps=corrector_steps)
        scheduler.set_timesteps(steps)
        logits = lambda tokens, level: model(tokens.view(-1, 2, 2), level).sample.flatten(2).transpose(1, 2)
        tokens = torch.randint(3, (samples, 4), generator=generator)
        for index, timestep in enumerate(scheduler.timesteps):
            tokens = scheduler.step(logits(tokens, timestep), timestep, tokens, generator=generator).prev_sample
            level = 1 - (index + 1) / steps
            if corrector_steps and level > 0:
                tokens = scheduler.step_correct(logits(tokens, level), timestep, tokens, generator=generator).prev_sample
        share = torch.bincount(model.states(tokens), minlength=len(model.truth)) / samples
        distances[steps] = 0.5 * (share - model.truth).abs().sum().item()
    assert distances[1] > 0.1 and distances[64] < 0.04
