import json

import peft
import pytest
import torch
from conftest import tiny_pipeline
from kills import contents, killed_before, leftovers
from safetensors import safe_open
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


TARGETS = {"unet": ["to_q"], "text_encoder": ["q", "o"], "text_encoder_2": ["q_proj"], "prior": ["proj_in"]}


def save_all(folder, names=TARGETS, **kwargs) -> list[torch.Tensor]:
    """Save an adapter of several components in one file; what they compute with it."""
    pipe, parts = tiny_pipeline(), {}
    for name in names:
        model = getattr(pipe, name)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS[name], init_lora_weights=False, **kwargs), "made")
        parts[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(model, adapter_name="made")
        parts[f"{name}_lora_adapter_metadata"] = model.peft_config["made"].to_dict()
    pipe.save_lora_weights(folder, **parts)
    return computed(pipe)


def computed(pipe) -> list[torch.Tensor]:
    """What the U-Net, ByT5, CLIP's text encoder and the prior compute."""
    text, _, _, _, clip, _ = pipe.encode_prompt("red", do_classifier_free_guidance=False)
    with torch.no_grad():
        return [logits(pipe), text, clip, pipe.prior(torch.ones(1, 12), 0.5, torch.ones(1, 12)).sample]


def test_one_file_for_the_unet_the_text_encoders_and_the_prior(tmp_path):
    pipe = tiny_pipeline()
    plain, expected = computed(pipe), save_all(tmp_path, lora_alpha=3)
    assert {key.partition(".")[0] for key in load_file(tmp_path / "pytorch_lora_weights.safetensors")} == TARGETS.keys()
    assert not any(torch.allclose(one, other) for one, other in zip(plain, expected))
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(computed(pipe), expected)
    assert pipe.get_list_adapters() == {name: ["default_0"] for name in TARGETS}
    with pytest.raises(ValueError, match="Adapters are attached"):
        pipe.save_pretrained(tmp_path / "pipe")
    pipe.set_adapters("default_0", {"text_encoder": 0.0, "prior": 0.0})
    found = computed(pipe)
    assert [torch.equal(one, other) for one, other in zip(found, plain)] == [False, True, False, True]
    pipe.set_adapters("default_0")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(computed(pipe), expected, atol=1e-4, rtol=1e-4)


def test_adapters_are_loaded_with_sequential_offloading(tmp_path):
    expected = save_all(tmp_path)
    pipe = tiny_pipeline()
    pipe.enable_sequential_cpu_offload(device="cpu")
    pipe.load_lora_weights(tmp_path)
    assert pipe.text_encoder.device.type == "meta"  # offloaded again
    pipe.remove_all_hooks()
    torch.testing.assert_close(computed(pipe), expected)


def test_parts_are_loaded_alone_and_have_one_name(tmp_path):
    pipe = tiny_pipeline()
    plain, expected = computed(pipe), save_all(tmp_path / "texts", ["text_encoder", "text_encoder_2"])
    save_all(tmp_path / "unet", ["unet"])
    pipe.load_lora_weights(tmp_path / "texts")
    torch.testing.assert_close(computed(pipe), expected)
    pipe.load_lora_weights(tmp_path / "unet")
    names = {"unet": ["default_1"], "text_encoder": ["default_0"], "text_encoder_2": ["default_0"]}
    assert pipe.get_list_adapters() == names
    pipe.unload_lora_weights()
    assert all(torch.equal(one, other) for one, other in zip(computed(pipe), plain))


def test_files_loaded_under_one_name_are_pushed_as_one(hub, tmp_path):
    pipe, again = tiny_pipeline(), tiny_pipeline()
    for number, names in enumerate((["unet", "text_encoder"], ["prior"])):
        save_all(tmp_path / str(number), names)
        pipe.load_lora_weights(tmp_path / str(number), adapter_name="both")
    pipe.push_lora_to_hub("me/both")
    again.load_lora_weights("me/both", cache_dir=tmp_path / "cache")
    assert again.get_list_adapters().keys() == {"unet", "text_encoder", "prior"}
    torch.testing.assert_close(computed(again), computed(pipe))


def test_parts_that_do_not_fit_are_refused_before_anything_is_attached(pipe, tmp_path):
    save_all(tmp_path, ["unet", "prior"])
    with pytest.raises(ValueError, match="has weights for `prior`, which this pipeline does not have"):
        pipe.load_lora_weights(tmp_path)
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    weights = {key.replace("prior.", "text_encoder."): weight for key, weight in weights.items()}
    with pytest.raises(ValueError, match="this `text_encoder`"):
        pipe.load_lora_weights(weights)
    assert pipe.get_list_adapters() == {}


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


def scales(pipe, name: str) -> dict[str, float]:
    """Each adapted layer's scale, relative to alpha / rank."""
    layers = {key: layer for key, layer in pipe.unet.named_modules() if hasattr(layer, "set_scale")}
    return {key: layer.scaling[name] * layer.r[name] / layer.lora_alpha[name] for key, layer in layers.items()}


def test_a_scale_of_zero_for_one_call_leaves_the_adapters_scale(pipe):
    add_adapter(pipe, "a", 1)
    pipe.set_adapters("a", 0.5)
    half = logits(pipe)
    tokens(pipe, cross_attention_kwargs={"scale": 0.0})
    assert set(scales(pipe, "a").values()) == {0.5}
    assert torch.equal(logits(pipe), half)


def test_a_scale_for_each_block(pipe, tmp_path):
    """With the layers that `examples/train_paella_lora.py` adapts."""
    unet = tiny_pipeline().unet
    modules = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    metadata = unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(unet), unet_lora_adapter_metadata=metadata)
    for name in ("a", "b"):
        pipe.load_lora_weights(tmp_path, adapter_name=name)
    pipe.set_adapters("a", {"unet": {"down": 0.5}})
    by_layer = scales(pipe, "a")
    assert {scale for key, scale in by_layer.items() if key.startswith("down_blocks.")} == {0.5}
    assert {scale for key, scale in by_layer.items() if not key.startswith("down_blocks.")} == {1.0}
    half = logits(pipe)
    pipe.set_adapters("a")
    assert set(scales(pipe, "a").values()) == {1.0} and not torch.allclose(logits(pipe), half)
    nested = {"down": 0.5, "up": {"block_0": 0.25}, "up_blocks.0.layers.2.attention.to_q": 0.0}
    pipe.set_adapters(["a", "b"], [{"unet": nested}, None])
    by_layer = scales(pipe, "a")
    first = {scale for key, scale in by_layer.items() if key.startswith("up_blocks.0.")}
    assert first == {0.25, 0.0} and by_layer["up_blocks.0.layers.2.attention.to_q"] == 0.0
    assert set(scales(pipe, "b").values()) == {1.0}
    pipe.unet.set_adapters("b", {"up_blocks": 0.0, "down_blocks": 0.0, "proj_in": 0.0, "proj_out": 0.0})
    assert torch.equal(logits(pipe), logits(tiny_pipeline(prior=None, prior_scheduler=None)))
    before = scales(pipe, "b")
    for wrong, message in (
        ({"down": {"block_99": 1.0}}, r"no layers in 'down_blocks.99', but in \['down_blocks.0'"),
        ({"mid": 1.0}, "no layers in 'mid'"),
        ({"down": "half"}, "scale of down_blocks must be a finite number, got 'half'"),
        ({"down": float("nan")}, "must be a finite number"),
        (True, "must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.unet.set_adapters("b", wrong)
    with pytest.raises(ValueError, match="Length of adapter names"):
        pipe.unet.set_adapters(["a", "b"], [1.0])
    assert scales(pipe, "b") == before


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
    with pytest.raises(ValueError, match="no LoRA adapter of a Paella.*transformer.lora_A"):
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
        (contents | {first: contents[first] * torch.nan}, f"has NaN or infinite values in {module}.lora_A.weight"),
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


def test_hostile_metadata_are_refused_or_not_evaluated(pipe, tmp_path):
    folder, expected = saved_adapter(tmp_path)
    path = folder / "pytorch_lora_weights.safetensors"
    weights = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])

    def save_with(**entries):
        own = json.dumps(metadata | {f"unet.{key}": value for key, value in entries.items()})
        save_file(weights, path, {"format": "pt", "lora_adapter_metadata": own})

    for entries in (
        {"target_modules": "(" + "a?" * 40 + ")*b" + "(x+x+)+y" * 5},  # which would take for ever
        {"target_modules": ["(x+x+)+y"], "layers_pattern": "(x+x+)+y", "exclude_modules": "(x+x+)+y"},
        {"init_lora_weights": "pissa", "loftq_config": {"loftq_bits": 4}, "modules_to_save": ["head"], "unknown": 1},
    ):
        save_with(**entries)
        pipe.load_lora_weights(folder)
        torch.testing.assert_close(logits(pipe), expected)
        pipe.unload_lora_weights()
    for entries, message in (
        ({"r": 10**9}, r"rank in the adapter's metadata must be in \[1, 65536\], got 1000000000"),
        ({"r": "2"}, "rank in the adapter's metadata must be"),
        ({"rank_pattern": {"to_q": 10**9}}, "rank in the adapter's metadata must be"),
        ({"rank_pattern": {"(x+x+)+y": 2}}, "`rank_pattern` in the adapter's metadata must have names of layers"),
        ({"alpha_pattern": {"(x+x+)+y": 2}}, "`alpha_pattern` in the adapter's metadata must have names of layers"),
        ({"alpha_pattern": {"to_q": float("nan")}}, "`lora_alpha` in the adapter's metadata must be a finite number"),
        ({"lora_alpha": 1e300}, "`lora_alpha` in the adapter's metadata must be a finite number up to 1000000 in size"),
        ({"lora_alpha": float("inf")}, "`lora_alpha` in the adapter's metadata must be a finite number"),
        ({"lora_dropout": 7}, "`lora_dropout` in the adapter's metadata must be"),
        ({"peft_type": "LOKR"}, "must be a LoRA, got 'LOKR'"),
    ):
        save_with(**entries)
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(folder)
    for text in ("[1]", "{", "[" * 100000, "7"):
        save_file(weights, path, {"format": "pt", "lora_adapter_metadata": text})
        with pytest.raises(ValueError, match="has metadata that are"):
            pipe.load_lora_weights(folder)
    assert not getattr(pipe.unet, "peft_config", None)


def test_ranks_and_alphas_of_single_layers(pipe, tmp_path):
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["to_q", "proj_in", "token_embedding"],
        rank_pattern={"to_q": 3},
        alpha_pattern={"to_q": 9},
        init_lora_weights=False,
    )
    trained = tiny_pipeline(prior=None, prior_scheduler=None)
    trained.unet.add_adapter(config)
    weights = peft.get_peft_model_state_dict(trained.unet)
    metadata = trained.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, weights, unet_lora_adapter_metadata=metadata)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(logits(pipe), logits(trained))
    again = tmp_path / "again"
    weights = peft.get_peft_model_state_dict(pipe.unet, adapter_name="default_0")
    metadata = pipe.unet.peft_config["default_0"].to_dict()
    pipe.save_lora_weights(again, weights, unet_lora_adapter_metadata=metadata)
    other = tiny_pipeline(prior=None, prior_scheduler=None)
    other.load_lora_weights(again)
    torch.testing.assert_close(logits(other), logits(trained))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
def test_kinds_of_lora(pipe, tmp_path, options):
    trained = tiny_pipeline(prior=None, prior_scheduler=None)
    modules = ["to_q", "proj_in", "depthwise"] if "use_rslora" in options else ["to_q", "proj_in"]
    trained.unet.add_adapter(peft.LoraConfig(r=16, target_modules=modules, init_lora_weights=False, **options))
    metadata = trained.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(trained.unet), unet_lora_adapter_metadata=metadata)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(logits(pipe), logits(trained))


def test_an_adapter_is_saved_whole_or_not_at_all(pipe, tmp_path):
    folder, expected = saved_adapter(tmp_path / "folder")
    weights = pipe.lora_state_dict(folder)
    before = contents(folder)
    other = {key.removeprefix("unet."): tensor + 1 for key, tensor in weights.items()}
    operation = 0
    while killed_before(operation, folder, lambda: pipe.save_lora_weights(folder, other)):
        operation += 1
        if contents(folder) != before:
            break
        pipe.load_lora_weights(folder)
        torch.testing.assert_close(logits(pipe), expected)
        pipe.unload_lora_weights()
    assert operation > 2
    pipe.save_lora_weights(folder, other)
    assert contents(folder).keys() == before.keys() and contents(folder) != before and not leftovers(tmp_path)
