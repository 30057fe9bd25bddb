import inspect

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_components

from paella_diffusers import PaellaInversionPipeline, PaellaPipeline
from paella_diffusers.pipelines.conditioning import PromptEmbeds


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe():
    pipe = PaellaInversionPipeline(**tiny_components(prior=None, prior_scheduler=None))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def grid(seed: int = 0, batch: int = 1) -> torch.LongTensor:
    return torch.randint(32, (batch, 8, 8), generator=seeded(seed))


def edit(pipe, prompt, image, **kwargs):
    call = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent"}
    return pipe(prompt, image=image, **call | kwargs).images


@pytest.mark.parametrize("strength", [0.75, 1.0])
def test_the_source_prompt_reconstructs(pipe, strength):
    tokens = grid(batch=2)
    prompts = ["red heart", "a"]
    result = edit(pipe, prompts, tokens, source_prompt=prompts, residual_scale=1, strength=strength, negative_prompt="x")
    assert torch.equal(result, tokens)


def test_an_early_stop_keeps_the_residual(pipe):
    """Once sure and stable, an image is its edited prediction, not what the target prompt alone makes likely."""
    call = {"source_prompt": "a", "residual_scale": 1.0, "num_inference_steps": 6, "stability_threshold": 1e-9}
    steps = []
    call["callback_on_step_end"] = lambda pipe, step, t, tensors: steps.append(step)
    assert torch.equal(edit(pipe, "a", grid(), confidence_threshold=1e9, **call), grid())
    assert steps == [0, 1]


def test_more_of_the_residual_keeps_more(pipe):
    kept = []
    for scale in (0, 0.3, 0.6, 0.9, 1):
        result = edit(pipe, "blue heart", grid(), source_prompt="red heart", residual_scale=scale)
        kept.append((result == grid()).float().mean().item())
    assert kept == sorted(kept) and kept[0] < 0.5


def test_without_residual_the_target_decides(pipe):
    """λ = 0: the most likely tokens, whatever the source prompt is."""
    results = [edit(pipe, "ab", grid(), source_prompt=source, residual_scale=0) for source in ("a", "b")]
    assert torch.equal(*results)
    assert not torch.equal(results[0], edit(pipe, "cd", grid(), source_prompt="a", residual_scale=0))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_batches_and_output_types(pipe, output_type):
    pictures = [
        PIL.Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 48, 3), dtype=np.uint8)) for i in range(2)
    ]
    call = {"output_type": output_type, "residual_scale": 0.2}
    generators = [seeded(i) for i in range(4)]
    negative = {"negative_prompt": ["x", "yy"]}
    batch = edit(
        pipe,
        ["a", "b"],
        pictures,
        source_prompt=["c", "d"],
        num_images_per_prompt=2,
        generator=generators,
        **negative,
        **call,
    )
    assert len(batch) == 4
    alone = edit(pipe, "b", pictures[1], source_prompt="d", generator=[seeded(3)], negative_prompt="yy", **call)
    np.testing.assert_allclose(np.asarray(batch[3]), np.asarray(alone[0]), atol=1e-4)


def test_one_generator_or_a_list_of_one(pipe):
    one, listed = (edit(pipe, "b", grid(), source_prompt="a", generator=g) for g in (seeded(4), [seeded(4)]))
    assert torch.equal(one, listed)
    torch.manual_seed(3)
    without = edit(pipe, "b", grid(), source_prompt="a", generator=None)
    torch.manual_seed(3)
    assert torch.equal(edit(pipe, "b", grid(), source_prompt="a", generator=None), without)


def test_embeddings_in_place_of_both_prompts(pipe):
    target, source = (PromptEmbeds(*pipe.encode_prompt(prompt, "x")) for prompt in ("bcd", "a"))
    given = target._asdict() | {
        "source_prompt_embeds": source.prompt_embeds,
        "source_clip_text_embeds": source.clip_text_embeds,
    }
    expected = edit(pipe, "bcd", grid(), source_prompt="a", negative_prompt="x")
    assert torch.equal(edit(pipe, None, grid(), **given), expected)


def test_the_arguments_of_the_other_tasks(pipe):
    names = inspect.signature(PaellaPipeline.__call__).parameters.keys()
    assert names <= inspect.signature(PaellaInversionPipeline.__call__).parameters.keys()
    call = {"source_prompt": "a", "guidance_scale": 2.0}
    plain = edit(pipe, "b", grid(), **call)
    assert torch.equal(edit(pipe, "b", grid(), **call, cross_attention_kwargs={"scale": 1.0}), plain)
    assert torch.equal(edit(pipe, ["b"], grid(), **call, region_masks=[torch.ones(8, 8)]), plain)
    conditioned = edit(pipe, "b", grid(), **call, clip_image_embeds=torch.ones(1, 12), residual_scale=0.1)
    assert not torch.equal(conditioned, edit(pipe, "b", grid(), **call, residual_scale=0.1))
    noise = torch.zeros(1, 8, 8, dtype=torch.long)
    assert not torch.equal(edit(pipe, "b", grid(), **call, latents=noise, residual_scale=0.1), conditioned)
    first = edit(pipe, "b", grid(), **call, renoise_steps=0, residual_scale=0.1, num_inference_steps=1)
    assert first.shape == (1, 8, 8)


def test_with_the_prior_the_source_prompt_reconstructs(tmp_path):
    pipe = PaellaInversionPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    call = {"residual_scale": 1, "prior_num_inference_steps": 2, "use_prior": True}
    assert torch.equal(edit(pipe, "a", grid(), source_prompt="a", **call), grid())


def test_conditioning_weights_are_the_results_only(pipe):
    """There may be more of them than the source prompt has tokens, and the source run is the same without them."""
    weights, calls = [1.2] * 12, []
    condition = pipe.unet.encode_conditioning
    pipe.unet.encode_conditioning = lambda **kwargs: calls.append(kwargs["conditioning_weights"]) or condition(**kwargs)
    edit(pipe, "a long blue prompt", grid(), conditioning_weights=weights, num_inference_steps=2, guidance_scale=None)
    assert [None if given is None else given.shape[-1] for given in calls] == [12, None]


def test_callbacks_see_the_edited_image(pipe):
    seen = []
    callback = lambda pipe, step, t, tensors: seen.append(tensors["pred_original_sample"]) or {}
    inputs = ["pred_original_sample"]
    result = edit(pipe, "a", grid(), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs)
    assert len(seen) == 4 and torch.equal(seen[-1], result)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image": None}, "`image` must be"),
        ({"image": grid() + 40}, "must be in \\[0, 32\\)"),
        ({"image": grid(batch=3)}, "`image` has 3 images for 1 prompts"),
        ({"source_prompt": ["a", "b"]}, "`source_prompt` has 2 entries for 1 prompts"),
        ({"source_prompt": 3}, "`source_prompt` must be a string"),
        ({"source_prompt": "a", "source_prompt_embeds": torch.ones(1, 2, 16)}, "either `source_prompt` or"),
        ({"temperature": 0.5}, "`temperature` is not used by discrete inversion"),
        ({"prompt": []}, "`prompt` must be a string"),
        ({"residual_scale": -1}, "`residual_scale`.*got -1"),
        ({"smoothing": 1}, "`smoothing`.*got 1"),
        ({"smoothing": 1 - 1e-16}, "`smoothing`.*got 0.99"),
        ({"smoothing": 1e-45}, "`smoothing`.*got 1e-45"),
        ({"source_prompt": None, "source_prompt_embeds": torch.ones(1, 2, 5)}, "`source_prompt_embeds` must have shape"),
        ({"source_clip_text_embeds": torch.ones(1, 5)}, "`source_clip_text_embeds` must have shape"),
        ({"source_prompt_attention_mask": [1]}, "`source_prompt_attention_mask` must be a tensor"),
        ({"generator": [seeded()] * 2}, "list of 2, but 1 images"),
        ({"output_type": "jpeg"}, "`output_type`"),
        ({"strength": 2}, "`strength`"),
    ],
)
def test_bad_input_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        edit(pipe, **{"prompt": "a", "image": grid()} | arguments)


@pytest.mark.usefixtures("float64")
def test_one_source_prompt_with_a_negative_embedding_for_each_image(pipe):
    embeds = torch.randn(2, 3, 16, generator=seeded())
    call = {"negative_prompt_embeds": embeds, "source_prompt": "a", "use_prior": False}
    both = edit(pipe, ["d", "e"], grid(batch=2), generator=[seeded(0), seeded(1)], **call)
    alone = edit(pipe, "e", grid(batch=2)[1:], generator=[seeded(1)], **call | {"negative_prompt_embeds": embeds[1:]})
    assert torch.equal(both[1:], alone)


@pytest.mark.parametrize("smoothing", [1e-6, 1 - 1e-6])
def test_the_image_returns_with_the_least_and_the_most_smoothing(pipe, smoothing):
    result = edit(pipe, "a", grid(), source_prompt="a", residual_scale=1.0, smoothing=smoothing)
    assert torch.equal(result, grid())


@pytest.mark.usefixtures("float64")
def test_a_negative_prompt_for_each_image(pipe):
    call = {"negative_prompt": ["c", "dd"], "source_prompt": ["a", "bb"]}
    both = edit(pipe, ["d", "e"], grid(batch=2), generator=[seeded(0), seeded(1)], **call)
    alone = edit(pipe, "e", grid(batch=2)[1:], generator=[seeded(1)], negative_prompt="dd", source_prompt="bb")
    assert torch.equal(both[1:], alone)
    one = edit(pipe, ["d", "e"], grid(batch=2), generator=[seeded(0), seeded(1)], **call | {"negative_prompt": ["dd"]})
    assert torch.equal(one[1:], alone)
