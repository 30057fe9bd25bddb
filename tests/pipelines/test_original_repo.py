"""`PaellaPipeline.from_pretrained("dome272/Paella")` through the real Hub client and a local server."""

import json
import shutil

import pytest
import torch
from conftest import tiny_components

from paella_diffusers import PaellaFlowMatchEulerScheduler, PaellaPipeline, PaellaScheduler
from paella_diffusers.loaders.original_repo import CLIP_REPO


def tokens(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 64, "num_inference_steps": 3, "output_type": "latent", "prior_num_inference_steps": 2}
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **call | kwargs).images


def test_published_layout_makes_an_image_and_survives_saving(published, hub, tmp_path):
    pipe = PaellaPipeline.from_pretrained("dome272/Paella", **published)
    assert [name for name, component in pipe.components.items() if component is None] == ["guider"]
    assert {m.dtype for m in pipe.components.values() if isinstance(m, torch.nn.Module)} == {torch.float32}
    assert tokens(pipe, output_type="pil")[0].size == (64, 32)
    expected = tokens(pipe)
    swapped = PaellaFlowMatchEulerScheduler.from_config(pipe.scheduler.config)

    pipe.save_pretrained(tmp_path / "saved")
    saved = PaellaScheduler.from_pretrained(tmp_path / "saved", subfolder="scheduler")
    assert tuple(PaellaFlowMatchEulerScheduler.from_config(saved.config).config.temperature) == swapped.config.temperature
    assert not list((tmp_path / "saved").rglob("*.bin"))
    assert torch.equal(tokens(PaellaPipeline.from_pretrained(tmp_path / "saved")), expected)

    shutil.copytree(tmp_path / "saved", hub.repo("someone/finetune"), dirs_exist_ok=True)
    loaded = PaellaPipeline.from_pretrained("someone/finetune", cache_dir=tmp_path / "cache")
    assert torch.equal(tokens(loaded), expected)


def test_published_folder_with_its_own_configuration(published, hub):
    """A folder in the published layout may say its sizes in `config.json`."""
    folder = hub.repo("dome272/Paella")
    (folder / "config.json").write_text(json.dumps(published.pop("original_config")))
    for source in (folder, "dome272/Paella"):
        assert tokens(PaellaPipeline.from_pretrained(source, **published)).shape == (1, 8, 16)


def test_parts_are_passed_in_and_left_out(published, hub):
    mine = tiny_components()["text_encoder"]
    pipe = PaellaPipeline.from_pretrained(
        "dome272/Paella", text_encoder=mine, text_encoder_2=None, image_encoder=None, prior=None, **published
    )
    assert pipe.text_encoder is mine
    assert [n for n, c in pipe.components.items() if c is None] == [
        "text_encoder_2", "tokenizer_2", "image_encoder", "feature_extractor", "prior", "prior_scheduler", "guider",
    ]  # fmt: skip
    assert not [request for request in hub.requests if CLIP_REPO in request or "prior_v1" in request]


def test_dtype(published):
    half = PaellaPipeline.from_pretrained("dome272/Paella", dtype=torch.bfloat16, **published)
    assert {m.dtype for m in half.components.values() if isinstance(m, torch.nn.Module)} == {torch.bfloat16}
    assert tokens(half).shape == (1, 8, 16)
    earlier = {"dtype": torch.bfloat16, "torch_dtype": None}
    assert PaellaPipeline.from_pretrained("dome272/Paella", **earlier, **published).unet.dtype == torch.bfloat16
    mixed = PaellaPipeline.from_pretrained("dome272/Paella", torch_dtype={"unet": torch.bfloat16}, **published)
    assert (mixed.unet.dtype, mixed.vqgan.dtype) == (torch.bfloat16, torch.float32)


def test_offline_after_a_first_time(published, hub):
    expected = tokens(PaellaPipeline.from_pretrained("dome272/Paella", **published))
    hub.clear()  # nothing is left to download
    loaded = PaellaPipeline.from_pretrained("dome272/Paella", local_files_only=True, **published)
    assert torch.equal(tokens(loaded), expected)
    assert hub.requests == []


def test_revision_is_that_of_the_paella_repository(published, hub):
    commit = hub.commit("dome272/Paella")
    PaellaPipeline.from_pretrained("dome272/Paella", revision=commit, prior=None, **published)
    assert [r for r in hub.requests if r.startswith("GET") and f"/resolve/{commit}/paella_v3.pt" in r]


def test_what_cannot_be_loaded_is_refused(published, hub, tmp_path):
    with pytest.raises(ValueError, match="no variants.*dtype"):
        PaellaPipeline.from_pretrained("dome272/Paella", variant="fp16", **published)
    hub.repo("someone/else").joinpath("weights.bin").write_bytes(b"")
    for source in ("someone/else", tmp_path):
        with pytest.raises(ValueError, match="neither layout.*model_index.json.*paella_v3.pt"):
            PaellaPipeline.from_pretrained(source, cache_dir=tmp_path / "cache")
    with pytest.raises(OSError, match="on the Hub, or it is private"):
        PaellaPipeline.from_pretrained("nobody/nothing", cache_dir=tmp_path / "cache")
    with pytest.raises(OSError, match="in the cache"):
        PaellaPipeline.from_pretrained("dome272/Paella", local_files_only=True, cache_dir=tmp_path / "empty")
    (hub.root / "dome272/Paella" / "vqgan_f4.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no vqgan_f4\.pt"):
        PaellaPipeline.from_pretrained(hub.root / "dome272/Paella", text_encoder=None, text_encoder_2=None, **published)
