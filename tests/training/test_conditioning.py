import pytest
import torch
from conftest import tiny_pipeline

from paella_diffusers.training.conditioning import Encoder, drop_conditioning


def test_shares_of_what_is_dropped():
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([drop_conditioning(generator) for _ in range(2000)], dtype=torch.float32)
    torch.testing.assert_close(draws.mean(0), torch.tensor([0.05, 0.9, 0.9]), atol=0.03, rtol=0)
    both = (draws[:, 1] * draws[:, 2]).mean()  # each for itself
    assert abs(both - 0.81) < 0.03
    assert drop_conditioning(None, 0, 0, 0) == (False, False, False) and drop_conditioning(None, 1, 1, 1) == (
        True,
        True,
        True,
    )


@pytest.fixture
def batch():
    return {"pixels": torch.rand(2, 3, 32, 32), "text": ["a long caption", "short"]}


def test_the_encoder_gives_what_the_pipeline_samples_with(pipe, batch):
    encoder = Encoder(pipe)
    inputs = encoder.conditioning(batch)
    with torch.no_grad():
        text, _, mask, _, clip, _ = pipe.encode_prompt(batch["text"], do_classifier_free_guidance=False)
        images = [pipe.numpy_to_pil(pixels.permute(1, 2, 0).numpy())[0] for pixels in batch["pixels"]]
        image = pipe.encode_image([[image] for image in images], 2)[:, 0]
        tokens = pipe.vqgan.encode(batch["pixels"]).indices
    assert torch.equal(inputs["encoder_hidden_states"], text) and torch.equal(inputs["encoder_attention_mask"], mask)
    assert torch.equal(inputs["clip_text_embeds"], clip) and torch.equal(encoder.tokens(batch), tokens)
    # pictures are resized by another library
    assert torch.nn.functional.cosine_similarity(inputs["clip_image_embeds"], image).min() > 0.98
    assert not any(p.requires_grad for part in (pipe.vqgan, pipe.text_encoder) for p in part.parameters())


def test_what_is_dropped_is_that_of_no_words(pipe, batch):
    inputs = Encoder(pipe).conditioning(batch, (True, True, True))
    with torch.no_grad():
        text, _, _, _, clip, _ = pipe.encode_prompt(["", ""], do_classifier_free_guidance=False)
    assert torch.equal(inputs["encoder_hidden_states"], text) and inputs["encoder_attention_mask"] is None
    assert torch.equal(inputs["clip_text_embeds"], clip) and inputs["clip_image_embeds"] is None


def test_without_clip(batch):
    encoder = Encoder(tiny_pipeline(text_encoder_2=None, tokenizer_2=None, image_encoder=None, feature_extractor=None))
    for dropped in ((False, False, False), (False, True, False)):
        inputs = encoder.conditioning(batch, dropped)
        assert inputs["clip_text_embeds"] is None and inputs["clip_image_embeds"] is None
