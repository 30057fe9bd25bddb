import numpy as np
import PIL.Image
import pytest
import torch
from conftest import load_golden_models, tiny_components

from paella_diffusers import PaellaImg2ImgPipeline, PaellaPipeline, PaellaScheduler


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe():
    pipe = PaellaImg2ImgPipeline(**tiny_components(prior=None, prior_scheduler=None))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(width: int = 64, height: int = 32, seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_golden_image_to_image(golden):
    """Encoded tokens, noised at 0.6, to the published run's tokens."""
    models, io, traces = load_golden_models(golden), golden.paella_io, golden.sampler_traces
    pipe = PaellaImg2ImgPipeline(models.vqgan, models.unet, PaellaScheduler())
    pipe.set_progress_bar_config(disable=True)
    starts = []
    prepare = pipe.prepare_latents
    pipe.prepare_latents = lambda *args: starts.append(prepare(*args)) or starts[0]
    tokens = pipe(
        image=traces["img2img.init_tokens"],
        strength=0.6,
        num_inference_steps=8,
        generator=seeded(golden.config["seeds"]["img2img"]),
        prompt_embeds=io["byt5"],
        negative_prompt_embeds=io["byt5_uncond"],
        clip_text_embeds=io["clip_text"],
        negative_clip_text_embeds=io["clip_text_uncond"],
        output_type="latent",
    ).images
    assert torch.equal(starts[0][0], traces["img2img.noised_tokens"])
    assert torch.equal(tokens, traces["img2img.final"])


def test_strength_one_is_text_to_image(pipe):
    expected = PaellaPipeline.from_pipe(pipe)("a b", height=32, width=64, generator=seeded(), output_type="latent").images
    tokens = pipe("a b", image=picture(), strength=1, generator=seeded(), output_type="latent").images
    assert torch.equal(tokens, expected)


def test_less_strength_keeps_more(pipe):
    """Without renoising and at the lowest noise, nearly all tokens enter the U-Net as they are."""
    pixels = torch.from_numpy(np.asarray(picture()) / 255.0).permute(2, 0, 1)[None].float()
    tokens = pipe.vqgan.encode(pixels).indices
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    kept = []
    for strength in (0.1, 0.4, 0.7, 1.0):
        seen.clear()
        pipe("a", image=pixels, strength=strength, num_inference_steps=1, guidance_scale=None, generator=seeded())
        kept.append((seen[0] == tokens).float().mean().item())
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == pytest.approx(0.9, abs=0.07)


def test_kinds_of_images_are_the_same(pipe):
    image = picture()
    array = np.asarray(image).astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    tokens = pipe.vqgan.encode(tensor[None]).indices
    kinds = [image, [image], array, array[None], tensor, tensor[None], [tensor], tokens, tokens[0]]
    results = [pipe("a", image=kind, strength=0.5, generator=seeded(), output_type="latent").images for kind in kinds]
    assert all(torch.equal(result, results[0]) for result in results)


def test_images_are_resized_when_a_size_is_given(pipe):
    assert pipe("a", image=picture(50, 30), height=32, width=64, num_inference_steps=1).images[0].size == (64, 32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_batches_and_output_types(pipe, output_type):
    """Two prompts with an image each, two pictures a prompt, a generator each: every one is as if it were alone."""
    prompts, images = ["a", "bcd"], [picture(seed=1), picture(seed=2)]
    generators = [seeded(i) for i in range(4)]
    call = {"strength": 0.6, "num_inference_steps": 3, "output_type": output_type}
    batch = pipe(prompts, image=images, num_images_per_prompt=2, generator=generators, **call).images
    assert len(batch) == 4
    alone = pipe(prompts[1], image=images[1], generator=[seeded(2)], **call).images
    np.testing.assert_allclose(np.asarray(batch[2]), np.asarray(alone[0]), atol=1e-4)


def test_callbacks(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, round(timestep.item(), 3), tuple(tensors["latents"].shape)))
        return {}

    pipe("a", image=picture(), strength=0.6, num_inference_steps=3, callback_on_step_end=callback)
    assert seen == [(0, 0.6, (1, 8, 16)), (1, 0.4, (1, 8, 16)), (2, 0.2, (1, 8, 16))]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image": None}, "`image` must be a PIL image"),
        ({"image": []}, "an empty list"),
        ({"image": "cat.png"}, "got str"),
        ({"image": [picture(), picture(32)]}, "several sizes"),
        ({"image": [picture()] * 3}, "3 images for 1 prompts"),
        ({"image": torch.full((1, 3, 32, 32), 2.0)}, "must be in \\[0, 1\\], got 2 to 2"),
        ({"image": torch.zeros(1, 4, 32, 32)}, "3 channels"),
        ({"image": torch.full((8, 8), 99)}, "must be in \\[0, 32\\), got 99"),
        ({"image": torch.zeros(8, 8, dtype=torch.long), "height": 16}, "`image` is a token grid"),
        ({"image": picture(), "strength": 0}, "`strength` must be a number in \\(0, 1\\], got 0"),
        ({"image": picture(), "strength": 1.5}, "got 1.5"),
        ({"image": picture(), "num_inference_steps": 0}, "`num_inference_steps`"),
    ],
)
def test_bad_input_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe("a", **arguments)


def test_unknown_arguments_are_refused(pipe):
    with pytest.raises(TypeError, match="strenght"):
        pipe("a", image=picture(), strenght=0.5)
