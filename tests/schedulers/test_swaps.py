"""What all schedulers have in common, diffusers' two for discrete tokens included."""

import itertools
import logging

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DiscreteDDIMScheduler, EntropyBoundScheduler

from paella_diffusers import (
    PaellaConfidenceScheduler,
    PaellaFlowMatchEulerScheduler,
    PaellaImg2ImgPipeline,
    PaellaInpaintPipeline,
    PaellaInversionPipeline,
    PaellaPipeline,
    PaellaScheduler,
)

OURS = [PaellaScheduler, PaellaConfidenceScheduler, PaellaFlowMatchEulerScheduler]
ALL = [*OURS, DiscreteDDIMScheduler, EntropyBoundScheduler]
SETTINGS = {"t_start": 0.9, "temperature": (0.9, 0.4), "num_inference_steps": 5, "num_vq_embeddings": 32}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(prior=None, prior_scheduler=None)


def draw(pipe, generator=None, **kwargs):
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"} | kwargs
    return pipe("a", generator=generator or seeded(), **call).images


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(ALL, 2)))
def test_swaps_keep_what_is_common_and_warn_of_nothing(first, second, caplog):
    settings = SETTINGS if first in OURS else {"num_inference_steps": 5}
    origin = first(**settings)
    with caplog.at_level(logging.WARNING, "diffusers"):
        logging.getLogger("diffusers").propagate = True
        swapped = second.from_config(origin.config)
        back = first.from_config(swapped.config)
    assert not caplog.records
    for name in settings.keys() & swapped.config.keys():
        assert swapped.config[name] == origin.config[name]
    assert type(back) is first and all(back.config[name] == value for name, value in settings.items())
    if first in OURS and second in OURS:
        assert torch.equal(swapped.timesteps, origin.timesteps)


@pytest.mark.parametrize("scheduler", ALL)
@pytest.mark.parametrize("steps", [1, 3])
def test_every_task_with_every_scheduler(pipe, scheduler, steps):
    """Known tokens stay, also in a run from a weaker noise level, and seeds decide."""
    image = torch.randint(32, (1, 8, 8), generator=seeded(3))
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:5, 1:6] = 1
    scheduler = scheduler.from_config({"num_vq_embeddings": 32} if scheduler in OURS else {})
    for task, arguments in (
        (PaellaPipeline, {}),
        (PaellaImg2ImgPipeline, {"image": image, "strength": 0.6}),
        (PaellaInpaintPipeline, {"image": image, "mask_image": mask}),
        (PaellaInpaintPipeline, {"image": image, "mask_image": mask, "strength": 0.5}),
        (PaellaInversionPipeline, {"image": image, "source_prompt": "b"}),
    ):
        task = task.from_pipe(pipe, scheduler=scheduler)
        tokens = draw(task, num_inference_steps=steps, **arguments)
        assert tokens.shape == (1, 8, 8) and tokens.min() >= 0 and tokens.max() < 32
        assert torch.equal(tokens, draw(task, num_inference_steps=steps, **arguments))
        if "mask_image" in arguments:
            assert torch.equal(tokens[mask == 0], image[mask == 0])


@pytest.mark.parametrize("scheduler", OURS)
def test_common_behaviour(scheduler, tmp_path):
    ours = scheduler(num_vq_embeddings=16, temperature=1.0)
    ours.save_pretrained(tmp_path)
    again = scheduler.from_pretrained(tmp_path)
    assert type(again) is scheduler and again.config.temperature == 1.0

    logits, tokens = torch.randn(2, 16, 6, 6, generator=seeded(1)) * 3, torch.randint(16, (2, 6, 6), generator=seeded(2))
    call = {"noise": tokens.flip(1)} if scheduler is not PaellaFlowMatchEulerScheduler else {}
    step = lambda **kwargs: ours.step(logits, 1.0, tokens, **call | {"generator": seeded()} | kwargs)
    first = step()
    ours.set_timesteps(3)
    ours.set_timesteps(12)  # nothing of a run is left for the next
    assert torch.equal(step().prev_sample, first.prev_sample)
    assert torch.equal(step(return_dict=False)[0], first.prev_sample)
    flat = {name: value.flatten(1) for name, value in call.items()}
    rows = ours.step(logits.flatten(2).transpose(1, 2), 1.0, tokens.flatten(1), generator=seeded(), **flat)
    assert torch.equal(rows.prev_sample.view_as(tokens), first.prev_sample)
    assert ours.step(logits.bfloat16(), 1.0, tokens, generator=seeded(), **call).sampled_tokens.dtype == torch.int64
    both = step(generator=[seeded(5), seeded(6)]).prev_sample
    assert torch.equal(step(generator=[seeded(7), seeded(6)]).prev_sample[1], both[1])
    for value in (float("nan"), float("inf")):
        broken = logits.clone()
        broken[1, 3, 2, 2] = value
        with pytest.raises(ValueError, match="`model_output` has NaN or infinite logits"):
            ours.step(broken, 1.0, tokens, **call)
    with pytest.raises(ValueError, match="`timestep` must be one of `timesteps`"):
        ours.step(logits, 0.12345, tokens, **call)
    noised = ours.add_noise(tokens, None, torch.tensor([0.0, 1.0]), seeded())
    assert torch.equal(noised[0], tokens[0]) and not torch.equal(noised[1], tokens[1])


# ------------------------------------------------------------------------------------------------ what pipelines add


@pytest.mark.parametrize(
    ("steps", "corrector_steps", "predictor", "sweeps"), [(12, 1, 7, 5), (12, 2, 6, 6), (1, 1, 1, 0), (5, 4, 5, 0)]
)
def test_corrector_sweeps_are_part_of_the_budget(pipe, steps, corrector_steps, predictor, sweeps):
    """As in DiffusionGemmaPipeline: as many predictor steps as it allows are corrected, the first."""
    task = PaellaPipeline.from_pipe(pipe, scheduler=DiscreteDDIMScheduler(corrector_steps=corrector_steps, corrector_k=4))
    levels, corrected = [], []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: levels.append(float(args[1])))
    sweep = task.scheduler.step_correct
    task.scheduler.step_correct = lambda logits, timestep, *args, **kw: (
        corrected.append(int(timestep)) or sweep(logits, timestep, *args, **kw)
    )
    draw(task, num_inference_steps=steps, temperature=1.0)
    handle.remove()
    assert len(levels) == steps and len(corrected) == sweeps and task.num_timesteps == predictor
    assert all(timestep < sweeps / corrector_steps for timestep in corrected)
    if sweeps:  # at the level that the first step went to
        assert levels[: 1 + corrector_steps] == pytest.approx([1.0, *[1 - 1 / predictor] * corrector_steps])


def test_corrected_images_do_not_depend_on_their_batch(pipe):
    task = PaellaPipeline.from_pipe(pipe, scheduler=DiscreteDDIMScheduler(corrector_steps=1))
    both = draw(task, [seeded(0), seeded(1)], num_images_per_prompt=2, temperature=1.0)
    assert torch.equal(both[1:], draw(task, [seeded(1)], temperature=1.0))


def test_nothing_stays_noise_at_the_end(pipe):
    """A scheduler that accepts few tokens a step has the rest predicted in the last."""
    task = PaellaPipeline.from_pipe(pipe, scheduler=EntropyBoundScheduler(entropy_bound=1e-6))
    last = []

    def keep(pipe, i, t, tensors):
        last.append(tensors)
        return {}

    names = ["latents", "pred_original_sample"]
    draw(task, num_inference_steps=3, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(last[-1]["latents"], last[-1]["pred_original_sample"])
    assert not torch.equal(last[0]["latents"], last[0]["pred_original_sample"])


def test_a_temperature_ramp_where_none_is_taken(pipe):
    task = PaellaPipeline.from_pipe(pipe, scheduler=DiscreteDDIMScheduler())
    with pytest.raises(ValueError, match="`temperature` must be one number for DiscreteDDIMScheduler, got \\(1.0, 0.5\\)"):
        draw(task, temperature=(1.0, 0.5))


# --------------------------------------------------------------------------------------------------- stopping early


def certain_after(pipe, calls: dict[int, int]):
    """Make the U-Net sure of token 7 for image i from its call `calls[i]` on: a hook to remove."""
    count = itertools.count(1)

    def sure(module, args, output):
        number = next(count)
        for row in range(len(output.sample)):
            if number >= calls[row % len(calls)]:
                output.sample[row] = 0
                output.sample[row, 7] = 50
        return output

    return pipe.unet.register_forward_hook(sure)


def test_images_stop_when_they_are_sure_and_stable(pipe):
    handle = certain_after(pipe, {0: 2, 1: 4})
    call = {"num_inference_steps": 8, "num_images_per_prompt": 2}
    try:
        stopped = draw(pipe, [seeded(0), seeded(1)], confidence_threshold=0.1, **call)
        assert pipe.steps_taken == [3, 5]  # sure, and once more the same
    finally:
        handle.remove()
    assert (stopped == 7).all()
    unsure = draw(pipe, [seeded(0), seeded(1)], confidence_threshold=1e-6, **call)
    assert pipe.steps_taken == [8, 8] and torch.equal(unsure, draw(pipe, [seeded(0), seeded(1)], **call))


def test_known_tokens_stay_when_images_stop(pipe):
    image, mask = torch.full((1, 8, 8), 3), torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    handle = certain_after(pipe, {0: 1})
    try:
        task = PaellaInpaintPipeline.from_pipe(pipe)
        tokens = draw(task, image=image, mask_image=mask, num_inference_steps=8, confidence_threshold=0.1)
    finally:
        handle.remove()
    assert task.steps_taken == [2] and (tokens[:, :4] == 7).all() and (tokens[:, 4:] == 3).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"confidence_threshold": 0.0}, "`confidence_threshold` must be a number of nats above 0"),
        ({"confidence_threshold": 0.1, "stability_threshold": 1.5}, "`stability_threshold` must be a share in"),
    ],
)
def test_bad_thresholds(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, **arguments)
