"""Schedulers of other makers in the pipeline: the interface announced for diffusers' own, and one of a user's."""

from dataclasses import dataclass

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DiscreteDDIMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from schedulers.stand_in import DescendingDDIMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from paella_diffusers import PaellaImg2ImgPipeline, PaellaInpaintPipeline, PaellaScheduler
from paella_diffusers.sampling.steppers import DiscreteStepper, InversionStepper


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(pipe, prompt="a", **kwargs):
    call = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent", "use_prior": False}
    return pipe(prompt, **call | kwargs).images


@pytest.fixture
def levels(monkeypatch):
    """The noise levels that the model is told."""
    return []


def pipeline(scheduler, levels):
    pipe = tiny_pipeline(scheduler=scheduler)
    pipe.unet.register_forward_pre_hook(lambda module, args: levels.append(round(float(args[1]), 4)))
    return pipe


def test_descending_timesteps(levels):
    pipe = pipeline(DescendingDDIMScheduler(temperature=1.0), levels).to(torch.float64)
    both = tokens(pipe, ["a", "bb"], generator=[seeded(0), seeded(1)])
    assert levels == [1.0, 0.75, 0.5, 0.25]
    assert torch.equal(both[1:], tokens(pipe, "bb", generator=[seeded(1)]))
    assert torch.equal(tokens(pipe), tokens(pipe)) and pipe.scheduler.step_index is None


def test_the_schedulers_own_temperature():
    pipe = tiny_pipeline(scheduler=DescendingDDIMScheduler(temperature=0.0))
    greedy = tokens(pipe)
    assert torch.equal(tokens(pipe, temperature=0.0), greedy)
    warm = tokens(pipe, temperature=(5.0, 5.0))
    assert not torch.equal(warm, greedy) and pipe.scheduler.config.temperature == 0.0
    pipe.scheduler = DescendingDDIMScheduler(temperature=5.0)
    assert torch.equal(tokens(pipe), warm)
    pipe.scheduler = DescendingDDIMScheduler.from_config(PaellaScheduler(temperature=(5.0, 5.0)).config)  # a ramp
    assert torch.equal(tokens(pipe), warm)


def test_correctors_in_the_budget(levels):
    pipe = pipeline(DescendingDDIMScheduler(temperature=1.0, corrector_steps=1), levels)
    tokens(pipe, num_inference_steps=5)
    assert levels == [1.0, 0.6667, 0.6667, 0.3333, 0.3333]


def test_an_image_to_begin_with_and_known_tokens(levels):
    pipe = pipeline(DescendingDDIMScheduler(temperature=1.0), levels)
    image = torch.randint(32, (1, 8, 8), generator=seeded(3))
    tokens(PaellaImg2ImgPipeline.from_pipe(pipe), image=image, strength=0.5)
    assert levels == [0.5, 0.375, 0.25, 0.125]
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:5] = 1
    inpainted = tokens(PaellaInpaintPipeline.from_pipe(pipe), image=image, mask_image=mask)
    assert torch.equal(inpainted[mask == 0], image[mask == 0]) and not torch.equal(inpainted, image)


@dataclass
class Output(BaseOutput):
    prev_sample: torch.LongTensor
    sampled_tokens: torch.LongTensor


class MostLikelyScheduler(SchedulerMixin, ConfigMixin):
    """A user's own: it takes whatever it is given."""

    @register_to_config
    def __init__(self, num_inference_steps: int = 4):
        self.set_timesteps(num_inference_steps)

    def set_timesteps(self, num_inference_steps, device=None):
        self.timesteps = torch.arange(num_inference_steps)

    def step(self, model_output, timestep, sample, **kwargs):
        SEEN.append({name: value.shape for name, value in kwargs.items() if isinstance(value, torch.Tensor)})
        SEEN[-1] |= {"generator": type(kwargs["generator"])}
        return Output(model_output.argmax(-1), model_output.argmax(-1))


SEEN = []


def test_a_scheduler_with_any_keyword_is_given_all_arguments():
    pipe = PaellaInpaintPipeline.from_pipe(tiny_pipeline(scheduler=MostLikelyScheduler()))
    SEEN.clear()
    image = torch.zeros(1, 8, 8, dtype=torch.long)
    tokens(pipe, image=image, mask_image=torch.ones(1, 8, 8))
    assert len(SEEN) == 4
    assert SEEN[0] == {"noise": (1, 64), "mask": (1, 64), "codebook": (32, 4), "generator": torch.Generator}


def test_a_step_without_clean_tokens_is_refused(monkeypatch):
    @dataclass
    class Bare(BaseOutput):
        prev_sample: torch.LongTensor

    monkeypatch.setattr(MostLikelyScheduler, "step", lambda self, logits, t, sample, **kwargs: Bare(sample))
    with pytest.raises(ValueError, match="a MostLikelyScheduler, cannot sample from Paella: its `step` returns no"):
        tokens(tiny_pipeline(scheduler=MostLikelyScheduler()))


class GeneratorElsewhere(torch.Generator):
    """Says that it is on another device than the logits."""

    device = torch.device("cpu", 0)


def test_a_generator_of_another_device_seeds_one_of_the_logits():
    logits, grid = torch.randn(1, 32, 4, 4, generator=seeded(1)), torch.zeros(1, 4, 4, dtype=torch.long)

    def drawn(generator):
        stepper = DiscreteStepper(DiscreteDDIMScheduler())
        return stepper.step(logits, stepper.plan(2).steps[0], grid, grid, generator=generator)[1]

    seed = torch.randint(2**62, (1,), generator=seeded()).item()
    assert torch.equal(drawn(GeneratorElsewhere().manual_seed(0)), drawn(seeded(seed)))


def test_a_strength_that_takes_too_long_a_run_is_refused():
    stepper = DiscreteStepper(DiscreteDDIMScheduler())
    with pytest.raises(ValueError, match="`strength`=1e-09 in 12 steps takes the last of 12000000000 .*: raise `strength`"):
        stepper.plan(12, strength=1e-9)


class NoLargeIntegers(TorchDispatchMode):
    """No tensor of integers has as many as there are logits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= 32 * 16:
            assert result.dtype != torch.int64, function
        return result


def test_what_is_known_takes_no_integer_for_each_logit():
    logits, known = torch.randn(1, 32, 4, 4, generator=seeded(1)), torch.randint(32, (1, 4, 4), generator=seeded(2))
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    inversion = InversionStepper(PaellaScheduler(), 1.0, 0.1)
    inversion.clean, inversion.source_denoiser = known, lambda tokens, step: logits
    step = inversion.plan(2).steps[0]
    with NoLargeIntegers():
        prepared, _ = DiscreteStepper(DiscreteDDIMScheduler())._prepare(logits, known, mask, None)
        assert torch.equal(inversion.step(logits, step, known, known, generator=seeded())[1], known)
    rows = prepared.transpose(1, 2).view_as(logits)
    assert torch.equal(rows[:, :, :2], logits[:, :, :2])
    assert torch.equal(rows[:, :, 2:].softmax(1).argmax(1), known[:, 2:]) and rows[:, :, 2:].unique().tolist() == [0, 50]


class PlainScheduler(MostLikelyScheduler):
    """One whose `step` has no options."""

    def step(self, model_output, timestep, sample):
        return Output(model_output.argmax(-1), model_output.argmax(-1))


def test_options_that_are_not_taken():
    stepper = DiscreteStepper(PlainScheduler())
    with pytest.raises(ValueError, match="PlainScheduler takes no `temperature`"):
        stepper.plan(4, temperature=1.0)
    assert "takes no `generator`" in stepper.why_no_draw(stepper.plan(4))
    with pytest.raises(ValueError, match="`temperature` is not used by discrete inversion"):
        InversionStepper(PaellaScheduler(), 0.9, 0.1).plan(4, temperature=1.0)
