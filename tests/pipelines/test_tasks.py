"""What every task has: batches, generators, kinds of output, callbacks, and errors up front."""

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DiscreteDDIMScheduler
from images import animation, grey_png_16, phone_photo, photo, saved, transparent_png

from paella_diffusers import (
    PaellaImg2ImgPipeline,
    PaellaInpaintPipeline,
    PaellaInversionPipeline,
    PaellaPipeline,
    PaellaScheduler,
)
from paella_diffusers.pipelines.image_reading import to_rgb


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray((torch.rand(32, 32, 3, generator=seeded(seed)) * 255).byte().numpy())


HALF = torch.zeros(32, 32)
HALF[:16] = 1
TASKS = {
    "text to image": (PaellaPipeline, {}),
    "variations": (PaellaPipeline, {"condition_image": [picture(1), picture(2)], "condition_image_weights": [1.0, 0.5]}),
    "image to image": (PaellaImg2ImgPipeline, {"image": picture(), "strength": 0.5}),
    "inpainting": (PaellaInpaintPipeline, {"image": picture(), "mask_image": HALF}),
    "outpainting": (PaellaInpaintPipeline, {"image": picture(), "padding": (16, 0, 16, 0)}),
    "inversion": (PaellaInversionPipeline, {"image": picture(), "source_prompt": "b"}),
    "regions": (PaellaPipeline, {"prompt": ["a", "b"], "region_masks": [HALF, 1 - HALF]}),
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(prior=None, prior_scheduler=None)


@pytest.mark.parametrize("task", TASKS)
def test_outputs_callbacks_and_generators(pipe, task):
    cls, arguments = TASKS[task]
    pipe = cls.from_pipe(pipe)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        return {}

    call = {"prompt": "a", "num_images_per_prompt": 2, "num_inference_steps": 2, "callback_on_step_end": callback}
    call |= {"callback_on_step_end_tensor_inputs": ["latents", "pred_original_sample"]} | arguments
    draw = lambda kind, first=0: pipe(**call, output_type=kind, generator=[seeded(first), seeded(1)]).images
    tokens, floats = draw("latent"), draw("pt")
    assert seen[:2] == [(0, ["latents", "pred_original_sample"]), (1, ["latents", "pred_original_sample"])]
    assert tokens.dtype == torch.int64 and len(tokens) == 2 and floats.shape[:2] == (2, 3)
    assert floats.shape[2] == 4 * tokens.shape[1] and floats.shape[3] == 4 * tokens.shape[2]
    np.testing.assert_allclose(draw("np"), floats.permute(0, 2, 3, 1), atol=1e-6)
    pictures = draw("pil")
    assert np.abs(np.stack([np.asarray(image) for image in pictures]) / 255 - draw("np")).max() <= 0.5 / 255 + 1e-6
    assert torch.equal(draw("latent", first=7)[1], tokens[1])  # the second image has its own generator


FILES = {
    "JPEG": lambda: saved(photo(500, 300), "JPEG"),
    "turned by EXIF": lambda: phone_photo(403, 302),
    "transparent": lambda: transparent_png(70, 50),
    "16 bits": lambda: grey_png_16(70, 50),
    "CMYK": lambda: saved(photo(70, 50).convert("CMYK"), "JPEG"),
    "animation": lambda: animation(70, 50),
    "small": lambda: saved(photo(9, 7), "PNG"),
}


@pytest.mark.parametrize("task", ["variations", "image to image", "inpainting", "outpainting", "inversion"])
@pytest.mark.parametrize("file", FILES)
def test_pictures_of_any_size_and_kind(pipe, task, file):
    """Results have the picture's size, and its pixels where nothing was generated: as whoever opens the file sees it."""
    cls, own = TASKS[task]
    pipe, image = cls.from_pipe(pipe), PIL.Image.open(FILES[file]())
    call = {"prompt": "a", "num_inference_steps": 2} | own
    if task == "variations":  # resized to the encoder's input
        call |= {"condition_image": [image, image]}
        assert pipe(**call).images[0].size == (32, 32)
        return
    mask = np.zeros((40, 30), bool)
    mask[10:20, 10:20] = True
    call |= {"image": image, "mask_image": mask} if task == "inpainting" else {"image": image}
    size = (302, 403) if file == "turned by EXIF" else image.size
    left, top, right, bottom = call.get("padding", (0, 0, 0, 0))
    expected_size = (size[0] + left + right, size[1] + top + bottom)
    draw = lambda kind: pipe(**call, output_type=kind, generator=seeded()).images
    result = draw("pil")[0]
    assert result.size == expected_size
    assert draw("np").shape == (1, expected_size[1], expected_size[0], 3)
    assert draw("pt").shape == (1, 3, expected_size[1], expected_size[0])
    assert max(draw("latent").shape) <= 24  # three times the model's side
    seen = np.asarray(to_rgb(image))
    if task == "outpainting":
        assert (np.asarray(result)[:, left : left + size[0]] == seen).all()
    if task == "inpainting":
        same = (np.asarray(result) == seen).all(-1)
        assert same[: size[1] // 5].all() and not same[2 * size[1] // 5, 2 * size[0] // 5]


@pytest.mark.parametrize("task", ["image to image", "inpainting", "outpainting", "inversion"])
def test_given_sizes(pipe, task):
    """Results have them, whatever the picture's size is; and pictures of several sizes need them."""
    cls, own = TASKS[task]
    pipe = cls.from_pipe(pipe)
    call = {"prompt": ["a", "b"], "num_inference_steps": 2} | own
    for mode in ("default", "fill", "crop"):
        given = {"image": [photo(50, 30)] * 2, "height": 48, "width": 32, "resize_mode": mode}
        assert [image.size for image in pipe(**call | given).images] == [(32, 48)] * 2
    pictures = [photo(50, 30), photo(30, 50)]
    with pytest.raises(ValueError, match="several sizes, 50×30, 30×50|several sizes, 30×50, 50×30"):
        pipe(**call | {"image": pictures})
    if task != "outpainting":
        given = {"image": pictures, "height": 32, "width": 48}
        assert [image.size for image in pipe(**call | given).images] == [(48, 32)] * 2
    with pytest.raises(ValueError, match="multiples of 16, got 100 and .*: the nearest are 96 and"):
        pipe(**call | {"image": photo(50, 30), "height": 100})


def test_a_large_photo(pipe, caplog):
    """A photo as phones take it, turned by EXIF: inpainted in the part that needs it, and the rest to the last bit."""
    pipe = PaellaInpaintPipeline.from_pipe(pipe)
    image = PIL.Image.open(phone_photo(4032, 3024))
    mask = PIL.Image.new("L", (302, 403))
    mask.paste(255, (100, 100, 110, 110))
    result = pipe("a", image=image, mask_image=mask, padding_mask_crop=32, num_inference_steps=2).images[0]
    assert result.size == (3024, 4032)
    same = (np.asarray(result) == np.asarray(to_rgb(image))).all(-1)
    assert same[:1000].all() and same[1110:].all() and same[:, :1000].all() and same[:, 1110:].all()
    assert not same[1010:1090, 1010:1090].any()
    assert sum("enlarged" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator": [3]}, "`generator`"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end` must be a function"),
        ({"output_type": "jpeg"}, "`output_type`"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"guidance_scale": "8"}, "`guidance_scale`"),
        ({"height": "32"}, "`height`"),
        ({"prompt": []}, "`prompt`"),
    ],
)
def test_wrong_values_are_named(pipe, task, arguments, message):
    cls, own = TASKS[task]
    with pytest.raises(ValueError, match=message):
        cls.from_pipe(pipe)(**{"prompt": "a", "num_inference_steps": 2} | own | arguments)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (PaellaInpaintPipeline, {"image": picture(), "padding": 16}, r"`padding` must be \(left, top, right, bottom\)"),
        (PaellaImg2ImgPipeline, {"image": picture(), "height": 0}, "`height` must be a number of pixels, got 0"),
        (PaellaPipeline, {"prompt": None, "prompt_embeds": [1.0]}, "`prompt_embeds` must be a tensor, got list"),
        (PaellaPipeline, {"region_masks": 3}, "`region_masks` must be a list"),
        (PaellaPipeline, {"condition_image": picture(), "condition_image_weights": "x"}, "`condition_image_weights`"),
    ],
)
def test_wrong_types_are_named(pipe, cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls.from_pipe(pipe)(**{"prompt": "a"} | arguments)


def test_the_number_of_steps_is_the_schedulers_unless_given(pipe, monkeypatch):
    call = {"prompt": "a", "output_type": "latent", "guidance_scale": 1}
    assert pipe(**call).steps_taken == [12]
    monkeypatch.setattr(pipe, "scheduler", PaellaScheduler(num_inference_steps=2, num_vq_embeddings=32))
    assert pipe(**call).steps_taken == [2] and pipe(**call, num_inference_steps=3).steps_taken == [3]
    monkeypatch.setattr(pipe, "scheduler", DiscreteDDIMScheduler())  # whose own 32 is for text
    assert pipe(**call).steps_taken == [12]
