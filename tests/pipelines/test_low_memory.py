"""`low_memory=True`: the same pictures, with the weights of one model in memory at a time."""

import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from PIL import Image
from safetensors.torch import load_file, save_file

from paella_diffusers import PaellaImg2ImgPipeline, PaellaInpaintPipeline, PaellaPipeline

CALL = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "latent"}


def tokens(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **CALL | kwargs).images


def models(pipe) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def in_memory(pipe) -> set[str]:
    return {name for name, model in models(pipe).items() if not all(p.is_meta for p in model.parameters())}


@pytest.fixture(params=[{}, {"max_shard_size": "10KB"}, {"variant": "bf16"}])
def saved(request, tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "saved", **request.param)
    return pipe, tmp_path / "saved", {"variant": request.param["variant"]} if "variant" in request.param else {}


def test_same_tokens_and_one_model_at_a_time(saved):
    pipe, folder, kwargs = saved
    expected = tokens(pipe)
    low = PaellaPipeline.from_pretrained(folder, low_memory=True, **kwargs)
    assert len(models(low)) == 6 and not in_memory(low)
    seen = []
    for name in ("text_encoder", "text_encoder_2", "prior", "unet"):
        model = getattr(low, name)
        model.register_forward_hook(lambda *args: seen.append(tuple(in_memory(low))))
    decode = low.vqgan._decode
    low.vqgan._decode = lambda *args, **kwargs: seen.append(tuple(in_memory(low))) or decode(*args, **kwargs)
    for _ in range(2):  # calling again works
        assert torch.equal(tokens(low), expected)
        assert not in_memory(low)
    assert low.unet.dtype == torch.float32
    assert torch.equal(tokens(low, output_type="pt"), tokens(pipe, output_type="pt"))
    assert set(seen) == {("text_encoder",), ("text_encoder_2",), ("prior",), ("unet",), ("vqgan",)}


def test_every_task(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    low = PaellaPipeline.from_pretrained(tmp_path, low_memory=True)
    image = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
    for cls, call in (
        (PaellaPipeline, {"condition_image": image}),
        (PaellaImg2ImgPipeline, {"image": image, "strength": 0.5}),
        (PaellaInpaintPipeline, {"image": image, "mask_image": image.convert("L")}),
    ):
        task = cls.from_pipe(low)
        assert torch.equal(tokens(task, **call), tokens(cls.from_pipe(pipe), **call)) and not in_memory(task)


def test_dtype_device_and_parts_of_ones_own(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    half = PaellaPipeline.from_pretrained(tmp_path, low_memory=True, dtype=torch.bfloat16)
    assert {model.dtype for model in models(half).values()} == {torch.bfloat16}
    full = PaellaPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(tokens(half), tokens(full))
    assert half.to("cpu") is half and torch.equal(tokens(half), tokens(full))
    with pytest.raises(ValueError, match="pass `dtype` to `from_pretrained`"):
        half.to(torch.float32)
    with pytest.raises(ValueError, match="needs a device"):
        half.to()
    mine = tiny_unet()
    own = PaellaPipeline.from_pretrained(tmp_path, low_memory=True, unet=mine, text_encoder_2=None, prior=None)
    assert own.unet is mine and in_memory(own) == {"unet"} and own.text_encoder_2 is None
    tokens(own)
    assert in_memory(own) == {"unet"}


def test_float16_is_that_of_other_pipelines(saved_pipeline):
    """transformers keeps some of T5 in float32."""
    low = PaellaPipeline.from_pretrained(saved_pipeline, dtype=torch.float16, low_memory=True)
    full = PaellaPipeline.from_pretrained(saved_pipeline, dtype=torch.float16)
    for name, model in models(full).items():
        dtypes = {key: tensor.dtype for key, tensor in getattr(low, name).state_dict().items()}
        assert dtypes == {key: tensor.dtype for key, tensor in model.state_dict().items()}, name
    assert torch.float32 in {parameter.dtype for parameter in low.text_encoder.parameters()}


def test_from_the_hub(hub, tmp_path):
    pipe = tiny_pipeline()
    pipe.push_to_hub("me/whole")
    low = PaellaPipeline.from_pretrained("me/whole", low_memory=True, cache_dir=tmp_path)
    assert torch.equal(tokens(low), tokens(pipe)) and low.config._name_or_path == "me/whole"


def test_what_needs_weights_is_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    low = PaellaPipeline.from_pretrained(tmp_path, low_memory=True)
    with pytest.raises(ValueError, match="weights on disk: load it without `low_memory`"):
        low.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="without `low_memory` to attach adapters"):
        low.load_lora_weights({"unet.lora_A.weight": torch.zeros(1)})


def test_what_cannot_be_mapped_is_refused(tmp_path, published):
    with pytest.raises(ValueError, match="paella-diffusers convert dome272/Paella FOLDER"):
        PaellaPipeline.from_pretrained("dome272/Paella", low_memory=True, **published)
    tiny_pipeline().save_pretrained(tmp_path / "saved")
    for name, file in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        path = tmp_path / "saved" / name / file
        whole, weights = path.read_bytes(), load_file(path)
        gone = next(key for key in weights if "norm" in key or "head" in key)
        save_file({key: tensor for key, tensor in weights.items() if key != gone}, path)
        with pytest.raises(ValueError, match=f"{name} does not fit .*missing keys {gone}"):
            PaellaPipeline.from_pretrained(tmp_path / "saved", low_memory=True)
        save_file(weights | {gone: weights[gone][:1].clone()}, path)
        with pytest.raises(ValueError, match=f"{name} does not fit .*wrong tensors {gone} is"):
            PaellaPipeline.from_pretrained(tmp_path / "saved", low_memory=True)
        path.write_bytes(whole[:-9])
        with pytest.raises(ValueError, match="is damaged"):
            PaellaPipeline.from_pretrained(tmp_path / "saved", low_memory=True)
        path.unlink()
        with pytest.raises(FileNotFoundError, match="low_memory` maps safetensors"):
            PaellaPipeline.from_pretrained(tmp_path / "saved", low_memory=True)
        path.write_bytes(whole)
