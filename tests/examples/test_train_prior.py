import pytest
import torch
import train_prior
from safetensors.torch import load_file
from trainers import TINY

from paella_diffusers import PaellaPipeline, PaellaPrior


def test_it_trains_and_publishes(pictures, pretrained, tmp_path):
    options = [*TINY, "--data", pictures, "--pretrained", pretrained, "--output-dir", str(tmp_path / "out")]
    options += ["--batch-size", "8", "--max-steps", "3", "--ema-start", "1"]
    train_prior.main(train_prior.parse_args(options))
    pipe = PaellaPipeline.from_pretrained(tmp_path / "out")
    before = PaellaPrior.from_pretrained(pretrained, subfolder="prior").state_dict()
    assert any(not torch.equal(before[name], weight) for name, weight in pipe.prior.state_dict().items())
    assert pipe("red", num_inference_steps=2, prior_num_inference_steps=2, use_prior=True).images
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| data | pictures |" in card and "| ema decay | 0.999 |" in card and str(tmp_path) not in card


def test_it_learns(pictures, pretrained, tmp_path):
    """The noise in embeddings that are all alike can be told at once."""
    sizes = '{"embedding_dim": 12, "hidden_dim": 32, "time_embed_dim": 8, "num_layers": 2}'
    options = [*TINY, "--data", pictures, "--pretrained", pretrained, "--output-dir", str(tmp_path / "out")]
    options += ["--batch-size", "20", "--max-steps", "150", "--from-scratch", "--prior-config", sizes]
    options += ["--learning-rate", "3e-3", "--ema-start", "100", "--text-dropout", "0"]
    train_prior.main(train_prior.parse_args(options))
    torch.manual_seed(0)
    prior = PaellaPrior.from_pretrained(tmp_path / "out", subfolder="prior")
    noise = torch.randn(200, 12)
    with torch.no_grad():
        predicted = prior(noise, torch.full((200,), 0.99), torch.zeros(200, 12)).sample
    assert (predicted - noise).square().mean() < 0.3


def test_a_new_prior_has_the_given_ones_sizes(pictures, pretrained, tmp_path):
    options = [*TINY, "--data", pictures, "--pretrained", pretrained, "--max-steps", "1", "--from-scratch"]
    options += ["--prior-config", '{"hidden_dim": 20}', "--output-dir", str(tmp_path / "out")]
    train_prior.main(train_prior.parse_args(options))
    given = PaellaPrior.load_config(pretrained, subfolder="prior")
    new = PaellaPrior.load_config(tmp_path / "out", subfolder="prior")
    assert (new["num_layers"], new["time_embed_dim"]) == (given["num_layers"], given["time_embed_dim"]) == (2, 8)
    assert new["hidden_dim"] == 20


def test_a_prior_for_a_model_without_one(pictures, pretrained, tmp_path):
    pipe = PaellaPipeline.from_pretrained(pretrained, prior=None, prior_scheduler=None)
    pipe.save_pretrained(tmp_path / "without")
    options = [*TINY, "--data", pictures, "--pretrained", str(tmp_path / "without"), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="has no prior: add --from-scratch"):
        train_prior.main(train_prior.parse_args(options))
    options += ["--from-scratch", "--prior-config", '{"num_layers": 1, "hidden_dim": 12}', "--max-steps", "1"]
    train_prior.main(train_prior.parse_args(options))
    assert PaellaPrior.load_config(tmp_path / "out", subfolder="prior")["embedding_dim"] == 12


def test_an_adapter_of_the_prior(pictures, pretrained, tmp_path):
    options = [*TINY, "--data", pictures, "--pretrained", pretrained, "--batch-size", "8", "--rank", "2", "--ema-start", "1"]
    train = lambda folder, *more: train_prior.main(
        train_prior.parse_args([*options, "--output-dir", str(tmp_path / folder), *more])
    )
    train("whole", "--max-steps", "4", "--save-every", "2")
    train("parts", "--max-steps", "4", "--resume", str(tmp_path / "whole" / "checkpoints" / "00000002"))
    expected, found = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("whole", "parts"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert {name.partition(".")[0] for name in found} == {"prior"}
    pipe = PaellaPipeline.from_pretrained(pretrained)
    before = pipe.prior(torch.ones(1, 12), 0.5, torch.ones(1, 12)).sample
    pipe.load_lora_weights(tmp_path / "parts")
    assert not torch.equal(pipe.prior(torch.ones(1, 12), 0.5, torch.ones(1, 12)).sample, before)
    with pytest.raises(SystemExit):
        train("new", "--from-scratch")


def test_a_prior_too_narrow_for_the_noise_is_refused(pictures, pretrained, tmp_path):
    options = [*TINY, "--data", pictures, "--pretrained", pretrained, "--output-dir", str(tmp_path / "out")]
    options += ["--from-scratch", "--prior-config", '{"hidden_dim": 11, "num_layers": 1}']
    with pytest.raises(ValueError, match="`hidden_dim` 11, fewer than the 12 channels"):
        train_prior.main(train_prior.parse_args(options))
