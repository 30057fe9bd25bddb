import itertools

import accelerate
import pytest
import torch
from conftest import TINY_UNET, manifest, tiny_unet
from peft import LoraConfig

from paella_diffusers import PaellaUNet
from paella_diffusers.models.attention import chunked_attention
from paella_diffusers.models.unet_paella import GlobalResponseNorm, sinusoidal_embedding


def inputs(batch_size=2, length=5, seed=0, dtype=torch.float32, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype)
    return {
        "sample": torch.randint(32, (batch_size, 8, 8), generator=generator),
        "timestep": torch.rand(batch_size, generator=generator),
        "encoder_hidden_states": random(batch_size, length, 16),
        "clip_text_embeds": random(batch_size, 12),
        "clip_image_embeds": random(batch_size, 12),
    } | kwargs


GOLDEN_TOLERANCE = {"atol": 2e-4, "rtol": 0}  # with AVX2, `exp` rounds one of the embedding's frequencies otherwise


def test_golden(golden, golden_models):
    io = golden.paella_io
    text, image = {"clip_text_embeds": io["clip_text"]}, {"clip_image_embeds": io["clip_image"]}
    both_images = torch.stack([io["clip_image"], io["clip_image_2"]], dim=1)
    for name, kwargs in {
        "byt5": {},
        "byt5_text": text,
        "byt5_text_image": text | image,
        "two_images": text | {"clip_image_embeds": both_images},
        "image_only": image,
        "attn_weights": text | image | {"conditioning_weights": io["attn_weights"]},
    }.items():
        with torch.no_grad():
            logits = golden_models.unet(io["tokens"], io["t"], io["byt5"], **kwargs).sample
        torch.testing.assert_close(logits, io[f"logits_{name}"], **GOLDEN_TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_golden_time_embedding(golden):
    io = golden.paella_io
    embedding = sinusoidal_embedding(io["t"], golden.config["paella"]["c_r"])
    torch.testing.assert_close(embedding, io["time_embedding"], **GOLDEN_TOLERANCE)
    assert sinusoidal_embedding(io["t"], 9)[:, -1].eq(0).all()  # an odd size ends with a zero


def test_default_sizes_are_the_released_ones():
    with torch.device("meta"):
        original = PaellaUNet().to_original_state_dict()
    expected = {key: shape for key, (shape, _) in manifest("paella_v3").items()}
    assert {key: list(tensor.shape) for key, tensor in original.items()} == expected
    assert {str(tensor.dtype)[6:] for tensor in original.values()} == {d for _, d in manifest("paella_v3").values()}


def test_initialisation_is_the_published_one():
    unet = PaellaUNet(**TINY_UNET | {"num_vq_embeddings": 4096, "cross_attention_dim": 64, "text_embed_dim": 256})
    assert unet(**inputs(encoder_hidden_states=torch.randn(2, 5, 256))).sample.std() == 0  # uniform predictions
    assert torch.equal(unet.head.weight, unet.token_embedding.weight)
    assert unet.token_embedding.weight.std().item() == pytest.approx(1 / 64, rel=0.05)
    assert unet.text_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    block = unet.up_blocks[0]
    assert block.block_types == "CTA"
    residual, time, attention = block.layers
    assert time.proj.weight.eq(0).all()
    xavier = (6 / (16 + 64)) ** 0.5
    assert residual.proj_out.weight.abs().max().item() == pytest.approx(xavier / 3**0.5, rel=0.05)  # 3 layers in all
    packed_xavier = (6 / (16 + 48)) ** 0.5
    assert attention.attention.to_q.weight.abs().max().item() == pytest.approx(packed_xavier, rel=0.05)


def test_padding_with_a_mask_changes_nothing():
    unet, kwargs = tiny_unet(), inputs()
    expected = unet(**kwargs).sample
    padded = torch.cat([kwargs["encoder_hidden_states"], torch.randn(2, 3, 16)], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 3] * 2)
    logits = unet(**kwargs | {"encoder_hidden_states": padded, "encoder_attention_mask": mask}).sample
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(unet(**kwargs | {"encoder_hidden_states": padded}).sample, expected, atol=1e-3)


def test_mask_over_the_whole_sequence_leaves_the_image_out():
    unet, kwargs = tiny_unet(), inputs()
    expected = unet(**kwargs | {"clip_image_embeds": None}).sample
    mask = torch.tensor([[1] * 7 + [0] * 2] * 2)  # 5 text, 2 for CLIP text, 2 for the image
    torch.testing.assert_close(unet(**kwargs, encoder_attention_mask=mask).sample, expected, atol=1e-5, rtol=0)


def test_conditioning_weights_end_at_the_last_attended_token():
    unet, weights = tiny_unet(), torch.tensor([2.0, 0.0, 0.5])
    kwargs = inputs(clip_text_embeds=None, clip_image_embeds=None)
    expected = unet(**kwargs, conditioning_weights=weights).sample
    assert not torch.allclose(expected, unet(**kwargs).sample, atol=1e-3)
    # the same text with padding inside and at the end
    text = kwargs["encoder_hidden_states"]
    padding = torch.randn(2, 2, 16)
    padded = torch.cat([text[:, :3], padding, text[:, 3:], padding], dim=1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 0, 0]] * 2)
    logits = unet(
        **kwargs | {"encoder_hidden_states": padded}, encoder_attention_mask=mask, conditioning_weights=weights.expand(2, -1)
    ).sample
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_images_in_a_batch_do_not_meet():
    unet, kwargs = tiny_unet().double(), inputs(dtype=torch.float64)
    both = unet(**kwargs).sample
    for row in range(2):
        alone = unet(**{name: value[row : row + 1] for name, value in kwargs.items()}).sample
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-12, rtol=0)


def test_scalar_timestep():
    unet, kwargs = tiny_unet(), inputs()
    expected = unet(**kwargs | {"timestep": torch.full((2,), 0.25)}).sample
    for timestep in (0.25, torch.tensor(0.25), torch.tensor([0.25])):
        assert torch.equal(unet(**kwargs | {"timestep": timestep}).sample, expected)


def test_gradient_checkpointing_keeps_gradients():
    unet, kwargs = tiny_unet(dropout=0.0).train(), inputs()
    unet(**kwargs).sample.square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}
    unet.zero_grad()
    unet.enable_gradient_checkpointing()
    calls = []
    checkpoint = unet._gradient_checkpointing_func
    unet._gradient_checkpointing_func = lambda block, *args: calls.append(block) or checkpoint(block, *args)
    unet(**kwargs).sample.square().mean().backward()
    assert len(calls) == 6
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_dropout_acts_in_training_only():
    unet, kwargs = tiny_unet(dropout=(0.0, 0.5)), inputs()
    assert torch.equal(unet(**kwargs).sample, unet(**kwargs).sample)
    unet.train()
    assert not torch.equal(unet(**kwargs).sample, unet(**kwargs).sample)
    assert unet.up_blocks[0].layers[2].attention.dropout == 0.5
    assert unet.down_blocks[0].layers[0].dropout.p == 0.0


def test_compiled_blocks_have_one_graph():
    unet, kwargs = tiny_unet(), inputs()
    expected = unet(**kwargs).sample
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(unet(**kwargs).sample, expected, atol=1e-5, rtol=0)


def test_whole_model_compiles_to_one_graph():
    unet, kwargs = tiny_unet(), inputs()
    expected = unet(**kwargs).sample
    mask, weights = torch.tensor([[1, 1, 1, 1, 0], [1] * 5]), torch.rand(3)
    masked = unet(**kwargs, encoder_attention_mask=mask, conditioning_weights=weights).sample
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**kwargs).sample, expected, atol=1e-5, rtol=0)
        logits = compiled(**kwargs, encoder_attention_mask=mask, conditioning_weights=weights).sample
    torch.testing.assert_close(logits, masked, atol=1e-5, rtol=0)


def test_attention_backends_and_processors():
    unet, kwargs = tiny_unet(), inputs()
    expected = unet(**kwargs).sample
    try:
        unet.set_attention_backend("_native_math")
        torch.testing.assert_close(unet(**kwargs).sample, expected, atol=1e-5, rtol=0)
    finally:
        unet.set_attention_backend("native")  # diffusers keeps the choice for the whole process
    assert len(unet.attn_processors) == 4
    unet.set_attn_processor(type(next(iter(unet.attn_processors.values())))())
    assert torch.equal(unet(**kwargs).sample, expected)


def test_layerwise_casting_runs_and_stays_close():
    unet, kwargs = tiny_unet(), inputs()
    expected = unet(**kwargs).sample
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert unet.text_proj.weight.dtype == torch.bfloat16
    assert unet.token_embedding.weight.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(unet(**kwargs).sample, expected, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_to_disk(offload_type, tmp_path):
    unet, kwargs = tiny_unet(), inputs()
    expected = unet(**kwargs).sample
    options = {"num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path)}
    unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type, **options)
    with torch.no_grad():
        torch.testing.assert_close(unet(**kwargs).sample, expected)


def test_accelerate_offloading():
    unet, kwargs = tiny_unet(), inputs()
    expected = unet(**kwargs).sample
    accelerate.cpu_offload(unet, torch.device("cpu"))
    assert unet.head.weight.device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(unet(**kwargs).sample, expected)


def test_adapters_and_their_scale():
    unet, kwargs = tiny_unet(), inputs()
    expected = unet(**kwargs).sample
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    adapted = unet(**kwargs).sample
    assert not torch.allclose(adapted, expected, atol=1e-3)
    off = unet(**kwargs, cross_attention_kwargs={"scale": 0.0}).sample
    torch.testing.assert_close(off, expected, atol=1e-5, rtol=0)
    assert torch.equal(unet(**kwargs).sample, adapted)
    with pytest.raises(ValueError, match="no adapters"):
        unet.to_original_state_dict()


def test_half_precision_stays_close():
    unet, kwargs = tiny_unet(), inputs()
    expected = unet(**kwargs).sample
    half = {k: v.bfloat16() if v.is_floating_point() and k != "timestep" else v for k, v in kwargs.items()}
    logits = unet.to(torch.bfloat16)(**half).sample
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.5, rtol=0.1)


def test_logits_are_channels_last():
    logits = tiny_unet()(**inputs()).sample
    assert logits.shape == (2, 32, 8, 8)
    assert logits.is_contiguous(memory_format=torch.channels_last)


def test_save_and_load(tmp_path):
    unet, kwargs = tiny_unet(), inputs()
    unet.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(PaellaUNet.from_pretrained(tmp_path)(**kwargs).sample, unet(**kwargs).sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 6, 8, dtype=torch.long)}, "6×8.*divisible by 4"),
        ({"encoder_attention_mask": torch.ones(2, 6)}, "6 columns.*5 tokens.*sequence 9"),
        ({"conditioning_weights": torch.ones(3, 2)}, "3 rows for a batch of 2"),
        ({"conditioning_weights": torch.ones(10)}, "10 entries for.*9 tokens"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet()(**inputs() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_types": ("CT", "TCA")}, "begin with C"),
        ({"block_types": ("CT", "CXA")}, "begin with C"),
        ({"layers_per_block": (1, 2, 3)}, "layers_per_block.*one entry a level"),
        ({"dropout": (0.1,)}, "dropout.*one entry a level"),
        ({"time_embed_dim": 2}, "time_embed_dim.*at least 4"),
        ({"kernel_size": 4}, "kernel_size.*odd"),
        ({"num_attention_heads": (-1, -1)}, "num_attention_heads.*divide the 16 channels"),
        ({"num_attention_heads": (-1, 3)}, "num_attention_heads.*divide the 16 channels"),
    ],
)
def test_bad_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PaellaUNet(**TINY_UNET | change)


@pytest.mark.parametrize("block_types", [("CT", "CTA"), ("CTA", "CTAFT"), ("C", "CT")])
def test_guided_logits(block_types):
    """Both halves in one call, the conditioning encoded before: as guidance of two calls."""
    unet, both = tiny_unet(block_types=block_types, num_attention_heads=(2, 2)), inputs(batch_size=4)
    both["sample"][2:], both["timestep"][2:] = both["sample"][:2], both["timestep"][:2]
    both["encoder_attention_mask"] = torch.ones(4, 5).tril(3)
    both["conditioning_weights"] = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    rows = lambda half: {name: value[half] for name, value in both.items()}
    with torch.no_grad():
        expected = 3.0 * unet(**rows(slice(2))).sample - 2.0 * unet(**rows(slice(2, 4))).sample
        torch.testing.assert_close(unet(**both, mixing_weights=((3.0, -2.0),)).sample, expected, atol=1e-4, rtol=1e-4)
        sample, timestep = both.pop("sample"), both.pop("timestep")
        encoded = unet.encode_conditioning(**both)
        assert torch.equal(unet(sample, timestep, encoded).sample, unet(sample, timestep, **both).sample)
        guided = unet(sample, timestep, encoded, mixing_weights=((3.0, -2.0),)).sample
        torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)


def test_encoded_conditioning_has_the_adapter():
    unet, call = tiny_unet(), inputs()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    sample, timestep = call.pop("sample"), call.pop("timestep")
    for scale in (0.0, 0.5, 1.0):
        lora = {"cross_attention_kwargs": {"scale": scale}}
        encoded = unet.encode_conditioning(**call, **lora)
        assert torch.equal(unet(sample, timestep, encoded, **lora).sample, unet(sample, timestep, **call, **lora).sample)


def test_deep_features_take_the_place_of_the_lower_levels():
    unet, both = tiny_unet(), inputs(batch_size=4)
    both["sample"][2:] = both["sample"][:2]
    unet.eval()
    with torch.no_grad():
        features, plain = [], unet(**both, mixing_weights=((3.0, -2.0),)).sample
        assert torch.equal(unet(**both, mixing_weights=((3.0, -2.0),), deep_features=features).sample, plain)
        assert len(features) == 1
        calls = []
        for block in (*unet.down_blocks, *unet.up_blocks):
            block.register_forward_hook(lambda block, args, output: calls.append(type(block).__name__))
        again = unet(**both, mixing_weights=((3.0, -2.0),), deep_features=features).sample
        torch.testing.assert_close(again, plain)
        assert calls == ["PaellaBlock", "PaellaBlock"]  # of the first level, down and up
        other = both | {"timestep": both["timestep"] / 2}
        assert not torch.equal(unet(**other, deep_features=features).sample, unet(**other).sample)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "key_length"), [(4, 9), (300, 310), (600, 1000)])
def test_chunked_attention_is_attention(masked, length, key_length):
    """In bfloat16 not much farther from the truth than torch's own, which keeps scores in float32."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, n, 4, 16, generator=generator) for n in (length, key_length, key_length))
    mask = torch.rand(3, key_length, generator=generator) < 0.7 if masked else None
    attend = lambda *states: torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in states), attn_mask=None if mask is None else mask[:, None, None]
    ).transpose(1, 2)
    expected = attend(query, key, value)
    torch.testing.assert_close(chunked_attention(query, key, value, mask), expected)
    halves = [states.bfloat16() for states in (query, key, value)]
    error = lambda states: (states.float() - expected).square().mean().sqrt()
    assert error(chunked_attention(*halves, mask)) < 2 * error(attend(*halves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_attention_is_linear(dtype, monkeypatch):
    """Of four times as many tokens: all scores at once would take 16 times as much."""
    monkeypatch.setattr("paella_diffusers.models.attention.HAS_FAST_BFLOAT16", True)
    attention = tiny_unet().up_blocks[0].layers[2].attention
    mask = torch.ones(1, 4096, dtype=torch.bool)

    def peak(length):
        states = torch.randn(1, length, 2, 8).to(dtype)
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            attention.processor.attend(attention, states, states, states, mask[:, :length])
        held = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        return max(itertools.accumulate(held))

    assert peak(1024) > 2 * 1024 * 8 and peak(4096) < 6 * peak(1024)


def test_compiled_chunked_attention():
    query, key = torch.randn(2, 300, 4, 16).bfloat16(), torch.randn(2, 310, 4, 16).bfloat16()
    mask = torch.rand(2, 310) > 0.5
    torch.library.opcheck(chunked_attention, (query, key, key, mask))
    compiled = torch.compile(chunked_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(query, key, key, mask), chunked_attention(query, key, key, mask))


def test_bfloat16_attends_in_chunks(monkeypatch):
    """Unless a gradient is wanted, or another backend, or the processor is slow at it."""
    monkeypatch.setattr("paella_diffusers.models.attention.HAS_FAST_BFLOAT16", True)
    unet, call = tiny_unet().to(torch.bfloat16), inputs()
    call = {name: value.bfloat16() if value.is_floating_point() else value for name, value in call.items()}
    calls = []
    original = chunked_attention
    replacement = lambda *args: calls.append(1) or original(*args)
    monkeypatch.setattr("paella_diffusers.models.attention.chunked_attention", replacement)
    with torch.no_grad():
        ours = unet(**call).sample
    assert calls
    calls.clear()
    unet(**call)
    unet.set_attention_backend("native")
    with torch.no_grad():
        torch.testing.assert_close(unet(**call).sample, ours, atol=0.1, rtol=0.1)
    assert not calls
    unet.reset_attention_backend()
    monkeypatch.setattr("paella_diffusers.models.attention.HAS_FAST_BFLOAT16", False)
    with torch.no_grad():
        torch.testing.assert_close(unet(**call).sample, ours, atol=0.1, rtol=0.1)
    assert not calls


def test_what_pipelines_do_compiles_to_one_graph_of_any_size():
    """Guided, with encoded conditioning, and then larger: nothing is compiled a third time."""
    unet, graphs = tiny_unet(), []
    backend = lambda graph, example: graphs.append(graph) or graph.forward
    compiled = torch.compile(unet, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for side, scale in ((8, 3.0), (12, 4.0), (16, 5.0)):
            call = inputs(batch_size=4, sample=torch.randint(32, (4, side, side)), timestep=torch.tensor(0.5))
            sample, timestep = call.pop("sample"), call.pop("timestep")
            sample[2:] = sample[:2]
            encoded = unet.encode_conditioning(**call)
            expected = unet(sample, timestep, encoded, mixing_weights=((scale, 1 - scale),)).sample
            output = compiled(sample, timestep, encoded, mixing_weights=((scale, 1 - scale),)).sample
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert len(graphs) <= 2


def test_a_silent_channel_has_finite_gradients():
    norm = GlobalResponseNorm(4)
    torch.nn.init.ones_(norm.gamma)
    hidden_states = torch.randn(2, 3, 3, 4)
    hidden_states[..., 1] = 0
    hidden_states.requires_grad_()
    norm(hidden_states).square().sum().backward()
    assert hidden_states.grad.isfinite().all() and norm.gamma.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_response_norm_in_half_precision(dtype):
    """With sums of squares beyond what float16 can say."""
    norm = GlobalResponseNorm(4)
    torch.nn.init.ones_(norm.gamma)
    hidden_states = 10 * torch.randn(2, 40, 40, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = norm(hidden_states)
        output = norm.to(dtype)(hidden_states.to(dtype)).float()
    torch.testing.assert_close(output, expected, atol=0.05, rtol=0.02)


def test_response_norm_of_large_numbers_in_float16():
    """Their squares are beyond what float16 can say."""
    hidden_states = torch.full((1, 2, 2, 2), 300.0).half()
    assert torch.equal(GlobalResponseNorm(2).half()(hidden_states), hidden_states)


def test_deep_features_without_blocks_above_them():
    """Nothing but them is left: the logits are those of the call that filled them."""
    unet, call, features = tiny_unet(layers_per_block=(0, 2)), inputs(), []
    with torch.no_grad():
        filled = unet(**call, deep_features=features).sample
        again = unet(**call, deep_features=features).sample
    assert len(features) == 1 and torch.equal(again, filled)


def test_several_mixtures_of_branches():
    """Each is a weighted sum of the branches' logits."""
    unet, call = tiny_unet(), inputs(batch_size=4)
    call |= {"sample": call["sample"][:2].repeat(2, 1, 1), "timestep": 0.6}
    with torch.no_grad():
        first, second = unet(**call).sample.chunk(2)
        mixtures = unet(**call, mixing_weights=((3.0, -2.0), (1.0, 0.0), (0.0, 1.0))).sample.chunk(3)
    for mixture, expected in zip(mixtures, (3 * first - 2 * second, first, second)):
        torch.testing.assert_close(mixture, expected, atol=1e-4, rtol=1e-4)


def test_samples_are_tiled_for_more_rows_of_conditioning():
    unet, call = tiny_unet().double(), inputs(batch_size=6, dtype=torch.float64)
    sample, call["timestep"] = call.pop("sample")[:2], 0.4
    with torch.no_grad():
        torch.testing.assert_close(unet(sample, **call).sample, unet(sample.repeat(3, 1, 1), **call).sample)


@pytest.mark.parametrize(("samples", "rows"), [(2, 3), (4, 1), (3, 2)])
def test_other_numbers_of_rows_are_refused(samples, rows):
    call = inputs(batch_size=rows) | {"sample": torch.zeros(samples, 8, 8, dtype=torch.long), "timestep": 0.5}
    with pytest.raises(ValueError, match=f"conditioning has {rows} rows for {samples} samples: pass as many, or a multiple"):
        tiny_unet()(**call)


def test_exported_with_a_dynamic_batch():
    unet, call = tiny_unet(), inputs(batch_size=3)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(unet, (), call, dynamic_shapes={name: {0: batch} for name in call}, strict=False).module()
    other = inputs(batch_size=5, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(exported(**other).sample, unet(**other).sample, atol=1e-5, rtol=0)
