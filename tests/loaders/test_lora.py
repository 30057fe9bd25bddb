import peft
import pytest
import torch
from conftest import tiny_pipeline
from safetensors.torch import load_file, save_file

from paella_diffusers import PaellaImg2ImgPipeline


@pytest.fixture
def pipe():
    return tiny_pipeline(prior=None, prior_scheduler=None)


def tokens(pipe, **kwargs):
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    return pipe("a", **call | kwargs).images


def logits(pipe) -> torch.Tensor:
    """What the U-Net says of fixed input: finer than the tokens."""
    text = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.unet(torch.arange(16).view(1, 4, 4), 0.5, text).sample


def add_adapter(pipe, name: str, seed: int) -> dict[str, torch.Tensor]:
    """A random adapter on every attention projection; its weights."""
    modules = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=modules, init_lora_weights=False), name)
    torch.manual_seed(seed)
    for key, parameter in pipe.unet.named_parameters():
        if f".{name}." in key:
            torch.nn.init.normal_(parameter, std=0.5)
    return peft.get_peft_model_state_dict(pipe.unet, adapter_name=name)


def saved_adapter(folder, seed: int = 1):
    """A folder with an adapter, and the logits with it."""
    pipe = tiny_pipeline(prior=None, prior_scheduler=None)
    weights = add_adapter(pipe, "made", seed)
    pipe.save_lora_weights(folder, weights, unet_lora_adapter_metadata=pipe.unet.peft_config["made"].to_dict())
    return folder, logits(pipe)


def test_save_and_load(pipe, tmp_path):
    plain = logits(pipe)
    folder, expected = saved_adapter(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["pytorch_lora_weights.safetensors"]
    for source in (folder, str(folder), folder / "pytorch_lora_weights.safetensors"):
        pipe.load_lora_weights(source)
        torch.testing.assert_close(logits(pipe), expected)
        pipe.unload_lora_weights()
        assert torch.equal(logits(pipe), plain)


def test_every_task_has_adapters(pipe, tmp_path):
    folder, expected = saved_adapter(tmp_path)
    edit = PaellaImg2ImgPipeline.from_pipe(pipe)
    edit.load_lora_weights(folder)
    torch.testing.assert_close(logits(edit), expected)


def test_several_adapters_with_weights(pipe, tmp_path):
    plain = logits(pipe)
    first, one = saved_adapter(tmp_path / "1", seed=1)
    second, two = saved_adapter(tmp_path / "2", seed=2)
    pipe.load_lora_weights(first, adapter_name="first")
    pipe.load_lora_weights(second, adapter_name="second")
    assert pipe.get_list_adapters() == {"unet": ["first", "second"]}
    pipe.set_adapters("first")
    torch.testing.assert_close(logits(pipe), one)
    pipe.set_adapters(["first", "second"], adapter_weights=[0.0, 1.0])
    torch.testing.assert_close(logits(pipe), two)
    pipe.set_adapters(["first", "second"], adapter_weights=[0.5, 0.7])
    assert not torch.allclose(logits(pipe), one) and not torch.allclose(logits(pipe), two)
    pipe.disable_lora()
    torch.testing.assert_close(logits(pipe), plain)
    pipe.enable_lora()
    pipe.delete_adapters("second")
    assert pipe.get_list_adapters() == {"unet": ["first"]}


def test_scale_for_one_call(pipe, tmp_path):
    plain = tokens(pipe)
    folder, _ = saved_adapter(tmp_path)
    pipe.load_lora_weights(folder)
    adapted = tokens(pipe)
    assert not torch.equal(adapted, plain)
    assert torch.equal(tokens(pipe, cross_attention_kwargs={"scale": 0.0}), plain)
    assert torch.equal(tokens(pipe, cross_attention_kwargs={"scale": 1.0}), adapted)
    assert torch.equal(tokens(pipe), adapted)  # the scale was that call's alone


def test_fuse_and_unfuse(pipe, tmp_path):
    plain = logits(pipe)
    folder, expected = saved_adapter(tmp_path)
    pipe.load_lora_weights(folder)
    pipe.fuse_lora()
    torch.testing.assert_close(logits(pipe), expected, atol=1e-5, rtol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(logits(pipe), plain, atol=1e-5, rtol=1e-4)
    pipe.load_lora_weights(folder)
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    fused = pipe.unet.to_original_state_dict()  # a finetune for the published code
    assert not any("lora" in key for key in fused) and not torch.allclose(logits(pipe), plain)


def test_weights_in_memory_are_not_changed(pipe, tmp_path):
    folder, _ = saved_adapter(tmp_path)
    weights = pipe.lora_state_dict(folder)
    before = dict(weights)
    pipe.load_lora_weights(weights)
    assert weights.keys() == before.keys()


def test_what_is_no_adapter_is_refused(pipe, tmp_path):
    canary = tmp_path / "canary"

    class Malicious:
        def __reduce__(self):
            return (canary.touch, ())

    torch.save({"unet.lora": Malicious()}, tmp_path / "adapter.bin")
    torch.save({"unet.lora": Malicious()}, tmp_path / "pytorch_lora_weights.bin")
    for source, arguments in (
        (tmp_path, {"weight_name": "adapter.bin"}),
        (tmp_path / "adapter.bin", {}),
        (tmp_path, {}),
        (tmp_path, {"use_safetensors": True}),
    ):
        with pytest.raises((OSError, ValueError)) as error:
            pipe.load_lora_weights(source, **arguments)
        assert str(error.value)
    assert not canary.exists()
    save_file({"transformer.lora_A.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no LoRA adapter of Paella's U-Net.*transformer.lora_A"):
        pipe.load_lora_weights(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="`unet_lora_layers`"):
        pipe.save_lora_weights(tmp_path)


def test_without_peft(pipe, monkeypatch):
    monkeypatch.setattr("paella_diffusers.loaders.lora.is_peft_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install \S+\[lora\]"):
        pipe.load_lora_weights({})


def test_pickled_adapters_are_read_without_executing_anything(pipe, tmp_path):
    plain = logits(pipe)
    folder, _ = saved_adapter(tmp_path)
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    (tmp_path / "pickled").mkdir()
    torch.save(weights, tmp_path / "pickled" / "pytorch_lora_weights.bin")
    pipe.load_lora_weights(tmp_path / "pickled")
    assert not torch.equal(logits(pipe), plain)
    with pytest.raises(OSError):
        pipe.load_lora_weights(tmp_path / "pickled", use_safetensors=True)


def test_adapters_that_do_not_fit_are_refused_by_name(pipe, tmp_path):
    plain = logits(pipe)
    folder, _ = saved_adapter(tmp_path)
    path = folder / "pytorch_lora_weights.safetensors"
    whole, contents = path.read_bytes(), load_file(path)
    first = next(key for key in contents if key.endswith("to_q.lora_A.weight"))
    module = first.removeprefix("unet.").removesuffix(".lora_A.weight")
    without = {key: tensor for key, tensor in contents.items() if key != first}
    for weights, message in (
        (without, f"does not fit this U-Net: missing keys {module}.lora_A.weight"),
        (contents | {first: contents[first][:, 1:].contiguous()}, f"wrong tensors {module}.lora_A.weight is floating"),
        (contents | {first: contents[first][1:].contiguous()}, f"wrong tensors {module}.lora_B.weight is floating"),
        (contents | {first: contents[first].long()}, f"{module}.lora_A.weight is integer"),
        (without | {"unet.mid_block.to_q.lora_A.weight": contents[first]}, "unexpected keys mid_block.to_q.lora_A"),
        (without | {first.removesuffix(".weight"): contents[first]}, f"unexpected keys {module}.lora_A"),
    ):
        save_file(weights, path)
        for source in (folder, weights):
            with pytest.raises(ValueError, match=message):
                pipe.load_lora_weights(source)
    for damaged in (whole[:-10], (10**9).to_bytes(8, "little") + whole[8:], b"", b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a state dict that can be loaded safely"):
            pipe.load_lora_weights(folder)
    assert not getattr(pipe.unet, "peft_config", None) and torch.equal(logits(pipe), plain)
    path.write_bytes(whole)
    pipe.load_lora_weights(folder)
    assert not torch.equal(logits(pipe), plain)


def test_earlier_names_of_the_same_weights(pipe, tmp_path):
    folder, expected = saved_adapter(tmp_path)
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    rank = next(iter(weights.values())).shape[0]
    earlier = {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for key, t in weights.items()}
    pipe.load_lora_weights(earlier)
    assert next(iter(pipe.unet.peft_config.values())).lora_alpha == rank  # nothing says that it was twice that
    pipe.set_adapters(pipe.get_active_adapters(), 2.0)
    torch.testing.assert_close(logits(pipe), expected)


def test_which_file_is_the_adapter(pipe, tmp_path):
    folder, expected = saved_adapter(tmp_path)
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "mine.safetensors")
    pipe.load_lora_weights(folder)
    torch.testing.assert_close(logits(pipe), expected)
    (folder / "other.safetensors").write_bytes((folder / "mine.safetensors").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"mine.safetensors', 'other.safetensors'\]: pass `weight_name`"):
        pipe.load_lora_weights(folder)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(folder, weight_name="mine.safetensors")
    torch.testing.assert_close(logits(pipe), expected)
    with pytest.raises(FileNotFoundError, match="has no nothing.safetensors"):
        pipe.load_lora_weights(folder, weight_name="nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="has neither pytorch_lora_weights.safetensors nor"):
        pipe.load_lora_weights(folder, subfolder="sub")
