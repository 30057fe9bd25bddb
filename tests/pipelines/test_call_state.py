"""One pipeline for many threads; what callbacks read, set and replace."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DiscreteDDIMScheduler, EntropyBoundScheduler
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from PIL import Image

from paella_diffusers import (
    PaellaAdaptiveProjectedGuidance,
    PaellaClassifierFreeGuidance,
    PaellaConfidenceScheduler,
    PaellaPipeline,
    PaellaScheduler,
    PaellaSemanticGuidance,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def call_of(i: int) -> dict:
    """Calls that differ in all that a call can say."""
    return {
        "prompt": ["a", "bb", "ccc"][: 1 + i % 3],
        "negative_prompt": "x" * (i % 4),
        "guidance_scale": [1.5, 3.0, (2.0, 6.0), None][i % 4],
        "guidance_steps": [None, 2, (1, 3)][i % 3],
        "num_inference_steps": 3 + i % 4,
        "temperature": [None, 1.0, (1.2, 0.2)][i % 3],
        "height": 32 if i % 2 else 16,
        "use_prior": bool(i % 5 == 0),
        "prior_num_inference_steps": 2 + i % 3,
        "generator": seeded(i),
        "output_type": "latent",
    }


def run(pipe, i: int):
    output = pipe(**call_of(i))
    return output.images, output.steps_taken, pipe.guidance_scale, pipe.num_timesteps


def check_threads(pipe, count=24, threads=8):
    serial = [run(pipe, i) for i in range(count)]
    barrier = threading.Barrier(threads)
    with ThreadPoolExecutor(threads, initializer=barrier.wait) as pool:
        parallel = list(pool.map(lambda i: run(pipe, i), range(count)))
    for (tokens, *state), (expected, *expected_state) in zip(parallel, serial):
        assert torch.equal(tokens, expected) and state == expected_state


@pytest.mark.parametrize(
    "scheduler",
    [
        PaellaScheduler(num_vq_embeddings=32),
        PaellaConfidenceScheduler(num_vq_embeddings=32),
        DiscreteDDIMScheduler(corrector_steps=1),
        EntropyBoundScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_threads_share_a_pipeline(scheduler, monkeypatch):
    if not isinstance(scheduler, DiscreteDDIMScheduler):
        monkeypatch.setitem(globals(), "call_of", lambda i, call_of=call_of: call_of(i))
    if isinstance(scheduler, EntropyBoundScheduler):  # which takes no temperature
        monkeypatch.setitem(globals(), "call_of", lambda i, call_of=call_of: call_of(i) | {"temperature": None})
    check_threads(tiny_pipeline(scheduler=scheduler))


def test_threads_share_a_pipeline_in_low_memory(tmp_path):
    tiny_pipeline(scheduler=PaellaScheduler(num_vq_embeddings=32)).save_pretrained(tmp_path)
    pipe = PaellaPipeline.from_pretrained(tmp_path, low_memory=True)
    pipe.set_progress_bar_config(disable=True)
    check_threads(pipe, count=12)


def test_threads_share_a_pipeline_with_an_adapter():
    """The scale of an adapter is set on the layers themselves."""
    pipe = tiny_pipeline(scheduler=PaellaScheduler(num_vq_embeddings=32))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))

    def tokens(i):
        return pipe(**call_of(i), cross_attention_kwargs={"scale": i % 4 / 2}).images

    serial = [tokens(i) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        assert all(map(torch.equal, pool.map(tokens, range(12)), serial))


def lock_of(pipe):
    """The lock that a call takes; None where it takes none."""
    lock = pipe._exclusive_if_needed()
    return lock if hasattr(lock, "acquire") else None


def test_calls_take_turns_where_hooks_change_the_parts_of_a_model():
    pipe = tiny_pipeline(prior=None, prior_scheduler=None)
    assert lock_of(pipe) is None
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert lock_of(pipe) is not None


def test_calls_take_turns_where_the_leaves_of_an_encoder_are_offloaded():
    pipe = tiny_pipeline(prior=None, prior_scheduler=None)
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.text_encoder, cpu, cpu, "leaf_level")
    assert lock_of(pipe) is not None


def test_interpolation_encodes_in_its_turn():
    pipe = tiny_pipeline(prior=None, prior_scheduler=None)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    lock, free = lock_of(pipe), []

    def is_free() -> bool:
        got = lock.acquire(blocking=False)
        if got:
            lock.release()
        return got

    with ThreadPoolExecutor(1) as other:
        for encoder in (pipe.text_encoder, pipe.text_encoder_2, pipe.image_encoder):
            encoder.register_forward_pre_hook(lambda *args: free.append(other.submit(is_free).result()))
        pipe.interpolate("a", Image.new("RGB", (16, 16)), 2, num_inference_steps=1, output_type="latent")
    assert len(free) >= 3 and not any(free)


def test_a_call_leaves_the_components_alone():
    pipe = tiny_pipeline(guider=PaellaClassifierFreeGuidance(guidance_scale=2.0))
    before = {name: str(vars(getattr(pipe, name))) for name in ("scheduler", "prior_scheduler", "guider")}
    pipe(**call_of(5))
    assert before == {name: str(vars(getattr(pipe, name))) for name in before}


def test_the_state_of_a_call_is_read_within_and_after():
    pipe = tiny_pipeline()
    assert not hasattr(pipe, "guidance_scale")  # before the first call
    seen = []

    def callback(pipe, step, timestep, tensors):
        assert pipe.current_timestep == timestep and pipe.num_timesteps == 3 and not pipe.interrupt
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance))
        pipe._guidance_scale += 1.0

    pipe("a", guidance_scale=2.0, num_inference_steps=3, use_prior=False, callback_on_step_end=callback)
    assert seen == [(2.0, True), (3.0, True), (4.0, True)] and pipe.guidance_scale == 5.0
    assert "_guidance_scale" not in vars(pipe)
    other = tiny_pipeline()
    other("a", guidance_scale=None, num_inference_steps=1, use_prior=False)
    assert pipe.guidance_scale == 5.0 and other.guidance_scale is None and not other.do_classifier_free_guidance


@pytest.mark.parametrize(
    "guider",
    [
        PaellaAdaptiveProjectedGuidance(),
        PaellaSemanticGuidance(editing_prompt="b", edit_momentum_scale=0.5, edit_warmup_steps=0),
        AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=0.5),
    ],
    ids=lambda guider: type(guider).__name__,
)
def test_a_finished_call_keeps_nothing_as_large_as_its_logits(guider):
    """Its state can still be read; momentum is gone."""
    pipe = tiny_pipeline(prior=None, prior_scheduler=None, guider=guider)
    pipe("a", height=48, width=16, num_inference_steps=2, output_type="latent")
    gc.collect()
    assert pipe.num_timesteps == 2
    assert not [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.shape == (1, 32, 12, 4)]


def test_a_call_within_a_callback():
    """The outer call goes on with its own state."""
    pipe = tiny_pipeline()
    outer = {"num_inference_steps": 3, "guidance_scale": 2.0, "use_prior": False, "output_type": "latent"}
    expected = pipe("a", **outer, generator=seeded()).images

    def callback(pipe, step, timestep, tensors):
        pipe("b", num_inference_steps=2, guidance_scale=7.0, use_prior=False)
        assert pipe.guidance_scale == 2.0 and pipe.num_timesteps == 3

    assert torch.equal(pipe("a", **outer, generator=seeded(), callback_on_step_end=callback).images, expected)


def test_interrupted_calls_say_how_many_steps_they_took():
    pipe = tiny_pipeline()
    stop = lambda pipe, step, *rest: setattr(pipe, "_interrupt", step == 1)
    assert pipe("a", num_inference_steps=6, use_prior=False, callback_on_step_end=stop).steps_taken == [2]


# ------------------------------------------------------------------------------------------- what callbacks replace


def passes(pipe):
    """The rows of the conditioning in each evaluation."""
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize("images", [1, 3])
def test_diffusers_cutoff_callback(images):
    pipe = tiny_pipeline()
    rows = passes(pipe)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    call = {"num_inference_steps": 4, "use_prior": False, "num_images_per_prompt": images, "output_type": "latent"}
    cut = pipe("a", generator=seeded(), callback_on_step_end=cutoff, **call).images
    assert rows == [2 * images, 2 * images, images, images]
    assert torch.equal(cut, pipe("a", generator=seeded(), guidance_steps=2, **call).images)
    pipe("a", callback_on_step_end=MultiPipelineCallbacks([cutoff, cutoff]), **call)


def test_conditioning_is_read_and_replaced():
    pipe = tiny_pipeline()
    call = {"num_inference_steps": 3, "use_prior": False, "output_type": "latent"}
    given = {}

    def look(pipe, step, timestep, tensors):
        given.update(tensors)
        return tensors

    names = pipe._callback_tensor_inputs
    expected = pipe("a", generator=seeded(), **call).images
    looked = pipe("a", generator=seeded(), callback_on_step_end=look, callback_on_step_end_tensor_inputs=names, **call)
    assert torch.equal(looked.images, expected) and given.keys() == set(names)
    assert given["prompt_embeds"].shape[::2] == (1, 16) and given["clip_text_embeds"].shape == (1, 12)
    assert given["clip_image_embeds"] is None and given["prompt_attention_mask"] is None

    other = pipe.encode_prompt("bcd")
    replacements = dict(zip(("prompt_embeds", "negative_prompt_embeds"), other), clip_text_embeds=other[4])
    swap = lambda pipe, step, *rest: replacements if step == 0 else None
    swapped = pipe("a", generator=seeded(), callback_on_step_end=swap, **call).images
    assert not torch.equal(swapped, expected)


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds", "clip_text_embeds"])
def test_conditioning_may_be_changed_in_place(name):
    pipe = tiny_pipeline(prior=None, prior_scheduler=None)
    call = {"num_inference_steps": 3, "output_type": "latent", "callback_on_step_end_tensor_inputs": [name]}

    def change(replace):
        def callback(pipe, step, timestep, tensors):
            return {name: tensors[name] * 3} if replace else (tensors[name].mul_(3), None)[1]

        return callback

    replaced, in_place = (
        pipe("a", generator=seeded(), callback_on_step_end=change(replace), **call).images for replace in (True, False)
    )
    assert torch.equal(replaced, in_place)
    assert not torch.equal(replaced, pipe("a", generator=seeded(), **call).images)


def test_text_and_its_mask_are_replaced_together():
    """By text of another length."""
    pipe = tiny_pipeline(prior=None, prior_scheduler=None)
    text, negative, mask, negative_mask, *_ = pipe.encode_prompt(["a", "bcd"])
    other, _, other_mask, *_ = pipe.encode_prompt(["defgh", "b"])
    assert mask is not None and other_mask.shape != mask.shape

    def draw(returned):
        call = {"prompt_embeds": text, "prompt_attention_mask": mask, "negative_prompt_embeds": negative}
        call |= {"negative_prompt_attention_mask": negative_mask, "generator": seeded(), "output_type": "latent"}
        return pipe(num_inference_steps=3, callback_on_step_end=lambda *args: returned, **call).images

    assert not torch.equal(draw({"prompt_embeds": other, "prompt_attention_mask": other_mask}), draw(None))
    message = "`prompt_embeds` of length 6 with `prompt_attention_mask` of length 4: return both, of one length"
    with pytest.raises(ValueError, match=message):
        draw({"prompt_embeds": other})


def test_cached_features_are_of_the_new_conditioning():
    """DeepCache: the levels below the first are computed anew where a callback replaces a prompt."""
    pipe = tiny_pipeline(prior=None, prior_scheduler=None)
    cached = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: cached.append(bool(kwargs["deep_features"])), with_kwargs=True
    )
    other = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt("bcd")))
    swap = lambda pipe, step, *rest: other if step == 1 else None
    pipe("a", num_inference_steps=4, deep_feature_interval=4, output_type="latent", callback_on_step_end=swap)
    assert cached == [False, True, False, True]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"latents": torch.full((1, 8, 8), 99)}, r"`latents` must be in \[0, 32\)"),
        ({"latents": torch.zeros(1, 8, 8)}, "`latents` must be a token grid, an int64 tensor"),
        ({"latents": torch.zeros(2, 8, 8, dtype=torch.long)}, r"`latents` must have shape \(1, 8, 8\)"),
        ({"prompt_embeds": torch.zeros(2, 3, 16)}, r"returned `prompt_embeds` of shape \(2, 3, 16\), in place of"),
        ({"clip_image_embeds": torch.zeros(1, 1, 12)}, "returned `clip_image_embeds`, which this call has not"),
        ([1], "must return a dictionary of tensors, or None, got list"),
    ],
)
def test_what_a_callback_returns_is_checked(returned, message):
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match=message):
        pipe("a", num_inference_steps=2, use_prior=False, callback_on_step_end=lambda *args: returned)
