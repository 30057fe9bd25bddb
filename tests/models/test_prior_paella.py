import pytest
import torch
from conftest import manifest, randomise

from paella_diffusers import PaellaPrior


def test_golden(golden, golden_models):
    io = golden.prior_io
    with torch.no_grad():
        predicted = golden_models.prior(io["x"], io["t"], io["c"]).sample
    torch.testing.assert_close(predicted, io["pred_noise"], atol=1e-5, rtol=0)


def test_default_sizes_are_the_released_ones():
    with torch.device("meta"):
        original = PaellaPrior().to_original_state_dict()
    expected = {key: shape for key, (shape, _) in manifest("prior_v1").items()}
    assert {key: list(tensor.shape) for key, tensor in original.items()} == expected


def test_gradient_checkpointing_keeps_gradients():
    prior = randomise(PaellaPrior(embedding_dim=6, hidden_dim=8, time_embed_dim=4, num_layers=3)).train()
    sample, text = torch.randn(2, 6), torch.randn(2, 6)
    prior(sample, 0.5, text).sample.square().mean().backward()
    expected = [parameter.grad.clone() for parameter in prior.parameters()]
    prior.zero_grad()
    prior.enable_gradient_checkpointing()
    prior(sample, torch.tensor([0.5, 0.5]), text).sample.square().mean().backward()
    for parameter, gradient in zip(prior.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


def test_save_and_load(tmp_path):
    prior = randomise(PaellaPrior(embedding_dim=6, hidden_dim=8, time_embed_dim=4, num_layers=3))
    prior.save_pretrained(tmp_path)
    sample, text = torch.randn(2, 6), torch.randn(2, 6)
    assert torch.equal(PaellaPrior.from_pretrained(tmp_path)(sample, 0.5, text).sample, prior(sample, 0.5, text).sample)


def test_too_small_a_time_embedding_is_refused():
    with pytest.raises(ValueError, match="`time_embed_dim` must be at least 4, got 2"):
        PaellaPrior(embedding_dim=8, hidden_dim=8, time_embed_dim=2, num_layers=1)
