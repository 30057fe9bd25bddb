import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_components

from paella_diffusers import PaellaInversionPipeline


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
        ({"generator": [seeded()] * 2}, "list of 2, but 1 images"),
        ({"output_type": "jpeg"}, "`output_type`"),
        ({"strength": 2}, "`strength`"),
    ],
)
def test_bad_input_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        edit(pipe, **{"prompt": "a", "image": grid()} | arguments)


@pytest.mark.usefixtures("float64")
def test_a_negative_prompt_for_each_image(pipe):
    call = {"negative_prompt": ["c", "dd"], "source_prompt": ["a", "bb"]}
    both = edit(pipe, ["d", "e"], grid(batch=2), generator=[seeded(0), seeded(1)], **call)
    alone = edit(pipe, "e", grid(batch=2)[1:], generator=[seeded(1)], negative_prompt="dd", source_prompt="bb")
    assert torch.equal(both[1:], alone)
    one = edit(pipe, ["d", "e"], grid(batch=2), generator=[seeded(0), seeded(1)], **call | {"negative_prompt": ["dd"]})
    assert torch.equal(one[1:], alone)
