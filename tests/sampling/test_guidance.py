"""Guidance methods: on a posterior that is known exactly, in the pipeline, saved and loaded, diffusers' own among them."""

import itertools
import math

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DiffusionPipeline
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
)

from paella_diffusers import PaellaClassifierFreeGuidance, PaellaPipeline
from paella_diffusers.sampling.guidance.base import GuidanceMixin, identity


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


@pytest.mark.parametrize("load", [PaellaPipeline.from_pretrained, DiffusionPipeline.from_pretrained])
@pytest.mark.parametrize(
    "guider",
    [
        PaellaClassifierFreeGuidance(guidance_scale=(2.0, 4.0), plausibility_threshold=0.3),
        ClassifierFreeGuidance(guidance_scale=3.0),
        None,
    ],
    ids=["ours", "diffusers'", "none"],
)
def test_saved_and_loaded_with_the_pipeline(guider, load, tmp_path):
    pipe = tiny_pipeline()
    pipe.guider = guider  # swapped by assignment
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "guider" / "guider_config.json").is_file() == (guider is not None)
    loaded = load(tmp_path)
    assert type(loaded.guider) is type(guider)
    if guider is not None:
        assert loaded.guider.config.guidance_scale in (guider.config.guidance_scale, [2.0, 4.0])
    assert torch.equal(tokens(loaded), tokens(pipe))


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


@pytest.mark.parametrize(
    "guider",
    [
        ClassifierFreeGuidance(guidance_rescale=0.5),
        ClassifierFreeGuidance(start=0.3, stop=0.8),
        AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5),
        ClassifierFreeZeroStarGuidance(zero_init_steps=0),
    ],
)
def test_diffusers_guiders_run_and_keep_nothing_of_a_call(guider):
    pipe = tiny_pipeline(guider=guider)
    first = tokens(pipe)
    assert torch.equal(tokens(pipe), first) and guider._step is None
    assert not torch.equal(first, tokens(pipe, guidance_scale=2.0))
    assert guider.guidance_scale == 7.5


def test_guiders_that_need_other_branches_are_refused():
    pipe = tiny_pipeline(guider=SkipLayerGuidance(skip_layer_guidance_layers=[0]))
    with pytest.raises(ValueError, match="`guider`, a SkipLayerGuidance, needs the predictions"):
        tokens(pipe)
