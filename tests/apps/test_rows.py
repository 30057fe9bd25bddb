"""Rows: what is refused when one is made, which can be drawn together, and what a row gets whatever the others are."""

import pytest
import torch
from PIL import Image

from paella_diffusers import EMOJI_MODEL, PaellaImg2ImgPipeline, PaellaPipeline
from paella_diffusers.apps.rows import Row, batch_key, draw, text_length
from paella_diffusers.schedulers.categorical import random_tokens

SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def emoji(request):
    pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL, dtype=request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "seed, arguments, error, message",
    [
        (-1, {}, ValueError, "`seed` must be an integer of at least 0, got -1"),
        (2**63, {}, ValueError, "`seed`"),
        (0, {"num_inference_steps": 0}, ValueError, "`num_inference_steps` must be an integer of at least 1, got 0"),
        (0, {"guidance_scale": "high"}, ValueError, "`guidance_scale`"),
        (0, {"height": 0}, ValueError, "`height`"),
        (0, {"negative_prompt": ["a", "b"]}, ValueError, "`negative_prompt` must be a text"),
        (0, {"num_images_per_prompt": 2}, ValueError, "`num_images_per_prompt` is no argument of a row: leave it out."),
        (0, {"prompt_embeds": 1}, ValueError, "`prompt_embeds`"),
        (0, {"guidance_scal": 3}, TypeError, "did you mean `guidance_scale`?"),
        (0, {"strength": 0.5}, TypeError, "takes no argument `strength`"),  # without an image
        (0, {"image": Image.new("RGB", (8, 8)), "strength": 0}, ValueError, "`strength`"),
        (0, {"image": "cat.png"}, ValueError, "`image` must be a PIL image, got 'cat.png'"),
        (0, {"image": Image.new("RGB", (8, 8)), "mask_image": 1}, ValueError, "`mask_image` must be a PIL image, got 1"),
        (0, {"condition_image": "cat.png"}, ValueError, "`condition_image` must be a list of PIL images, got 'cat.png'"),
    ],
)
def test_a_bad_row_is_refused_when_it_is_made(seed, arguments, error, message):
    with pytest.raises(error, match=message):
        Row("a", "red heart", seed, arguments)


def test_a_prompt_must_be_a_text():
    with pytest.raises(ValueError, match="`prompt` must be a text, got 3"):
        Row("a", 3, 0)


def test_rows_with_equal_keys_can_be_drawn_together(pipe):
    one = Row("a", "red heart", 0, {"guidance_scale": [8, 4], "negative_prompt": "blue"})
    assert batch_key(one) == batch_key(Row("b", "pizza", 7, {"guidance_scale": (8, 4)}))
    others = [{"guidance_scale": 8}, {"guidance_scale": (8, 4), "height": 32}, {}]
    assert len({batch_key(row) for row in (one, *(Row("b", "pizza", 7, others) for others in others))}) == 4
    long = Row("b", "a" * 100, 7, {"guidance_scale": (8, 4)})
    assert batch_key(one) == batch_key(long)
    assert batch_key(one, pipe) != batch_key(long, pipe)
    with pytest.raises(ValueError, match="their `batch_key` must be equal"):
        draw(pipe, [one, long], 2, exact=True)
    with pytest.raises(ValueError, match="`batch_size` must be an integer of at least 2, got 1"):
        draw(pipe, [one, one], 1, exact=True)
    with pytest.raises(ValueError, match="`rows` is empty"):
        draw(pipe, [])


@pytest.mark.parametrize("length, padded", [(0, 64), (62, 64), (63, 128), (5000, 1024)])
def test_texts_are_padded_to_a_power_of_two_above_their_length(pipe, length, padded):
    assert text_length(pipe, Row("a", "é" * (length // 2) + "a" * (length % 2), 0)) == padded  # one token ends a text
    assert text_length(pipe, Row("a", "", 0, {"negative_prompt": "a" * length})) == padded


def test_a_row_gets_the_same_bits_in_every_place_of_every_batch(emoji):
    prompts = ["red heart", "a grinning face with big eyes", "dog"]
    rows = [Row(text, text, seed, SMALL | {"negative_prompt": "blue" * (seed % 2)}) for seed, text in enumerate(prompts)]
    alone = {row.key: draw(emoji, [row], 3, exact=True)[0].image.tobytes() for row in rows[:2]}
    for batch in (rows, rows[1:] + rows[:1]):  # the first row first and last, the second one in the middle and first
        for row, drawn in zip(batch, draw(emoji, batch, 3, exact=True)):
            assert drawn.image.tobytes() == alone.get(row.key, drawn.image.tobytes()), row.key


def test_rows_are_what_the_pipeline_draws(pipe, float64):
    rows = [Row("a", "red heart", 3, {"use_prior": True}), Row("b", "dog", 4, {"use_prior": True})]
    for exact in (False, True):
        drawn = draw(pipe, rows, 2, exact=exact, output_type="latent")
        for row, one in zip(rows, drawn):
            output = pipe(
                row.prompt, generator=torch.Generator().manual_seed(row.seed), use_prior=True, output_type="latent"
            )
            assert torch.equal(one.image, output.images[0])
            assert torch.equal(one.initial_noise, output.initial_noise[0])
            assert one.steps_taken == 12


def test_the_initial_noise_is_the_generators_first(pipe):
    row = Row("a", "red heart", 3, {"use_prior": False})
    noise = random_tokens(32, (1, 8, 8), torch.Generator().manual_seed(3))[0]
    assert torch.equal(draw(pipe, [row])[0].initial_noise, noise)


def test_rows_with_pictures(pipe, float64):
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    rows = [Row(str(seed), "a", seed, {"condition_image": [picture]}) for seed, picture in enumerate(pictures)]
    edits = [Row(str(seed), "a", seed, {"image": picture, "strength": 0.5}) for seed, picture in enumerate(pictures)]
    for task, some in ((pipe, rows), (PaellaImg2ImgPipeline.from_pipe(pipe), edits)):
        task.set_progress_bar_config(disable=True)
        drawn = draw(task, some, 2, exact=True, output_type="latent")
        for row, one in zip(some, drawn):
            output = task(
                row.prompt, **row.arguments, generator=torch.Generator().manual_seed(row.seed), output_type="latent"
            )
            assert torch.equal(one.image, output.images[0])


def test_callbacks_see_every_step(pipe):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append((step, tensors["pred_original_sample"].shape))
        return {}

    rows = [Row("a", "red heart", 3, {"num_inference_steps": 2})]
    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["pred_original_sample"]}
    draw(pipe, rows, 3, exact=True, **options)
    assert steps == [(0, (3, 8, 8)), (1, (3, 8, 8))]
