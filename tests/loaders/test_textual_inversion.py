"""Textual inversion: loading, prompts with tokens of several vectors, unloading, and saving."""

import pytest
import torch
from safetensors.torch import save_file

from paella_diffusers import PaellaPipeline

VECTORS = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))


def embed(pipe, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    return embeds[0], embeds[4]


def test_tokens_of_both_encoders(pipe, tmp_path):
    save_file({"<horse>": VECTORS}, tmp_path / "learned_embeds.safetensors")
    save_file({"<horse>": VECTORS}, tmp_path / "learned_embeds_2.safetensors")
    before, other = embed(pipe, "a <horse>"), embed(pipe, "a dog")
    pipe.load_textual_inversion(tmp_path)
    text, clip = embed(pipe, "a <horse>")
    # two bytes, a vector, a space, the other vector, and the end; CLIP still reads bytes
    assert text.shape[1] == 6 and before[0].shape[1] == 10 and torch.equal(clip, before[1])
    file = dict(weight_name="learned_embeds_2.safetensors", text_encoder=pipe.text_encoder_2)
    pipe.load_textual_inversion(tmp_path, **file)
    assert not torch.equal(embed(pipe, "a <horse>")[1], before[1])
    assert all(torch.equal(now, then) for now, then in zip(embed(pipe, "a dog"), other))
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[384:], VECTORS)
    assert len(pipe(["a <horse>", "a dog"], num_inference_steps=2).images) == 2
    # saved and loaded, they are there
    pipe.save_pretrained(tmp_path / "saved")
    loaded = PaellaPipeline.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(now, then) for now, then in zip(embed(loaded, "a <horse>"), embed(pipe, "a <horse>")))


def test_unloaded_everything_is_as_before(pipe):
    before = embed(pipe, "a <horse> and a <dog>")
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        pipe.load_textual_inversion({"<horse>": VECTORS}, text_encoder=encoder)
    pipe.load_textual_inversion(VECTORS[0], token="<dog>")
    with_both = embed(pipe, "a <dog>")[0]
    pipe.unload_textual_inversion("<horse>", text_encoder=pipe.text_encoder)
    assert torch.equal(embed(pipe, "a <dog>")[0], with_both) and len(pipe.tokenizer) == 385
    with pytest.raises(ValueError, match=r"`tokens` has \['<cat>'\], but loaded are \['<dog>', '<horse>', '<horse>_1'\]"):
        pipe.unload_textual_inversion(["<cat>"])
    pipe.unload_textual_inversion()
    assert all(torch.equal(now, then) for now, then in zip(embed(pipe, "a <horse> and a <dog>"), before))
    pipe.unload_textual_inversion()  # nothing is left to be unloaded
    pipe.load_textual_inversion({"<horse>": VECTORS})


def test_a_token_is_unloaded_with_its_own_vectors_only(pipe):
    before = set(pipe.tokenizer.get_added_vocab())
    pipe.load_textual_inversion({"<a>": VECTORS})
    pipe.load_textual_inversion({"<a>_x": VECTORS[0]})
    pipe.unload_textual_inversion("<a>")
    assert set(pipe.tokenizer.get_added_vocab()) - before == {"<a>_x"}


def test_offloading_goes_on_to_the_same_device(pipe, monkeypatch):
    """diffusers would go on with the device on which the weights wait."""
    pipe.enable_model_cpu_offload(device="cpu")
    pipe._offload_device, devices = torch.device("cuda:1"), []
    monkeypatch.setattr(pipe, "enable_model_cpu_offload", lambda device=None: devices.append(device))
    pipe.load_textual_inversion({"<horse>": VECTORS})
    assert devices == [torch.device("cuda:1")]


def test_with_sequential_offloading(pipe):
    pipe.load_textual_inversion({"<horse>": VECTORS})
    expected = embed(pipe, "a <horse>")[0]
    pipe.enable_sequential_cpu_offload(device="cpu")
    pipe.unload_textual_inversion()
    pipe.load_textual_inversion({"<horse>": VECTORS})
    assert pipe.text_encoder.device.type == "meta"  # offloaded again
    pipe.remove_all_hooks()
    assert torch.equal(embed(pipe, "a <horse>")[0], expected)


def test_weights_on_disk_are_refused(saved_pipeline):
    pipe = PaellaPipeline.from_pretrained(saved_pipeline, low_memory=True)
    with pytest.raises(ValueError, match="`text_encoder` has its weights on disk: load the pipeline without `low_memory`"):
        pipe.load_textual_inversion({"<horse>": VECTORS})


def test_clear_errors(pipe):
    with pytest.raises(ValueError, match="no vectors of `text_encoder`, which have 16 entries: give the `text_encoder`"):
        pipe.load_textual_inversion({"<horse>": torch.ones(15)})
    pipe.load_textual_inversion({"<horse>": VECTORS})
    with pytest.raises(ValueError, match="already in tokenizer"):
        pipe.load_textual_inversion({"<horse>": VECTORS})
    pipe.register_modules(text_encoder_2=None, tokenizer_2=None)
    with pytest.raises(ValueError, match="`text_encoder` must be the pipeline's"):
        pipe.load_textual_inversion({"<horse>": VECTORS}, text_encoder=torch.nn.Linear(1, 1))
