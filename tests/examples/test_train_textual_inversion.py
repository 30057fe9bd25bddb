import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import train_textual_inversion
from PIL import Image
from safetensors.torch import load_file
from trainers import TINY

from paella_diffusers import PaellaPipeline
from paella_diffusers.training.inversion import TEMPLATES, LearnedTokens, TemplateCaptions

FILES = ["learned_embeds.safetensors", "learned_embeds_2.safetensors"]


@pytest.fixture
def options(pictures, pretrained):
    (Path(pictures) / "metadata.jsonl").unlink()  # pictures need no captions
    options = [*TINY, "--data", pictures, "--pretrained", pretrained, "--batch-size", "4", "--clip-text-dropout", "0"]
    return [*options, "--placeholder-token", "<horse>", "--initializer-token", "red", "--num-vectors", "2"]


def train(options, folder, *more) -> dict[str, torch.Tensor]:
    train_textual_inversion.main(
        train_textual_inversion.parse_args([*options, "--output-dir", str(folder), *map(str, more)])
    )
    return {name: load_file(folder / name)["<horse>"] for name in FILES}


def load(pretrained, folder) -> PaellaPipeline:
    pipe = PaellaPipeline.from_pretrained(pretrained)
    pipe.load_textual_inversion(folder)
    pipe.load_textual_inversion(folder, weight_name=FILES[1], text_encoder=pipe.text_encoder_2)
    return pipe


def test_it_trains_the_vectors_alone_and_publishes_them(options, tmp_path, pretrained):
    folder = tmp_path / "out"
    learned = train(options, folder, "--max-steps", 3, "--prompts", "a <horse>", "--seed", 3)
    before = PaellaPipeline.from_pretrained(pretrained)
    for name, encoder in zip(FILES, ("text_encoder", "text_encoder_2")):
        start = getattr(before, encoder).get_input_embeddings().weight
        start = start[before.tokenizer("re", add_special_tokens=False).input_ids]  # the word's first two bytes
        assert learned[name].shape == (2, 16) and 0 < (learned[name] - start).abs().max() < 0.1
    pipe = load(pretrained, folder)
    assert all(torch.equal(now, then) for now, then in zip(pipe.unet.parameters(), before.unet.parameters()))
    # the last sheet is what the loaded vectors draw
    image = pipe("a <horse>", height=32, width=32, generator=torch.Generator().manual_seed(3)).images[0]
    assert Image.open(folder / "samples" / "00000003.png").tobytes() == image.tobytes()
    card = (folder / "README.md").read_text()
    assert "vectors of the token `<horse>`" in card and "load_textual_inversion" in card and str(tmp_path) not in card
    # a checkpoint is loaded in the same way
    load(pretrained, folder / "checkpoints" / "00000003" / "learned_embeds")


def test_it_learns(options, tmp_path, pretrained):
    """The loss of captions with the word falls, with all noise and tokens the same."""
    train([*options, "--lr-scheduler", "constant"], tmp_path / "out", "--max-steps", 60, "--learning-rate", 0.1)
    pipe, tokens = load(pretrained, tmp_path / "out"), torch.full((4, 8, 8), 5)
    before = PaellaPipeline.from_pretrained(pretrained)
    pixels = torch.tensor([120 / 255, 100 / 255, 100 / 255]).view(1, 3, 1, 1).expand(4, 3, 32, 32)
    target = pipe.vqgan.encode(pixels).indices
    losses = []
    for model, word in ((before, "red"), (pipe, "<horse>")):
        text, _, mask, _, clip, _ = model.encode_prompt([f"a {word}"] * 4, do_classifier_free_guidance=False)
        with torch.no_grad():
            logits = model.unet(tokens, torch.ones(4), text, clip_text_embeds=clip, encoder_attention_mask=mask).sample
        losses.append(torch.nn.functional.cross_entropy(logits, target).item())
    assert losses[1] < losses[0]


def test_large_vectors_pass_through_the_encoders_unchanged(pipe):
    """So the states of the new word can be what no other word's are."""
    states = {}
    for scale in (1.0, 1e4):
        copied = copy.deepcopy(pipe)
        word = LearnedTokens(copied, "<new>", "red", 3, scale)
        unit = word.units["text_encoder"]
        assert word.vectors["text_encoder"].square().mean().sqrt().log2().abs() <= 0.5 + 1e-3  # the unit grows with them
        ids = torch.tensor([copied.tokenizer.convert_tokens_to_ids(["<new>", "<new>_1", "<new>_2"])])
        with torch.no_grad():
            found = copied.text_encoder(ids).last_hidden_state[0]
        norm = copied.text_encoder.encoder.final_layer_norm
        states[scale] = (found - norm(word.vectors["text_encoder"].detach() * unit)).abs().max().item()
    assert states[1e4] < 1e-3 < states[1.0]


def test_resumed_it_ends_as_if_not_interrupted(options, tmp_path):
    options += ["--max-steps", "4"]
    expected = train(options, tmp_path / "whole", "--save-every", 2)
    found = train(options, tmp_path / "parts", "--resume", tmp_path / "whole" / "checkpoints" / "00000002")
    assert all(torch.equal(found[name], expected[name]) for name in FILES)


def test_two_processes_have_the_captions_of_one_with_twice_the_batch(pipe):
    def captions(index, count, batch_size):
        run = SimpleNamespace(args=SimpleNamespace(seed=1), passes=5, part=(index, count))
        encoder = TemplateCaptions(run, pipe, "<horse>", TEMPLATES["object"])
        texts = encoder.conditioning({"text": [""] * batch_size}, (False, False, True))["text"]
        assert all("<horse>" in text for text in texts)
        return texts

    one = captions(0, 1, 12)
    assert [captions(0, 2, 6), captions(1, 2, 6)] == [one[0::2], one[1::2]] and len(set(one)) > 1


def test_gradient_checkpointing_changes_nothing(options, tmp_path):
    """The model is frozen: its dropout stays off."""
    options += ["--max-steps", "1"]
    expected = train(options, tmp_path / "without")
    found = train(options, tmp_path / "with", "--gradient-checkpointing")
    for name in FILES:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)


def test_clear_errors(options, tmp_path, pipe):
    with pytest.raises(ValueError, match="`tokenizer` knows <horse> already: take another --placeholder-token"):
        LearnedTokens(pipe, "<horse>", "red") and LearnedTokens(pipe, "<horse>", "red")
    with pytest.raises(ValueError, match="--initializer-token '' has no tokens of `tokenizer`: give a word"):
        LearnedTokens(pipe, "<zebra>", "")
    train(options, tmp_path / "out", "--max-steps", 1)
    changes = {"placeholder-token": "<zebra>", "initializer-token": "blue", "num-vectors": 3, "initializer-scale": 2.0}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=f"was saved with --{name} .*, but now it is {value}: its states do not fit"):
            train(options, tmp_path / "out", "--max-steps", 2, "--resume", "latest", f"--{name}", value)
    for wrong in (("--num-vectors", 0), ("--initializer-scale", 0), ("--initializer-scale", "nan")):
        with pytest.raises(SystemExit):
            train(options, tmp_path, *wrong)
