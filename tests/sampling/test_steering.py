"""Steering by rewards: exactly on grids whose distribution is known, and in every task of the pipelines."""

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DiscreteDDIMScheduler, EntropyBoundScheduler
from diffusers.guiders import AdaptiveProjectedGuidance
from peft import LoraConfig

from benchmarks import steering as benchmark
from paella_diffusers import (
    BestOfN,
    IterativeRefinement,
    PaellaAdaptiveProjectedGuidance,
    PaellaConfidenceScheduler,
    PaellaFlowMatchEulerScheduler,
    PaellaFlowMatchTrapezoidalScheduler,
    PaellaImg2ImgPipeline,
    PaellaInpaintPipeline,
    PaellaInversionPipeline,
    PaellaPipeline,
    PaellaPsiScheduler,
    PaellaScheduler,
    PaellaSemanticGuidance,
    SequentialMonteCarlo,
)
from paella_diffusers.sampling.denoiser import Denoiser
from paella_diffusers.sampling.steering import spawn_generators, systematic

# pictures of the tiny models differ in brightness by about 0.004
METHODS = {"smc": SequentialMonteCarlo(0.0005, 1.0), "refinement": IterativeRefinement(0.0005), "best": BestOfN()}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(prior=None, prior_scheduler=None).to(torch.float64)


# ------------------------------------------------------------------------------------------------- what is known exactly


@pytest.fixture(scope="module")
def known():
    unet = benchmark.ExactDenoiser().unet
    return unet, benchmark.grid_rewards(unet)


@pytest.mark.parametrize("scheduler", [benchmark.FRESH, benchmark.EULER])
def test_the_samplers_own_distribution_is_computed_exactly(known, scheduler):
    expected = benchmark.sampler_distribution(known[0], scheduler, 4)
    drawn = benchmark.steered_distribution(BestOfN(), scheduler, 4, 1, 4000)
    assert expected.sum() == pytest.approx(1, abs=1e-6) and benchmark.distance(drawn, expected) < 0.08  # 0.05 by chance


@pytest.mark.parametrize("scheduler", [benchmark.FRESH, benchmark.EULER])
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_more_particles_approach_the_tilted_distribution(known, scheduler, threshold):
    """Down to what 64 · 60 particles leave to chance; one particle is at a distance of 0.5."""
    target = benchmark.tilted(benchmark.sampler_distribution(known[0], scheduler, 4), known[1])
    method = SequentialMonteCarlo(resample_threshold=threshold)
    near = [
        benchmark.distance(benchmark.steered_distribution(method, scheduler, 4, n, 3840 // n), target) for n in (1, 4, 64)
    ]
    assert near[0] > 0.4 > near[1] > 0.15 > near[2], near


def test_best_of_n_leaves_it(known):
    target = benchmark.tilted(benchmark.sampler_distribution(known[0], benchmark.FRESH, 4), known[1])
    far = [
        benchmark.distance(benchmark.steered_distribution(BestOfN(), benchmark.FRESH, 4, n, 3840 // n), target)
        for n in (8, 64)
    ]
    assert far[1] > far[0] > 0.15 and far[1] > 0.4


def test_refinements_approach_the_tilted_truth(known):
    """With few steps, each refinement moves many tokens; 600 pictures are at 0.1 by chance."""
    target = benchmark.tilted(known[0].truth, known[1])
    near = [
        benchmark.distance(
            benchmark.steered_distribution(IterativeRefinement(num_refinements=n), benchmark.FRESH, 4, 4, 600), target
        )
        for n in (0, 8)
    ]
    assert near[1] < near[0] - 0.1 and near[1] < 0.25, near


def test_a_constant_reward_changes_no_weight(pipe):
    output = pipe("a", reward=lambda images, prompts: torch.ones(len(images)), num_particles=4, num_inference_steps=3)
    torch.testing.assert_close(output.log_weights.exp(), torch.full((1, 4), 0.25))


def test_systematic_resampling():
    weights = torch.tensor([0.5, 0.3, 0.2, 0.0]).double()
    for uniform in (0.0, 0.3, 0.999999):
        counts = torch.bincount(systematic(weights, uniform), minlength=4)
        assert counts[0] == 2 and counts[3] == 0 and 1 <= counts[1] <= 2 and 0 <= counts[2] <= 1
    mean = sum(torch.bincount(systematic(weights, u / 100), minlength=4) for u in range(100)) / 400
    torch.testing.assert_close(mean.double(), weights, atol=0.01, rtol=0)


# ----------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("method", METHODS)
def test_the_reward_of_the_picture_rises(pipe, method):
    call = {"num_inference_steps": 4, "output_type": "pt", "num_images_per_prompt": 4}
    steer = {"reward": brightness, "num_particles": 8, "generator": seeded()}
    plain = pipe("a", steering_method=BestOfN(), **call, **steer).rewards  # of 32 pictures that were not steered
    steer["generator"] = seeded()
    output = pipe("a", steering_method=METHODS[method], **call, **steer)
    assert brightness(output.images, None).mean() > plain.mean() + plain.std()
    assert output.rewards.shape == output.log_weights.shape == (4, 8) and output.rewards.dtype == torch.float32
    torch.testing.assert_close(output.log_weights.logsumexp(1), torch.zeros(4))
    drawn = brightness(output.images, None).float()
    assert (output.rewards - drawn[:, None]).abs().amin(1).max() < 1e-5  # each picture is one of its particles
    assert output.steps_taken == [8 * 4 * (2 if method == "refinement" else 1)] * 4
    assert output.initial_noise.shape == (4, 8, 8)


@pytest.mark.parametrize("method", METHODS)
def test_images_depend_on_their_own_generator_and_on_no_part_of_the_batch(pipe, method):
    def draw(*seeds, **kwargs):
        call = {"num_inference_steps": 3, "output_type": "latent", "num_particles": 4, "reward": brightness}
        generator = [seeded(seed) for seed in seeds]
        return pipe(["a"] * len(seeds), generator=generator, steering_method=METHODS[method], **call, **kwargs)

    both, again = draw(1, 2), draw(1, 2)
    assert torch.equal(both.images, again.images) and torch.equal(both.rewards, again.rewards)
    assert torch.equal(draw(2).images[0], both.images[1]) and not torch.equal(draw(3).images[0], both.images[0])
    for size in (1, 3, 8):
        parts = draw(1, 2, particle_batch_size=size)
        assert torch.equal(parts.images, both.images)
        torch.testing.assert_close(parts.rewards, both.rewards)


def test_particle_batch_size_bounds_what_models_are_given(pipe, monkeypatch):
    sizes = []
    forward, decode = pipe.unet.forward, pipe.vqgan.decode_indices
    monkeypatch.setattr(pipe.unet, "forward", lambda sample, *a, **k: sizes.append(len(sample)) or forward(sample, *a, **k))
    monkeypatch.setattr(pipe.vqgan, "decode_indices", lambda tokens: sizes.append(len(tokens)) or decode(tokens))
    pipe("a", reward=brightness, num_particles=5, particle_batch_size=2, num_inference_steps=2)
    assert set(sizes) == {4, 2, 1}  # two or one with guidance, two or one


HALF = torch.zeros(32, 32)
HALF[:16] = 1
PICTURE = torch.rand(3, 32, 32, generator=seeded())
TASKS = {
    "text to image": (PaellaPipeline, {}),
    "latents": (PaellaPipeline, {"latents": torch.randint(32, (2, 8, 8), generator=seeded())}),
    "image to image": (PaellaImg2ImgPipeline, {"image": PICTURE, "strength": 0.6}),
    "inpainting": (PaellaInpaintPipeline, {"image": PICTURE, "mask_image": HALF}),
    "inversion": (PaellaInversionPipeline, {"image": PICTURE, "source_prompt": "b", "residual_scale": 0.1}),
    "regions": (PaellaPipeline, {"prompt": ["a", "b"], "region_masks": [HALF, 1 - HALF], "num_images_per_prompt": 2}),
    "editing": (PaellaPipeline, {"editing_prompt": "c", "edit_momentum_scale": 0.3}),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task(pipe, task):
    cls, arguments = TASKS[task]
    pipe = cls.from_pipe(pipe)
    prompts = []

    def reward(images, told):
        prompts.extend(told)
        return brightness(images, told)

    call = {"prompt": ["a", "b"], "num_inference_steps": 4, "output_type": "pt", "guidance_scale": 2.0} | arguments
    call |= {"reward": reward, "num_particles": 4}
    plain = pipe(**call, steering_method=BestOfN(), generator=[seeded(0), seeded(1)]).rewards
    call |= {"steering_method": METHODS["smc"]}
    output = pipe(**call, generator=[seeded(0), seeded(1)])
    told = prompts[:8]
    assert told == (["a, b"] * 8 if task == "regions" else ["a"] * 4 + ["b"] * 4)
    assert brightness(output.images, None).mean() > plain.mean()
    drawn = brightness(output.images, None).float()
    assert (output.rewards - drawn[:, None]).abs().amin(1).max() < 1e-5
    parts = pipe(**call, particle_batch_size=3, generator=[seeded(0), seeded(1)])
    torch.testing.assert_close(parts.rewards, output.rewards)
    if task == "inpainting":
        torch.testing.assert_close(output.images[..., 16:, :].float(), PICTURE[None, :, 16:].expand(2, -1, -1, -1))


SCHEDULERS = {
    "fresh noise": PaellaScheduler(num_vq_embeddings=32, noise_source="fresh"),
    "confidence": PaellaConfidenceScheduler(num_vq_embeddings=32),
    "euler": PaellaFlowMatchEulerScheduler(num_vq_embeddings=32),
    "trapezoidal": PaellaFlowMatchTrapezoidalScheduler(num_vq_embeddings=32),
    "psi": PaellaPsiScheduler(num_vq_embeddings=32),
    "ddim": DiscreteDDIMScheduler(corrector_steps=1),
    "entropy bound": EntropyBoundScheduler(),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(pipe, name):
    steered = PaellaPipeline.from_pipe(pipe, scheduler=SCHEDULERS[name])
    call = {"num_inference_steps": 5, "output_type": "pt", "generator": seeded()}
    call |= {"temperature": 1.0} if name == "ddim" else {}
    call |= {"reward": brightness, "num_particles": 6}
    plain = steered("a", steering_method=BestOfN(), **call).rewards
    for method in ("smc",) if name == "trapezoidal" else ("smc", "refinement"):
        pictures = steered("a", steering_method=METHODS[method], **call).images
        assert brightness(pictures, None) > plain.mean()


def test_with_an_adapter():
    pipe = tiny_pipeline(prior=None, prior_scheduler=None).to(torch.float64)

    def draw(**kwargs):
        call = {"num_inference_steps": 3, "output_type": "latent", "num_particles": 4, "reward": brightness}
        return pipe("a", generator=seeded(), **call, **kwargs).images

    without = draw()
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    pipe.unet.to(torch.float64)
    assert torch.equal(draw(cross_attention_kwargs={"scale": 0.0}), without)
    adapted = draw()
    assert not torch.equal(adapted, without)
    pipe.unet.fuse_lora()
    assert torch.equal(draw(), adapted)


def test_two_stages_of_a_step_are_not_separated(pipe):
    """Particles are resampled after whole steps: what the first stage keeps is of the same particles."""
    steered = PaellaPipeline.from_pipe(pipe, scheduler=SCHEDULERS["trapezoidal"])
    seen = []

    def reward(images, prompts):
        seen.append(len(images))
        return brightness(images, prompts)

    steered("a", reward=reward, num_particles=2, num_inference_steps=7, steering_method=METHODS["smc"])
    assert len(seen) == 4  # after three whole steps, and of the final pictures


@pytest.mark.parametrize(
    "guider",
    [
        PaellaAdaptiveProjectedGuidance(3.0),
        PaellaSemanticGuidance(3.0, editing_prompt="b", edit_momentum_scale=0.5),
        AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5),
    ],
)
def test_what_guidance_keeps_goes_with_the_particles(pipe, guider, monkeypatch):
    """Each particle's history is its own: one image whose particles all become one goes on as this one would alone."""
    guided, ancestors, momenta = PaellaPipeline.from_pipe(pipe, guider=guider), [], []

    def kept(denoiser):
        guidance = denoiser.guidance
        buffer = getattr(getattr(guidance, "guider", None), "momentum_buffer", None)
        values = vars(guidance) if buffer is None else {"momentum": buffer.running_average}
        return next(value for value in values.values() if isinstance(value, torch.Tensor)).clone()

    reorder = Denoiser.reorder

    def watched(self, rows):
        before = kept(self)
        reorder(self, rows)
        ancestors.append(rows)
        momenta.append((before, kept(self)))

    monkeypatch.setattr(Denoiser, "reorder", watched)
    guided("a", reward=brightness, num_particles=4, num_inference_steps=4, steering_method=METHODS["smc"])
    assert ancestors
    for rows, (before, after) in zip(ancestors, momenta):
        assert torch.equal(after, before[rows])


def test_deep_features_and_callbacks(pipe):
    rows = []

    def callback(pipe, step, timestep, tensors):
        rows.append(len(tensors["latents"]))
        return {"latents": tensors["latents"].clone()}

    call = {"reward": brightness, "num_particles": 3, "num_inference_steps": 4, "deep_feature_interval": 2}
    output = pipe("a", **call, particle_batch_size=2, callback_on_step_end=callback, output_type="pt")
    assert rows == [3] * 4 and output.rewards.shape == (1, 3)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    stopped = pipe("a", **call, callback_on_step_end=stop, output_type="pt")  # its pictures are judged as they are
    drawn = brightness(stopped.images, None).float()
    assert (stopped.rewards - drawn).abs().min() < 1e-6 and stopped.steps_taken == [3]


def test_refused_before_any_work(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "encode_prompt", lambda *args, **kwargs: pytest.fail("work began"))
    call = {"prompt": "a", "reward": brightness}
    cases = {
        "`num_particles` goes with `reward`": {"reward": None, "num_particles": 4},
        "`particle_batch_size` goes with `reward`": {"reward": None, "particle_batch_size": 4},
        "`steering_method` goes with `reward`": {"reward": None, "steering_method": BestOfN()},
        "`reward` must be a function of pictures": {"reward": 5},
        "does not take these two arguments": {"reward": lambda images: images},
        "`num_particles` must be an integer": {"num_particles": 0},
        "`particle_batch_size` must be an integer": {"particle_batch_size": 1.5},
        "`steering_method` must be": {"steering_method": "smc"},
        "`confidence_threshold` ends images": {"confidence_threshold": 0.1},
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            pipe(**call | arguments)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (PaellaScheduler(sampling_rule="argmax"), {}, "a PaellaScheduler, draws nothing.*sampling_rule='argmax'"),
        (PaellaScheduler(sampling_rule="quantized"), {}, "sampling_rule='quantized'"),
        (PaellaScheduler(quantized_steps=12), {}, "quantized_steps=12"),
        (DiscreteDDIMScheduler(), {}, "a DiscreteDDIMScheduler, draws nothing: at temperature 0"),
        (DiscreteDDIMScheduler(), {"temperature": 0.0}, "at temperature 0"),
        (
            PaellaFlowMatchTrapezoidalScheduler(),
            {"steering_method": IterativeRefinement()},
            "IterativeRefinement, takes each step again",
        ),
    ],
)
def test_samplers_that_cannot_be_steered_are_refused(pipe, scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        PaellaPipeline.from_pipe(pipe, scheduler=scheduler)("a", reward=brightness, **arguments)


def test_inversion_is_not_refined(pipe):
    inversion = PaellaInversionPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="neither inversion nor"):
        inversion("a", image=PICTURE, reward=brightness, steering_method=IterativeRefinement())


@pytest.mark.parametrize("values", [torch.ones(3), torch.full((2,), torch.nan), torch.ones(2, 1)])
def test_rewards_that_are_no_finite_number_each_are_refused(pipe, values):
    with pytest.raises(ValueError, match="`reward` must return"):
        pipe("a", reward=lambda images, prompts: values, num_particles=2, num_inference_steps=2)


def test_settings_out_of_range_are_refused():
    for make in (
        lambda: SequentialMonteCarlo(temperature=0),
        lambda: SequentialMonteCarlo(resample_threshold=1.5),
        lambda: IterativeRefinement(temperature=-1.0),
        lambda: IterativeRefinement(num_refinements=-1),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()


def test_generators_of_particles_come_from_their_images():
    images, particles = spawn_generators([seeded(0), seeded(1)], 2, 3)
    assert len(images) == 2 and len(particles) == 6
    again = spawn_generators([seeded(1)], 1, 3)[1]
    assert [one.initial_seed() for one in particles[3:]] == [one.initial_seed() for one in again]
