"""diffusers' modular pipelines on our folders: the tokens of the plain pipelines, to the last bit."""

import json
import logging

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import ModularPipeline
from PIL import Image

from paella_diffusers import (
    PaellaAutoBlocks,
    PaellaClassifierFreeGuidance,
    PaellaImg2ImgPipeline,
    PaellaInpaintPipeline,
    PaellaModularPipeline,
    PaellaPipeline,
    PaellaScheduler,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    guider = PaellaClassifierFreeGuidance(guidance_scale=3.0, plausibility_threshold=0.2)
    tiny_pipeline(guider=guider, image_encoder=None, feature_extractor=None, use_prior=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def modular(folder):
    pipe = ModularPipeline.from_pretrained(folder)
    pipe.load_components()
    return pipe


@pytest.fixture(scope="module")
def plain(folder):
    pipe = PaellaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PICTURE = Image.linear_gradient("L").resize((37, 45)).convert("RGB")  # no size that the model allows
MASK = Image.new("L", (37, 45))
MASK.paste(255, (4, 4, 20, 30))


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        (PaellaPipeline, {}),
        (PaellaPipeline, {"prompt": ["a", "bc"], "num_images_per_prompt": 2, "height": 48, "temperature": 0.9}),
        (PaellaPipeline, {"guidance_scale": (1.0, 4.0), "guidance_steps": 2, "use_prior": False, "negative_prompt": "b"}),
        (PaellaPipeline, {"generator": [1, 2], "num_images_per_prompt": 2, "guidance_scale": 1.0}),
        (PaellaPipeline, {"editing_prompt": "b", "edit_guidance_scale": 4.0, "guidance_scale": 1.0}),
        (PaellaImg2ImgPipeline, {"image": PICTURE}),
        (PaellaImg2ImgPipeline, {"image": PICTURE, "strength": 0.4, "resize_mode": "crop", "height": 32}),
        (PaellaImg2ImgPipeline, {"image": torch.randint(32, (1, 8, 8), generator=seeded(3)), "strength": 1.0}),
        (PaellaInpaintPipeline, {"image": PICTURE, "mask_image": MASK}),
        (PaellaInpaintPipeline, {"image": PICTURE, "mask_image": MASK, "strength": 0.6, "feather_radius": 2}),
        (PaellaInpaintPipeline, {"image": PICTURE, "padding": (0, 0, 16, 0), "prompt": "b"}),
    ],
)
@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_same_as_the_plain_pipeline(modular, plain, task, arguments, output_type):
    def call(pipe, **kwargs):
        generator = arguments.get("generator", 0)
        generators = [seeded(one) for one in generator] if isinstance(generator, list) else seeded(generator)
        call = {"prompt": "a", "num_inference_steps": 3, "output_type": output_type} | arguments
        return pipe(**call | {"generator": generators} | kwargs)

    ours = call(modular, output="images")
    assert torch.equal(ours, call(task.from_pipe(plain)).images)


def test_it_is_found_without_remote_code(modular, plain):
    assert type(modular) is PaellaModularPipeline and type(modular.blocks) is PaellaAutoBlocks
    assert modular.guider.config == plain.guider.config and type(modular.scheduler) is PaellaScheduler
    assert modular.image_encoder is None and modular.config["use_prior"] is True
    assert {"text2image", "image2image", "inpainting"} <= set(modular.blocks.available_workflows)


def test_the_guider_is_swapped_as_a_component(folder, plain):
    modular = ModularPipeline.from_pretrained(folder)
    modular.load_components()
    guider = PaellaClassifierFreeGuidance(guidance_scale=1.5)
    modular.update_components(guider=guider)
    swapped = PaellaPipeline.from_pipe(plain, guider=guider)
    call = {"prompt": "a", "num_inference_steps": 3, "output_type": "latent"}
    expected = swapped(generator=seeded(), **call).images
    assert torch.equal(modular(generator=seeded(), output="latents", **call), expected)
    assert not torch.equal(plain(generator=seeded(), **call).images, expected)


def test_without_a_guider_guidance_is_as_published(tmp_path):
    plain = tiny_pipeline(prior=None, prior_scheduler=None, text_encoder_2=None, tokenizer_2=None)
    plain.save_pretrained(tmp_path)
    modular = ModularPipeline.from_pretrained(tmp_path)
    modular.load_components()
    assert modular.guider.guidance_scale == 8.0 and modular.prior is None
    call = {"prompt": "a", "num_inference_steps": 2, "output_type": "latent"}
    ours = modular(generator=seeded(), output=["images", "steps_taken"], **call)
    assert torch.equal(ours["images"], plain(generator=seeded(), **call).images) and ours["steps_taken"] == [2]


def test_embeddings_in_place_of_prompts_and_variations(modular, plain):
    call = {"num_inference_steps": 2, "output_type": "latent"}
    embeds = plain.encode_prompt("abc")
    names = ("prompt_embeds", "negative_prompt_embeds", "clip_text_embeds", "negative_clip_text_embeds")
    given = dict(zip(names, (embeds[0], embeds[1], embeds[4], embeds[5])))
    expected = plain(**given, **call, generator=seeded()).images
    assert torch.equal(modular(**given, **call, generator=seeded(), output="latents"), expected)


def test_blocks_run_by_themselves(folder, modular, plain):
    """Prompts are encoded in one pipeline, and drawn in another without text encoders."""
    blocks = PaellaAutoBlocks().sub_blocks
    encoder = blocks["text_encoder"].init_pipeline(folder)
    encoder.load_components()
    embeds = encoder(prompt="a").values
    painter = blocks["denoise"].init_pipeline(folder)
    painter.load_components()
    assert not hasattr(painter, "text_encoder") and not hasattr(encoder, "prior")
    names = [name for name in embeds if name.endswith("embeds") or name.endswith("mask")]
    latents = painter(**{n: embeds[n] for n in names}, num_inference_steps=2, generator=seeded(), output="latents")
    call = {"prompt": "a", "num_inference_steps": 2, "output_type": "latent"}
    assert torch.equal(latents, plain(generator=seeded(), **call).images)


def test_saved_and_loaded_as_a_modular_pipeline(modular, tmp_path):
    modular.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    index = json.loads((tmp_path / "modular_model_index.json").read_text())
    assert index["_class_name"] == "PaellaModularPipeline" and index["_blocks_class_name"] == "PaellaAutoBlocks"
    again = ModularPipeline.from_pretrained(tmp_path)
    again.load_components()
    call = {"prompt": "a", "num_inference_steps": 2, "output_type": "latent", "output": "images"}
    assert torch.equal(again(generator=seeded(), **call), modular(generator=seeded(), **call))


def test_dtypes_and_silence(folder, monkeypatch, caplog):
    """Everything loads in float32 unless told otherwise; parts that the folder does not have are not looked for."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with caplog.at_level(logging.WARNING, "diffusers"):
        modular = ModularPipeline.from_pretrained(folder)
        modular.load_components(dtype=torch.bfloat16)
    assert not caplog.records
    assert modular.unet.dtype == modular.text_encoder.dtype == torch.bfloat16
    assert modular(prompt="a", num_inference_steps=1, output="images")[0].size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "Pass either `prompt` or `prompt_embeds`"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer of at least 1, got 0"),
        ({"image": "picture.png"}, "`image`"),
        ({"output_type": "jpeg", "num_inference_steps": 1, "use_prior": False}, "`output_type` must be one of .pil., .np.,"),
        ({"height": 33}, "`height` and `width` must be multiples of"),
    ],
)
def test_bad_input_is_refused_as_in_the_plain_pipeline(modular, arguments, message):
    with pytest.raises(ValueError, match=message):
        modular(**{"prompt": "a"} | arguments)
