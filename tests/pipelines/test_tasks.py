"""What every task has: batches, generators, kinds of output, callbacks, and errors up front."""

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_pipeline

from paella_diffusers import PaellaImg2ImgPipeline, PaellaInpaintPipeline, PaellaInversionPipeline, PaellaPipeline


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
