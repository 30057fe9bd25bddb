"""`pipe.optimize()`: the same results, few compilations, and nothing left behind."""

import copy
import json
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch._dynamo.config
import torch._inductor.config
from conftest import tiny_pipeline, tiny_unet
from diffusers import TaylorSeerCacheConfig
from torch._dynamo.utils import counters

from paella_diffusers import PaellaImg2ImgPipeline, PaellaPerturbedAttentionGuidance, PaellaPipeline
from paella_diffusers import optimize as optimize_module


@pytest.fixture(autouse=True)
def tracing_only(monkeypatch):
    """Graphs are traced, guarded and counted as always, but then run as they are: a C++ compiler takes a minute for each."""
    monkeypatch.setattr(optimize_module, "BACKEND", "eager")
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def said(caplog):
    """What was logged."""
    caplog.set_level(logging.INFO, "paella_diffusers.optimize")
    return caplog


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def tokens(pipe, prompt="a dog", **kwargs) -> torch.Tensor:
    options = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "latent"}
    return pipe(prompt, **options | {"generator": torch.Generator().manual_seed(0)} | kwargs).images


def twin() -> PaellaPipeline:
    """As `pipe` in float64, not optimized."""
    plain = tiny_pipeline()
    plain.to(torch.float64)
    return plain


def test_calls_of_two_sizes(pipe, float64, said):
    """Twice two graphs are enough; then it is undone."""
    calls = [
        {},
        {"prompt": "a prompt of quite another length", "guidance_scale": (4.0, 2.0)},
        {"prompt": "a", "negative_prompt": "b"},  # nothing is padded
        {"height": 48, "width": 32},
    ]
    expected = [tokens(pipe, **call) for call in calls]
    assert pipe.optimize() is pipe and pipe.optimize() is pipe
    assert said.text.count("compiled in the first call of each size") == 1
    for call, drawn in zip(calls, expected):
        assert torch.equal(tokens(pipe, **call), drawn), call
    assert graphs() == 2 and pipe.unet._compiled_call_impl.failed is False
    assert said.text.count("The first compiled call of the U-Net for (2, 8, 8) tokens took") == 1
    assert pipe.optimize(False) is pipe and pipe.optimize(False) is pipe
    assert pipe.unet._compiled_call_impl is None
    assert torch.equal(tokens(pipe, height=64, width=32), tokens(twin(), height=64, width=32)) and graphs() == 2


def test_what_the_user_compiled_comes_back(pipe):
    pipe.unet.compile(backend="eager")
    own = pipe.unet._compiled_call_impl
    assert pipe.optimize().optimize(False).unet._compiled_call_impl is own


@pytest.mark.parametrize("value", ["x", None, 1])
def test_other_values_are_refused(pipe, value):
    with pytest.raises(ValueError, match=f"`enable` must be True or False, got {value!r}"):
        pipe.optimize(value)


def test_a_wrapped_model_is_refused(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(ValueError, match="`pipe.unet` must be a PaellaUNet to be optimized, got OptimizedModule: .*assign"):
        pipe.optimize()


def test_no_setting_is_changed(pipe, monkeypatch):
    """And with frozen weights switched on for others, ours are not: they could not change."""

    def settings():
        configs = torch._dynamo.config.get_config_copy(), torch._inductor.config.get_config_copy()
        precision = torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision
        return *configs, precision, torch.get_num_threads()

    frozen, seen = [], []
    monkeypatch.setattr(
        optimize_module, "BACKEND", lambda graph, inputs: frozen.append(torch._inductor.config.freezing) or graph.forward
    )
    with torch._inductor.config.patch(freezing=True):
        before = settings()
        pipe.optimize()
        tokens(pipe, callback_on_step_end=lambda *args: seen.append(settings()) or {})
        pipe.optimize(False)
        assert frozen == [False] and seen == [before, before] and settings() == before


def test_without_a_compiler(tmp_path):
    """In a process of its own: torch reads CXX once."""
    code = (
        "from paella_diffusers import EMOJI_MODEL, PaellaPipeline\n"
        "pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)\n"
        "assert pipe.optimize() is pipe and pipe.unet._compiled_call_impl is None\n"
        "pipe('a dog', num_inference_steps=1, height=32, width=32)\n"
    )
    environment = os.environ | {"CXX": "/nonexistent", "PATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "`optimize` changes nothing, and calls work as before: there is no C++ compiler; install g++" in ran.stderr


@torch._dynamo.config.patch(disable=True)
def test_with_the_compiler_switched_off(pipe, said):
    expected = tokens(pipe)
    assert torch.equal(tokens(pipe.optimize()), expected)
    assert "changes nothing, and calls work as before: torch's compiler is switched off" in said.text


def test_what_cannot_be_compiled_runs_as_before(pipe, float64, monkeypatch, said):
    def broken(graph, inputs):
        raise RuntimeError("no space left")

    expected = tokens(pipe)
    monkeypatch.setattr(optimize_module, "BACKEND", broken)
    pipe.optimize()
    assert torch.equal(tokens(pipe), expected) and torch.equal(tokens(pipe), expected)
    assert said.text.count("could not be compiled, and its calls work as before") == 1 and "no space left" in said.text


def test_calls_that_are_not_optimized_say_so(pipe, float64, said):
    pipe.unet.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1))
    expected = tokens(pipe, num_inference_steps=4)
    pipe.optimize()
    for _ in range(2):
        assert torch.equal(tokens(pipe, num_inference_steps=4), expected)
    assert graphs() == 0 and said.text.count("This call of the U-Net is not optimized: `unet.enable_cache`") == 1


def test_training_goes_on(pipe, said):
    """With gradients, and dropout."""
    pipe.optimize()
    call = torch.zeros(1, 8, 8, dtype=torch.long), 0.5, torch.randn(1, 5, 16)
    pipe.unet(*call).sample.sum().backward()
    assert pipe.unet.head.weight.grad is not None
    pipe.unet.train()
    tokens(pipe)
    assert graphs() == 0 and "not optimized: the model is in training mode; `pipe.unet.eval()` ends it" in said.text


def test_saved_copied_and_shared(pipe, float64, tmp_path):
    names = list(pipe.unet.state_dict())
    pipe.optimize()
    expected = tokens(pipe)
    assert list(pipe.unet.state_dict()) == names
    pipe.save_pretrained(tmp_path)
    assert torch.equal(tokens(PaellaPipeline.from_pretrained(tmp_path, dtype=torch.float64)), expected)
    copied = copy.deepcopy(pipe)
    assert copied.unet._compiled_call_impl is None and torch.equal(tokens(copied), expected)
    shared = PaellaImg2ImgPipeline.from_pipe(pipe)
    shared("a dog", image=torch.rand(1, 3, 32, 32), num_inference_steps=2, strength=0.5)
    assert shared.optimize(False) is shared and pipe.unet._compiled_call_impl is None


# ------------------------------------------------------------------------------------------------- `make test-compile`


@pytest.mark.compile
@torch._dynamo.config.patch(recompile_limit=2)  # of others, which is not heeded
def test_walk_of_20_calls(pipe, float64):
    """Whatever changes between calls: the tokens stay the same, and at most one graph is added for what is new."""
    plain, size = twin(), {"height": 48, "width": 32}
    pipe.optimize()
    walk = [  # the call, and how many graphs it may add
        ({}, 1),
        ({"num_inference_steps": 3}, 0),
        ({"prompt": "a prompt of quite another length"}, 0),
        ({"guidance_scale": 3.0}, 0),
        ({"guidance_scale": (4.0, 2.0)}, 0),
        ({"num_inference_steps": 5, "negative_prompt": "a cat"}, 0),
        ({"prompt": "a", "negative_prompt": "b"}, 0),
        (size, 1),
        ({}, 0),
        ({"guidance_scale": None}, 1),
        ({"guidance_scale": None, "prompt": "a longer prompt"}, 0),
        ({"guidance_steps": 1}, 0),
        ({"prompt": ["a dog", "a cat of some length"]}, 1),
        ({"prompt": ["a dog", "a cat"], "negative_prompt": "a negative prompt"}, 0),
        ({"num_images_per_prompt": 2}, 0),
        (size | {"prompt": ["a dog", "a cat"]}, 1),
        (size, 0),
        ({"use_prior": False}, 0),
        ({"height": 32, "width": 48}, 1),
        ({"conditioning_weights": torch.ones(4)}, 1),
    ]
    for call, allowed in walk:
        before = graphs()
        assert torch.equal(tokens(pipe, **call), tokens(plain, **call)), call
        assert graphs() - before <= allowed, call
    assert graphs() == 7 and len(walk) == 20 and pipe.unet._compiled_call_impl.failed is False


@pytest.mark.compile
def test_deep_features_and_perturbed_attention(pipe, float64):
    plain, deep = twin(), {"deep_feature_interval": 2, "num_inference_steps": 4}
    pipe.optimize()
    assert torch.equal(tokens(pipe, **deep), tokens(plain, **deep))
    pipe.guider = plain.guider = PaellaPerturbedAttentionGuidance()
    assert torch.equal(tokens(pipe), tokens(plain))
    assert pipe.unet._compiled_call_impl.failed is False


@pytest.mark.compile
def test_adapters_come_and_go(pipe, float64):
    """Attached, weighted, fused and unloaded: the tokens are those of a model that is not optimized."""
    peft = pytest.importorskip("peft")

    def results(pipe):
        yield tokens(pipe)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        torch.manual_seed(0)
        pipe.unet.add_adapter(config, "made")
        pipe.to(torch.float64)
        yield tokens(pipe)
        yield tokens(pipe, cross_attention_kwargs={"scale": 0.3})
        pipe.set_adapters("made", 5.0)
        yield tokens(pipe)
        pipe.fuse_lora()
        yield tokens(pipe)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        yield tokens(pipe)

    expected = list(results(twin()))
    assert not torch.equal(expected[0], expected[1]) and not torch.equal(expected[1], expected[3])
    for drawn, wanted in zip(results(pipe.optimize()), expected):
        assert torch.equal(drawn, wanted)
    assert pipe.unet._compiled_call_impl.failed is False


@pytest.mark.compile
def test_weights_may_change(pipe, float64):
    """Other weights, another dtype: nothing of the earlier ones is kept."""
    pipe.optimize()
    tokens(pipe)
    other = twin()
    other.unet.load_state_dict({name: weight + 0.1 for name, weight in tiny_unet().state_dict().items()})
    pipe.unet.load_state_dict(other.unet.state_dict())
    assert torch.equal(tokens(pipe), tokens(other)) and graphs() == 1
    tokens(pipe.to(torch.float32))
    assert graphs() == 2
    assert torch.equal(tokens(pipe.to(torch.float64)), tokens(other)) and graphs() == 2


@pytest.mark.compile
def test_threads(pipe, float64):
    """Calls of several sizes at once, compiled together: the tokens of calls one after the other."""
    calls = [{"height": 32, "width": width, "prompt": prompt} for width in (32, 48, 64) for prompt in ("a dog", "a longer")]
    expected = [tokens(pipe, **call) for call in calls]
    pipe.optimize()
    drawn = [None] * len(calls)

    def run(index):
        drawn[index] = tokens(pipe, **calls[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, wanted) for one, wanted in zip(drawn, expected))
    assert graphs() == 3 and pipe.unet._compiled_call_impl.failed is False


@pytest.mark.compile
def test_bad_input_is_refused_in_the_same_words(pipe):
    pipe.optimize()
    with torch.no_grad():
        conditioning = pipe.unet.encode_conditioning(torch.randn(3, 5, 16))
        with pytest.raises(ValueError, match="conditioning has 3 rows for 2 samples"):
            pipe.unet(torch.zeros(2, 8, 8, dtype=torch.long), 0.5, encoder_hidden_states=conditioning)
    tokens(pipe)
    assert graphs() == 1  # and it is still optimized


SECOND_PROCESS = """
import json
import torch
from conftest import tiny_unet
from torch._dynamo.utils import counters
from paella_diffusers.optimize import optimize
one_block = dict(block_out_channels=(16,), layers_per_block=(1,), block_types=("CTA",), num_attention_heads=(2,))
unet, generator = tiny_unet(**one_block), torch.Generator().manual_seed(0)
sample = torch.randint(32, (1, 8, 8), generator=generator).repeat(2, 1, 1)
with torch.no_grad():
    texts = [torch.randn(2, length, 16, generator=generator) for length in (5, 9)]
    calls = [{"encoder_hidden_states": unet.encode_conditioning(text), "mixing_weights": ((8.0, -7.0),)} for text in texts]
    expected = [unet(sample, torch.tensor(0.5), **call).sample for call in calls]
    optimize(unet)
    output = [unet(sample, torch.tensor(0.5), **call).sample for call in calls]
    differences = [(one - other).abs().max().item() for one, other in zip(output, expected)]
print(json.dumps([differences, counters["stats"], counters["inductor"], counters["aot_autograd"]]))
"""


@pytest.mark.compile
def test_a_second_process_finds_what_the_first_one_compiled(tmp_path):
    """By torch's own compiler, in float32: logits equal up to rounding."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    for name, other in (("miss", "hit"), ("hit", "miss")):
        ran = subprocess.run([sys.executable, "-c", SECOND_PROCESS], env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        differences, dynamo, inductor, aot = json.loads(ran.stdout.splitlines()[-1])
        assert max(differences) < 1e-4 and dynamo["unique_graphs"] == 1
        assert aot[f"autograd_cache_{name}"] == 1 and f"autograd_cache_{other}" not in aot
        assert f"fxgraph_cache_{other}" not in inductor
