"""
The nodes for ComfyUI, in the order of the workflows that come with them. `make test-comfyui COMFYUI=FOLDER` runs the same
workflows through ComfyUI itself.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_components, tiny_pipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from paella_diffusers import (
    EMOJI_MODEL,
    PaellaAdaptiveProjectedGuidance,
    PaellaConfidenceScheduler,
    PaellaImg2ImgPipeline,
    PaellaPipeline,
)

FOLDER = Path(__file__).parent.parent.parent / "integrations/comfyui"


@pytest.fixture(scope="module")
def package():
    spec = importlib.util.spec_from_file_location(
        "paella_comfyui", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    module = sys.modules["paella_comfyui"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith("paella_comfyui")]:
        del sys.modules[name]


def picture() -> torch.Tensor:
    """A red square on white, as ComfyUI gives pictures."""
    image = torch.ones(1, 64, 64, 3)
    image[:, 16:48, 16:48] = torch.tensor([0.9, 0.1, 0.1])
    return image


def mask() -> torch.Tensor:
    mask = torch.zeros(1, 64, 64)
    mask[:, 32:] = 1
    return mask


def execute(package, workflow: str, **changes) -> dict[str, torch.Tensor]:
    """What a workflow saves, by the prefix of the file's name. A node runs after those that its inputs name."""
    graph = json.loads((FOLDER / f"workflows/{workflow}.json").read_text())
    results, saved = {}, {}

    def run(key: str):
        if key in results:
            return
        kind, inputs = graph[key]["class_type"], dict(graph[key]["inputs"])
        inputs |= {name: value for name, value in changes.items() if name in inputs and not isinstance(inputs[name], list)}
        for name, value in inputs.items():
            if isinstance(value, list):
                run(value[0])
                inputs[name] = results[value[0]][value[1]]
        if kind == "LoadImage":
            results[key] = (picture(), mask())
        elif kind == "SaveImage":
            saved[inputs["filename_prefix"]], results[key] = inputs["images"], ()
        else:
            check_inputs(package.NODE_CLASS_MAPPINGS[kind], inputs)
            node = package.NODE_CLASS_MAPPINGS[kind]()
            results[key] = getattr(node, node.FUNCTION)(**inputs)
            assert len(results[key]) == len(node.RETURN_TYPES)

    for key in graph:
        run(key)
    return saved


def check_inputs(node: type, inputs: dict):
    """As ComfyUI does before it runs anything: no input unknown or missing, and every choice one of the choices."""
    declared = node.INPUT_TYPES()
    known = declared["required"] | declared.get("optional", {})
    assert set(declared["required"]) <= set(inputs) <= set(known)
    for name, value in inputs.items():
        if isinstance(known[name][0], list):
            assert value in known[name][0]


def test_text_to_image_is_that_of_the_pipeline(package):
    images = execute(package, "text_to_image", num_inference_steps=3)["paella"]
    pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)
    pipe.guider = PaellaAdaptiveProjectedGuidance(guidance_scale=3.0)
    generator = torch.Generator().manual_seed(0)
    alone = pipe("red heart", num_inference_steps=3, num_images_per_prompt=2, generator=generator, output_type="np").images
    assert images.shape == (2, 64, 64, 3)
    np.testing.assert_allclose(images.numpy(), alone, atol=1e-5)


def test_a_picture_is_edited(package):
    saved = execute(package, "edit_picture", num_inference_steps=2)
    assert {name: tuple(image.shape) for name, image in saved.items()} == {
        "paella-image-to-image": (1, 64, 64, 3),
        "paella-inpaint": (1, 64, 64, 3),
        "paella-outpaint": (1, 64, 96, 3),
        "paella-variation": (1, 64, 64, 3),
    }
    assert torch.equal(saved["paella-inpaint"][:, :32], picture()[:, :32])  # outside the mask
    assert not torch.equal(saved["paella-inpaint"][:, 32:], picture()[:, 32:])
    pipe = PaellaImg2ImgPipeline.from_pretrained(EMOJI_MODEL)
    pipe.scheduler = PaellaConfidenceScheduler.from_config(pipe.scheduler.config)
    pixels = picture().movedim(-1, 1)
    options = dict(strength=0.75, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
    alone = pipe("blue heart", pixels, **options).images
    np.testing.assert_allclose(saved["paella-image-to-image"].numpy(), alone, atol=1e-5)


def test_adapters_belong_to_the_models_that_have_them(package, tmp_path):
    """Nodes before and after an adapter share the U-Net."""
    nodes = package.NODE_CLASS_MAPPINGS
    (model,) = nodes["PaellaLoad"]().run("embedded", "float32", False)
    (conditioning,) = nodes["PaellaEncode"]().run(model, "red heart", "")
    options = dict(height=0, width=0, num_images_per_prompt=1, seed=0, num_inference_steps=2, scheduler="the model's own")
    sample = nodes["PaellaSample"]().run
    (before,) = sample(model, conditioning, **options)

    other = PaellaPipeline.from_pretrained(EMOJI_MODEL)
    other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    layers = {name: value for name, value in other.unet.state_dict().items() if "lora_" in name}
    generator = torch.Generator().manual_seed(0)
    for value in layers.values():
        value.copy_(torch.randn(value.shape, generator=generator))
    lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(other.unet))
    PaellaPipeline.save_lora_weights(tmp_path, unet_lora_layers=lora)
    (adapted,) = nodes["PaellaLora"]().run(model, str(tmp_path), 1.0)
    (with_adapter,) = sample(adapted, conditioning, **options)
    (after,) = sample(model, conditioning, **options)
    (again,) = sample(adapted, conditioning, **options)
    assert torch.equal(again, with_adapter)
    assert not torch.equal(with_adapter, before)
    assert torch.equal(after, before)


def tiny_model(package):
    return sys.modules["paella_comfyui.nodes"].Model(tiny_pipeline())


def save_lora(folder: Path, component: str, layer: str) -> str:
    """A random adapter of one component of `tiny_pipeline`."""
    model = tiny_components()[component]
    model.add_adapter(LoraConfig(r=2, target_modules=[layer], init_lora_weights=False))
    PaellaPipeline.save_lora_weights(folder, **{f"{component}_lora_layers": get_peft_model_state_dict(model)})
    return str(folder)


def test_prompts_are_encoded_with_the_adapters_of_their_model(package, tmp_path):
    model, lora = tiny_model(package), save_lora(tmp_path, "text_encoder", "o")
    load = package.NODE_CLASS_MAPPINGS["PaellaLora"]().run
    encode = lambda model: package.NODE_CLASS_MAPPINGS["PaellaEncode"]().run(model, "red heart", "")[0]["prompt_embeds"]
    plain = encode(model)
    (half,), (whole,) = load(model, lora, 0.5), load(model, lora, 1.0)  # read once
    assert torch.equal(encode(model), plain)
    with_half, with_whole = encode(half), encode(whole)
    assert not torch.equal(with_half, plain) and not torch.equal(with_whole, with_half)
    assert torch.equal(encode(model), plain) and torch.equal(encode(half), with_half)


def test_adapters_whose_names_are_alike_are_two(package, tmp_path):
    model, load = tiny_model(package), package.NODE_CLASS_MAPPINGS["PaellaLora"]().run
    folders = [save_lora(tmp_path / name, "unet", "to_q") for name in ("a-b", "a_b")]
    names = [load(model, folder, 1.0)[0].adapters[0][0] for folder in (*folders, folders[0])]
    assert names[0] == names[2] != names[1]
    assert model.pipe.get_list_adapters() == {"unet": names[:2]}


def test_bad_input_names_the_nodes_input(package, tmp_path):
    nodes = package.NODE_CLASS_MAPPINGS
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="`model` is"):
        nodes["PaellaLoad"]().run(str(tmp_path), "float32", False)
    with pytest.raises(ValueError, match="`model` is"):
        nodes["PaellaLoad"]().run(str(tmp_path / "nowhere"), "float32", False)
    (model,) = nodes["PaellaLoad"]().run("embedded", "float32", False)
    with pytest.raises(ValueError, match="`lora` is"):
        nodes["PaellaLora"]().run(model, str(tmp_path / "nowhere"), 1.0)
    (conditioning,) = nodes["PaellaEncode"]().run(model, "red heart", "")
    options = dict(seed=0, num_inference_steps=2, scheduler="the model's own")
    with pytest.raises(ValueError, match="`height`"):
        nodes["PaellaSample"]().run(model, conditioning, height=33, width=0, num_images_per_prompt=1, **options)
    with pytest.raises(ValueError, match="`mask_image`"):
        nodes["PaellaInpaint"]().run(
            model, conditioning, picture().repeat(2, 1, 1, 1), mask().repeat(3, 1, 1), strength=1.0, **options
        )
    with pytest.raises(ValueError, match="`padding`"):
        nodes["PaellaOutpaint"]().run(model, conditioning, picture(), 0, 0, 0, 0, **options)


class Cancelled(BaseException):
    pass


@pytest.fixture
def comfy(monkeypatch):
    """What the nodes use of ComfyUI: its progress bar, and the exception that ends a cancelled workflow."""
    shown = []

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            shown.append((value, self.total, preview[0], preview[1].size))

    def throw_exception_if_processing_interrupted():
        if len(shown) == module.cancel_after:
            raise Cancelled

    module = types.ModuleType("comfy")
    module.__spec__ = importlib.util.spec_from_loader("comfy", None)
    utils, management = types.ModuleType("comfy.utils"), types.ModuleType("comfy.model_management")
    utils.ProgressBar = ProgressBar
    management.throw_exception_if_processing_interrupted = throw_exception_if_processing_interrupted
    module.shown, module.cancel_after = shown, None
    for name, value in {"comfy": module, "comfy.utils": utils, "comfy.model_management": management}.items():
        monkeypatch.setitem(sys.modules, name, value)
    return module


def test_previews_and_cancelling(package, comfy):
    execute(package, "text_to_image", num_inference_steps=3)
    assert comfy.shown == [(step, 3, "JPEG", (64, 64)) for step in (1, 2, 3)]
    comfy.shown.clear()
    comfy.cancel_after = 2
    with pytest.raises(Cancelled):
        execute(package, "text_to_image", num_inference_steps=3)
    assert len(comfy.shown) == 2
