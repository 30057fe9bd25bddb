import ast
import inspect
import textwrap

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import load_golden, load_golden_models, tiny_pipeline

from paella_diffusers import PaellaPipeline, PaellaScheduler
from paella_diffusers.pipelines.conditioning import Conditioning, PromptEmbeds
from paella_diffusers.pipelines.pipeline_paella import slerp


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(seed=0, size=(20, 24)):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def tokens(pipe, prompt="a", **kwargs):
    return pipe(
        prompt, **{"num_inference_steps": 3, "generator": seeded(), "output_type": "latent", "use_prior": False} | kwargs
    ).images


# -------------------------------------------------------------------------------------------------- the published loop

TRACES = {  # name: scheduler configuration, call
    "default": ({}, {"num_inference_steps": 12}),
    "notebook": ({}, {"num_inference_steps": 32, "temperature": (1.2, 0.2), "renoise_steps": 26}),
    "cfg_ramp_partial_guidance": (
        {},
        {"num_inference_steps": 8, "temperature": (1.0, 0.5), "guidance_scale": (3, 8), "guidance_steps": 5},
    ),
    "no_guidance": ({}, {"num_inference_steps": 6, "guidance_scale": None}),
    "argmax": ({"sampling_rule": "argmax"}, {"num_inference_steps": 6}),
    "quant_tail": ({"quantized_steps": 3}, {"num_inference_steps": 8}),
    "fresh_noise": ({"noise_source": "fresh"}, {"num_inference_steps": 8}),
}


@pytest.mark.parametrize("config", ["a", "b"])
@pytest.mark.parametrize("name", TRACES)
def test_golden_traces(config, name):
    golden = load_golden(config)
    models, io = load_golden_models(golden), golden.paella_io
    scheduler_config, call = TRACES[name]
    pipe = PaellaPipeline(models.vqgan, models.unet, PaellaScheduler(**scheduler_config))
    pipe.set_progress_bar_config(disable=True)
    steps = []
    renoise_steps = call.get("renoise_steps", call["num_inference_steps"] - 1)

    def record(pipe, step, timestep, tensors):
        steps.append(tensors["pred_original_sample"])
        if step < renoise_steps:
            steps.append(tensors["latents"])
        return {}

    if name == "notebook":
        call = call | {"clip_image_embeds": io["clip_image"], "conditioning_weights": io["attn_weights"]}
    final = pipe(
        height=io["tokens"].shape[1] * 4,
        width=io["tokens"].shape[2] * 4,
        prompt_embeds=io["byt5"],
        negative_prompt_embeds=io["byt5_uncond"],
        clip_text_embeds=io["clip_text"],
        negative_clip_text_embeds=io["clip_text_uncond"],
        generator=seeded(golden.config["seeds"][name]),
        output_type="latent",
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
        **call,
    ).images
    assert torch.equal(torch.stack(steps), golden.sampler_traces[f"{name}.steps"])
    assert torch.equal(final, golden.sampler_traces[f"{name}.final"])


def test_golden_of_one_image(golden, golden_models):
    """For a batch of one, the published code's view of its probabilities changes the order of its random numbers."""
    io = golden.paella_io
    pipe = PaellaPipeline(golden_models.vqgan, golden_models.unet, PaellaScheduler())
    call = {
        "prompt_embeds": io["byt5"][:1],
        "negative_prompt_embeds": io["byt5_uncond"][:1],
        "clip_text_embeds": io["clip_text"][:1],
        "negative_clip_text_embeds": io["clip_text_uncond"][:1],
        "height": io["tokens"].shape[1] * 4,
        "width": io["tokens"].shape[2] * 4,
        "output_type": "latent",
    }
    for generator in (seeded(11), [seeded(11)]):
        assert torch.equal(pipe(**call, generator=generator).images, golden.one_image["final"])


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_golden_prior_steps(golden, golden_models, name):
    from diffusers import DDPMWuerstchenScheduler

    from paella_diffusers import DDIMWuerstchenScheduler

    class FromGolden({"ddpm": DDPMWuerstchenScheduler, "ddim": DDIMWuerstchenScheduler}[name]):
        """Keeps every sample; each next step starts from the published one, as rounding errors grow along the steps."""

        def step(self, *args, **kwargs):
            output = super().step(*args, **kwargs)
            samples.append(output.prev_sample)
            output.prev_sample = golden_samples[len(samples) - 1]
            return output

    samples, golden_samples = [], golden.prior_io[f"{name}_steps"]
    pipe = PaellaPipeline(
        golden_models.vqgan, golden_models.unet, PaellaScheduler(), prior=golden_models.prior, prior_scheduler=FromGolden()
    )
    generator = seeded(golden.config["seeds"][f"prior_{name}"])
    with torch.no_grad():
        pipe.sample_prior(golden.prior_io["c"], 10, 3.0, generator)
    torch.testing.assert_close(torch.stack(samples), golden_samples, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "passes"), [(torch.float32, 2), (torch.bfloat16, 1)])
def test_passes_of_the_prior(pipe, dtype, passes):
    """In float32 two for each step, as published; in half precision one batch of both."""
    calls, text = [], torch.randn(3, 12).to(dtype)
    pipe.prior.to(dtype).register_forward_hook(lambda module, args, output: calls.append(args))
    pipe.sample_prior(text, 5, 3.0, seeded())
    assert len(calls) == 5 * passes
    for first in range(0, len(calls), passes):
        samples, _, texts = (torch.cat(parts) if parts[0].ndim else parts for parts in zip(*calls[first : first + passes]))
        assert torch.equal(samples[:3], samples[3:])
        assert torch.equal(texts, torch.cat([text, torch.zeros_like(text)]))


def test_prior_scheduler_swaps_and_is_saved(pipe, tmp_path):
    from paella_diffusers import DDIMWuerstchenScheduler

    before = tokens(pipe, use_prior=True)
    pipe.prior_scheduler = DDIMWuerstchenScheduler.from_config(pipe.prior_scheduler.config)
    after = tokens(pipe, use_prior=True)
    assert not torch.equal(before, after)
    pipe.save_pretrained(tmp_path)
    loaded = PaellaPipeline.from_pretrained(tmp_path)
    assert type(loaded.prior_scheduler) is DDIMWuerstchenScheduler
    assert torch.equal(tokens(loaded, use_prior=True), after)


def test_golden_prior_noise(golden):
    from diffusers import DDPMWuerstchenScheduler

    io = golden.prior_io
    noised = DDPMWuerstchenScheduler().add_noise(io["x"], io["noise"], io["t"])
    torch.testing.assert_close(noised, io["noised"], atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- conditioning


@pytest.mark.usefixtures("float64")
def test_prompts_of_different_lengths_do_not_meet(pipe):
    prompts = ["a", "a much longer prompt than that", ""]
    together = tokens(pipe, prompts, generator=[seeded(i) for i in range(3)])
    for i, prompt in enumerate(prompts):
        assert torch.equal(together[i : i + 1], tokens(pipe, prompt, generator=[seeded(i)]))


@pytest.mark.usefixtures("float64")
def test_branches_in_one_batch_are_as_if_alone(pipe):
    """With different lengths, CLIP text and images in some of them only, and weights."""
    generator = seeded()
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    branches = [
        Conditioning(
            2,
            random(2, 5, 16),
            clip_text_embeds=random(2, 12),
            clip_image_embeds=random(2, 2, 12),
            encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1] * 5]),
            conditioning_weights=torch.tensor([[0.3, 2.0, 0.1]] * 2),
        ),
        Conditioning(2, random(2, 7, 16), clip_text_embeds=random(2, 12)),
        Conditioning(2, random(2, 3, 16), clip_image_embeds=random(2, 1, 12), conditioning_weights=torch.ones(2, 1) * 3),
    ]
    latents = torch.randint(32, (2, 8, 8), generator=generator)
    with torch.no_grad():
        together = pipe.unet(latents.repeat(3, 1, 1), 0.7, **branches[0].cat(*branches[1:]).arguments()).sample
        for branch, expected in zip(branches, together.chunk(3)):
            alone = pipe.unet(latents, 0.7, **branch.arguments()).sample
            torch.testing.assert_close(alone, expected, atol=1e-12, rtol=0)


def test_no_mask_where_nothing_is_padded():
    half = Conditioning(2, torch.zeros(1, 3, 16))
    assert half.cat(half).encoder_attention_mask is None


def test_embeddings_in_place_of_prompts(pipe):
    prompts, negative = ["one", "another"], "bad"
    expected = tokens(pipe, prompts, negative_prompt=negative)
    with torch.no_grad():
        embeds, negative_embeds, mask, negative_mask, clip, negative_clip = pipe.encode_prompt(prompts, negative)
    given = {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative_embeds,
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": negative_mask,
        "clip_text_embeds": clip,
        "negative_clip_text_embeds": negative_clip,
    }
    bare = tiny_pipeline(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    assert torch.equal(tokens(bare, None, **given), expected)


def test_encode_prompt_returns_names_that_the_call_takes():
    source = ast.parse(textwrap.dedent(inspect.getsource(PaellaPipeline.encode_prompt)))
    returns = [node for node in ast.walk(source) if isinstance(node, ast.Return)]
    assert len(returns) == 1
    names = [element.id for element in returns[0].value.elts]
    assert set(names) <= set(inspect.signature(PaellaPipeline.__call__).parameters)


def test_text_is_encoded_once_per_distinct_prompt(pipe):
    rows = []
    pipe.text_encoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    embeds, *_ = pipe.encode_prompt(["a", "b", "a"], num_images_per_prompt=2)
    assert rows == [2, 1] and embeds.shape[0] == 6
    assert torch.equal(embeds[0], embeds[1]) and torch.equal(embeds[0], embeds[4])


@pytest.mark.usefixtures("float64")
def test_condition_images(pipe):
    one = tokens(pipe, condition_image=picture())
    assert torch.equal(one, tokens(pipe, condition_image=[picture()]))
    assert not torch.equal(one, tokens(pipe))
    two = tokens(pipe, ["a", "b"], condition_image=[picture(0), picture(1)], generator=[seeded(0), seeded(1)])
    nested = [[picture(0), picture(1)]] * 2
    assert torch.equal(two, tokens(pipe, ["a", "b"], condition_image=nested, generator=[seeded(0), seeded(1)]))
    own = tokens(pipe, ["a", "b"], condition_image=[[picture(0)], [picture(1)]], generator=[seeded(0), seeded(1)])
    assert torch.equal(own[1:], tokens(pipe, "b", condition_image=picture(1), generator=[seeded(1)]))


def test_images_alone_and_their_weights(pipe):
    images = [picture(0), picture(1)]
    expected = tokens(pipe, "", condition_image=images)
    assert torch.equal(tokens(pipe, None, condition_image=images), expected)
    assert torch.equal(tokens(pipe, None, condition_image=images, condition_image_weights=[1.0, 1.0]), expected)
    weighted = tokens(pipe, None, condition_image=images, condition_image_weights=[0.2, 1.5])
    explicit = torch.tensor([0.2, 0.2, 1.5, 1.5])  # two conditioning tokens an image
    assert torch.equal(weighted, tokens(pipe, "", condition_image=images, conditioning_weights=explicit))
    rows = tokens(pipe, None, condition_image=[[picture(0)], [picture(1)]], condition_image_weights=[[0.5], [2.0]])
    assert rows.shape == (2, 8, 8)


def test_a_weight_of_zero_leaves_an_image_out(pipe):
    images = [picture(0), picture(1), picture(2)]
    alone = tokens(pipe, "a", condition_image=[images[0], images[2]], condition_image_weights=[0.7, 1.2])
    assert torch.equal(tokens(pipe, "a", condition_image=images, condition_image_weights=[0.7, 0, 1.2]), alone)
    assert torch.equal(tokens(pipe, "a", condition_image=images, condition_image_weights=np.zeros(3)), tokens(pipe, "a"))
    # of one prompt's images only: masked
    call = {"condition_image": [images[:2]] * 2, "generator": [seeded(0), seeded(1)]}
    rows = tokens(pipe, ["a", "b"], condition_image_weights=[[0.5, 0.0], [0.0, 2.0]], num_inference_steps=1, **call)
    for i, (prompt, weight) in enumerate((("a", 0.5), ("b", 2.0))):
        call = {"condition_image": images[i], "condition_image_weights": [weight], "generator": [seeded(i)]}
        own = tokens(pipe, prompt, num_inference_steps=1, **call)
        assert (rows[i] == own[0]).float().mean() > 0.9  # but for rounding


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0], "`condition_image_weights` must be finite and at least 0"),
        ([1.0, float("nan")], "`condition_image_weights` must be finite and at least 0"),
        ([1.0], r"`condition_image_weights` must be numbers of shape \(2,\) or \(1, 2\), got \(1,\)"),
        ([[1.0, 2.0]] * 3, r"got \(3, 2\)"),
    ],
)
def test_bad_weights_are_refused(pipe, weights, message):
    with pytest.raises(ValueError, match=message):
        tokens(pipe, "a", condition_image=[picture(0), picture(1)], condition_image_weights=weights)


def test_image_is_resized_to_the_encoder_without_cropping(pipe):
    expected = picture(size=(40, 10)).resize((16, 16), PIL.Image.Resampling.BICUBIC)
    pixels = torch.tensor(np.asarray(expected)).permute(2, 0, 1)[None] / 255
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (pipe.feature_extractor.image_mean, pipe.feature_extractor.image_std)
    )
    with torch.no_grad():
        embeds = pipe.image_encoder((pixels - mean) / std).image_embeds
        result = pipe.encode_image(picture(size=(40, 10)), 1)
    torch.testing.assert_close(result[0], embeds, atol=1e-4, rtol=1e-3)


def test_prior_gives_image_embeddings(pipe):
    with_prior = tokens(pipe, use_prior=None, prior_num_inference_steps=2)
    assert torch.equal(with_prior, tokens(pipe, use_prior=True, prior_num_inference_steps=2))
    assert not torch.equal(with_prior, tokens(pipe))
    # an image embedding that is given comes first
    embeds = torch.randn(1, 12, generator=seeded())
    assert torch.equal(tokens(pipe, use_prior=None, clip_image_embeds=embeds), tokens(pipe, clip_image_embeds=embeds))


def test_pipelines_without_optional_parts():
    pipe = tiny_pipeline(
        text_encoder_2=None, tokenizer_2=None, image_encoder=None, feature_extractor=None, prior=None, prior_scheduler=None
    )
    assert tokens(pipe, use_prior=None).shape == (1, 8, 8)


def test_conditioning_weights(pipe):
    expected = tokens(pipe)
    assert torch.equal(tokens(pipe, conditioning_weights=torch.ones(3)), expected)
    assert not torch.equal(tokens(pipe, conditioning_weights=torch.full((3,), 5.0)), expected)


# ------------------------------------------------------------------------------------------------------------ the call


def test_default_size_and_output_types(pipe):
    outputs = {kind: tokens(pipe, output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert outputs["pil"][0].size == (32, 32)
    assert outputs["np"].shape == (1, 32, 32, 3) and outputs["pt"].shape == (1, 3, 32, 32)
    assert outputs["latent"].shape == (1, 8, 8) and outputs["latent"].dtype == torch.int64
    expected = pipe.vqgan.decode_indices(outputs["latent"]).sample.clamp(0, 1)
    torch.testing.assert_close(outputs["pt"], expected)
    np.testing.assert_allclose(np.asarray(outputs["pil"][0]) / 255, outputs["np"][0], atol=0.6 / 255)
    (images,) = pipe(
        "a", num_inference_steps=3, generator=seeded(), output_type="latent", use_prior=False, return_dict=False
    )
    assert torch.equal(images, outputs["latent"])


def test_steps_of_the_call_by_themselves_keep_no_gradients(pipe):
    latents = tokens(pipe)
    assert pipe.decode(latents, "pil")[0].size == (32, 32)
    assert not pipe.decode(latents, "pt").requires_grad
    assert not any(part.requires_grad for part in pipe.encode_prompt("a") if part is not None)
    assert not pipe.encode_image(picture()).requires_grad


def test_arrays_and_numbers_of_numpy(pipe):
    embeds = PromptEmbeds(*pipe.encode_prompt("ab"))
    arrays = {name: value.numpy() for name, value in embeds._asdict().items() if value is not None}
    call = {"guidance_scale": np.float32(3), "num_inference_steps": np.int64(3), "temperature": np.float64(0.5)}
    latents = torch.randint(32, (1, 8, 8), generator=seeded())
    by_tensors = tokens(pipe, None, **embeds._asdict(), **call, latents=latents)
    assert torch.equal(tokens(pipe, None, **arrays, **call, latents=latents.numpy()), by_tensors)


def test_a_misspelt_argument_names_the_nearest(pipe):
    with pytest.raises(
        TypeError, match=r"PaellaPipeline.__call__ takes no argument `guidance_scal`: did you mean `guidance_sc"
    ):
        pipe("a", guidance_scal=3.0)
    with pytest.raises(TypeError, match="takes no argument `promt`: did you mean `prompt`"):
        pipe.interpolate("a", "b", 2, promt="c")
    with pytest.raises(ValueError, match=r"`interpolate` makes \['clip_text_embeds'\] from `a` and `b`"):
        pipe.interpolate("a", "b", 2, clip_text_embeds=torch.zeros(2, 12))


def test_the_folder_says_whether_the_prior_is_used(pipe, tmp_path):
    call = {"use_prior": None, "prior_num_inference_steps": 2}
    with_prior, without = tokens(pipe, **call), tokens(pipe, use_prior=False)
    pipe.register_to_config(use_prior=False)
    assert torch.equal(tokens(pipe, **call), without)
    assert torch.equal(tokens(pipe, **call | {"use_prior": True}), with_prior)
    pipe.save_pretrained(tmp_path)
    loaded = PaellaPipeline.from_pretrained(tmp_path)
    assert loaded.config.use_prior is False and torch.equal(tokens(loaded, **call), without)
    assert PaellaPipeline.from_pipe(loaded).config.use_prior is False


def test_other_sizes(pipe):
    assert tokens(pipe, height=16, width=48).shape == (1, 4, 12)


@pytest.mark.usefixtures("float64")
def test_several_images_per_prompt_are_independent(pipe):
    generators = [seeded(i) for i in range(4)]
    images = tokens(pipe, ["a", "bb"], num_images_per_prompt=2, generator=generators)
    assert torch.equal(images[3:], tokens(pipe, "bb", generator=[seeded(3)]))
    assert not torch.equal(images[2], images[3])


def test_latents_are_the_start(pipe):
    latents = torch.randint(32, (1, 8, 8), generator=seeded())
    generator = seeded()
    torch.randint(32, (1, 8, 8), generator=generator)  # the draw that `latents` replaces
    assert torch.equal(tokens(pipe, latents=latents, generator=generator), tokens(pipe))


def test_no_second_pass_without_guidance(pipe):
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for scale in (None, 1.0, 0.5):
        tokens(pipe, guidance_scale=scale)
    assert set(rows) == {1}
    rows.clear()
    tokens(pipe, guidance_scale=3.0, guidance_steps=2)
    assert rows == [2, 2, 1]
    rows.clear()
    tokens(pipe, guidance_scale=(0.0, 2.0))
    assert rows == [1, 1, 2]
    rows.clear()
    tokens(pipe, guidance_scale=3.0, guidance_steps=(1, 2))
    assert rows == [1, 2, 1]


def test_deep_features_are_used_again(pipe):
    """Every second step, and not when guidance ends in between."""
    deep = []
    pipe.unet.down_blocks[-1].register_forward_hook(lambda *args: deep.append(args))
    call = {"guidance_scale": 3.0, "num_inference_steps": 6}
    plain = tokens(pipe, **call)
    assert len(deep) == 6 and torch.equal(tokens(pipe, **call, deep_feature_interval=1), plain)
    for extra, count in (({}, 3), ({"guidance_steps": 3}, 4)):
        deep.clear()
        assert tokens(pipe, **call, **extra, deep_feature_interval=2).shape == plain.shape and len(deep) == count


def test_negative_prompt_matters_and_defaults_to_the_empty_one(pipe):
    assert torch.equal(tokens(pipe), tokens(pipe, negative_prompt=""))
    assert not torch.equal(tokens(pipe), tokens(pipe, negative_prompt="blurry, low quality"))


def test_callback_reads_and_changes(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, round(float(timestep), 4), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    names = ["latents", "pred_original_sample"]
    final = tokens(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert final.eq(0).all()
    assert seen == [(0, 1.0, names), (1, 0.6667, names), (2, 0.3333, names)]


def test_callback_changes_guidance(pipe):
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))

    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0
        return {}

    tokens(pipe, callback_on_step_end=callback)
    assert rows == [2, 1, 1]
    rows.clear()
    tokens(pipe, guidance_scale=None, callback_on_step_end=lambda pipe, *args: setattr(pipe, "_guidance_scale", 3.0) or {})
    assert rows == [1, 1, 1]  # nothing was encoded for a second pass


def test_interrupt_stops(pipe):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    tokens(pipe, callback_on_step_end=callback)
    assert steps == [0, 1]


def test_call_leaves_the_configuration_alone(pipe):
    before = dict(pipe.scheduler.config)
    tokens(pipe, temperature=(2.0, 1.0), renoise_steps=0)
    assert dict(pipe.scheduler.config) == before


def test_half_precision():
    pipe = tiny_pipeline().to(torch.bfloat16)
    assert tokens(pipe, condition_image=picture(), output_type="pt").isfinite().all()
    assert tokens(pipe, use_prior=True, prior_num_inference_steps=2).shape == (1, 8, 8)


def test_save_and_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = (tmp_path / "model_index.json").read_text()
    for name in ("PaellaVQModel", "PaellaUNet", "PaellaPrior", "PaellaScheduler"):
        assert f'"paella_diffusers",\n    "{name}"' in index
    loaded = PaellaPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    call = {"condition_image": picture(), "negative_prompt": "bad"}
    assert torch.equal(tokens(loaded, **call), tokens(pipe, **call))
    without = PaellaPipeline.from_pretrained(tmp_path, prior=None, image_encoder=None, dtype=torch.bfloat16)
    assert without.prior is None and without.unet.dtype == without.text_encoder.dtype == torch.bfloat16


def test_without_dtype_everything_is_float32(pipe, tmp_path):
    pipe.to(torch.float16, silence_dtype_warnings=True).save_pretrained(tmp_path)
    loaded = PaellaPipeline.from_pretrained(tmp_path)
    for name, component in loaded.components.items():
        if isinstance(component, torch.nn.Module):
            assert component.dtype == torch.float32, name


def test_swapped_components_are_recorded_under_our_name(pipe, tmp_path):
    pipe.scheduler = PaellaScheduler.from_config(pipe.scheduler.config, temperature=1.0)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert pipe.config.scheduler == ("paella_diffusers", "PaellaScheduler")
    assert pipe.config.unet == ("paella_diffusers", "PaellaUNet")
    pipe.save_pretrained(tmp_path)
    assert tuple(PaellaPipeline.from_pretrained(tmp_path).scheduler.temperatures) == (1.0,) * 12


def test_from_pipe_shares_components_and_keeps_dtypes(pipe):
    pipe.unet.to(torch.bfloat16)
    other = PaellaPipeline.from_pipe(pipe, prior=None)
    assert other.unet is pipe.unet and other.prior is None
    assert (other.unet.dtype, other.vqgan.dtype) == (torch.bfloat16, torch.float32)
    assert PaellaPipeline.from_pipe(pipe, dtype=torch.float32).unet.dtype == torch.float32


def test_offloaded_codebook(tmp_path):
    expected = tokens(tiny_pipeline(scheduler=PaellaScheduler(quantized_steps=2)))
    pipe = tiny_pipeline(scheduler=PaellaScheduler(quantized_steps=2))
    accelerate.cpu_offload(pipe.vqgan, torch.device("cpu"))
    assert torch.equal(tokens(pipe), expected)


def test_components_saved_as_none_reload(tmp_path):
    pipe = tiny_pipeline(prior=None, prior_scheduler=None, image_encoder=None, feature_extractor=None)
    pipe.save_pretrained(tmp_path)
    assert PaellaPipeline.from_pretrained(tmp_path).prior is None


@pytest.mark.usefixtures("float64")
def test_images_from_diffusers_discrete_schedulers(pipe):
    from diffusers import DiscreteDDIMScheduler, EntropyBoundScheduler

    for cls in (DiscreteDDIMScheduler, EntropyBoundScheduler):
        pipe.scheduler = cls()
        levels = []
        handle = pipe.unet.register_forward_pre_hook(lambda module, args: levels.append(float(args[1])))  # noqa: B023
        assert tokens(pipe, num_inference_steps=4).shape == (1, 8, 8)
        handle.remove()
        assert levels == [1.0, 0.75, 0.5, 0.25]
        with pytest.raises(ValueError, match="takes no `renoise_steps`"):
            tokens(pipe, renoise_steps=2)
        generators = [seeded(0), seeded(1)]
        both = tokens(pipe, ["a", "bb"], num_inference_steps=4, generator=generators)
        assert torch.equal(both[1:], tokens(pipe, "bb", num_inference_steps=4, generator=[seeded(1)]))
    pipe.scheduler = DiscreteDDIMScheduler()
    greedy = tokens(pipe, temperature=0.0)
    assert torch.equal(greedy, tokens(pipe)) and not torch.equal(greedy, tokens(pipe, temperature=5.0))


# ------------------------------------------------------------------------------------------------ prompts for regions


@pytest.mark.usefixtures("float64")
def test_one_region_is_the_plain_pipeline(pipe):
    for mask in (torch.ones(32, 32), torch.full((8, 8), 0.3), np.ones((8, 8)), np.ones((32, 32), dtype=bool)):
        assert torch.equal(tokens(pipe, ["ab"], region_masks=[mask]), tokens(pipe, "ab"))


def test_each_prompt_governs_its_region(pipe, monkeypatch):
    """Logits inside a region are those of its prompt, and a blend between."""
    ramp = torch.linspace(1, 0, 8).expand(8, 8)
    starts, shares = [], [torch.ones(8, 8), ramp, 1 - ramp]
    pipe.unet.register_forward_hook(lambda module, args, output: starts.append(output.sample))
    step = PaellaScheduler.step
    seen = []
    monkeypatch.setattr(
        PaellaScheduler, "step", lambda self, logits, *args, **kw: seen.append(logits) or step(self, logits, *args, **kw)
    )
    tokens(pipe, ["a", "bcd"], region_masks=[shares[1] * 0.5, shares[2] * 0.5], num_inference_steps=1, guidance_scale=None)
    expected = ramp * starts[0][:1] + (1 - ramp) * starts[0][1:]
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.usefixtures("float64")
def test_regions_with_guidance_negative_prompts_and_several_images(pipe):
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    call = {"region_masks": [left, 1 - left], "negative_prompt": ["x", "y"], "num_images_per_prompt": 2}
    batch = tokens(pipe, ["a", "bcd"], generator=[seeded(0), seeded(1)], **call)
    call["num_images_per_prompt"] = 1
    assert batch.shape == (2, 8, 8)
    assert torch.equal(batch[1:], tokens(pipe, ["a", "bcd"], generator=[seeded(1)], **call))
    assert not torch.equal(batch[1:], tokens(pipe, ["bcd", "a"], generator=[seeded(1)], **call))
    assert tokens(pipe, ["a", "bcd"], generator=[seeded(1)], **call | {"use_prior": None}).shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.ones(3, 32, 32), "3 masks for 2 prompts"),
        (torch.ones(2, 31, 32), "`region_masks` must be as large as the image, 32×32"),
        (torch.zeros(2, 32, 32), "row 0 and column 0 without a prompt"),
        (torch.full((2, 32, 32), -1.0), "must be in \\[0, 1\\]"),
        ("left", "`region_masks` must be a PIL image, an array or a tensor, got str"),
    ],
)
def test_bad_regions_are_refused(pipe, masks, message):
    with pytest.raises(ValueError, match=message):
        tokens(pipe, ["a", "b"], region_masks=masks)


# ------------------------------------------------------------------------------------------------------ interpolation


def frames(pipe, a, b, num_images=5, **kwargs):
    call = {"num_inference_steps": 3, "output_type": "latent", "generator": seeded(3), "use_prior": False}
    return pipe.interpolate(a, b, num_images, **call | kwargs).images


@pytest.mark.usefixtures("float64")
def test_interpolation_begins_and_ends_with_its_prompts(pipe):
    grids = frames(pipe, "a cat", "dogs and dogs", guidance_scale=(6, 2))
    assert grids.shape == (5, 8, 8)
    for grid, prompt in ((grids[:1], "a cat"), (grids[-1:], "dogs and dogs")):
        assert torch.equal(grid, tokens(pipe, prompt, generator=seeded(3), guidance_scale=(6, 2)))
    assert not torch.equal(grids[2], grids[0]) and not torch.equal(grids[2], grids[4])


@pytest.mark.usefixtures("float64")
def test_interpolation_between_images_and_prompts(pipe):
    two = frames(pipe, picture(0), picture(1), num_images=2, use_prior=None)
    expected = tokens(pipe, "", condition_image=picture(1), generator=seeded(3))
    assert torch.equal(two[1:], expected)
    mixed = frames(pipe, "a", picture(1), num_images=3, use_prior=None)
    assert torch.equal(mixed[2:], expected)
    pipe.prior = pipe.prior_scheduler = None  # then the CLIP text embedding stands in for an image's
    embeds = pipe.encode_prompt("a", do_classifier_free_guidance=False)[4]
    without = frames(pipe, "a", picture(1), num_images=3, use_prior=None)
    assert torch.equal(without[:1], tokens(pipe, "a", clip_image_embeds=embeds, generator=seeded(3)))


@pytest.mark.usefixtures("float64")
def test_interpolation_cuts_its_prompts(pipe):
    cut = frames(pipe, "a cat", "dogs", num_images=2, max_sequence_length=3)
    assert torch.equal(cut[:1], tokens(pipe, "a cat", generator=seeded(3), max_sequence_length=3, use_prior=False))
    assert not torch.equal(cut, frames(pipe, "a cat", "dogs", num_images=2))


def test_interpolation_passes_on_what_the_prior_is_told(pipe, monkeypatch):
    told = []
    sample_prior = pipe.sample_prior
    record = lambda *args, **kwargs: told.append(kwargs) or sample_prior(*args, **kwargs)
    monkeypatch.setattr(pipe, "sample_prior", record)
    options = {"num_images": 2, "prior_num_inference_steps": 2, "prior_guidance_scale": 1.5}
    frames(pipe, "a", picture(1), **options, use_prior=None)
    assert [(one["num_inference_steps"], one["guidance_scale"]) for one in told] == [(2, 1.5)]
    without = frames(pipe, "a", picture(1), **options)  # `use_prior=False`
    pipe.register_to_config(use_prior=False)
    assert torch.equal(frames(pipe, "a", picture(1), **options, use_prior=None), without) and len(told) == 1


def test_slerp_keeps_to_the_sphere():
    first, last = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    share = torch.tensor([0.0, 0.25, 1.0])
    arc = slerp(first, last, share)
    angle = share * torch.pi / 2
    torch.testing.assert_close(arc, torch.stack([angle.cos(), angle.sin()], dim=1))
    torch.testing.assert_close(slerp(first, 3 * first, share)[:, 0], torch.tensor([1.0, 1.5, 3.0]))
    torch.testing.assert_close(slerp(first, -first, share)[::2], torch.stack([first, -first]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", 3), "`b` must be a prompt or a PIL image, got int"),
        (("a", "b", 1), "`num_images` must be an integer of at least 2, got 1"),
        (("a", "b", 3, [seeded()]), "`generator` must be one torch.Generator, got list"),
    ],
)
def test_bad_interpolations_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.interpolate(*arguments)


@pytest.mark.parametrize(
    ("end", "arguments", "message"),
    [
        ("\ud800", {}, "`b` must be Unicode text"),
        ("b", {"num_inference_steps": 0}, "`num_inference_steps`"),
        ("b", {"renoise_steps": -1}, "`renoise_steps`"),
        ("b", {"height": 20}, "multiples of 16"),
        ("b", {"num_images_per_prompt": 2}, "`generator` is a list of 3, but 6 images"),
        ("b", {"conditioning_weights": [1.0] * 5}, "`conditioning_weights` has 5 entries, but there are only 4"),
        (picture(), {"use_prior": True}, "`use_prior=True` samples an image embedding"),
        ("b", {"promt": "c"}, "takes no argument `promt`"),
    ],
)
def test_interpolations_are_refused_before_any_work(pipe, end, arguments, message):
    work = []
    for name in ("text_encoder", "text_encoder_2", "image_encoder", "unet", "vqgan"):
        getattr(pipe, name).register_forward_pre_hook(lambda module, args, n=name: work.append(n))
    with pytest.raises((ValueError, TypeError), match=message):
        pipe.interpolate("a", end, 3, **{"use_prior": False} | arguments)
    assert not work


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": None}, "either `prompt` or `prompt_embeds`"),
        ({"prompt": "\ud800"}, "`prompt` must be Unicode text, but .* has a lone surrogate"),
        ({"prompt": None, "prompt_embeds": 5}, "`prompt_embeds` must be a tensor, got int"),
        ({"prompt": None, "prompt_embeds": torch.full((1, 2, 16), float("nan"))}, "`prompt_embeds` must be finite"),
        ({"prompt_attention_mask": [[1]]}, "`prompt_attention_mask` must be a tensor, got list"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number, got nan"),
        ({"guidance_scale": (float("inf"), 2.0)}, "`guidance_scale` must be a finite number, got inf"),
        ({"renoise_steps": 1.5}, "`renoise_steps` must be an integer of at least 0, got 1.5"),
        ({"renoise_steps": True}, "`renoise_steps` must be an integer of at least 0, got True"),
        ({"temperature": "hot"}, "`temperature` must be a finite number"),
        ({"num_inference_steps": 10**9}, "`num_inference_steps` must be an integer of at most 10000"),
        ({"prior_guidance_scale": None}, "`prior_guidance_scale` must be a finite number, got None"),
        ({"use_prior": "no"}, "`use_prior` must be True, False or None"),
        ({"cross_attention_kwargs": "x"}, "`cross_attention_kwargs` must be"),
        ({"cross_attention_kwargs": {"scales": 1}}, "`cross_attention_kwargs` must be"),
        ({"callback_on_step_end_tensor_inputs": 0.5}, "`callback_on_step_end_tensor_inputs` must be a list"),
        ({"callback_on_step_end_tensor_inputs": [[]]}, "`callback_on_step_end_tensor_inputs` must be a list"),
        ({"conditioning_weights": np.full(2, np.nan)}, "`conditioning_weights` must be finite"),
        ({"height": 0}, "multiples of 16, got 0 and 32"),
        ({"height": 16 * 10**6}, "at most .* pixels together, got 16000000 and 32"),
        ({"height": 10**400}, "at most .* pixels together"),
        ({"guidance_scale": 10**400}, "`guidance_scale` must be a finite number"),
        ({"num_images_per_prompt": 10**9}, "`num_images_per_prompt` must be an integer of at most 1048576"),
        ({"max_sequence_length": 10**400}, "`max_sequence_length` must be an integer of at most"),
        ({"use_prior": np.ones(2)}, "`use_prior` must be True, False or None"),
        ({"return_dict": "no"}, "`return_dict` must be True or False, got 'no'"),
        ({"conditioning_weights": [1.0] * 5}, "`conditioning_weights` has 5 entries, but there are only 4"),
        ({"prompt": []}, "`prompt` must be a string or a list of at least one"),
        ({"prompt": 3}, "`prompt` must be a string.*got 3"),
        ({"prompt": ["a", None]}, "`prompt` must be a string"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt.*3 entries for 1 prompts"),
        ({"prompt_embeds": torch.zeros(1, 3, 16)}, "exactly one"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 15)}, r"`prompt_embeds`.*length, 16\).*got \(1, 3, 15\)"),
        ({"clip_text_embeds": torch.zeros(1, 11)}, r"`clip_text_embeds`.*12\).*got \(1, 11\)"),
        ({"clip_image_embeds": torch.zeros(3, 12)}, "`clip_image_embeds` has 3 rows for 1 prompts"),
        ({"conditioning_weights": torch.ones(3, 2)}, r"`conditioning_weights`.*\(1, n\), got \(3, 2\)"),
        ({"prompt_attention_mask": torch.ones(1, 3)}, "`prompt_attention_mask` goes with `prompt_embeds`"),
        ({"height": 20}, "multiples of 16, got 20 and 32: the nearest are 16 and 32"),
        ({"width": 0}, "multiples of 16, got 32 and 0"),
        ({"width": 64.0}, "multiples of 16"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 0, 16)}, "`prompt_embeds` must have shape"),
        ({"max_sequence_length": 0}, "`max_sequence_length`.*at least 1"),
        ({"prior_num_inference_steps": 0}, "`prior_num_inference_steps`.*at least 1"),
        ({"use_prior": True, "condition_image": picture()}, "`use_prior=True` samples an image embedding"),
        ({"generator": 3}, "`generator` must be a torch.Generator"),
        ({"temperature": float("nan")}, "`temperature` must be a finite number of at least 0"),
        ({"guidance_scale": (None, 8.0)}, "`guidance_scale` must be a finite number"),
        ({"conditioning_weights": "heavy"}, "`conditioning_weights` must be a list of numbers"),
        ({"num_inference_steps": 0}, "`num_inference_steps`.*at least 1, got 0"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps`.*integer"),
        ({"temperature": 0.0}, "`temperature` must be a number in"),
        ({"temperature": (1.0, -1.0)}, "`temperature` must be a finite number of at least 0"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt`.*got 0"),
        ({"guidance_steps": -1}, "`guidance_steps`.*at least 0"),
        ({"guidance_steps": (1, 2, 3)}, r"`guidance_steps`.*\(first, end\)"),
        ({"deep_feature_interval": 0}, "`deep_feature_interval`.*at least 1, got 0"),
        ({"guidance_scale": (1, 2, 3)}, "`guidance_scale`.*first, last"),
        ({"generator": [seeded(), seeded()]}, "`generator` is a list of 2, but 1 images"),
        ({"latents": torch.zeros(1, 8, 8)}, "`latents`.*int64 tensor, got torch.float32"),
        ({"latents": torch.zeros(1, 4, 8, dtype=torch.long)}, r"`latents` must have shape \(1, 8, 8\), got \(1, 4, 8\)"),
        ({"latents": torch.full((1, 8, 8), 32)}, r"`latents` must be in \[0, 32\), got 32 to 32"),
        ({"output_type": "jpeg"}, "`output_type`.*'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "tensor_inputs.*'noise'"),
        ({"condition_image": "cat.png"}, "`condition_image` must be a PIL image"),
        ({"condition_image": []}, "`condition_image` must be a PIL image"),
        ({"condition_image": [[picture()], [picture()]]}, "for 1 prompts"),
        ({"condition_image": picture(), "clip_image_embeds": torch.zeros(1, 12)}, "not both"),
    ],
)
def test_bad_input_is_refused_before_any_work(pipe, call, message):
    work = []
    for name in ("text_encoder", "text_encoder_2", "unet", "vqgan"):
        getattr(pipe, name).register_forward_pre_hook(lambda module, args, n=name: work.append(n))
    with pytest.raises(ValueError, match=message):
        tokens(pipe, **{"prompt": "a"} | call)
    assert not work


@pytest.mark.parametrize(
    ("missing", "call", "message"),
    [
        (["text_encoder"], {}, "`prompt` needs the components `text_encoder`"),
        (["image_encoder"], {"condition_image": picture()}, "needs the components `image_encoder`"),
        (["prior"], {"use_prior": True}, "needs the components `prior`"),
        (["text_encoder_2"], {"use_prior": True}, "needs CLIP text embeddings"),
        (
            ["text_encoder"],
            {"prompt": None, "prompt_embeds": torch.zeros(1, 3, 16)},
            "Guidance needs `negative_prompt_embeds`",
        ),
        (["text_encoder_2"], {"clip_text_embeds": torch.zeros(1, 12)}, "Guidance needs `negative_clip_text_embeds`"),
    ],
)
def test_missing_components_are_named(missing, call, message):
    pipe = tiny_pipeline(**dict.fromkeys(missing))
    with pytest.raises(ValueError, match=message):
        tokens(pipe, **{"prompt": "a"} | call)
