"""What all schedulers have in common, diffusers' two for discrete tokens included."""

import functools
import itertools
import logging
import math

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DiscreteDDIMScheduler, EntropyBoundScheduler

from paella_diffusers import (
    PaellaConfidenceScheduler,
    PaellaFlowMatchEulerScheduler,
    PaellaFlowMatchTrapezoidalScheduler,
    PaellaImg2ImgPipeline,
    PaellaInpaintPipeline,
    PaellaInversionPipeline,
    PaellaPipeline,
    PaellaPsiScheduler,
    PaellaScheduler,
)
from paella_diffusers.schedulers.scheduling_utils import RenoisingSchedulerBase

OURS = [
    PaellaScheduler,
    PaellaConfidenceScheduler,
    PaellaFlowMatchEulerScheduler,
    PaellaFlowMatchTrapezoidalScheduler,
    PaellaPsiScheduler,
]
ALL = [*OURS, DiscreteDDIMScheduler, EntropyBoundScheduler]
OWN = {  # what the others do not have
    PaellaScheduler: {"quantized_steps": 1},
    PaellaConfidenceScheduler: {"ranking": "halton"},
    PaellaFlowMatchEulerScheduler: {"corrector_rate": 2.0},
    PaellaFlowMatchTrapezoidalScheduler: {"theta": 0.4},
    PaellaPsiScheduler: {"kappa": 0.2},
    DiscreteDDIMScheduler: {},  # diffusers warns of what is not the default when it swaps one of its own for another
    EntropyBoundScheduler: {},
}
SETTINGS = {"t_start": 0.9, "temperature": (0.9, 0.4), "num_inference_steps": 5, "num_vq_embeddings": 32}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(prior=None, prior_scheduler=None)


def draw(pipe, generator=None, **kwargs):
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"} | kwargs
    return pipe("a", generator=generator or seeded(), **call).images


def draw_counting(pipe, generator=None, **kwargs):
    """And how many steps each image took."""
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"} | kwargs
    output = pipe("a", generator=generator or seeded(), **call)
    return output.images, output.steps_taken


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(ALL, 2)))
def test_swaps_keep_what_is_common_and_warn_of_nothing(first, second, caplog, monkeypatch):
    settings = (SETTINGS if first in OURS else {"num_inference_steps": 5}) | OWN[first]
    origin = first(**settings)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with caplog.at_level(logging.WARNING, "diffusers"):
        swapped = second.from_config(origin.config)
        back = first.from_config(swapped.config)
    assert not caplog.records
    for name in settings.keys() & swapped.config.keys():
        assert swapped.config[name] == origin.config[name]
    assert all(back.config[name] == value for name, value in settings.items())
    if {first, second} <= set(OURS) - {PaellaFlowMatchTrapezoidalScheduler}:  # which has levels of its own between
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
    again = draw(task, num_inference_steps=steps, image=image, source_prompt="a", residual_scale=1.0)
    assert torch.equal(again, image)  # inversion with the source prompt gives the image back


@pytest.mark.parametrize("scheduler", OURS)
def test_common_behaviour(scheduler, tmp_path):
    ours = scheduler(num_vq_embeddings=16, temperature=1.0)
    ours.save_pretrained(tmp_path)
    again = scheduler.from_pretrained(tmp_path)
    assert type(again) is scheduler and again.config.temperature == 1.0

    logits, tokens = torch.randn(2, 16, 6, 6, generator=seeded(1)) * 3, torch.randint(16, (2, 6, 6), generator=seeded(2))
    call = {"noise": tokens.flip(1)} if issubclass(scheduler, RenoisingSchedulerBase) else {}
    step = lambda **kwargs: ours.step(logits, 1.0, tokens, **call | {"generator": seeded()} | kwargs)
    first = step()
    ours.set_timesteps(3, temperature=0.1)
    for level in ours.timesteps:
        ours.step(logits, level, tokens, generator=seeded(9), **call)
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
        with pytest.raises(ValueError, match="output has NaN or infinite logits"):
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


def test_corrected_images_do_not_depend_on_their_batch():
    task = tiny_pipeline(prior=None, prior_scheduler=None, scheduler=DiscreteDDIMScheduler(corrector_steps=1))
    task.to(torch.float64)
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


def test_a_temperature_without_effect_is_refused(pipe):
    """Also where the scheduler that was swapped left one in the configuration."""
    swapped = EntropyBoundScheduler.from_config(PaellaScheduler(temperature=(0.9, 0.4)).config)
    for scheduler in (EntropyBoundScheduler(), swapped):
        task = PaellaPipeline.from_pipe(pipe, scheduler=scheduler)
        with pytest.raises(ValueError, match="EntropyBoundScheduler takes no `temperature`"):
            draw(task, num_inference_steps=2, temperature=1.0)
        draw(task, num_inference_steps=2)


def test_the_temperature_goes_along_in_a_swap(pipe, monkeypatch):
    """DiscreteDDIMScheduler has none in its configuration, but takes one in each step."""
    swapped = DiscreteDDIMScheduler.from_config(PaellaScheduler(temperature=(1.0, 0.4)).config)
    task = PaellaPipeline.from_pipe(pipe, scheduler=swapped)
    taken = []
    step = DiscreteDDIMScheduler.step
    recorded = functools.wraps(step)(lambda *args, **kw: taken.append(kw.get("temperature")) or step(*args, **kw))
    monkeypatch.setattr(DiscreteDDIMScheduler, "step", recorded)
    draw(task, num_inference_steps=3)
    assert taken == pytest.approx([1.0, 0.7, 0.4])
    taken.clear()
    draw(task, num_inference_steps=3, temperature=0.5)
    assert taken == [0.5, 0.5, 0.5]
    assert torch.equal(draw(PaellaPipeline.from_pipe(pipe, scheduler=DiscreteDDIMScheduler())), draw(task, temperature=0.0))


def test_a_swap_with_t_end_leaves_no_noise(pipe):
    handle = certain_after(pipe, {0: 1})
    try:
        for scheduler in OURS:
            swapped = scheduler.from_config(PaellaScheduler(t_end=0.4, num_vq_embeddings=32).config)
            assert (draw(PaellaPipeline.from_pipe(pipe, scheduler=swapped)) == 7).all()
    finally:
        handle.remove()


@pytest.mark.parametrize("scheduler", ALL)
@pytest.mark.parametrize("strength", [0.3, 0.9])
def test_the_level_that_an_image_is_noised_to_is_the_one_that_the_model_is_told(pipe, scheduler, strength):
    task = PaellaImg2ImgPipeline.from_pipe(pipe, scheduler=scheduler.from_config({}))
    image, levels, given = torch.full((1, 64, 64), 3), [], []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: levels.append(float(args[1])) or given.append(args[0]))
    try:
        draw(task, image=image, strength=strength, num_inference_steps=2)
    finally:
        handle.remove()
    share = (given[0] != 3).float().mean().item() * 32 / 31  # one in 32 random tokens is the same
    assert levels[0] < 1 and share == pytest.approx(levels[0], abs=0.03)


def test_time_grids_hold_for_image_to_image(pipe):
    scheduler = PaellaFlowMatchEulerScheduler(time_grid="cosine", num_vq_embeddings=32)
    task = PaellaImg2ImgPipeline.from_pipe(pipe, scheduler=scheduler)
    levels = []
    keep = lambda pipe, i, t, tensors: levels.append(float(t))
    draw(task, image=torch.full((1, 8, 8), 3), strength=0.8, callback_on_step_end=keep)
    assert levels == pytest.approx([0.8 * math.cos(math.pi * i / 8) for i in range(4)])


def test_too_many_steps_for_a_flat_descent():
    scheduler = PaellaFlowMatchEulerScheduler(time_grid="polynomial", time_power=4.0)
    with pytest.raises(ValueError, match="`num_inference_steps`=100 is too many for this descent"):
        scheduler.set_timesteps(100)


@pytest.mark.parametrize("scheduler", OURS)
def test_a_start_below_the_end_is_named(scheduler):
    ours = scheduler(t_end=0.3)
    for t_start in (0.3, 0.2):
        with pytest.raises(ValueError, match=f"`t_start`={t_start} .* must be above the configured `t_end`=0.3"):
            ours.set_timesteps(4, t_start=t_start)
    ours.set_timesteps(1, t_start=0.2)


def test_correctors_work_where_tokens_are_generated(pipe):
    """Sweeps pick the least certain positions: known ones are certain."""
    image, mask = torch.randint(32, (1, 8, 8), generator=seeded(3)), torch.zeros(1, 8, 8)
    mask[:, 3, :5] = 1
    scheduler = DiscreteDDIMScheduler(corrector_steps=1, corrector_k=2)
    picked, select = [], scheduler._select_positions
    scheduler._select_positions = lambda *args: picked.append(select(*args)) or picked[-1]
    task = PaellaInpaintPipeline.from_pipe(pipe, scheduler=scheduler)
    tokens = draw(task, image=image, mask_image=mask, num_inference_steps=12, temperature=1.0)
    assert mask.flatten()[torch.cat(picked).flatten()].mean() > 0.5  # 5 of 64, so 8 % by chance
    assert torch.equal(tokens[mask == 0], image[mask == 0])


def test_logits_that_are_not_finite_are_refused_for_all(pipe):
    handle = pipe.unet.register_forward_hook(lambda module, args, output: (output.sample.fill_(float("nan")), None)[1])
    try:
        for scheduler in (DiscreteDDIMScheduler(), EntropyBoundScheduler(), PaellaScheduler(num_vq_embeddings=32)):
            with pytest.raises(ValueError, match="NaN or infinite logits"):
                draw(PaellaPipeline.from_pipe(pipe, scheduler=scheduler))
        with pytest.raises(ValueError, match="NaN or infinite logits"):
            draw(PaellaInversionPipeline.from_pipe(pipe), image=torch.full((1, 8, 8), 3))
    finally:
        handle.remove()


# --------------------------------------------------------------------------------------------------- stopping early


def certain_after(pipe, calls: dict[int, int], where: slice = slice(None)):
    """Make the U-Net sure of token 7 in rows `where` of image i from its call `calls[i]` on: a hook to remove."""
    count = itertools.count(1)

    def sure(module, args, output):
        number = next(count)
        for row in range(len(output.sample)):
            if number >= calls[row % len(calls)]:
                output.sample[row, :, where] = 0
                output.sample[row, 7, where] = 50
        return output

    return pipe.unet.register_forward_hook(sure)


def test_images_stop_when_they_are_sure_and_stable(pipe):
    handle = certain_after(pipe, {0: 2, 1: 4})
    call = {"num_inference_steps": 8, "num_images_per_prompt": 2}
    try:
        stopped, steps_taken = draw_counting(pipe, [seeded(0), seeded(1)], confidence_threshold=0.1, **call)
        assert steps_taken == [3, 5]  # sure, and once more the same
    finally:
        handle.remove()
    assert (stopped == 7).all()
    unsure, steps_taken = draw_counting(pipe, [seeded(0), seeded(1)], confidence_threshold=1e-6, **call)
    assert steps_taken == [8, 8] and torch.equal(unsure, draw(pipe, [seeded(0), seeded(1)], **call))


def test_known_tokens_stay_when_images_stop(pipe):
    image, mask = torch.full((1, 8, 8), 3), torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    task = PaellaInpaintPipeline.from_pipe(pipe)
    call = {"image": image, "mask_image": mask, "num_inference_steps": 8, "confidence_threshold": 0.1}
    handle = certain_after(pipe, {0: 1}, where=slice(4, None))
    try:
        _, steps_taken = draw_counting(task, **call)
    finally:
        handle.remove()
    assert steps_taken == [8]  # sure of what is known only
    handle = certain_after(pipe, {0: 1}, where=slice(4))
    try:
        tokens, steps_taken = draw_counting(task, **call)
    finally:
        handle.remove()
    assert steps_taken == [2] and (tokens[:, :4] == 7).all() and (tokens[:, 4:] == 3).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"confidence_threshold": 0.0}, "`confidence_threshold` must be a finite number above 0"),
        ({"confidence_threshold": 0.1, "stability_threshold": 1.5}, "`stability_threshold` must be a number in"),
    ],
)
def test_bad_thresholds(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, **arguments)
