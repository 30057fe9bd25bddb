"""The sampling loop, its plan, and steppers, apart from any pipeline."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from diffusers import (
    AmusedScheduler,
    BlockRefinementScheduler,
    DDIMScheduler,
    DiscreteDDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from paella_diffusers import PaellaFlowMatchEulerScheduler, PaellaScheduler
from paella_diffusers.sampling import loop
from paella_diffusers.sampling.plan import linear_ramp
from paella_diffusers.sampling.steppers import DiscreteStepper, PaellaStepper, make_stepper


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_loop_is_short_and_imports_nothing_of_ours():
    tree = ast.parse(Path(loop.__file__).read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert all(getattr(node, "level", 0) == 0 for node in imported)
    assert len(inspect.getsource(loop.sample).splitlines()) <= 40
    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef)).body
    assert body[-1].end_lineno - body[1].lineno + 1 <= 30


def test_the_loop_with_a_toy_model():
    """A denoiser that is certain ends in its tokens; each step is told its noise level."""
    stepper = make_stepper(PaellaScheduler(num_vq_embeddings=4))
    plan = stepper.plan(5)
    levels = []

    def denoiser(tokens, step):
        levels.append(float(step.level))
        return torch.nn.functional.one_hot(torch.full_like(tokens, 2), 4).movedim(-1, 1) * 100.0

    noise = torch.randint(4, (1, 6, 6), generator=seeded())
    assert (loop.sample(denoiser, stepper, plan, noise, noise, generator=seeded()) == 2).all()
    assert levels == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    stopped = []
    on_step = lambda step, tokens, clean: (tokens, stopped.append(step.index) or step.index == 1)
    loop.sample(denoiser, stepper, plan, noise, noise, generator=seeded(), on_step=on_step)
    assert stopped == [0, 1]


def test_plans():
    plan = PaellaStepper(PaellaScheduler()).plan(4, strength=0.8)
    assert [float(step.level) for step in plan] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert [step.next_level for step in plan] == pytest.approx([0.6, 0.4, 0.2, 0])
    assert plan.start_level == 0.8 and plan.num_evaluations == 4 and [step.is_last for step in plan] == [False] * 3 + [True]
    plan = DiscreteStepper(DiscreteDDIMScheduler(corrector_steps=2)).plan(7, strength=0.5)
    assert [step.num_sweeps for step in plan] == [2, 2, 0] and plan.num_evaluations == 7
    assert [float(step.level) for step in plan] == pytest.approx([0.5, 1 / 3, 1 / 6])
    assert [float(sweep.level) for sweep in plan.steps[0].corrector_sweeps] == pytest.approx([1 / 3] * 2)
    assert linear_ramp((1.0, 0.0), 3) == [1.0, 0.5, 0.0] and linear_ramp(None, 2) == [None, None]


def test_a_stepper_leaves_the_scheduler_alone():
    scheduler = PaellaScheduler()
    before = scheduler.timesteps.clone()
    PaellaStepper(scheduler).plan(3, temperature=2.0)
    assert torch.equal(scheduler.timesteps, before)
    discrete = DiscreteDDIMScheduler(corrector_steps=1)
    DiscreteStepper(discrete).plan(3)
    assert discrete.num_inference_steps == 32


@pytest.mark.parametrize("scheduler", [PaellaFlowMatchEulerScheduler(), DiscreteDDIMScheduler()])
def test_overrides_that_a_scheduler_does_not_take_are_refused(scheduler):
    with pytest.raises(ValueError, match=f"{type(scheduler).__name__} takes no `renoise_steps`"):
        make_stepper(scheduler).plan(4, renoise_steps=2)


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (EulerDiscreteScheduler, "continuous latents"),
        (DDIMScheduler, "continuous latents"),
        (FlowMatchEulerDiscreteScheduler, "continuous latents"),
        (lambda: AmusedScheduler(mask_token_id=5), "its noise is a mask token"),
        (BlockRefinementScheduler, "its noise is a mask token"),
    ],
)
def test_schedulers_that_cannot_work_are_refused_by_name(scheduler, reason):
    scheduler = scheduler()
    with pytest.raises(
        ValueError, match=f"`scheduler`, a {type(scheduler).__name__}, cannot sample.*{reason}.*PaellaScheduler"
    ):
        make_stepper(scheduler)
