import pytest
import torch
import train_vqgan
from PIL import Image
from trainers import TINY
from transformers import ConvNextConfig, ConvNextImageProcessor, ConvNextModel

from paella_diffusers import VQModel

SIZES = ["--config", '{"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 32}']


@pytest.fixture
def options(pictures):
    return [*TINY, *SIZES, "--data", pictures, "--batch-size", "4", "--adversarial-start", "3", "--log-every", "1"]


def train(options, folder, *more) -> VQModel:
    train_vqgan.main(train_vqgan.parse_args([*options, "--output-dir", str(folder), *map(str, more)]))
    return VQModel.from_pretrained(folder)


@pytest.fixture
def classifier(tmp_path):
    config = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=32)
    ConvNextModel(config).save_pretrained(tmp_path / "classifier")
    ConvNextImageProcessor().save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def test_all_losses(options, tmp_path, classifier):
    options += ["--perceptual-model", str(classifier), "--restart-every", "2"]
    vqgan = train(options, tmp_path / "out", "--max-steps", 6, "--sample-every", 6)
    assert vqgan.config.num_vq_embeddings == 32
    assert Image.open(tmp_path / "out" / "samples" / "00000006.png").size == (4 * 32, 2 * 32)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| data | pictures |" in card and "| max steps | 6 |" in card and str(tmp_path) not in card


def test_push_to_hub(options, tmp_path, hub):
    repo = hub.repo("me/vqgan")
    vqgan = train(options, tmp_path / "out", "--max-steps", 1, "--push-to-hub", "--hub-model-id", "me/vqgan")
    uploaded = {str(path.relative_to(repo)) for path in repo.rglob("*") if path.is_file()} - {".gitattributes"}
    assert {"README.md", "config.json", "diffusion_pytorch_model.safetensors"} <= uploaded
    assert not [name for name in uploaded if "checkpoints" in name or "training_args" in name or "logs" in name]
    weights = VQModel.from_pretrained("me/vqgan").state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in vqgan.state_dict().items())
    assert "| data | pictures |" in (repo / "README.md").read_text()


def test_computed_tokens_are_refused(pairs, tmp_path):
    options = [
        *TINY,
        "--data",
        pairs,
        "--output-dir",
        str(tmp_path / "out"),
        *SIZES,
        "--max-steps",
        "1",
        "--batch-size",
        "2",
    ]
    with pytest.raises(ValueError, match="--data .*pairs has computed tokens in place of pictures"):
        train_vqgan.main(train_vqgan.parse_args(options))


def test_it_learns_and_uses_its_codes(options, tmp_path):
    torch.manual_seed(0)
    before = VQModel(embed_dim=16, bottleneck_blocks=1, num_vq_embeddings=32).eval()
    options += ["--adversarial-weight", "0", "--learning-rate", "3e-3", "--batch-size", "20", "--restart-every", "20"]
    after = train(options, tmp_path / "out", "--max-steps", 200, "--restart-until", 100)
    # the pictures of the data set
    pixels = (
        torch.stack([torch.tensor([i * 12, 100, 200 - i * 10]) for i in range(20)]).view(20, 3, 1, 1).expand(-1, -1, 32, 32)
    )
    pixels = pixels / 255
    with torch.no_grad():
        errors = [(vqgan(pixels).sample - pixels).square().mean() for vqgan in (before, after)]
    assert errors[1] < errors[0] / 20
    assert len(after.encode(pixels).indices.unique()) >= 8


def test_with_the_decoder_only_tokens_stay(options, tmp_path, pretrained):
    options = [option for option in options if option not in SIZES]
    options += ["--pretrained", pretrained, "--subfolder", "vqgan", "--decoder-only", "--max-steps", "4"]
    after = train(options, tmp_path / "out")
    before = VQModel.from_pretrained(pretrained, subfolder="vqgan")
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(before.encode(pixels).indices, after.encode(pixels).indices)
    assert not torch.equal(before(pixels).sample, after(pixels).sample)
