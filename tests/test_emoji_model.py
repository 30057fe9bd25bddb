"""The model inside the package."""

from pathlib import Path

import pytest
import torch

from paella_diffusers import EMOJI_MODEL, PaellaImg2ImgPipeline, PaellaInversionPipeline, PaellaPipeline


@pytest.fixture(scope="module")
def pipe():
    pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_says_where_it_comes_from():
    files = [path for path in Path(EMOJI_MODEL).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert "MIT License" in (Path(EMOJI_MODEL) / "LICENSE.md").read_text()
    assert "Fluent Emoji" in (Path(EMOJI_MODEL) / "README.md").read_text()


def test_prompts_decide_what_is_drawn(pipe):
    hearts = {"red": 0, "green": 1, "blue": 2}
    prompts = [f"{colour} heart" for colour in hearts]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = pipe(prompts, guidance_scale=2.0, generator=generators, output_type="pt").images
    assert images.shape == (3, 3, 64, 64)
    for image, channel in zip(images, hearts.values()):
        assert image[:, :, [0, -1]].mean() > 0.9  # white at the sides
        center = image[:, 28:36, 28:36].mean((1, 2))
        assert center.argmax() == channel


PROMPTS = ["red heart", "grinning face", "rocket", "green apple", "cat face", "soccer ball"]


@pytest.fixture(scope="module")
def drawn(pipe):
    """A picture of each prompt, from its words alone."""
    return pipe(PROMPTS, guidance_scale=1.5, use_prior=False, generator=seeds()).images


def seeds():
    return [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]


def test_the_prior_tells_from_the_words_what_the_picture_will_look_like(pipe, drawn):
    seen = pipe.encode_image([[image] for image in drawn], len(drawn))[:, 0]
    text = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)[4]
    expected = pipe.sample_prior(text, generator=seeds())
    nearest = torch.cosine_similarity(expected[:, None], seen, dim=2).argmax(1)
    assert (nearest == torch.arange(len(PROMPTS))).sum() >= 5


def test_variations_are_of_their_picture(pipe, drawn):
    varied = pipe(
        [""] * len(drawn), condition_image=[[image] for image in drawn], guidance_scale=1.5, generator=seeds()
    ).images
    pixels, varied = (pipe.image_processor.preprocess(images).flatten(1) for images in (drawn, varied))
    assert (torch.cdist(varied, pixels).argmin(1) == torch.arange(len(PROMPTS))).sum() >= 5


def test_the_weaker_the_noise_the_more_is_kept(pipe):
    """Image to image without a prompt: the distance to the input grows with the strength."""
    prompts = ["pizza", "rocket", "dog face", "sunflower", "guitar", "green apple"]
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(6)]
    pictures = pipe(prompts, guidance_scale=2.0, generator=seeds(), output_type="pt").images
    edit = PaellaImg2ImgPipeline.from_pipe(pipe)
    call = {"image": pictures, "guidance_scale": None, "num_inference_steps": 6, "output_type": "pt"}
    changed = [edit([""] * 6, strength=s, generator=seeds(), **call).images for s in (0.1, 0.4, 0.7, 1.0)]
    distances = [(image - pictures).square().mean((1, 2, 3)).sqrt().mean().item() for image in changed]
    assert distances == sorted(distances) and distances[-1] > 2 * distances[0]


def test_inversion_gives_the_picture_back_and_edits_it(pipe):
    heart = pipe("red heart", guidance_scale=2.0, generator=torch.Generator().manual_seed(0), output_type="latent").images
    edit = PaellaInversionPipeline.from_pipe(pipe)
    call = {"image": heart, "source_prompt": "red heart", "guidance_scale": 2.0, "num_inference_steps": 12}
    seed = lambda: torch.Generator().manual_seed(1)
    again = edit("red heart", residual_scale=1.0, generator=seed(), output_type="latent", **call).images
    assert torch.equal(again, heart)
    blue = edit("blue heart", generator=seed(), output_type="pt", **call).images[0]
    assert blue[:, 28:36, 28:36].mean((1, 2)).argmax() == 2
