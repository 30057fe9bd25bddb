"""Guidance methods: on a posterior that is known exactly, in the pipeline, saved and loaded, diffusers' own among them."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DiffusionPipeline
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    LTX2Guidance,
    MagnitudeAwareGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)

from benchmarks.guidance import final_distribution
from paella_diffusers import (
    PaellaAdaptiveProjectedGuidance,
    PaellaClassifierFreeGuidance,
    PaellaClassifierFreeZeroStarGuidance,
    PaellaPerturbedAttentionGuidance,
    PaellaRescaledGuidance,
    PaellaSemanticGuidance,
    PaellaSmoothedEnergyGuidance,
)
from paella_diffusers.sampling.guidance.base import GuidanceMixin, centred, identity
from paella_diffusers.sampling.guidance.diffusers_guidance import DiffusersGuidance
from paella_diffusers.sampling.plan import Step


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(pipe, **kwargs):
    call = {"num_inference_steps": 4, "generator": seeded(), "output_type": "latent", "use_prior": False}
    return pipe("a", **call | kwargs).images


def test_linear_guidance_is_of_the_prior():
    """Guided posteriors of one token, at any step, are those of the prior p_c^w p_u^(1-w)."""
    generator, size, scale = seeded(), 8, 3.0
    conditional, unconditional = torch.rand(2, size, generator=generator, dtype=torch.float64).softmax(-1)
    guided_prior = (conditional**scale * unconditional ** (1 - scale)).double()
    guided_prior /= guided_prior.sum()
    (guided,) = PaellaClassifierFreeGuidance().mixing_weights(scale)
    for t, seen in itertools.product((0.1, 0.5, 0.99), range(size)):
        likelihood = torch.full((size,), t / size, dtype=torch.float64)
        likelihood[seen] += 1 - t
        posterior = lambda prior: (prior * likelihood).log()  # noqa: B023
        mixed = guided[0] * posterior(conditional) + guided[1] * posterior(unconditional)
        torch.testing.assert_close(mixed.softmax(0), posterior(guided_prior).softmax(0), atol=1e-14, rtol=0)


SIZE = 8


def posterior_logits(prior: torch.Tensor, level: float) -> torch.Tensor:
    """
    Of a single token with this prior, `(size,)`: the logits of the clean token for every token that may be seen at a noise
    level, `(size, size, 1, 1)`, each row off by a number of its own, as a model's are.
    """
    size = len(prior)
    likelihood = (1 - level) * torch.eye(size, dtype=torch.float64) + level / size
    return ((likelihood * prior).log() + torch.randn(size, 1, generator=seeded(7)).double())[..., None, None]


def priors() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple((2 * torch.randn(2, SIZE, generator=seeded(3), dtype=torch.float64)).softmax(-1))


def guided_posterior(guidance, conditional, unconditional, scale: float) -> torch.Tensor:
    """What a method makes of two branches, mixed as before the model's head: probabilities `(size, size)`."""
    branches = guidance.branches(None, scale)
    weights = guidance.mixing_weights(scale, branches)
    logits = [sum(w * branch for w, branch in zip(row, (conditional, unconditional))) for row in weights]
    return guidance.forward(*logits, step=None, guidance_scale=scale).softmax(1)[..., 0, 0]


LIMITS = {  # settings with which a method is linear guidance
    "APG": lambda: PaellaAdaptiveProjectedGuidance(eta=1.0, momentum=0.0, norm_threshold=None),
    "APG, a high threshold": lambda: PaellaAdaptiveProjectedGuidance(eta=1.0, momentum=0.0, norm_threshold=1e9),
    "rescaled": lambda: PaellaRescaledGuidance(guidance_rescale=0.0),
    "PAG": lambda: PaellaPerturbedAttentionGuidance(perturbed_guidance_scale=0.0),
    "SEG": lambda: PaellaSmoothedEnergyGuidance(seg_guidance_scale=0.0),
    "SEGA": lambda: PaellaSemanticGuidance(editing_prompt="b", edit_guidance_scale=0.0),
}


@pytest.mark.parametrize("method", LIMITS)
@pytest.mark.parametrize("scale", [1.5, 8.0])
def test_limits_are_linear_guidance(method, scale):
    """On the exact posterior: the posterior of the prior p_c^w p_u^(1-w), at every noise level, whatever was seen."""
    guidance, (conditional, unconditional) = LIMITS[method](), priors()
    tilted = conditional**scale * unconditional ** (1 - scale)
    for level in (0.1, 0.5, 1.0):
        both = posterior_logits(conditional, level), posterior_logits(unconditional, level)
        expected = posterior_logits(tilted / tilted.sum(), level).softmax(1)[..., 0, 0]
        torch.testing.assert_close(guided_posterior(guidance, *both, scale), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_what_sampling_ends_with(steps):
    """
    Computed exactly, of a single token: linear guidance ends with its prior after any number of steps, even where that is a
    token which both branches all but exclude.
    """
    conditional = torch.tensor([0.9, 0.099, 0.001], dtype=torch.float64)
    unconditional = torch.tensor([0.9, 0.099999, 0.000001], dtype=torch.float64)
    tilted = conditional**5.0 * unconditional**-4.0
    final = lambda guidance: final_distribution(guidance, conditional, unconditional, 5.0, steps)
    torch.testing.assert_close(final(PaellaClassifierFreeGuidance()), tilted / tilted.sum(), atol=1e-12, rtol=0)
    assert tilted.argmax() == 2
    for guidance in (PaellaClassifierFreeGuidance(plausibility_threshold=0.05), PaellaClassifierFreeZeroStarGuidance()):
        assert final(guidance)[2] < 0.2


@pytest.mark.parametrize(
    "guidance", [PaellaAdaptiveProjectedGuidance(), PaellaClassifierFreeZeroStarGuidance()], ids=lambda g: type(g).__name__
)
def test_what_differs_in_temperature_only_is_not_guided(guidance):
    """If p_u is p_c at another temperature, there is nothing to move towards; linear guidance would only sharpen."""
    conditional, _ = priors()
    logits = posterior_logits(conditional, 0.5)
    expected = logits.softmax(1)[..., 0, 0]
    both = logits, 0.4 * logits + 3
    torch.testing.assert_close(guided_posterior(guidance, *both, 8.0), expected, atol=1e-12, rtol=0)
    assert (guided_posterior(PaellaClassifierFreeGuidance(), *both, 8.0) - expected).abs().max() > 0.01


def test_projected_guidance_moves_at_a_right_angle():
    conditional, unconditional = (posterior_logits(prior, 0.5) for prior in priors())
    guided = guided_posterior(PaellaAdaptiveProjectedGuidance(), conditional, unconditional, 8.0).log()[..., None, None]
    moved = centred(guided) - centred(conditional)
    assert (moved * centred(conditional)).sum(1).abs().max() < 1e-10 < moved.norm(dim=1).min()
    short = PaellaAdaptiveProjectedGuidance(norm_threshold=0.01)
    guided = guided_posterior(short, conditional, unconditional, 8.0).log()[..., None, None]
    assert (centred(guided) - centred(conditional)).std(1, correction=0).max() <= 7 * 0.01 + 1e-9


def test_rescaled_guidance_is_as_spread_out_as_the_conditional_prediction():
    conditional, unconditional = (posterior_logits(prior, 0.5) for prior in priors())
    guided = guided_posterior(PaellaRescaledGuidance(guidance_rescale=1.0), conditional, unconditional, 8.0).log()
    torch.testing.assert_close(guided.std(1), conditional.std(1)[:, 0, 0], atol=1e-10, rtol=0)


STEP = Step(0, torch.tensor(1.0), torch.tensor(1.0), 0.5, 4)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda w: PaellaAdaptiveProjectedGuidance(eta=0.3, momentum=-0.5, norm_threshold=0.8),
            lambda w: AdaptiveProjectedGuidance(w - 1, -0.5, 0.8 * SIZE**0.5, 1, 0.3, use_original_formulation=True),
        ),
        (
            lambda w: PaellaClassifierFreeZeroStarGuidance(),
            lambda w: ClassifierFreeZeroStarGuidance(w, zero_init_steps=0),
        ),
        (
            lambda w: PaellaRescaledGuidance(guidance_rescale=0.6),
            lambda w: ClassifierFreeGuidance(w, guidance_rescale=0.6),
        ),
    ],
    ids=["APG", "CFG-Zero*", "rescaled"],
)
def test_formulas_are_those_of_diffusers_guiders(ours, theirs):
    """Given centred logits, with every position as a row of the batch, in several steps."""
    scale = 6.0
    ours, theirs = ours(scale), DiffusersGuidance(theirs(scale))
    for index in range(3):
        step = replace(STEP, index=index)
        both = torch.randn(2, 2, SIZE, 3, 3, generator=seeded(index))
        rows = [centred(logits).movedim(1, -1).reshape(-1, SIZE) for logits in both]
        theirs.branches(step, theirs.guidance_scale)
        expected = theirs.forward(*rows, step=step, guidance_scale=theirs.guidance_scale)
        weights = ours.mixing_weights(scale, ours.branches(step, scale))
        logits = [sum(w * branch for w, branch in zip(row, both)) for row in weights]
        guided = ours.forward(*logits, step=step, guidance_scale=scale)
        torch.testing.assert_close(guided.movedim(1, -1).reshape(-1, SIZE), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "guidance",
    [
        PaellaAdaptiveProjectedGuidance(momentum=-0.5, norm_threshold=5.0),
        PaellaClassifierFreeZeroStarGuidance(),
        PaellaRescaledGuidance(),
        PaellaPerturbedAttentionGuidance(plausibility_threshold=0.1),
        PaellaSmoothedEnergyGuidance(seg_blur_sigma=1.0),
        PaellaSemanticGuidance(
            editing_prompt=["b", "c"], edit_momentum_scale=0.3, edit_warmup_steps=[0, 2], plausibility_threshold=0.1
        ),
    ],
    ids=lambda g: type(g).__name__,
)
def test_methods_in_the_pipeline(guidance, dtype):
    """They change tokens, keep nothing of a call, and are off without guidance; with ramps, intervals and callbacks."""
    pipe = tiny_pipeline(guider=guidance).to(dtype)
    plain = tiny_pipeline().to(dtype)
    high = {"guidance_scale": 60.0}  # the branches of so small a model differ little
    first = tokens(pipe, **high)
    assert torch.equal(tokens(pipe, **high), first) and not torch.equal(first, tokens(plain, **high))
    assert torch.equal(tokens(pipe, guidance_scale=None), tokens(plain, guidance_scale=None))
    assert torch.equal(tokens(pipe, guidance_steps=0), tokens(plain, guidance_scale=None))
    ramp = tokens(pipe, guidance_scale=(60.0, 1.0), guidance_steps=(1, 4), num_images_per_prompt=2)
    assert ramp.shape == (2, 8, 8) and not torch.equal(ramp[:1], first)


def test_a_callback_cannot_turn_on_what_was_not_encoded():
    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 5.0

    plain = tokens(tiny_pipeline(), guidance_scale=None)
    for guider in (PaellaPerturbedAttentionGuidance(), PaellaSemanticGuidance(editing_prompt="b")):
        assert torch.equal(tokens(tiny_pipeline(guider=guider), guidance_scale=None, callback_on_step_end=callback), plain)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (PaellaAdaptiveProjectedGuidance, {"eta": "no"}, "`eta` must be a finite number, got 'no'"),
        (PaellaAdaptiveProjectedGuidance, {"momentum": 1}, r"`momentum` must be a number in \(-1, 1\), got 1"),
        (PaellaAdaptiveProjectedGuidance, {"norm_threshold": 0}, "`norm_threshold` must be a finite number above 0, got 0"),
        (
            PaellaClassifierFreeZeroStarGuidance,
            {"guidance_scale": None},
            "`guidance_scale` must be a finite number, got None",
        ),
        (PaellaRescaledGuidance, {"guidance_rescale": 2}, r"`guidance_rescale` must be a number in \[0, 1\], got 2"),
        (PaellaPerturbedAttentionGuidance, {"perturbed_levels": ()}, "`perturbed_levels` must be a list of at least one"),
        (
            PaellaPerturbedAttentionGuidance,
            {"perturbed_guidance_scale": -1},
            "`perturbed_guidance_scale` must be .*, got -1",
        ),
        (PaellaSmoothedEnergyGuidance, {"seg_blur_sigma": 0}, "`seg_blur_sigma` must be a finite number above 0, got 0"),
    ],
)
def test_bad_settings_of_methods_are_refused(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings)


def test_implausible_tokens_are_cut_off():
    """Only tokens that the conditional branch finds plausible can be drawn, however high the scale is."""
    guidance = PaellaClassifierFreeGuidance(plausibility_threshold=0.2)
    conditional = torch.tensor([0.5, 0.11, 0.09, 0.3 - 1e-9, 1e-9]).log().view(1, 5, 1, 1)
    unconditional = torch.tensor([0.5, 0.3, 0.1, 0.1 - 1e-15, 1e-15]).log().view(1, 5, 1, 1)
    assert guidance.mixing_weights(8.0) == ((8.0, -7.0), (1.0, 0.0))
    guided = 8 * conditional - 7 * unconditional
    assert guided.argmax() == 4  # next to impossible for both, and yet the most likely
    probabilities = guidance.forward(guided, conditional).softmax(1).flatten()
    assert probabilities[[1, 2, 4]].tolist()[1:] == [0, 0] and probabilities.argmax() == 3
    assert guidance.forward(guided, conditional).isfinite().all()
    plain = PaellaClassifierFreeGuidance()
    assert plain.mixing_weights(8.0) == ((8.0, -7.0),) and plain.forward(guided) is guided


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_threshold_of_one_takes_the_most_likely_token(dtype):
    """Of the conditional logits, as they are without guidance but for rounding."""
    pipe = tiny_pipeline(guider=PaellaClassifierFreeGuidance(plausibility_threshold=1.0)).to(dtype)
    cut, outputs = tokens(pipe, guidance_scale=5.0, num_inference_steps=1), []
    pipe.unet.register_forward_hook(lambda module, args, output: outputs.append(output.sample.double()))
    tokens(pipe, guidance_scale=None, num_inference_steps=1)
    (logits,) = outputs
    behind = logits.amax(1) - logits.gather(1, cut[:, None])[:, 0]
    assert behind.max() <= 4 * torch.finfo(dtype).eps * logits.abs().max()


def test_what_the_call_leaves_out_the_guider_says():
    pipe = tiny_pipeline()
    assert torch.equal(tokens(pipe), tokens(pipe, guidance_scale=8.0)) and pipe.guidance_scale == 8.0
    pipe.guider = PaellaClassifierFreeGuidance(guidance_scale=2.5)
    assert torch.equal(tokens(pipe), tokens(pipe, guidance_scale=2.5)) and pipe.guidance_scale == 2.5
    assert not torch.equal(tokens(pipe), tokens(pipe, guidance_scale=8.0))
    assert not torch.equal(tokens(pipe), tokens(pipe, guidance_scale=None)) and not pipe.do_classifier_free_guidance
    pipe.guider = PaellaClassifierFreeGuidance(guidance_scale=(1.0, 4.0))
    assert torch.equal(tokens(pipe), tokens(pipe, guidance_scale=(1.0, 4.0)))
    assert pipe.guider.config.guidance_scale == (1.0, 4.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": math.nan}, "`guidance_scale` must be a finite number, got nan"),
        ({"guidance_scale": (1, 2, 3)}, "`guidance_scale` must be a number or"),
        ({"guidance_scale": "high"}, "`guidance_scale` must be a finite number, got 'high'"),
        ({"plausibility_threshold": 0}, r"`plausibility_threshold` must be a number in \(0, 1\], got 0"),
        ({"plausibility_threshold": 1.5}, r"`plausibility_threshold` must be a number in \(0, 1\], got 1.5"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PaellaClassifierFreeGuidance(**settings)


@pytest.mark.parametrize(
    "guider",
    [
        PaellaClassifierFreeGuidance(guidance_scale=(2.0, 4.0), plausibility_threshold=0.3),
        PaellaAdaptiveProjectedGuidance(guidance_scale=3.0, eta=0.5, momentum=-0.5, norm_threshold=2.0),
        PaellaClassifierFreeZeroStarGuidance(guidance_scale=3.0),
        PaellaRescaledGuidance(guidance_scale=3.0, guidance_rescale=0.4),
        PaellaPerturbedAttentionGuidance(guidance_scale=3.0, perturbed_guidance_scale=2.0, perturbed_levels=(1,)),
        PaellaSmoothedEnergyGuidance(guidance_scale=3.0, seg_guidance_scale=2.0, seg_blur_sigma=1.5),
        PaellaSemanticGuidance(3.0, editing_prompt=["b", "c"], edit_guidance_scale=[4.0, 2.0], edit_threshold=0.5),
        ClassifierFreeGuidance(guidance_scale=3.0),
        None,
    ],
    ids=lambda guider: type(guider).__name__,
)
def test_saved_and_loaded_with_the_pipeline(guider, tmp_path):
    pipe = tiny_pipeline()
    pipe.guider = guider  # swapped by assignment
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "guider" / "guider_config.json").is_file() == (guider is not None)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)  # plain diffusers; in test_loading.py, this package's
    assert type(loaded.guider) is type(guider)
    if guider is not None:
        saved = lambda config: {name: value for name, value in config.items() if not name.startswith("_")}
        as_json = json.loads(json.dumps(saved(guider.config)))
        assert json.loads(json.dumps(saved(loaded.guider.config))) == as_json
    assert torch.equal(tokens(loaded), tokens(pipe))
    if isinstance(guider, GuidanceMixin):
        assert not torch.equal(tokens(loaded), tokens(tiny_pipeline(guider=type(guider)())))  # its settings count


def test_numbers_of_numpy_are_saved_as_those_of_python(tmp_path):
    settings = {"edit_threshold": np.float32(0.5), "edit_warmup_steps": np.int64(3)}
    guider = PaellaSemanticGuidance((np.float32(4), np.float32(2)), editing_prompt=["b"], **settings)
    guider.save_pretrained(tmp_path)
    loaded = PaellaSemanticGuidance.from_pretrained(tmp_path)
    assert loaded.guidance_scale == (4, 2) and loaded.config.edit_threshold == 0.5 and loaded.config.edit_warmup_steps == 3


class NoUnconditional(GuidanceMixin):
    """A method that looks at the branches' logits and returns the conditional ones."""

    from diffusers.configuration_utils import register_to_config as _register

    @_register
    def __init__(self, guidance_scale: float = 2.0):
        self.seen = []

    def forward(self, conditional, unconditional, *, step, guidance_scale):
        self.seen.append((step.index, guidance_scale, tuple(conditional.shape), tuple(unconditional.shape)))
        SEEN.extend(self.seen)
        return conditional


SEEN = []


def test_a_method_of_ones_own():
    pipe = tiny_pipeline(guider=NoUnconditional()).to(torch.float64)
    assert identity(2) == ((1.0, 0.0), (0.0, 1.0))
    SEEN.clear()
    result = tokens(pipe, guidance_steps=1)
    assert SEEN == [(0, 2.0, (1, 32, 8, 8), (1, 32, 8, 8))]
    assert pipe.guider.seen == []  # the call had a copy of its own
    assert torch.equal(result, tokens(pipe, guidance_scale=None))


# --------------------------------------------------------------------------------------------------- diffusers' guiders


def test_diffusers_linear_guidance_is_ours():
    pipe = tiny_pipeline().to(torch.float64)
    expected = tokens(pipe, guidance_scale=3.0)
    pipe.guider = ClassifierFreeGuidance(guidance_scale=3.0)
    assert torch.equal(tokens(pipe), expected)
    pipe.guider = ClassifierFreeGuidance(guidance_scale=1.0)
    assert torch.equal(tokens(pipe), tokens(pipe, guidance_scale=None))


GUIDERS = [  # at a high scale, as the branches of so small a model differ little
    ClassifierFreeGuidance(60.0, guidance_rescale=0.5),
    ClassifierFreeGuidance(60.0, start=0.3, stop=0.8),
    AdaptiveProjectedGuidance(60.0, adaptive_projected_guidance_momentum=-0.5),
    AdaptiveProjectedMixGuidance(60.0, adaptive_projected_guidance_start_step=1),
    ClassifierFreeZeroStarGuidance(60.0, zero_init_steps=0),
    TangentialClassifierFreeGuidance(60.0),
]


@pytest.mark.parametrize("guider", GUIDERS, ids=lambda guider: type(guider).__name__)
def test_diffusers_guiders_run_and_keep_nothing_of_a_call(guider):
    pipe = tiny_pipeline(guider=guider)
    first = tokens(pipe)
    assert torch.equal(tokens(pipe), first) and guider._step is None
    assert not torch.equal(first, tokens(pipe, guidance_scale=2.0))
    assert guider.guidance_scale == 60.0
    pipe.guider = ClassifierFreeGuidance(60.0)
    assert not torch.equal(first, tokens(pipe))


@pytest.mark.parametrize("first_step", [0, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda beta: AdaptiveProjectedGuidance(60.0, beta),
        lambda beta: AdaptiveProjectedMixGuidance(60.0, 0.0, 60.0, beta, adaptive_projected_guidance_start_step=1),
    ],
    ids=["APG", "mixed"],
)
def test_momentum_of_diffusers_guiders(make, first_step):
    """They make what it needs in the first step, which may not be guided."""
    call = {"guidance_steps": (first_step, 6), "num_inference_steps": 6}
    without, with_momentum = (tokens(tiny_pipeline(guider=make(beta)), **call) for beta in (None, -0.5))
    assert not torch.equal(without, with_momentum)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkipLayerGuidance(skip_layer_guidance_layers=[0]), "SkipLayerGuidance, needs the predictions .*another"),
        (
            lambda: PerturbedAttentionGuidance(perturbed_guidance_layers=[0]),
            "PerturbedAttentionGuidance, needs the predictions .*: take PaellaPerturbedAttentionGuidance",
        ),
        (
            lambda: SmoothedEnergyGuidance(seg_guidance_layers=[0]),
            "SmoothedEnergyGuidance, needs the predictions .*: take PaellaSmoothedEnergyGuidance",
        ),
        (lambda: LTX2Guidance(), "LTX2Guidance, needs the predictions"),
        (lambda: AutoGuidance(auto_guidance_layers=[0], dropout=0.5), "AutoGuidance, changes the model between"),
        (lambda: MagnitudeAwareGuidance(), "MagnitudeAwareGuidance, cannot take the norm of logits"),
    ],
)
def test_guiders_that_cannot_work_are_refused_by_name(make, message):
    pipe = tiny_pipeline(guider=make())
    with pytest.raises(ValueError, match=f"`guider`, a {message}"):
        tokens(pipe)


def test_guiders_without_a_scale_are_refused():
    with pytest.raises(ValueError, match="`guider`, a .*, has no `guidance_scale` to set"):
        DiffusersGuidance(type("NoScale", (ClassifierFreeGuidance,), {"__init__": lambda self: None})())


def test_a_guider_without_momentum_keeps_nothing_of_the_images():
    guidance = DiffusersGuidance(ClassifierFreeGuidance(guidance_scale=3.0))
    guidance.reorder(torch.tensor([1, 0]))
    source = guidance.for_source()
    assert source.guidance_scale == 3.0 and source.guider is not guidance.guider


def test_the_parts_of_an_offloaded_model_are_called_in_turn():
    pipe = tiny_pipeline(prior=None, prior_scheduler=None).to(torch.float64)
    draw = lambda: pipe("a", generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="latent").images
    expected = draw()
    pipe.unet.down_blocks[0]._hf_hook = None  # as accelerate marks what it moves about
    assert torch.equal(draw(), expected)
