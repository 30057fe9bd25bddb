"""diffusers' caches on the U-Net: what they skip, what they reuse, and which are refused."""

import ast

import pytest
import torch
from conftest import tiny_pipeline, tiny_unet
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)

from paella_diffusers import PaellaInversionPipeline

STEPS = 6
ALWAYS = {  # reuse whatever can be reused
    "first block": FirstBlockCacheConfig(threshold=1e9),
    "mag": MagCacheConfig(1e9, max_skip_steps=1, retention_ratio=0.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    "taylor": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float64),
    "taylor, lite": TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float64, use_lite_mode=True
    ),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0.0, 1.0)
    ),
}
NEVER = {  # compute everything anew
    "first block": FirstBlockCacheConfig(threshold=-1.0),
    "mag": MagCacheConfig(0.0, retention_ratio=1.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    "taylor": TaylorSeerCacheConfig(disable_cache_before_step=STEPS),
    "taylor, lite": TaylorSeerCacheConfig(disable_cache_before_step=STEPS, use_lite_mode=True),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=1, spatial_attention_timestep_skip_range=(0.0, 1.0)
    ),
}


def tokens(pipe, **kwargs):
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "num_images_per_prompt": 2, "output_type": "latent"}
    return pipe("a", generator=torch.Generator().manual_seed(0), **call | kwargs).images


@pytest.fixture(scope="module")
def pipe():
    """In float64: a cache computes the first level for every branch, which rounds differently."""
    pipe = tiny_pipeline(prior=None, prior_scheduler=None)
    return pipe.to(torch.float64)


@pytest.fixture(autouse=True)
def disabled(pipe):
    yield
    if pipe.unet.is_cache_enabled:
        pipe.unet.disable_cache()


@pytest.mark.parametrize("name", NEVER)
def test_a_cache_that_reuses_nothing_changes_nothing(pipe, name):
    plain = tokens(pipe)
    pipe.unet.enable_cache(NEVER[name])
    assert torch.equal(tokens(pipe), plain)


@pytest.mark.parametrize("name", ALWAYS)
def test_each_call_begins_anew_and_disabling_restores(pipe, name):
    plain = tokens(pipe)
    pipe.unet.enable_cache(ALWAYS[name])
    cached = tokens(pipe)
    assert not torch.equal(cached, plain) and torch.equal(tokens(pipe), cached)
    assert tokens(pipe, num_images_per_prompt=1).shape == (1, 8, 8)  # another batch size
    handle = pipe.unet.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokens(pipe)
    handle.remove()
    assert torch.equal(tokens(pipe), cached)  # also after a call that failed
    assert tokens(pipe, guidance_steps=(1, 3)).shape == (2, 8, 8)  # with one branch, two, and one
    pipe.unet.disable_cache()
    assert torch.equal(tokens(pipe), plain)


def evaluations(unet, modules, levels=(0.9, 0.6, 0.3), cached=True):
    """What modules make in evaluations of one grid at several noise levels, and the logits."""
    made = {name: [] for name in modules}
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: made[name].append(output.clone()))
        for name, module in modules.items()
    ]
    sample, text = torch.randint(32, (2, 8, 8), generator=torch.Generator().manual_seed(1)), torch.ones(4, 3, 16).double()
    text = text * torch.arange(4)[:, None, None]  # two branches of two rows
    logits = []
    for level in levels:
        if not cached:
            logits.append(unet(sample.repeat(2, 1, 1), level, text).sample)
            continue
        with unet.cache_context("denoiser", sigma=level):
            logits.append(unet(sample.repeat(2, 1, 1), level, text).sample)
    for handle in handles:
        handle.remove()
    return made, logits


@torch.no_grad()
def test_first_block_cache_adds_what_the_other_blocks_did():
    unet = tiny_unet().double()
    ends = {"first": unet.down_blocks[0], "last": unet.up_blocks[-1]}
    plain, _ = evaluations(unet, ends, cached=False)
    unet.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    cached, _ = evaluations(unet, ends)
    torch.testing.assert_close(cached["last"][0], plain["last"][0])
    others = plain["last"][0] - plain["first"][0]
    for step in (1, 2):
        torch.testing.assert_close(cached["last"][step], plain["first"][step] + others)


@torch.no_grad()
def test_mag_cache_adds_what_all_blocks_did():
    unet = tiny_unet().double()
    ends = {"before": unet.norm_in, "last": unet.up_blocks[-1]}
    plain, _ = evaluations(unet, ends, cached=False)
    unet.enable_cache(MagCacheConfig(1e9, retention_ratio=0.0, num_inference_steps=3, mag_ratios=[1.0] * 3))
    cached, _ = evaluations(unet, ends)
    for step in (1, 2):
        torch.testing.assert_close(cached["last"][step], plain["last"][0] - plain["before"][0] + plain["before"][step])


@torch.no_grad()
def test_mag_cache_calibrates(pipe, capsys):
    pipe.unet.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    tokens(pipe)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")]
    ratios = ast.literal_eval(printed[0])
    assert len(ratios) == STEPS and min(ratios) > 0
    pipe.unet.disable_cache()
    pipe.unet.enable_cache(MagCacheConfig(num_inference_steps=STEPS, mag_ratios=ratios))
    assert tokens(pipe).shape == (2, 8, 8)


@torch.no_grad()
def test_taylorseer_extrapolates_attention_or_all_blocks():
    settings = {"max_order": 1, "cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float64}
    for lite in (False, True):
        unet = tiny_unet().double()
        part = unet.proj_out if lite else unet.down_blocks[-1].layers[2].attention
        unet.enable_cache(TaylorSeerCacheConfig(use_lite_mode=lite, **settings))
        made, _ = evaluations(unet, {"part": part}, levels=(0.9, 0.7, 0.5))
        first, second, third = made["part"]
        torch.testing.assert_close(third, 2 * second - first)


@torch.no_grad()
def test_pyramid_attention_broadcast_reuses_attention_within_a_range():
    unet = tiny_unet().double()
    attention = unet.down_blocks[-1].layers[2].attention
    unet.enable_cache(PyramidAttentionBroadcastConfig(2, spatial_attention_timestep_skip_range=(0.2, 0.8)))
    made, _ = evaluations(unet, {"part": attention}, levels=(0.7, 0.6, 0.5, 0.15))
    first, second, third, last = made["part"]
    assert torch.equal(first, second) and not torch.equal(second, third) and not torch.equal(third, last)


def test_first_block_cache_skips_the_other_blocks(pipe):
    """And keys and values of the conditioning are still computed once for all steps."""
    middle, encoded = [], []
    handle = pipe.unet.up_blocks[0].layers[0].register_forward_hook(lambda *args: middle.append(args))
    encode = pipe.unet.encode_conditioning
    pipe.unet.encode_conditioning = lambda **kwargs: encoded.append(kwargs) or encode(**kwargs)
    try:
        pipe.unet.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        tokens(pipe)
        assert len(middle) == 1 and len(encoded) == 1
        middle.clear()
        tokens(pipe, guidance_steps=3)  # the batch changes once
        assert len(middle) == 2
    finally:
        handle.remove()
        del pipe.unet.encode_conditioning


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            FasterCacheConfig(),
            "FasterCacheConfig is refused by PaellaUNet: .*`guidance_steps`.*Take one of First",
        ),
        (SeaCacheConfig(), "SeaCacheConfig is refused by PaellaUNet: it compares frequencies"),
        (TextKVCacheConfig(), "TextKVCacheConfig is refused by PaellaUNet: pipelines compute the keys and values"),
        ("first block", "str is refused by PaellaUNet: it is not known to work"),
        (
            PyramidAttentionBroadcastConfig(2),
            r"`spatial_attention_timestep_skip_range` must ascend .* got \(100, 800\)",
        ),
        (
            PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: 0),
            "`current_timestep_callback` .*leave it out",
        ),
        (TaylorSeerCacheConfig(cache_identifiers=["blocks.*attn"]), "TaylorSeerCacheConfig would do nothing"),
        (
            PyramidAttentionBroadcastConfig(
                2, spatial_attention_timestep_skip_range=(0.1, 0.9), spatial_attention_block_identifiers=("attn",)
            ),
            "PyramidAttentionBroadcastConfig would do nothing",
        ),
    ],
)
def test_what_does_not_work_is_refused_by_name(pipe, config, message):
    plain = tokens(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.unet.enable_cache(config)
    assert not pipe.unet.is_cache_enabled and torch.equal(tokens(pipe), plain)


def test_one_cache_at_a_time(pipe):
    pipe.unet.enable_cache(ALWAYS["first block"])
    with pytest.raises(ValueError, match="A cache is enabled already, FirstBlockCacheConfig: call `disable_cache` first"):
        pipe.unet.enable_cache(ALWAYS["mag"])
    with pytest.raises(ValueError, match="cannot be used with `deep_feature_interval`: call `unet.disable_cache"):
        tokens(pipe, deep_feature_interval=2)
    inversion = PaellaInversionPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="cannot be used with inversion"):
        inversion("a", torch.full((1, 8, 8), 3), source_prompt="b")


def test_calls_without_a_cache_leave_no_hooks():
    """They would make calls from several threads wait for each other."""
    pipe = tiny_pipeline(prior=None, prior_scheduler=None)
    tokens(pipe)
    assert not hasattr(pipe.unet, "_diffusers_hook")
