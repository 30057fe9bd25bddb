"""`pipe.enable_prompt_cache()`: nothing is encoded twice, and nothing stale is used."""

import copy

import pytest
import torch
from conftest import tiny_components
from peft import LoraConfig


@pytest.fixture
def encoded(pipe):
    """Which encoder ran, in order."""
    calls = []
    for name in ("text_encoder", "text_encoder_2"):
        getattr(pipe, name).register_forward_hook(lambda *args, name=name: calls.append(name))
    return calls


def encode(pipe, prompt="a dog", negative="a cat"):
    return [part.clone() for part in pipe.encode_prompt(prompt, negative) if part is not None]


def test_off_unless_asked_for(pipe, encoded):
    encode(pipe)
    encode(pipe)
    assert len(encoded) == 8


def test_nothing_is_encoded_twice(pipe, encoded):
    expected, longer = encode(pipe), encode(pipe, ["a dog", "a longer prompt"])
    encoded.clear()
    pipe.enable_prompt_cache()
    for _ in range(3):
        for parts, wanted in ((encode(pipe), expected), (encode(pipe, ["a dog", "a longer prompt"]), longer)):
            assert all(torch.equal(part, one) for part, one in zip(parts, wanted))
    assert encoded == ["text_encoder", "text_encoder_2"] * 3  # "a dog", "a cat", and the two; the third is of one row
    with torch.no_grad():
        pipe.encode_prompt("a dog")[0].zero_()  # the cache has its own
    assert torch.equal(encode(pipe)[0], expected[0])
    pipe.disable_prompt_cache()
    encode(pipe)
    assert len(encoded) == 12


def test_bounded(pipe, encoded):
    pipe.enable_prompt_cache(max_entries=4)
    encode(pipe, "a", "b")
    encode(pipe, "a", "b")
    assert len(encoded) == 4 and len(pipe._prompt_cache) == 4
    encode(pipe, "a", "c")  # in the place of "b"
    assert len(encoded) == 6 and len(pipe._prompt_cache) == 4
    encode(pipe, "a", "c")
    assert len(encoded) == 6


def test_nothing_stale(pipe, encoded):
    pipe.enable_prompt_cache()
    before = encode(pipe)
    with torch.no_grad():
        pipe.text_encoder.shared.weight.mul_(2)
    changed = encode(pipe)
    assert not torch.equal(changed[0], before[0])
    pipe.load_textual_inversion({"<horse>": torch.ones(16)})
    first = encode(pipe, "<horse>")
    pipe.unload_textual_inversion()
    pipe.load_textual_inversion({"<horse>": -torch.ones(16)})
    assert not torch.equal(encode(pipe, "<horse>")[0], first[0])
    pipe.text_encoder_2 = tiny_components()["text_encoder_2"]
    torch.nn.init.ones_(pipe.text_encoder_2.text_projection.weight)
    assert not torch.equal(encode(pipe)[2], changed[2])
    assert encode(pipe.to(torch.float64))[0].dtype == torch.float64
    other = copy.deepcopy(pipe)
    assert all(torch.equal(part, one) for part, one in zip(encode(other), encode(pipe)))


TARGETS = {"text_encoder": "q", "text_encoder_2": "q_proj"}


def add_adapters(pipe):
    for name, layer in TARGETS.items():
        getattr(pipe, name).add_adapter(LoraConfig(r=2, target_modules=[layer], init_lora_weights=False), "made")


def same(parts, others) -> list[bool]:
    return [torch.equal(part, other) for part, other in zip(parts, others)]


def test_nothing_stale_with_adapters(pipe):
    add_adapters(pipe)
    changes = [
        lambda: pipe.set_adapters("made", 0.5),
        lambda: pipe.set_adapters("made", 20.0),
        pipe.disable_lora,
        pipe.enable_lora,
    ]
    expected = []
    for change in changes:
        change()
        expected.append(encode(pipe))
    assert not any(same(expected[0], expected[1])) and not any(same(expected[1], expected[2]))
    pipe.enable_prompt_cache()
    for change, parts in zip(changes * 2, expected * 2):
        change()
        assert all(same(encode(pipe), parts))
    assert len(pipe._prompt_cache) == 12  # "a dog" and "a cat" of two encoders; to enable them is as before


def test_nothing_stale_after_fusing(pipe):
    pipe.enable_prompt_cache()
    plain = encode(pipe)
    add_adapters(pipe)
    pipe.set_adapters("made", 20.0)
    pipe.fuse_lora(list(TARGETS))
    pipe.unload_lora_weights()
    assert not any(same(encode(pipe), plain))


def test_nothing_stale_after_other_weights_are_put_in(pipe):
    pipe.enable_prompt_cache()
    found = []
    for factor in (1.0, 2.0):
        for name in TARGETS:
            weights = {key: weight * factor for key, weight in getattr(pipe, name).state_dict().items()}
            getattr(pipe, name).load_state_dict(weights, assign=True)
        found.append(encode(pipe))
    assert not any(same(*found))


@pytest.mark.parametrize("value", [0, 1.5, True, "many"])
def test_other_sizes_are_refused(pipe, value):
    with pytest.raises(ValueError, match="`max_entries` must be an integer of at least 1, got"):
        pipe.enable_prompt_cache(value)
