import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import load_golden_models, tiny_components

from paella_diffusers import PaellaInpaintPipeline, PaellaPipeline, PaellaScheduler


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe():
    pipe = PaellaInpaintPipeline(**tiny_components(prior=None, prior_scheduler=None))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(width: int = 64, height: int = 32, seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tensor(image: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def block_mask(height: int = 32, width: int = 64) -> torch.Tensor:
    mask = torch.zeros(height, width)
    mask[5:14, 20:33] = 1
    return mask


def mask_cases() -> dict[str, torch.Tensor]:
    one_pixel = torch.zeros(32, 64)
    one_pixel[17, 30] = 1
    return {
        "one pixel": one_pixel,
        "block": block_mask(),
        "white": torch.ones(32, 64),
        "black": torch.zeros(32, 64),
        "random": (torch.rand(48, 32, generator=seeded(1)) > 0.97).float(),
        "larger": (torch.rand(64, 96, generator=seeded(2)) > 0.995).float(),
    }


def test_golden_inpainting(golden):
    models, io, trace = load_golden_models(golden), golden.paella_io, golden.inpaint_trace
    pipe = PaellaInpaintPipeline(models.vqgan, models.unet, PaellaScheduler())
    pipe.set_progress_bar_config(disable=True)
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.extend([tensors["pred_original_sample"], tensors["latents"]])
        return {}

    tokens = pipe(
        image=trace["tokens"],
        mask_image=trace["mask"],
        num_inference_steps=8,
        generator=seeded(trace["seed"].item()),
        prompt_embeds=io["byt5"],
        negative_prompt_embeds=io["byt5_uncond"],
        clip_text_embeds=io["clip_text"],
        negative_clip_text_embeds=io["clip_text_uncond"],
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
    ).images
    assert torch.equal(torch.stack(steps[:-1]), trace["steps"])
    assert torch.equal(tokens, trace["final"])


@pytest.mark.parametrize("case", mask_cases())
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_known_tokens_and_pixels_stay(pipe, case, strength):
    mask = mask_cases()[case]
    height, width = mask.shape
    image = picture(width, height)
    known_tokens = pipe.vqgan.encode(tensor(image)).indices
    call = {"image": image, "mask_image": mask, "strength": strength, "num_inference_steps": 3}
    tokens = pipe("a", generator=seeded(), output_type="latent", **call).images
    generated = mask.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).amax((1, 3)).bool()
    assert torch.equal(tokens[0][~generated], known_tokens[0][~generated])
    if generated.any() and strength == 1:  # and the others are made
        assert not torch.equal(tokens[0][generated], known_tokens[0][generated])

    before, after = np.array(image), np.array(pipe("a", generator=seeded(), **call).images[0])
    rows, columns = np.nonzero(mask.numpy())
    distance = np.full(mask.shape, 1000)
    for row, column in zip(rows, columns):
        far = np.maximum(abs(np.arange(height) - row)[:, None], abs(np.arange(width) - column))
        distance = np.minimum(distance, far)
    assert (before[distance > 0] == after[distance > 0]).all()
    feathered = np.array(pipe("a", generator=seeded(), feather_radius=2, **call).images[0])
    assert (before[distance > 4] == feathered[distance > 4]).all()


def test_everything_masked_is_text_to_image(pipe):
    expected = PaellaPipeline.from_pipe(pipe)("ab", height=32, width=64, generator=seeded(), output_type="latent").images
    tokens = pipe("ab", image=picture(), mask_image=torch.ones(32, 64), generator=seeded(), output_type="latent").images
    assert torch.equal(tokens, expected)


def test_original_pixels_can_be_left_out(pipe):
    image = picture()
    result = pipe("a", image=image, mask_image=torch.zeros(32, 64), keep_original_pixels=False, output_type="pt").images
    tokens = pipe.vqgan.encode(tensor(image)).indices
    torch.testing.assert_close(result, pipe.vqgan.decode_indices(tokens).sample.clamp(0, 1), atol=1e-5, rtol=0)


def test_soft_masks_count_from_one_half(pipe):
    soft = torch.full((32, 64), 0.49)
    soft[16, 16] = 0.5
    hard = torch.zeros(32, 64)
    hard[16, 16] = 1
    call = {"image": picture(), "output_type": "np"}
    results = [pipe("a", mask_image=mask, generator=seeded(), **call).images for mask in (soft, hard)]
    assert (results[0] == results[1]).all()


def test_kinds_of_masks_are_the_same(pipe):
    mask = block_mask()
    array = mask.numpy()
    pil = PIL.Image.fromarray((array * 255).astype(np.uint8))
    kinds = [
        pil,
        pil.convert("RGB"),
        [pil],
        array,
        array[..., None],
        array > 0,
        mask,
        mask[None],
        mask[None, None],
        mask.long(),
    ]
    call = {"image": picture(), "num_inference_steps": 2, "output_type": "latent"}
    results = [pipe("a", mask_image=kind, generator=seeded(), **call).images for kind in kinds]
    assert all(torch.equal(result, results[0]) for result in results)


def test_outpainting_continues_the_image(pipe):
    image = picture(32, 32)
    wide = pipe("a", image=image, padding=(16, 0, 32, 16), num_inference_steps=2).images[0]
    assert wide.size == (80, 48)
    assert (np.array(wide)[:32, 16:48] == np.array(image)).all()
    any_padding = pipe("a", image=image, padding=(3, 0, 5, 1), num_inference_steps=2).images[0]
    assert any_padding.size == (40, 33)
    assert (np.array(any_padding)[:32, 3:35] == np.array(image)).all()


def test_outpainting_a_token_grid(pipe):
    tokens = torch.randint(32, (1, 8, 8), generator=seeded())
    result = pipe("a", image=tokens, padding=(16, 32, 0, 0), num_inference_steps=2, output_type="latent").images
    assert result.shape == (1, 16, 12)
    assert torch.equal(result[:, 8:, 4:], tokens)


def test_outpainting_and_a_mask_together(pipe):
    tokens = torch.randint(32, (1, 8, 8), generator=seeded())
    mask = torch.zeros(8, 8)
    mask[2:4] = 1
    call = {"mask_image": mask, "padding": (0, 0, 16, 0), "num_inference_steps": 2, "output_type": "latent"}
    result = pipe("a", image=tokens, generator=seeded(), **call).images
    assert torch.equal(result[:, 4:, :8], tokens[:, 4:]) and torch.equal(result[:, :2, :8], tokens[:, :2])
    assert not torch.equal(result[:, 2:4, :8], tokens[:, 2:4])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_batches_and_output_types(pipe, output_type):
    """Two prompts with an image and a mask each, two pictures a prompt: every one is as if it were alone."""
    images, masks = [picture(seed=1), picture(seed=2)], torch.stack([block_mask(), block_mask().flip(1)])
    call = {"num_inference_steps": 3, "output_type": output_type}
    generators = [seeded(i) for i in range(4)]
    batch = pipe(["a", "bcd"], image=images, mask_image=masks, num_images_per_prompt=2, generator=generators, **call).images
    assert len(batch) == 4
    alone = pipe("bcd", image=images[1], mask_image=masks[1], generator=[seeded(3)], **call).images
    np.testing.assert_allclose(np.asarray(batch[3]), np.asarray(alone[0]), atol=1e-4)


def test_one_image_with_several_masks(pipe):
    masks = torch.stack([block_mask(), torch.zeros(32, 64)])
    results = pipe(["a", "a"], image=picture(), mask_image=masks, num_inference_steps=2).images
    assert (np.array(results[1]) == np.array(picture())).all()
    assert (np.array(results[0]) != np.array(picture())).any()


@pytest.mark.parametrize("name", ["DiscreteDDIMScheduler", "EntropyBoundScheduler"])
def test_schedulers_without_masks_keep_known_tokens(pipe, name):
    pipe.scheduler = getattr(diffusers, name)()
    tokens = torch.randint(32, (1, 8, 8), generator=seeded())
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    call = {"num_inference_steps": 3, "output_type": "latent", "generator": seeded()}
    result = pipe("a", image=tokens, mask_image=mask, **call).images
    assert torch.equal(result[:, 4:], tokens[:, 4:])
    assert not torch.equal(result[:, :4], tokens[:, :4])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "Nothing to generate: pass `mask_image`"),
        ({"padding": (0, 0, 0, 0)}, "Nothing to generate"),
        ({"mask_image": "mask.png"}, "got str"),
        ({"mask_image": torch.full((32, 64), 255.0)}, "`mask_image` must be in \\[0, 1\\], got 255"),
        ({"mask_image": torch.ones(3, 32, 64)}, "3 masks for 1 images|3 images for 1 prompts"),
        ({"padding": (8, 0, 0)}, "must be \\(left, top, right, bottom\\)"),
        ({"padding": (-16, 0, 0, 0)}, "at least 0"),
        ({"width": 32}, "Nothing to generate"),
        ({"padding": (16, 0, 0, 0), "width": 97}, "multiples of 16"),
        ({"mask_image": torch.ones(32, 64), "feather_radius": -1}, "`feather_radius`"),
        ({"mask_image": torch.ones(32, 64), "strength": 0}, "`strength`"),
        ({"image": torch.zeros(8, 8, dtype=torch.long), "padding": (2, 0, 0, 0)}, "multiples of 4"),
        ({"image": torch.zeros(8, 8, dtype=torch.long), "mask_image": torch.ones(32, 32)}, "8×8"),
    ],
)
def test_bad_input_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe("a", **{"image": picture()} | arguments)


@pytest.mark.parametrize("padding", [(16, 16, 16, 16), (0, 32, 16, 0), (18, 3, 14, 13)])
def test_outpainting_leaves_all_tokens_of_the_picture(pipe, padding):
    """They are those of the picture alone, although the VQGAN's encoder would see what is around."""
    image = torch.rand(1, 3, 32, 32, generator=seeded(5))
    result = pipe("a", image=image, padding=padding, num_inference_steps=2, output_type="latent").images
    left, top, right, bottom = padding
    inside = torch.nn.functional.pad(image, (left % 4, right % 4, top % 4, bottom % 4), mode="replicate")
    with torch.no_grad():
        alone = pipe.vqgan.encode(inside).indices
    cut = lambda before, after: slice(int(before % 4 > 0), -1 if after % 4 else None)  # tokens that are partly new
    known = (slice(None), cut(top, bottom), cut(left, right))
    found = result[:, top // 4 : result.shape[1] - bottom // 4, left // 4 : result.shape[2] - right // 4]
    assert torch.equal(found[known], alone[known])
    pixels = pipe("a", image=image, padding=padding, num_inference_steps=2, output_type="pt").images
    assert torch.equal(pixels[..., top : top + 32, left : left + 32][..., 4:-4, 4:-4], image[..., 4:-4, 4:-4])
