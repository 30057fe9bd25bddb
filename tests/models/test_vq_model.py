import copy

import accelerate
import pytest
import torch
from conftest import manifest, randomise

from paella_diffusers import PaellaVQModel, VQModel


def test_golden(golden, golden_models):
    vqgan, io = golden_models.vqgan, golden.vqgan_io
    with torch.no_grad():
        encoded = vqgan.encode(io["image"])
        torch.testing.assert_close(encoded.latents, io["latents"], atol=1e-5, rtol=0)
        torch.testing.assert_close(encoded.quantized, io["quantized"], atol=1e-5, rtol=0)
        assert torch.equal(encoded.indices, io["indices"])
        for decode, codes, expected in (
            (vqgan.decode_indices, "indices", "decode_indices"),
            (vqgan.decode, "quantized", "decode_quantized"),
            (vqgan.decode, "latents", "decode_latents"),
        ):
            torch.testing.assert_close(decode(io[codes]).sample, io[expected], atol=1e-5, rtol=0)
        output = vqgan(io["image"])
    torch.testing.assert_close(output.commit_loss, io["loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.sample, io["decode_quantized"], atol=1e-5, rtol=0)


def test_default_sizes_are_the_released_ones():
    with torch.device("meta"):
        original = VQModel().to_original_state_dict()
    expected = manifest("vqgan_f4")
    assert {key: list(tensor.shape) for key, tensor in original.items()} == {k: shape for k, (shape, _) in expected.items()}
    assert {str(tensor.dtype)[6:] for tensor in original.values()} == {dtype for _, dtype in expected.values()}


def test_straight_through_gradient_trains_encoder_and_codebook():
    vqgan = randomise(VQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=16)).train()
    output = vqgan(torch.rand(2, 3, 32, 32))
    output.sample.square().mean().backward(retain_graph=True)
    assert vqgan.in_block[1].weight.grad.abs().sum() > 0  # through the quantizer
    assert vqgan.vquantizer.embedding.weight.grad is None
    output.commit_loss.backward()
    assert vqgan.vquantizer.embedding.weight.grad.abs().sum() > 0


def assert_nearest(vqgan: VQModel, indices: torch.LongTensor, latents: torch.Tensor, tolerance: float):
    """Each code is the nearest one to its latents, or farther by at most `tolerance`, the distance that rounding may add."""
    rows = latents.double().movedim(1, -1).flatten(0, -2) * vqgan.config.scale_factor
    distances = torch.cdist(rows, vqgan.vquantizer.embedding.weight.double())
    chosen = distances.gather(1, indices.reshape(-1, 1))[:, 0]
    assert (chosen - distances.amin(1)).max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    vqgan = randomise(VQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=16))
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        latents = vqgan.encode(pixels).latents
        encoded = copy.deepcopy(vqgan).to(dtype).encode(pixels.to(dtype))
        decoded = copy.deepcopy(vqgan).to(dtype).decode_indices(encoded.indices).sample
    assert encoded.latents.dtype == decoded.dtype == dtype and decoded.isfinite().all()
    rounding = 2 * torch.finfo(dtype).eps * latents.abs().max().item()
    torch.testing.assert_close(encoded.latents.float(), latents, atol=rounding, rtol=0)
    assert_nearest(vqgan, encoded.indices, latents, tolerance=2 * rounding)


def test_large_images_are_quantized_in_chunks():
    vqgan = randomise(VQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16))
    with torch.no_grad():
        encoded = vqgan.encode(torch.rand(1, 3, 512, 512))  # 16,384 latents, two chunks
    assert_nearest(vqgan, encoded.indices, encoded.latents, tolerance=1e-5)


def test_size_must_be_divisible():
    with pytest.raises(ValueError, match="34×32.*divisible by 4"):
        VQModel(bottleneck_blocks=1, embed_dim=8).encode(torch.rand(1, 3, 32, 34))


@pytest.mark.parametrize("scale_factor", [float("nan"), float("inf"), 0.0, -1.0, 1e-40, True, None, "0.3764"])
def test_bad_scale_factors_are_refused(scale_factor):
    with pytest.raises(ValueError, match=r"`scale_factor` must be a number in \[1e-06, 1e\+06\], got "):
        VQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=32, scale_factor=scale_factor)


def test_save_and_load(tmp_path):
    vqgan = randomise(VQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16))
    vqgan.save_pretrained(tmp_path)
    loaded = PaellaVQModel.from_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(vqgan.encode(pixels).latents, loaded.encode(pixels).latents)


def test_diffusers_own_class_shares_the_folder(tmp_path):
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel as DiffusersVQModel

    vqgan = randomise(VQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16))
    vqgan.save_pretrained(tmp_path / "ours")
    theirs = DiffusersVQModel.from_pretrained(tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    back = VQModel.from_pretrained(tmp_path / "theirs")
    pixels = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        latents = vqgan.encode(pixels).latents
        assert torch.equal(latents, back.encode(pixels).latents)
        # theirs does not scale
        torch.testing.assert_close(theirs.encode(pixels).latents, latents * vqgan.config.scale_factor)
        torch.testing.assert_close(theirs.decode(latents * vqgan.config.scale_factor).sample, vqgan.decode(latents).sample)


def test_gradient_checkpointing_keeps_gradients():
    vqgan, pixels = (
        randomise(VQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=16)).train(),
        torch.rand(2, 3, 16, 16),
    )
    vqgan(pixels).sample.square().mean().backward()
    expected = {name: p.grad for name, p in vqgan.named_parameters() if p.grad is not None}
    vqgan.zero_grad()
    vqgan.enable_gradient_checkpointing()
    calls, checkpoint = [], vqgan._gradient_checkpointing_func
    vqgan._gradient_checkpointing_func = lambda block, *args: calls.append(block) or checkpoint(block, *args)
    vqgan(pixels).sample.square().mean().backward()
    assert len(calls) == 4
    for name, gradient in expected.items():
        torch.testing.assert_close(vqgan.get_parameter(name).grad, gradient, msg=name)


@pytest.mark.parametrize("how", ["accelerate", "block_level", "leaf_level"])
def test_offloading(how, tmp_path):
    vqgan, pixels = randomise(VQModel(bottleneck_blocks=2, embed_dim=16, num_vq_embeddings=16)), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        tokens, codebook = vqgan.encode(pixels).indices, vqgan.codebook("cpu")
        expected = vqgan.decode_indices(tokens).sample
        if how == "accelerate":
            accelerate.cpu_offload(vqgan, torch.device("cpu"))
        else:
            options = {"num_blocks_per_group": 1} if how == "block_level" else {}
            vqgan.enable_group_offload(
                torch.device("cpu"), torch.device("cpu"), how, offload_to_disk_path=str(tmp_path), **options
            )
        assert torch.equal(vqgan.encode(pixels).indices, tokens)
        assert torch.equal(vqgan.codebook("cpu"), codebook)
        torch.testing.assert_close(vqgan.decode_indices(tokens).sample, expected)


def test_forward_without_quantization_decodes_the_latents():
    vqgan, pixels = randomise(VQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=16)), torch.rand(1, 3, 16, 16)
    encoded, output = vqgan.encode(pixels), vqgan(pixels, quantize=False)
    torch.testing.assert_close(output.sample, vqgan.decode(encoded.latents).sample)
    assert torch.equal(output.indices, encoded.indices)
    torch.testing.assert_close(vqgan(pixels).sample, vqgan.decode(encoded.quantized).sample)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_slices_and_tiles_change_nothing(levels):
    vqgan = randomise(VQModel(levels=levels, bottleneck_blocks=2, embed_dim=16, num_vq_embeddings=32))
    side = vqgan.patch_size
    vqgan.double()  # in which no two codes are as near but for rounding
    pixels = torch.rand(2, 3, 22 * side, 31 * side, dtype=torch.float64)
    with torch.no_grad():
        encoded, decoded = vqgan.encode(pixels), vqgan(pixels).sample
        vqgan.enable_slicing()
        vqgan.enable_tiling()
        vqgan.tile_latent_min_size = 5
        calls = []
        vqgan.in_block.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
        tiled, redecoded = vqgan.encode(pixels), vqgan(pixels).sample
    assert len(calls) == 2 * 2 * 5 * 7 and all(shape[0] == 1 for shape in calls)
    torch.testing.assert_close(tiled.latents, encoded.latents)
    assert torch.equal(tiled.indices, encoded.indices)
    torch.testing.assert_close(redecoded, decoded)
    vqgan.disable_slicing()
    vqgan.disable_tiling()
    calls.clear()
    with torch.no_grad():
        assert torch.equal(vqgan.encode(pixels).latents, encoded.latents) and len(calls) == 1


def test_large_images_are_tiled():
    """More than 1024 × 1024 pixels, unless tiling is off; the pictures are the same within less than a step of 255."""
    vqgan = randomise(VQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=32))
    assert vqgan.tile_from_tokens * vqgan.patch_size**2 == 1024 * 1024
    vqgan.tile_from_tokens, vqgan.tile_latent_min_size = 32 * 32, 16  # the same in small
    calls = []
    vqgan.out_block.register_forward_hook(lambda module, args, output: calls.append(output.shape[-1]))

    def decode(*size):
        calls.clear()
        with torch.no_grad():
            return vqgan.decode_indices(torch.randint(32, (1, *size), generator=torch.Generator().manual_seed(0))).sample

    decode(32, 32)
    assert len(calls) == 1
    tiled = decode(32, 40)
    assert len(calls) == 6
    vqgan.disable_tiling()
    whole = decode(32, 40)
    assert len(calls) == 1 and (tiled - whole).abs().max() < 0.1 / 255
    vqgan.use_tiling = None
    vqgan.train()
    decode(32, 40)
    assert len(calls) == 1
    vqgan.eval().enable_tiling()
    decode(20, 20)
    assert len(calls) == 4
