"""Semantic guidance: in the call and as a component, its formula, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_pipeline

from paella_diffusers import (
    PaellaAdaptiveProjectedGuidance,
    PaellaClassifierFreeGuidance,
    PaellaImg2ImgPipeline,
    PaellaInpaintPipeline,
    PaellaInversionPipeline,
    PaellaPipeline,
    PaellaSemanticGuidance,
)
from paella_diffusers.sampling.guidance.base import CONDITIONAL, UNCONDITIONAL
from paella_diffusers.sampling.guidance.semantic_guidance import SAFE_DIRECTIONS, largest
from paella_diffusers.sampling.plan import Step

STEP = Step(0, torch.tensor(1.0), torch.tensor(1.0), 0.5, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(pipe, **kwargs):
    call = {"prompt": "a", "num_inference_steps": 4, "generator": seeded(), "output_type": "latent", "use_prior": False}
    return pipe(**call | kwargs).images


EDIT = {"editing_prompt": ["b", "c"], "edit_guidance_scale": [60.0, 40.0], "reverse_editing_direction": [False, True]}


@pytest.mark.parametrize("guider", [None, PaellaClassifierFreeGuidance(3.0, 0.2)], ids=["published", "with the cut"])
@pytest.mark.parametrize(
    "edit",
    [
        {"editing_prompt": ["b", "c"], "edit_guidance_scale": 0.0},
        {"editing_prompt": "b", "edit_weights": [0.0]},
        {"editing_prompt": "b", "edit_warmup_steps": 4},
        {"editing_prompt": "b", "edit_cooldown_steps": 0, "edit_momentum_scale": 0.3},
    ],
)
def test_without_an_effect_it_is_no_semantic_guidance(guider, edit):
    """To the last bit; and the model evaluates no branch more."""
    pipe, rows = tiny_pipeline(guider=guider), []
    expected = tokens(pipe)
    pipe.unet.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    assert torch.equal(tokens(pipe, **edit), expected) and rows == [2] * 4
    pipe.guider = PaellaSemanticGuidance.from_guider(guider, **edit)
    assert torch.equal(tokens(pipe), expected)


IMAGE = torch.arange(64).view(8, 8) % 32
TASKS = {
    "text to image": (PaellaPipeline, {}),
    "image to image": (PaellaImg2ImgPipeline, {"image": IMAGE, "strength": 0.9}),
    "inpainting": (PaellaInpaintPipeline, {"image": IMAGE, "mask_image": torch.ones(8, 8)}),
    "inversion": (PaellaInversionPipeline, {"image": IMAGE, "source_prompt": "b", "residual_scale": 0.1}),
    "regions": (PaellaPipeline, {"prompt": ["a", "b"], "region_masks": torch.rand(2, 8, 8, generator=seeded())}),
}


@pytest.mark.parametrize("task", TASKS)
def test_in_the_call_and_as_a_component(task):
    cls, arguments = TASKS[task]
    pipe = cls.from_pipe(tiny_pipeline(prior=None, prior_scheduler=None))
    arguments = {"num_inference_steps": 6} | arguments
    plain, edited = tokens(pipe, **arguments), tokens(pipe, **arguments, **EDIT)
    assert not torch.equal(plain, edited)
    pipe.guider = PaellaSemanticGuidance(**EDIT)
    assert torch.equal(tokens(pipe, **arguments), edited)
    assert not torch.equal(tokens(pipe, **arguments, reverse_editing_direction=False), edited)  # the call's has precedence
    assert torch.equal(tokens(pipe, **arguments, edit_guidance_scale=0.0), plain)
    assert torch.equal(tokens(pipe, **arguments, guidance_steps=0), tokens(pipe, **arguments, guidance_scale=None))


def test_the_source_of_an_inversion_is_not_edited():
    pipe = PaellaInversionPipeline.from_pipe(tiny_pipeline(prior=None, prior_scheduler=None))
    rows = []
    pipe.unet.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    image = torch.randint(32, (8, 8), generator=seeded(2))
    call = {"image": image, "source_prompt": "b", "num_inference_steps": 2, "guidance_scale": 3.0}
    tokens(pipe, **call, editing_prompt="c")
    assert rows == [3, 2] * 2


def logits(seed: int) -> torch.Tensor:
    return torch.randn(2, 6, 4, 4, generator=seeded(seed), dtype=torch.float64)


def guided(guidance, scale: float, step, branches: dict[str, torch.Tensor]) -> torch.Tensor:
    """As the denoiser does it, from each branch's logits by its conditioning."""
    wanted = guidance.branches(step, scale)
    rows = [branches[branch.conditioning] for branch in wanted]
    mixed = [sum(w * row for w, row in zip(weights, rows)) for weights in guidance.mixing_weights(scale, wanted)]
    return guidance.forward(*mixed, step=step, guidance_scale=scale)


def test_formula():
    """Thresholds, weights, warm-up, cool-down and momentum, along eight steps, against the paper's equations."""
    settings = {
        "editing_prompt": ["b", "c"],
        "reverse_editing_direction": [False, True],
        "edit_guidance_scale": [3.0, 2.0],
        "edit_threshold": [0.5, 0.8],
        "edit_warmup_steps": [1, 3],
        "edit_cooldown_steps": [8, 6],
        "edit_weights": [1.0, 0.5],
        "edit_momentum_scale": 0.3,
        "edit_mom_beta": 0.6,
    }
    guidance, scale, momentum = PaellaSemanticGuidance(4.0, **settings), 4.0, 0.0
    for index in range(8):
        c, u, first, second = (logits(10 * index + row) for row in range(4))
        result = guided(
            guidance,
            scale,
            replace(STEP, index=index),
            {"conditional": c, "unconditional": u, "editing_prompt 0": first, "editing_prompt 1": second},
        )
        parts = []
        for edited, share, factor in ((first, 0.5, 3.0), (second, 0.8, -1.0)):
            d = edited - u
            length = (d - d.mean(1, keepdim=True)).norm(dim=1, keepdim=True).float()
            least = torch.quantile(length.flatten(1), share, dim=1).view(2, 1, 1, 1)
            parts.append(torch.where(length >= least, factor * d, 0.0))
        if index >= 6:
            parts[1] = torch.zeros_like(c)
        gamma = parts[0] + parts[1] + 0.3 * momentum
        effect = gamma if index >= 3 else parts[0] if index >= 1 else torch.zeros_like(c)
        torch.testing.assert_close(result, scale * c + (1 - scale) * u + effect, atol=1e-9, rtol=0)
        momentum = 0.6 * momentum + 0.4 * gamma


def test_on_the_exact_posterior():
    """Of one token: the edited prior is p_c^w p_u^(1-w) (p_e / p_u)^s, whatever the noise level and what was seen."""
    size, w, s = 8, 3.0, 2.0
    c, u, e = (2 * torch.randn(3, size, generator=seeded(1), dtype=torch.float64)).softmax(-1)
    guidance = PaellaSemanticGuidance(w, editing_prompt="e", edit_guidance_scale=s)
    for level in (0.2, 0.7, 1.0):
        likelihood = (1 - level) * torch.eye(size, dtype=torch.float64) + level / size
        posterior = lambda prior: (likelihood * prior).log()[..., None, None]  # noqa: B023
        branches = {"conditional": c, "unconditional": u, "editing_prompt 0": e}
        result = guided(guidance, w, STEP, {name: posterior(prior) for name, prior in branches.items()})
        expected = posterior(c**w * u ** (1 - w) * (e / u) ** s).softmax(1)
        torch.testing.assert_close(result.softmax(1), expected, atol=1e-12, rtol=0)


def test_positions_that_an_edit_concerns_most():
    difference = torch.zeros(2, 3, 2, 5)
    difference[:, 0] = torch.arange(20.0).view(2, 2, 5)
    difference[1] += 100  # no probability changes by it
    selected = largest(difference, 0.8)
    assert selected.shape == (2, 1, 2, 5) and selected.flatten(1).nonzero().tolist() == [[0, 8], [0, 9], [1, 8], [1, 9]]
    assert largest(difference, 0.0).all()


def test_what_an_editing_prompt_finds_plausible_may_be_drawn():
    """Where it is moved towards; a token that no prompt finds plausible may not."""
    c, u, e = (torch.full((1, 4, 1, 1), -20.0) for _ in range(3))
    c[0, 0], u[0, 1], e[0, 2] = 0, 0, 0
    branches = {"conditional": c, "unconditional": u, "editing_prompt 0": e}
    for reverse, expected in ((False, [True, False, True, False]), (True, [True, False, False, False])):
        guidance = PaellaSemanticGuidance(3.0, 0.5, editing_prompt="e", reverse_editing_direction=reverse)
        result = guided(guidance, 3.0, STEP, branches).flatten()
        assert (result > torch.finfo(result.dtype).min).tolist() == expected
        assert result.argmax() == (0 if reverse else 2)


def test_branches():
    guidance = PaellaSemanticGuidance(
        editing_prompt=["b", "c", "d"], edit_guidance_scale=[1.0, 0.0, 1.0], edit_warmup_steps=[0, 0, 2]
    )
    assert guidance.extra_prompts == {"editing_prompt 0": "b", "editing_prompt 2": "d"}
    names = lambda index, scale: [branch.conditioning for branch in guidance.branches(replace(STEP, index=index), scale)]
    assert names(0, 8.0) == names(0, 1.0) == ["conditional", "unconditional", "editing_prompt 0"]
    assert names(2, 8.0) == ["conditional", "unconditional", "editing_prompt 0", "editing_prompt 2"]
    assert names(2, None) == ["conditional"] and guidance.needs_unconditional(1.0)
    assert PaellaSemanticGuidance().branches(STEP, 8.0) == (CONDITIONAL, UNCONDITIONAL)
    assert not PaellaSemanticGuidance().needs_unconditional(1.0)


def test_safe_directions():
    guidance = PaellaSemanticGuidance.safe(guidance_scale=4.0, edit_threshold=0.5)
    assert guidance.guidance_scale == 4.0 and guidance.config.reverse_editing_direction is True
    assert all(direction in guidance.config.editing_prompt for direction in SAFE_DIRECTIONS)
    pipe = tiny_pipeline()
    assert pipe.guider is None  # off unless asked for
    plain = tokens(pipe, guidance_scale=4.0)
    pipe.guider = PaellaSemanticGuidance.safe(guidance_scale=4.0, edit_guidance_scale=60.0)
    assert not torch.equal(tokens(pipe), plain)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"editing_prompt": ""}, "`editing_prompt` must be a text or a list of them, none empty, got ''"),
        ({"editing_prompt": ["a", 3]}, "`editing_prompt` must be a text"),
        ({"editing_prompt": 5}, "`editing_prompt` must be a text or a list of them"),
        ({"editing_prompt": ["a", "b\udfff"]}, "`editing_prompt` must be Unicode text"),
        ({"edit_guidance_scale": [1.0]}, "`edit_guidance_scale` has 1 values for 2 editing prompts: pass one for each"),
        ({"edit_guidance_scale": "5"}, "`edit_guidance_scale` must be a finite number, got '5'"),
        ({"edit_threshold": 1.0}, r"`edit_threshold` must be a number in \[0, 1\), got 1.0"),
        ({"edit_warmup_steps": -1}, "`edit_warmup_steps` must be an integer of at least 0, got -1"),
        ({"edit_cooldown_steps": [1.5, 2]}, "`edit_cooldown_steps` must be an integer of at least 0, got 1.5"),
        ({"edit_weights": [1.0, -1.0]}, "`edit_weights` must be a finite number of at least 0, got -1.0"),
        ({"reverse_editing_direction": "yes"}, "`reverse_editing_direction` must be True or False, got 'yes'"),
        ({"edit_mom_beta": 1}, r"`edit_mom_beta` must be a number in \[0, 1\), got 1"),
        ({"edit_momentum_scale": -0.1}, "`edit_momentum_scale` must be a finite number of at least 0, got -0.1"),
        ({"editing_prompt": None, "edit_threshold": 0.5}, "`edit_threshold` goes with `editing_prompt`: pass it too"),
        ({"guidance_scale": None}, "`editing_prompt` is guidance: with `guidance_scale=1` only it guides"),
    ],
)
def test_bad_arguments_are_refused(pipe, edit, message):
    with pytest.raises(ValueError, match=message):
        tokens(pipe, **{"editing_prompt": ["b", "c"]} | edit)


def test_what_it_needs_is_named():
    pipe = tiny_pipeline(guider=PaellaAdaptiveProjectedGuidance())
    with pytest.raises(
        ValueError, match="`editing_prompt` goes with linear guidance, but `guider` is a PaellaAdaptiveProje"
    ):
        tokens(pipe, editing_prompt="b")
    pipe = tiny_pipeline(guider=PaellaSemanticGuidance(editing_prompt="b"), text_encoder=None, tokenizer=None)
    embeds = {"prompt": None, "prompt_embeds": torch.zeros(1, 3, 16), "negative_prompt_embeds": torch.zeros(1, 3, 16)}
    with pytest.raises(ValueError, match="PaellaSemanticGuidance, has prompts of its own, which need the components"):
        tokens(pipe, **embeds)
    assert tokens(pipe, **embeds, guidance_scale=None).shape == (1, 8, 8)
