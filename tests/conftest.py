"""
What the tests share: the golden data, tiny real components, and a local Hub.

The Hub's address and cache must be in the environment before huggingface_hub is imported anywhere.
"""

import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

from hub import LocalHub

HUB = LocalHub(Path(tempfile.mkdtemp(prefix="paella-hub-")))
os.environ |= {
    "HF_ENDPOINT": HUB.endpoint,
    "HF_HOME": tempfile.mkdtemp(prefix="paella-hf-home-"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "NO_PROXY": "127.0.0.1",
}
os.environ.pop("HF_HUB_OFFLINE", None)

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from paella_diffusers import PaellaPipeline, PaellaPrior, PaellaScheduler, PaellaUNet, VQModel
from paella_diffusers.cli import main as command_line

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers in every run of a test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def hub():
    """An empty local Hub; the real client talks to it."""
    HUB.clear()
    return HUB


@pytest.fixture(params=["a", "b"])
def golden(request):
    """One configuration of the golden data: `folder`, `config`, and the contents of the safetensors files by name."""
    return load_golden(request.param)


@pytest.fixture
def golden_a():
    return load_golden("a")


def load_golden(name: str) -> SimpleNamespace:
    folder = GOLDEN / name
    data = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    return SimpleNamespace(folder=folder, config=json.loads((folder / "config.json").read_text()), **data)


@pytest.fixture
def golden_models(golden):
    return load_golden_models(golden)


def load_golden_models(golden) -> SimpleNamespace:
    return SimpleNamespace(
        vqgan=VQModel.from_single_file(golden.folder / "vqgan.pt", golden.config["vqgan"]),
        unet=PaellaUNet.from_single_file(golden.folder / "paella.pt", golden.config["paella"]),
        prior=PaellaPrior.from_single_file(golden.folder / "prior.pt", golden.config["prior"]),
    )


def manifest(name: str) -> dict[str, list]:
    return json.loads((Path(__file__).parent / "manifest" / f"{name}.json").read_text())


# tiny real components

TINY_UNET = dict(
    sample_size=8,
    num_vq_embeddings=32,
    token_embed_dim=8,
    time_embed_dim=8,
    text_embed_dim=16,
    clip_embed_dim=12,
    clip_seq_len=2,
    cross_attention_dim=16,
    block_out_channels=(16, 16),
    layers_per_block=(1, 2),
    block_types=("CT", "CTA"),
    num_attention_heads=(-1, 2),
)


def randomise(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> torch.nn.Module:
    """Random parameters: as published, a fresh classifier is zero and all logits are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def tiny_unet(**kwargs) -> PaellaUNet:
    return randomise(PaellaUNet(**TINY_UNET | kwargs))


def tiny_components(**kwargs) -> dict:
    """Every component of a pipeline, real classes with a few thousand parameters."""
    from diffusers import DDPMWuerstchenScheduler
    from transformers import (
        ByT5Tokenizer,
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    torch.manual_seed(0)
    components = {
        "vqgan": randomise(VQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=32)),
        "unet": tiny_unet(),
        "scheduler": PaellaScheduler(num_vq_embeddings=32),
        "text_encoder": T5EncoderModel(
            T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=False)
        ),
        "tokenizer": ByT5Tokenizer(),
        "text_encoder_2": CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=384,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                projection_dim=12,
                max_position_embeddings=32,
                pad_token_id=0,
                eos_token_id=1,
            )
        ),
        "tokenizer_2": ByT5Tokenizer(),
        "image_encoder": CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
                projection_dim=12,
            )
        ),
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        "prior": randomise(PaellaPrior(embedding_dim=12, hidden_dim=16, time_embed_dim=8, num_layers=2)),
        "prior_scheduler": DDPMWuerstchenScheduler(),
    } | kwargs
    for name in ("text_encoder", "text_encoder_2", "image_encoder"):
        if components[name] is not None:
            components[name].eval()
    return components


def tiny_pipeline(**kwargs) -> PaellaPipeline:
    pipe = PaellaPipeline(**tiny_components(**kwargs))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> PaellaPipeline:
    return tiny_pipeline()


@pytest.fixture
def float64(pipe):
    """
    `pipe` in float64, for tests that compute the same tokens in two ways, such as alone and in a batch. Processors round
    each way differently; in float32 that decides a draw once in a few thousand tests, in float64 never.
    """
    pipe.to(torch.float64)


@pytest.fixture
def published(hub, tmp_path):
    """The three repositories in miniature; the keyword arguments that load from them into a cache of the test's own."""
    from transformers import ByT5Tokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, T5Config, T5ForConditionalGeneration

    from paella_diffusers.loaders.original_repo import BYT5_REPO, CLIP_REPO

    golden = load_golden("a")
    repo = hub.repo("dome272/Paella")
    for name, published_name in (("paella", "paella_v3"), ("vqgan", "vqgan_f4"), ("prior", "prior_v1")):
        shutil.copy(golden.folder / f"{name}.pt", repo / f"{published_name}.pt")
    torch.manual_seed(0)
    byt5 = T5Config(vocab_size=384, d_model=40, d_kv=8, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=False)
    T5ForConditionalGeneration(byt5).to(torch.bfloat16).save_pretrained(hub.repo(BYT5_REPO))  # the whole T5, as published
    ByT5Tokenizer().save_pretrained(hub.repo(BYT5_REPO))
    text = dict(vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text |= dict(max_position_embeddings=32, eos_token_id=1, pad_token_id=0)
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    CLIPModel(clip).save_pretrained(hub.repo(CLIP_REPO))
    ByT5Tokenizer().save_pretrained(hub.repo(CLIP_REPO))
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(hub.repo(CLIP_REPO))
    return {"original_config": golden.config, "cache_dir": tmp_path / "cache"}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for index in range(20):
        Image.new("RGB", (36, 32), (index * 12, 100, 200 - index * 10)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": [f"colour {index}", f"no. {index}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Pairs of noise and tokens as the batch command writes them, in two shards."""
    tmp_path = tmp_path_factory.mktemp("teacher")
    tiny_pipeline(prior=None, prior_scheduler=None).save_pretrained(tmp_path / "model")
    rows, prompts = tmp_path / "prompts.jsonl", ["red", "green", "a blue one", "black"]
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = ["--output", "tokens", "--no-prior", "--steps", "3", "--shard-size", "2", "--batch-size", "2"]
    command = ["batch", rows, "--model", tmp_path / "model", "--out", tmp_path / "pairs", "--device", "cpu", *options]
    assert command_line(list(map(str, command))) == 0
    return str(tmp_path / "pairs")


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def pretrained(saved_pipeline, tmp_path):
    """A tiny pipeline's folder, the test's own. Dropout is on: its random numbers must be continued, too."""
    shutil.copytree(saved_pipeline, tmp_path / "pretrained")
    return str(tmp_path / "pretrained")
