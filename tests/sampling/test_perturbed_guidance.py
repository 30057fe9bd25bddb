"""Guidance by a third branch with weaker attention: PAG and SEG."""

import pytest
import torch
from conftest import tiny_pipeline, tiny_unet

from paella_diffusers import (
    PaellaClassifierFreeGuidance,
    PaellaPerturbedAttentionGuidance,
    PaellaSmoothedEnergyGuidance,
)
from paella_diffusers.models.attention import AttentionPerturbation, PaellaAttnBlock, PaellaAttnProcessor
from paella_diffusers.sampling.guidance.base import CONDITIONAL, UNCONDITIONAL


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(pipe, **kwargs):
    call = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent", "use_prior": False}
    return pipe("a", **call | kwargs).images


class SeparatelyPerturbed(PaellaAttnProcessor):
    """Weaker attention in all rows, computed token by token: of each image token's query, and the keys that it may see."""

    def __init__(self, query_of, keys_of):
        self.query_of, self.keys_of = query_of, keys_of

    def attend(self, attn, query, key, value, mask=None):
        attended = []
        for i in range(query.shape[1]):
            seen = self.keys_of(i, query.shape[1], key.shape[1])
            scores = torch.einsum("bnc,bknc->bnk", self.query_of(query, i), key[:, seen]) * query.shape[-1] ** -0.5
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, seen], -torch.inf)
            attended.append(torch.einsum("bnk,bknc->bnc", scores.softmax(-1), value[:, seen]))
        return torch.stack(attended, dim=1)


def own_query(query, i):
    return query[:, i]


def mean_query(query, i):
    return query.mean(1)


def blurred_query(query, i, sigma=0.7):
    side = round(query.shape[1] ** 0.5)
    row, column = (torch.arange(side) - i // side) ** 2, (torch.arange(side) - i % side) ** 2
    weights = (-(row[:, None] + column).double() / (2 * sigma**2)).exp().flatten()
    return torch.einsum("k,bknc->bnc", weights / weights.sum(), query)


def all_keys(i, length, num_keys):
    return list(range(num_keys))


def itself_and_conditioning(i, length, num_keys):
    return [i, *range(length, num_keys)]


KINDS = {
    "identity": (AttentionPerturbation("identity", levels=(-1,)), own_query, itself_and_conditioning),
    "mean": (AttentionPerturbation("blur", levels=(1,)), mean_query, all_keys),
    "blur": (AttentionPerturbation("blur", levels=(0, -1), blur_sigma=0.7), blurred_query, all_keys),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_rows_named_are_perturbed(kind, masked):
    """They come out as of a model that is perturbed as a whole; other rows are the same to the last bit."""
    perturbation, query_of, keys_of = KINDS[kind]
    levels = {"block_types": ("CTA", "CTA"), "num_attention_heads": (2, 2)} if kind == "blur" else {}
    unet = tiny_unet(**levels).double()
    sample = torch.randint(32, (6, 8, 8), generator=seeded())
    text = torch.randn(6, 5, 16, generator=seeded(1), dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2, 5, 1])[:, None] if masked else None
    call = {"timestep": 0.6, "encoder_hidden_states": text, "encoder_attention_mask": mask}
    with torch.no_grad():
        plain = unet(sample, **call).sample
        some = unet(sample, **call, attention_perturbation=replace_rows(perturbation, (2, 4))).sample
        encoded = unet.encode_conditioning(**{name: value for name, value in call.items() if name != "timestep"})
        again = unet(sample, 0.6, encoded, attention_perturbation=replace_rows(perturbation, (2, 4))).sample
        for block in unet.modules():
            if isinstance(block, PaellaAttnBlock):
                block.attention.set_processor(SeparatelyPerturbed(query_of, keys_of))
        separate = unet(sample, **call).sample
    assert torch.equal(some[:2], plain[:2]) and torch.equal(some[4:], plain[4:]) and torch.equal(again, some)
    torch.testing.assert_close(some[2:4], separate[2:4], atol=1e-10, rtol=0)
    assert (plain[2:4] - separate[2:4]).abs().max() > 1e-3


def replace_rows(perturbation: AttentionPerturbation, rows) -> AttentionPerturbation:
    return AttentionPerturbation(perturbation.kind, perturbation.levels, perturbation.blur_sigma, rows)


def test_other_levels_are_not_perturbed():
    unet = tiny_unet(block_types=("CTA", "CTA"), num_attention_heads=(2, 2))
    sample, text = torch.randint(32, (1, 8, 8), generator=seeded()), torch.randn(1, 5, 16, generator=seeded(1))
    with torch.no_grad():
        logits = {
            levels: unet(sample, 0.5, text, attention_perturbation=AttentionPerturbation("blur", levels, rows=(0, 1))).sample
            for levels in [(0,), (1,), (-1,), (-2,), (0, 1)]
        }
    assert torch.equal(logits[(1,)], logits[(-1,)]) and torch.equal(logits[(0,)], logits[(-2,)])
    assert not torch.equal(logits[(0,)], logits[(1,)]) and not torch.equal(logits[(0,)], logits[(0, 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturbed_rows_in_half_precision(dtype):
    """bfloat16 attends in chunks, the perturbed rows apart from them."""
    unet = tiny_unet()
    sample, text = torch.randint(32, (3, 8, 8), generator=seeded()), torch.randn(3, 5, 16, generator=seeded(1))
    perturbation = AttentionPerturbation("identity", rows=(1, 2))
    with torch.no_grad():
        expected = unet(sample, 0.5, text, attention_perturbation=perturbation).sample
        output = unet.to(dtype)(sample, 0.5, text.to(dtype), attention_perturbation=perturbation).sample
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0.1)


METHODS = {
    "PAG": lambda scale, **kwargs: PaellaPerturbedAttentionGuidance(perturbed_guidance_scale=scale, **kwargs),
    "SEG": lambda scale, **kwargs: PaellaSmoothedEnergyGuidance(seg_guidance_scale=scale, **kwargs),
}


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("method", METHODS)
def test_scale_zero_is_linear_guidance(method, threshold):
    """To the last bit, and with two branches only."""
    expected = tokens(tiny_pipeline(guider=PaellaClassifierFreeGuidance(8.0, threshold)))
    guider = METHODS[method](0.0, plausibility_threshold=threshold)
    assert torch.equal(tokens(tiny_pipeline(guider=guider)), expected)
    assert guider.branches(None, 8.0) == (CONDITIONAL, UNCONDITIONAL)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("method", METHODS)
def test_guided_logits(method, scale):
    """w c + (1 - w) u + s (c - p), of branches evaluated apart; at a scale of 1, c + s (c - p)."""
    pipe, outputs = tiny_pipeline(guider=METHODS[method](2.0)).to(torch.float64), []
    pipe.unet.register_forward_hook(lambda module, args, kwargs, output: outputs.append((kwargs, output)), with_kwargs=True)
    guided = []
    call = {"guidance_scale": scale, "num_inference_steps": 1, "num_images_per_prompt": 2}
    tokens(pipe, **call)
    (kwargs, output), *_ = outputs
    guided = output.sample
    branches = 2 if scale <= 1 else 3
    encoded, perturbation = kwargs["encoder_hidden_states"], kwargs["attention_perturbation"]
    assert len(encoded.sequence) == 2 * branches and perturbation.rows == (2 * branches - 2, 2 * branches)
    pipe.guider = None
    outputs.clear()
    tokens(pipe, **call | {"guidance_scale": 2.0})
    ((kwargs, _),) = outputs
    encoded, latents = kwargs["encoder_hidden_states"], torch.randint(32, (2, 8, 8), generator=seeded())
    with torch.no_grad():
        latents = pipe.prepare_latents((2, 8, 8), "cpu", seeded())[1]
        c, u = pipe.unet(latents, 1.0, encoded).sample.chunk(2)
        weak = AttentionPerturbation(perturbation.kind, (-1,), perturbation.blur_sigma, rows=(0, 4))
        p, _ = pipe.unet(latents, 1.0, encoded, attention_perturbation=weak).sample.chunk(2)
    torch.testing.assert_close(guided, scale * c + (1 - scale) * u + 2.0 * (c - p), atol=1e-9, rtol=0)


def test_tasks_regions_caches_and_callbacks():
    """The branch follows what callbacks replace, and has rows for every region."""
    pipe = tiny_pipeline(guider=PaellaSmoothedEnergyGuidance(20.0, 20.0), prior=None, prior_scheduler=None)
    half = torch.zeros(32, 32)
    half[:16] = 1
    call = {"prompt": ["a", "b"], "region_masks": [half, 1 - half], "num_images_per_prompt": 2, "num_inference_steps": 3}
    draw = lambda **kwargs: pipe(**call | {"output_type": "latent", "generator": seeded()} | kwargs).images
    with_regions = draw()
    assert with_regions.shape == (2, 8, 8)
    pipe.to(torch.float64)
    other = torch.randn(2, 4, 16, generator=seeded(3), dtype=torch.float64)
    expected = pipe(
        prompt_embeds=other, num_inference_steps=2, output_type="latent", generator=[seeded(5), seeded(6)],
        negative_prompt_embeds=torch.zeros(1, 4, 16), latents=with_regions, deep_feature_interval=2,
        clip_text_embeds=torch.ones(1, 12), negative_clip_text_embeds=torch.zeros(1, 12),
    ).images  # fmt: skip
    assert expected.shape == (2, 8, 8)

    def swap(pipe, step, timestep, tensors):
        return {"prompt_embeds": -tensors["prompt_embeds"]} if step == 0 else {}

    call = {"prompt": "a", "num_inference_steps": 4}
    swapped = draw(
        **call, region_masks=None, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert not torch.equal(swapped, draw(**call, region_masks=None))


def test_models_that_have_not_the_attention_are_refused():
    pipe = tiny_pipeline(guider=PaellaPerturbedAttentionGuidance(), unet=tiny_unet(self_attention=False))
    with pytest.raises(ValueError, match="PaellaPerturbedAttentionGuidance, weakens .* take PaellaSmoothedEnergyGuidance"):
        tokens(pipe)
    assert tokens(pipe, guidance_scale=None).shape == (1, 8, 8)
    pipe.guider = PaellaSmoothedEnergyGuidance()
    assert tokens(pipe).shape == (1, 8, 8)
    for level in (0, 2, -3):
        pipe.guider = PaellaSmoothedEnergyGuidance(perturbed_levels=(1, level))
        with pytest.raises(ValueError, match=rf"names level {level}, but this U-Net has attention in the levels \[1\] of 2"):
            tokens(pipe)
