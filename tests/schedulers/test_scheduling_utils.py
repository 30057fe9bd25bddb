"""What all our schedulers check, refuse and keep."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from paella_diffusers import (
    EMOJI_MODEL,
    PaellaConfidenceScheduler,
    PaellaFlowMatchEulerScheduler,
    PaellaFlowMatchTrapezoidalScheduler,
    PaellaPsiScheduler,
    PaellaScheduler,
)
from paella_diffusers.schedulers.scheduling_utils import RenoisingSchedulerBase

SCHEDULERS = [
    PaellaScheduler,
    PaellaConfidenceScheduler,
    PaellaFlowMatchEulerScheduler,
    PaellaFlowMatchTrapezoidalScheduler,
    PaellaPsiScheduler,
]
NAN, INF = math.nan, math.inf


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def step(scheduler, **kwargs):
    """A step on two grids of 3 × 4 tokens out of 16, from noise level 1."""
    arguments = {
        "model_output": torch.randn(2, 16, 3, 4, generator=seeded(1)),
        "timestep": 1.0,
        "sample": torch.randint(16, (2, 3, 4), generator=seeded(2)),
        "noise": torch.randint(16, (2, 3, 4), generator=seeded(3)),
        "generator": seeded(),
    }
    if not isinstance(scheduler, RenoisingSchedulerBase):
        del arguments["noise"]
    return scheduler.step(**arguments | kwargs)


# ------------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("temperature", [(1.2, 0.2), 0.5])
def test_configuration_survives_save_and_load(scheduler, temperature, tmp_path):
    origin = scheduler(temperature=temperature, num_inference_steps=32, t_start=0.9)
    origin.save_pretrained(tmp_path)
    as_json = json.loads(origin.to_json_string())
    for again in (
        scheduler.from_pretrained(tmp_path),
        scheduler.from_config(origin.config),
        scheduler.from_config(as_json),
        scheduler.from_config(scheduler.load_config(tmp_path)),
    ):
        assert again.config.temperature == temperature and type(again.config.temperature) is type(temperature)
        values = {name: value for name, value in again.config.items() if not name.startswith("_")}
        assert values == {name: value for name, value in origin.config.items() if not name.startswith("_")}
        assert again.temperatures == origin.temperatures


def test_numpy_numbers_are_taken(tmp_path):
    scheduler = PaellaScheduler(
        num_inference_steps=np.int64(8),
        t_start=np.float32(0.5),
        temperature=np.array([1.0, 0.5]),
        renoise_steps=np.int32(3),
        quantized_steps=np.uint8(2),
        typical_mass=np.float64(0.25),
        num_vq_embeddings=np.int64(16),
    )
    scheduler.save_pretrained(tmp_path)
    config = PaellaScheduler.load_config(tmp_path)
    assert {name: config[name] for name in ("num_inference_steps", "t_start", "temperature", "renoise_steps")} == {
        "num_inference_steps": 8,
        "t_start": 0.5,
        "temperature": [1.0, 0.5],
        "renoise_steps": 3,
    }
    scheduler.set_timesteps(np.int64(4), temperature=np.float32(0.5), renoise_steps=np.int64(1), t_start=np.float64(1))
    assert (len(scheduler), scheduler.temperatures, scheduler.renoise_steps) == (4, [0.5] * 4, 1)
    scheduler.set_timesteps(timesteps=np.linspace(1, 0, 5)[:-1])
    assert scheduler.timesteps.tolist() == [1.0, 0.75, 0.5, 0.25]
    changed = PaellaScheduler.from_config(scheduler.config, temperature=np.float32(0.5), renoise_steps=np.int64(1))
    assert (changed.config.temperature, changed.renoise_steps) == (0.5, 1)
    first = step(scheduler, codebook=torch.randn(16, 2)).prev_sample
    assert torch.equal(step(scheduler, timestep=np.float64(1), codebook=torch.randn(16, 2)).prev_sample, first)
    noised = scheduler.add_noise(torch.zeros(2, 9, dtype=torch.long), None, np.array([0.0, 1.0]), seeded())
    assert noised[0].eq(0).all() and noised[1].any()


NUMBERS = {  # values to refuse, and what is expected instead
    "temperature": ([0, -1, NAN, INF, 1e-40, 1e9, (0.5, NAN), (1, 2, 3), (), "hot", True, ("a", 1)], "number (in|or)"),
    "num_inference_steps": ([0, -3, 1.5, NAN, 10**9, 10**30, "many", True, [3]], "integer of at (least 1|most 10000)"),
    "t_start": ([0, -0.1, 1.5, NAN, INF, "late", True, [1.0]], r"number in \(0, 1\]"),
    "t_end": ([1.0, -0.1, NAN, INF, "early", False, None], r"number in \[0, 1\)"),
    "num_vq_embeddings": ([-5, 0, 1.5, NAN, 2**40, "8192", True, None], "integer of at (least 1|most 2147483647)"),
    "renoise_steps": ([-1, 1.5, NAN, INF, True, "all", [1]], "integer of at least 0"),
    "quantized_steps": ([-1, 1.5, NAN, True, "all", None], "integer of at least 0"),
    "typical_mass": ([0, 1.5, NAN, INF, "some", True], r"number in \(0, 1\]"),
    "typical_min_tokens": ([0, 1.5, NAN, "one", True, None], "integer of at least 1"),
    "choice_temperature": ([-1, NAN, INF, 1e38, "hot", True, None], r"number in \[0, 1e\+06\]"),
    "time_power": ([0, -1, NAN, INF, "two", True, None], "finite number above 0"),
    "kappa": ([-0.1, 1.1, NAN, "half", True, None], r"number in \[0, 1\]"),
    "theta": ([0, 1, NAN, "half", True, None], r"number in \(0, 1\)"),
    "corrector_rate": ([-1, NAN, INF, "fast", True, None], "finite number of at least 0"),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_bad_numbers_are_refused_by_name(scheduler, name):
    if name not in scheduler().config:
        return
    values, expected = NUMBERS[name]
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must be an? {expected}.*, got "):
            scheduler(**{name: value})
        if name in ("temperature", "num_inference_steps", "t_start", "renoise_steps"):
            ours = scheduler()
            with pytest.raises(ValueError, match=f"`{name}` must be an? {expected}.*, got "):
                ours.set_timesteps(**{name: value})
            assert len(ours) == 12 and torch.equal(ours.timesteps, scheduler().timesteps)  # nothing has changed


@pytest.mark.parametrize(
    ("name", "value"), [("noise_source", "old"), ("sampling_rule", ["argmax"]), ("ranking", None), ("time_grid", 3)]
)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_bad_choices_are_refused_by_name(scheduler, name, value):
    if name in scheduler().config:
        with pytest.raises(ValueError, match=f"`{name}` must be one of '.*', '.*', got "):
            scheduler(**{name: value})


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("value", [1, "yes", None])
def test_the_leave_one_out_temperature_is_true_or_false(scheduler, value):
    if "leave_one_out_temperature" in scheduler().config:
        with pytest.raises(ValueError, match="`leave_one_out_temperature` must be True or False, got "):
            scheduler(leave_one_out_temperature=value)


@pytest.mark.parametrize(
    "timesteps",
    [
        [0.5, 0.9],
        [1.1, 0.5],
        [0.5, 0.0],
        [0.5, 0.5],
        [0.5, NAN],
        [INF, 0.5],
        [[0.9, 0.5]],
        0.5,
        [],
        torch.linspace(1, 1e-5, 10_001),
        "late",
        [0.9, "late"],
    ],
)
def test_bad_timesteps_are_refused(timesteps):
    with pytest.raises(ValueError, match="`timesteps` must"):
        PaellaScheduler().set_timesteps(timesteps=timesteps)


def test_timesteps_and_their_number_must_agree():
    with pytest.raises(ValueError, match="`timesteps` has 2 entries for `num_inference_steps`=3"):
        PaellaScheduler().set_timesteps(3, timesteps=[0.9, 0.5])


# --------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_step_is_one_of_the_run(scheduler):
    ours = scheduler()
    for value in (0.12345, NAN, INF, 0, torch.tensor(NAN), torch.ones(2), "1.0", True, None):
        with pytest.raises(ValueError, match=r"`timestep` must be one of `timesteps`, \[1.0, .*got "):
            step(ours, timestep=value)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("model_output", torch.randn(1, 16, 3, 4), ValueError, r"`sample` of shape \(2, 3, 4\), got \(1, 16, 3, 4\)"),
        ("model_output", torch.randn(2, 16, 4, 3), ValueError, r"got \(2, 16, 4, 3\)"),
        (
            "model_output",
            torch.randn(2, 12, 16),
            ValueError,
            r"\(batch_size, num_tokens, height, width\) .* got \(2, 12, 16\)",
        ),
        ("model_output", torch.randn(2, 0, 3, 4), ValueError, r"got \(2, 0, 3, 4\)"),
        ("model_output", torch.randint(9, (2, 16, 3, 4)), TypeError, "must be logits in float32, .* got torch.int64"),
        ("model_output", torch.randn(2, 16, 3, 4, dtype=torch.complex64), TypeError, "got torch.complex64"),
        ("model_output", torch.randn(2, 16, 3, 4).to(torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn"),
        ("model_output", [[1.0]], TypeError, "must be logits"),
        ("sample", torch.zeros(1, 3, 4, dtype=torch.long), ValueError, r"got \(2, 16, 3, 4\)"),
        ("sample", torch.zeros(2, 3, 4), TypeError, "`sample` must be a tensor of token ids in int64, got torch.float32"),
        ("sample", torch.zeros(2, 3, 4, dtype=torch.int32), TypeError, "got torch.int32"),
        ("sample", torch.zeros(2, dtype=torch.long), ValueError, r"`sample` must have the shape .* got \(2,\)"),
        (
            "noise",
            torch.zeros(1, 3, 4, dtype=torch.long),
            ValueError,
            r"`noise` must have the shape .*\(2, 3, 4\), got \(1,",
        ),
        ("noise", torch.zeros(2, 3, 4), TypeError, "`noise` must be a tensor of token ids in int64, got torch.float32"),
        ("mask", torch.ones(3, 4), ValueError, r"`mask` must have the shape of `sample`, \(2, 3, 4\), got \(3, 4\)"),
        ("mask", torch.ones(2, 3, 4, dtype=torch.complex64), TypeError, "`mask` must be a tensor of 0 and 1, got torch.c"),
        ("mask", "left", TypeError, "`mask` must be a tensor of 0 and 1, got 'left'"),
        ("generator", "seed", TypeError, "`generator` must be a torch.Generator or a list of them, got 'seed'"),
        ("generator", [seeded(), 3], TypeError, "`generator` must be a torch.Generator or a list of them"),
        ("generator", [seeded()], ValueError, "`generator` is a list of 1 for a batch of 2"),
    ],
)
def test_bad_tensors_are_refused_by_name(scheduler, name, value, error, message):
    if name == "noise" and not issubclass(scheduler, RenoisingSchedulerBase):
        return
    with pytest.raises(error, match=message):
        step(scheduler(), **{name: value})


def test_generators_are_checked_where_none_is_used():
    with pytest.raises(ValueError, match="`generator` is a list of 0 for a batch of 2"):
        step(PaellaScheduler(sampling_rule="argmax", renoise_steps=0), generator=[])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_integers_that_no_float_holds_are_refused_by_name(scheduler):
    with pytest.raises(ValueError, match="`temperature` must be a number"):
        scheduler(temperature=10**400)
    with pytest.raises(ValueError, match="`timestep` must be one of"):
        step(scheduler(), timestep=10**400)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_an_empty_batch_is_refused(scheduler, shape):
    tokens = torch.zeros(shape, dtype=torch.long)
    noise = {"noise": tokens} if issubclass(scheduler, RenoisingSchedulerBase) else {}
    with pytest.raises(ValueError, match=r"`sample` has no tokens, its shape is \(.*\): pass a batch of at least one"):
        step(scheduler(), model_output=torch.zeros(shape[0], 16, *shape[1:]), sample=tokens, **noise)
    with pytest.raises(ValueError, match="`original_samples` has no tokens"):
        scheduler().add_noise(tokens, None, 0.5)


def test_bad_codebooks_are_refused():
    scheduler = PaellaScheduler(sampling_rule="quantized")
    for codebook, error, message in (
        (None, ValueError, "needs `codebook`"),
        (torch.randn(15, 4), ValueError, r"`codebook` must have the shape \(16, channels\), got \(15, 4\)"),
        (torch.randn(16), ValueError, r"got \(16,\)"),
        (torch.ones(16, 4, dtype=torch.long), TypeError, "`codebook` must be a floating-point tensor, got torch.int64"),
    ):
        with pytest.raises(error, match=message):
            step(scheduler, codebook=codebook)


PATHS = [  # each way of sampling, in full and in half precision
    (PaellaScheduler, {}),
    (PaellaScheduler, {"sampling_rule": "argmax"}),
    (PaellaScheduler, {"sampling_rule": "quantized"}),
    (PaellaScheduler, {"typical_mass": 0.5}),
    (PaellaScheduler, {"typical_mass": 0.5, "sampling_rule": "argmax"}),
    (PaellaConfidenceScheduler, {}),
    (PaellaConfidenceScheduler, {"ranking": "halton"}),
    (PaellaFlowMatchEulerScheduler, {}),
    (PaellaFlowMatchEulerScheduler, {"leave_one_out_temperature": True, "temperature": 0.5}),
    (PaellaFlowMatchTrapezoidalScheduler, {}),
    (PaellaPsiScheduler, {}),
    (PaellaPsiScheduler, {"leave_one_out_temperature": True}),
]


@pytest.mark.parametrize(("scheduler", "settings"), PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_broken_logits_are_refused_and_minus_infinity_excludes(scheduler, settings, dtype, batch_size):
    logits = torch.randn(batch_size, 16, 3, 4, generator=seeded(1)).to(dtype)
    tokens = torch.zeros(batch_size, 3, 4, dtype=torch.long)
    call = {"sample": tokens}
    if issubclass(scheduler, RenoisingSchedulerBase):
        call["noise"] = tokens
    if settings.get("sampling_rule") == "quantized":
        call["codebook"] = torch.arange(16.0)[:, None]
    for where in ((-1, 5, 2, 2), (-1, slice(None), 2, 2)):  # a token, and all of a position
        for value in (NAN, INF):
            broken = logits.clone()
            broken[where] = value
            with pytest.raises(ValueError, match="output has NaN or infinite logits"):
                step(scheduler(**settings), model_output=broken, **call)
    broken[where] = -INF
    with pytest.raises(ValueError, match="output has NaN or infinite logits"):
        step(scheduler(**settings), model_output=broken, **call)
    logits[:, 4:] = -INF
    assert step(scheduler(**settings), model_output=logits, **call).sampled_tokens.max() < 4


@pytest.mark.parametrize("noise_source", ["initial", "fresh", "previous"])
@pytest.mark.parametrize("choice_temperature", [0.0, 1.0, 1e6])
def test_known_tokens_stay_whatever_the_ranking(noise_source, choice_temperature):
    scheduler = PaellaConfidenceScheduler(choice_temperature=choice_temperature, noise_source=noise_source)
    sample = torch.full((2, 3, 4), 15)
    for seed in range(20):
        mask = torch.rand(2, 3, 4, generator=seeded(seed)) < 0.5
        output = step(scheduler, sample=sample, mask=mask, generator=seeded(seed))
        for tokens in (output.prev_sample, output.sampled_tokens):
            assert tokens[~mask].eq(15).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"timesteps": NAN}, ValueError, r"`timesteps` must be a noise level in \[0, 1\]"),
        ({"timesteps": 1.5}, ValueError, "`timesteps` must be"),
        ({"timesteps": torch.ones(3)}, ValueError, "one for each of 2 rows"),
        ({"timesteps": "late"}, ValueError, "`timesteps` must be numbers, got 'late'"),
        ({"original_samples": torch.zeros(2, 9)}, TypeError, "`original_samples` must be a tensor of token ids in int64"),
        ({"noise": torch.zeros(1, 9, dtype=torch.long)}, ValueError, "`noise` must have the shape"),
        ({"generator": 3}, TypeError, "`generator` must be"),
    ],
)
def test_bad_noising_is_refused(arguments, error, message):
    call = {"original_samples": torch.zeros(2, 9, dtype=torch.long), "noise": None, "timesteps": 0.5}
    with pytest.raises(error, match=message):
        PaellaScheduler().add_noise(**call | arguments)


# --------------------------------------------------------------------------------------------------------------- swaps


def test_swaps_print_nothing():
    """A chain of swaps in a process of a user's: default verbosity, a stored configuration, nothing on stderr."""
    script = f"""
import sys
from diffusers import DiscreteDDIMScheduler, EntropyBoundScheduler
from paella_diffusers import (
    PaellaConfidenceScheduler,
    PaellaFlowMatchEulerScheduler,
    PaellaFlowMatchTrapezoidalScheduler,
    PaellaPsiScheduler,
    PaellaScheduler,
)

scheduler = PaellaScheduler.from_pretrained({EMOJI_MODEL!r}, subfolder="scheduler")
print("swaps begin", file=sys.stderr)
scheduler = PaellaScheduler.from_config(scheduler.config, temperature=(1.2, 0.2), typical_mass=0.2)
scheduler = PaellaConfidenceScheduler.from_config(scheduler.config, ranking="halton")
scheduler = PaellaFlowMatchEulerScheduler.from_config(scheduler.config, corrector_rate=1.0)
scheduler = PaellaPsiScheduler.from_config(scheduler.config, kappa=0.3)
scheduler = PaellaFlowMatchTrapezoidalScheduler.from_config(scheduler.config)
scheduler = DiscreteDDIMScheduler.from_config(scheduler.config, corrector_steps=2)
scheduler = EntropyBoundScheduler.from_config(scheduler.config, entropy_bound=0.2)
scheduler = PaellaScheduler.from_config(scheduler.config)
print(scheduler.config.temperature, scheduler.config.typical_mass)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.partition("swaps begin")[2].strip() == ""
    assert done.stdout.strip() == "(1.2, 0.2) 0.2"
