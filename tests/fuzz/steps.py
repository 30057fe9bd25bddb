"""Steps of every scheduler over all knobs and dtypes, and χ² tests of what they draw."""

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from scipy.stats import chisquare

from .calls import NO_BOOLEANS, NO_INTEGERS, NO_NUMBERS, NO_RAMPS, OWN, POSITIVE_INTEGERS, ramps, seeded, seeds
from .outcomes import Outcome, attempt, expect

RENOISING = ("PaellaScheduler", "PaellaConfidenceScheduler")
SCHEDULERS = sorted(name for name in OWN if name.endswith("Scheduler"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LEAST_P = 1e-9  # a thousand fair tests of a thousand runs stay above it


@dataclass
class Step:
    """
    A step of a scheduler.

    Args:
        knobs (`dict`): Its configuration.
        step (`dict`): The arguments of `step`, made by `arguments` from the other fields, that differ from good ones.
        bad (`str`): Which of `knobs`, `run` or `step` must be refused; empty if none.
    """

    scheduler: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_tokens: int
    seed: int
    knobs: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    masked: bool = False
    index: int = 0
    bad: str = ""


KNOBS = {
    "num_inference_steps": st.integers(1, 20),
    "t_start": st.floats(0.05, 1),
    "temperature": ramps(st.floats(1e-6, 1e6)),
}
OWN_KNOBS = {
    "PaellaScheduler": {
        "renoise_steps": st.none() | st.integers(0, 20),
        "noise_source": st.sampled_from(["initial", "fresh", "previous"]),
        "sampling_rule": st.sampled_from(["multinomial", "argmax", "quantized"]),
        "quantized_steps": st.integers(0, 5),
        "typical_mass": st.none() | st.floats(1e-3, 1),
        "typical_min_tokens": st.integers(1, 50),
    },
    "PaellaConfidenceScheduler": {
        "renoise_steps": st.none() | st.integers(0, 20),
        "noise_source": st.sampled_from(["initial", "fresh", "previous"]),
        "ranking": st.sampled_from(["confidence", "halton"]),
        "choice_temperature": st.floats(0, 1e6),
    },
    "PaellaFlowMatchEulerScheduler": {
        "time_grid": st.sampled_from(["linear", "cosine", "polynomial"]),
        "corrector_rate": st.floats(0, 1e6),
    },
    "PaellaFlowMatchTrapezoidalScheduler": {
        "time_grid": st.sampled_from(["linear", "cosine", "polynomial"]),
        "theta": st.floats(0.01, 0.99),
    },
    "PaellaPsiScheduler": {"kappa": st.floats(0, 1), "leave_one_out_temperature": st.booleans()},
}
BAD_KNOBS = {
    "num_inference_steps": [*POSITIVE_INTEGERS, 10**9],
    "t_start": [*NO_NUMBERS, 0, -1.0, 1.5, None],
    "t_end": [*NO_NUMBERS, -1.0, 1.0, None],
    "temperature": [*NO_RAMPS, 0, -1.0, 1e-40, 1e40, (1.0, 1e-40), None],
    "num_vq_embeddings": [*POSITIVE_INTEGERS, 2**40],
    "renoise_steps": NO_INTEGERS,
    "noise_source": ["x", 5, None, []],
    "sampling_rule": ["x", 5, None, []],
    "quantized_steps": [*NO_INTEGERS, None],
    "typical_mass": [*NO_NUMBERS, 0, 1.5, -1.0],
    "typical_min_tokens": POSITIVE_INTEGERS,
    "ranking": ["x", 5, None],
    "choice_temperature": [*NO_NUMBERS, -1.0, None, 1e40],
    "time_grid": ["x", 5, None],
    "time_power": [*NO_NUMBERS, 0, -1.0, None],
    "corrector_rate": [*NO_NUMBERS, -1.0, None],
    "theta": [*NO_NUMBERS, 0, 1, None],
    "kappa": [*NO_NUMBERS, -1.0, 1.5, None],
    "leave_one_out_temperature": NO_BOOLEANS,
}
BAD_RUN = {
    "num_inference_steps": [*POSITIVE_INTEGERS[:-1], 10**9],
    "timesteps": ["x", [], [math.nan], [0.0], [1.5], [0.5, 0.7], [0.5, 0.5], [[0.5]], 5, {}, np.ones(0)],
    "temperature": [*NO_RAMPS, 0, 1e-40],
    "t_start": [*NO_NUMBERS, 0, 1.5],
    "renoise_steps": NO_INTEGERS,
}
BAD_STEP = {
    "timestep": [math.nan, math.inf, 0.123456, -1, 2, None, "x", [], torch.zeros(2), torch.tensor(math.nan), 10**400],
    "model_output": [
        None,
        "x",
        5,
        np.ones((2, 4, 5)),
        torch.zeros(()),
        torch.zeros(1, 1),
        torch.zeros(2, 4, 5, dtype=torch.int64),
    ],
    "sample": [None, "x", 5, torch.zeros(2, 4), torch.zeros(0, 4, dtype=torch.int64), torch.zeros((), dtype=torch.int64)],
    "noise": ["x", 5, torch.zeros(2, 4), torch.zeros(1, 9, dtype=torch.int64), torch.zeros(9, 9, 9, dtype=torch.int64)],
    "mask": ["x", 5, torch.ones(1), torch.ones(9, 9), torch.ones(9, 9, 9)],
    "generator": ["x", 5, [], ["x"], [seeded(0)] * 9],
}


@st.composite
def steps(draw) -> Step:
    scheduler = draw(st.sampled_from(SCHEDULERS))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 6)) | st.tuples(*[st.integers(1, 3), *[st.integers(1, 5)] * 2]))
    case = Step(scheduler, draw(st.sampled_from(DTYPES)), shape, draw(st.integers(1, 40)), draw(seeds))
    known = KNOBS | OWN_KNOBS.get(scheduler, {})
    case.knobs = {name: draw(known[name]) for name in draw(st.lists(st.sampled_from(sorted(known)), unique=True))}
    case.masked, case.index = draw(st.booleans()), draw(st.integers(0, 30))
    if draw(st.booleans()):
        return case
    tables = {"knobs": BAD_KNOBS, "run": BAD_RUN, "step": BAD_STEP}
    case.bad = draw(st.sampled_from(["knobs", "run", "step", "logits"]))
    if case.bad == "logits":
        case.step["model_output"] = draw(st.sampled_from(["nan", "+inf", "all -inf"]))
        return case
    names = [name for name in tables[case.bad] if _takes(scheduler, case.bad, name)]
    name = draw(st.sampled_from(names))
    getattr(case, case.bad)[name] = draw(st.sampled_from(tables[case.bad][name]))
    return case


def _takes(scheduler: str, where: str, name: str) -> bool:
    scheduler = OWN[scheduler]
    function = {"knobs": scheduler.__init__, "run": scheduler.set_timesteps, "step": scheduler.step}[where]
    return name in inspect.signature(function).parameters


def attempt_step(case: Step) -> tuple[Outcome, str]:
    what = ""
    if case.bad == "logits":
        what = f"logits that are {case.step['model_output']}"
    elif case.bad:
        name, value = list(getattr(case, case.bad).items())[-1]
        what = f"{case.scheduler}, {case.bad}: {name}={value!r:.40}"
    return attempt(lambda: _run(case), judge=lambda result: _judge(case, *result), must_be_refused=what)


def _run(case: Step):
    scheduler = OWN[case.scheduler](**{"num_vq_embeddings": case.num_tokens} | case.knobs)
    if case.run:
        scheduler.set_timesteps(**case.run)
    arguments = _arguments(case, scheduler)
    if case.scheduler == "PaellaFlowMatchTrapezoidalScheduler" and case.index % len(scheduler.timesteps) % 2:
        first = {"timestep": scheduler.timesteps[case.index % len(scheduler.timesteps) - 1]}
        scheduler.step(**arguments | first)
    return scheduler, arguments, scheduler.step(**arguments)


def _arguments(case: Step, scheduler) -> dict[str, Any]:
    random = seeded(case.seed)
    logits = torch.randn(*case.shape, case.num_tokens, generator=random) * 5
    if case.seed % 3 == 0 and case.num_tokens > 1:
        logits[..., case.seed % case.num_tokens] = -torch.inf
    if case.bad == "logits":
        value = math.nan if case.step["model_output"] == "nan" else math.inf
        logits[(0,) * (logits.ndim - 1)] = (
            -math.inf if case.step["model_output"] == "all -inf" else logits[0].flatten()[0] + value
        )
    logits = logits.to(case.dtype)
    integers = lambda: torch.randint(case.num_tokens, case.shape, generator=random)
    arguments = {
        "model_output": logits.movedim(-1, 1) if len(case.shape) == 3 else logits,
        "timestep": scheduler.timesteps[case.index % len(scheduler.timesteps)],
        "sample": integers(),
        "generator": seeded(case.seed),
    }
    if case.seed % 2:
        arguments["generator"] = [seeded(case.seed + i) for i in range(case.shape[0])]
    if case.masked:
        arguments["mask"] = torch.rand(case.shape, generator=random) < 0.5
    if case.scheduler in RENOISING:
        arguments["noise"] = integers()
    if case.scheduler == "PaellaScheduler":
        arguments["codebook"] = torch.randn(case.num_tokens, 3, generator=random)
    if case.scheduler == "PaellaConfidenceScheduler" and len(case.shape) == 2:
        arguments["grid_size"] = (1, case.shape[1])
    return arguments if case.bad == "logits" else arguments | case.step


def _judge(case: Step, scheduler, arguments, output):
    sample, mask = arguments["sample"], arguments.get("mask")
    mask = torch.ones(case.shape, dtype=torch.bool) if mask is None else mask
    for name in ("prev_sample", "sampled_tokens"):
        tokens = output[name]
        expect(tokens.shape == case.shape and tokens.dtype == torch.int64, f"{name} of another shape or dtype")
        expect(tokens.min() >= 0 and tokens.max() < case.num_tokens, f"{name} out of range")
        expect((tokens == sample)[~mask].all(), f"{name}: known tokens are not kept")
    logits = arguments["model_output"]
    logits = logits.movedim(1, -1) if len(case.shape) == 3 else logits
    drawn = logits.gather(-1, output.sampled_tokens[..., None])[..., 0]
    by_code = case.knobs.get("sampling_rule") == "quantized" or case.knobs.get("quantized_steps", 0) > 0
    expect(by_code or (drawn > -torch.inf)[mask].all(), "tokens of probability 0 were drawn")
    if case.knobs.get("sampling_rule") == "argmax" and not by_code and case.knobs.get("typical_mass") is None:
        expect((drawn == logits.amax(-1))[mask].all(), "argmax took another than the most likely token")
    _judge_alone(case, scheduler, arguments, output)


def _judge_alone(case: Step, scheduler, arguments, output):
    """With a generator for each image, an image does not depend on its batch."""
    if not isinstance(arguments["generator"], list) or case.dtype != torch.float64:
        return
    if case.scheduler == "PaellaFlowMatchTrapezoidalScheduler" and case.index % len(scheduler.timesteps) % 2:
        return  # a second stage, once for each first one
    for i in range(case.shape[0]):
        part = {
            name: value[i : i + 1]
            for name, value in arguments.items()
            if name in ("model_output", "sample", "noise", "mask")
        }
        alone = scheduler.step(**arguments | part | {"generator": [seeded(case.seed + i)]})
        expect(torch.equal(alone.prev_sample[0], output.prev_sample[i]), "an image depends on its batch")


# -------------------------------------------------------------------------------------------------------------- draws


@dataclass
class Draw:
    """What a scheduler draws for many positions with one distribution."""

    scheduler: str
    dtype: torch.dtype
    as_grid: bool
    by_image: bool
    num_tokens: int
    temperature: float
    level: float
    seed: int
    knobs: dict[str, Any]


@st.composite
def draws(draw) -> Draw:
    scheduler = draw(st.sampled_from(SCHEDULERS))
    knobs = {
        "PaellaScheduler": st.fixed_dictionaries({"typical_mass": st.none() | st.floats(0.3, 1)}),
        "PaellaConfidenceScheduler": st.just({"choice_temperature": 1e6}),
        "PaellaFlowMatchEulerScheduler": st.fixed_dictionaries({"corrector_rate": st.sampled_from([0.0, 0.5, 3.0])}),
        "PaellaFlowMatchTrapezoidalScheduler": st.just({}),
        "PaellaPsiScheduler": st.fixed_dictionaries({"kappa": st.floats(0, 1)}),
    }[scheduler]
    numbers = (st.integers(2, 300), st.floats(0.2, 3), st.floats(0.1, 0.9), seeds, knobs)
    choices = (st.sampled_from(DTYPES), st.booleans(), st.booleans())
    return Draw(scheduler, *(draw(one) for one in choices), *(draw(one) for one in numbers))


def attempt_draw(case: Draw) -> tuple[Outcome, str]:
    return attempt(lambda: _draw(case), judge=lambda results: _judge_draws(case, *results))


def _draw(case: Draw):
    """Logits, tokens after the step and predicted ones, and tokens noised directly, each of 4 × 5,000 positions."""
    knobs = {"noise_source": "fresh"} if case.scheduler in RENOISING else {}
    scheduler = OWN[case.scheduler](num_vq_embeddings=case.num_tokens, temperature=case.temperature, **knobs | case.knobs)
    scheduler.set_timesteps(timesteps=[1.0, case.level])
    logits = torch.randn(case.num_tokens, generator=seeded(case.seed)).mul(2).to(case.dtype)
    shape = (4, 50, 100) if case.as_grid else (4, 5000)
    expanded = logits.expand(*shape, case.num_tokens)
    generators = [seeded(case.seed + 1 + i) for i in range(4)] if case.by_image else seeded(case.seed + 1)
    start = torch.zeros(shape, dtype=torch.int64)
    output = scheduler.step(
        expanded.movedim(-1, 1) if case.as_grid else expanded, timestep=1.0, sample=start, generator=generators
    )
    noised = scheduler.add_noise(start, None, case.level, generators)
    return logits.double(), output, noised


def _judge_draws(case: Draw, logits, output, noised):
    level, uniform = case.level, torch.full((case.num_tokens,), 1 / case.num_tokens, dtype=torch.float64)
    first = torch.eye(case.num_tokens, dtype=torch.float64)[0]
    if case.knobs.get("typical_mass") is None:
        clean = (logits / case.temperature).softmax(0)
    else:  # which tokens stay is another test's subject
        kept = torch.bincount(output.sampled_tokens.flatten(), minlength=case.num_tokens) > 0
        clean = (logits / case.temperature).masked_fill(~kept, -torch.inf).softmax(0)
    after = (1 - level) * clean + level * uniform
    if case.scheduler == "PaellaFlowMatchEulerScheduler":
        corrected = 1 - math.exp(-case.knobs["corrector_rate"] * (1 - level))
        after = corrected * after + (1 - corrected) * ((1 - level) * clean + level * first)
    if case.scheduler == "PaellaFlowMatchTrapezoidalScheduler":  # its first stage: a jump to another token, at its rate
        others = clean.clone().index_fill(0, torch.tensor(0), 0)
        stays = level ** others.sum()
        after = (1 - stays) * others / others.sum() + stays * first
    _judge_shares("predicted tokens", output.sampled_tokens, clean)
    _judge_shares("tokens after the step", output.prev_sample, after)
    _judge_shares("noised tokens", noised, (1 - level) * first + level * uniform)
    _judge_pairs("predicted tokens", output.sampled_tokens, clean)
    if case.scheduler == "PaellaConfidenceScheduler":
        count = (output.prev_sample != output.sampled_tokens).flatten(1).sum(1)
        expect((count <= round(level * 5000)).all(), "more tokens are re-noised than the level says")


def _judge_shares(what: str, tokens: torch.Tensor, probabilities: torch.Tensor):
    counts = torch.bincount(tokens.flatten(), minlength=len(probabilities)).double()
    expect(counts[probabilities == 0].sum() == 0, f"{what} of probability 0")
    _judge_counts(what, counts, probabilities)


def _judge_pairs(what: str, tokens: torch.Tensor, probabilities: torch.Tensor):
    """Neighbouring positions are independent: of the four most likely tokens, every pair has the product's probability."""
    likely = probabilities.topk(min(4, len(probabilities))).indices
    place = torch.full((len(probabilities),), len(likely)).index_put((likely,), torch.arange(len(likely)))
    classes = len(likely) + 1
    shares = torch.zeros(classes, dtype=torch.float64).index_add(0, place, probabilities)
    for axis in range(1, tokens.ndim):
        grid = place[tokens].movedim(axis, -1)
        left, right = grid[..., 0 : grid.shape[-1] // 2 * 2 : 2], grid[..., 1::2]
        pairs = torch.bincount((left * classes + right).flatten(), minlength=classes**2).double()
        _judge_counts(f"pairs of {what}", pairs, torch.outer(shares, shares).flatten())


def _judge_counts(what: str, counts: torch.Tensor, probabilities: torch.Tensor):
    """χ² of counts, where those that are expected less than five times are one class."""
    expected = probabilities / probabilities.sum() * counts.sum()
    rare = expected < 5
    observed = [*counts[~rare].tolist(), counts[rare].sum().item()]
    expected = [*expected[~rare].tolist(), expected[rare].sum().item()]
    if expected[-1] < 5:  # too few for a test; they belong to the smallest class
        observed[-1], expected[-1] = observed[-1] + observed.pop(0), expected[-1] + expected.pop(0)
    if len(observed) > 1:
        p = chisquare(observed, expected, sum_check=False).pvalue
        expect(p > LEAST_P, f"{what} are drawn with other probabilities (χ² test)")
