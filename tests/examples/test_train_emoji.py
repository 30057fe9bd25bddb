"""The script that trained the embedded model, on a few random pictures and for a few steps."""

import importlib
import random
from pathlib import Path

import pytest
import torch
import train_emoji

from paella_diffusers import EMOJI_MODEL, PaellaPipeline


@pytest.fixture
def images():
    return torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def captions(images):
    names = [f"icon {i}" for i in range(64)]
    return train_emoji.Captions(names, [[f"word {i}", "common"] for i in range(64)], images, held_out={"a icon 3"})


def test_all_stages_make_a_pipeline(images, captions, tmp_path):
    torch.manual_seed(0)
    vqgan = train_emoji.train_vqgan(images, steps=4, coarse_steps=1, work_dir=tmp_path)
    encoders = train_emoji.train_text(images, captions, steps=2, steps_all=2, work_dir=tmp_path)
    pipe = train_emoji.train_unet(vqgan, encoders, images, captions, steps=2, work_dir=tmp_path, compile=False)
    assert pipe("icon 1", num_inference_steps=2).images[0].size == (64, 64)
    assert (tmp_path / "unet-000002.png").exists()
    # a finished run is found again, not repeated
    again = train_emoji.train_unet(vqgan, encoders, images, captions, steps=2, work_dir=tmp_path, compile=False)
    assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), again.unet.parameters()))


def test_the_trainers_take_it_from_there(images, captions, tmp_path, monkeypatch):
    """With one step each, and in this process."""

    def run(command, check):
        script = importlib.import_module(Path(command[1]).stem)
        args = script.parse_args(command[2:])
        vars(args).update({"max_steps": 1, "batch_size": 4, "epochs": 1, "mixed_precision": None, "sample_every": 1})
        script.main(args)

    monkeypatch.setattr(train_emoji.subprocess, "run", run)
    monkeypatch.setattr(train_emoji, "SHEET", ["icon 1"])
    torch.manual_seed(0)
    pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)
    train_emoji.add_image_encoder(pipe, images, captions.names, steps=1, work_dir=tmp_path)
    ratio = pipe.unet.clip_image_proj.weight / pipe.unet.clip_text_proj.weight  # the same but for the scale of embeddings
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    train_emoji.write_dataset(tmp_path / "icons", captions.names[:8], images[:8], captions, count=3)
    refined = train_emoji.refine(pipe, tmp_path / "icons", tmp_path)
    assert refined.prior is not None and refined("icon 1", num_inference_steps=2).images[0].size == (64, 64)
    assert (tmp_path / "paella" / "samples" / "00000001.png").exists()


def test_a_resumed_stage_ends_as_an_uninterrupted_one(tmp_path):
    def run(folder, stop_at=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def loss(step):
            if step == stop_at:
                raise KeyboardInterrupt
            return (model(torch.randn(8, 3)) - train_emoji.batch(step, 8, 20)[:, None]).square().mean()

        optimizers = train_emoji.muon_and_adam(model, keep_adam=())
        train_emoji.fit("linear", model, optimizers, loss, steps=6, work_dir=folder, warmup=2, save_every=0)
        return model.weight

    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_at=4)
    assert torch.equal(run(tmp_path / "parts"), run(tmp_path / "whole"))


def test_batches_go_through_every_picture():
    seen = torch.cat([train_emoji.batch(step, 8, 20) for step in range(5)])
    assert sorted(seen[:20].tolist()) == sorted(seen[20:].tolist()) == list(range(20))


def test_captions_are_of_the_icon_and_never_held_out(captions):
    rng = random.Random(0)
    drawn = {captions.draw(3, rng, plain=0.5) for _ in range(500)}
    assert "icon 3" in drawn and "word 3" in drawn and len(drawn) > 10
    assert "a icon 3" not in drawn
    assert "common" not in drawn and any("common" in caption for caption in drawn)  # said of too many icons to stand alone


def test_colours_of_icons():
    images = torch.ones(3, 3, 8, 8)
    images[0, :, 2:6] = torch.tensor([0.9, 0.2, 0.2])[:, None, None]
    images[1, :, :4] = torch.tensor([0.2, 0.5, 0.9])[:, None, None]
    images[1, :, 6:] = torch.tensor([0.2, 0.6, 0.25])[:, None, None]
    assert train_emoji.colours_of(images) == [["red"], ["green", "blue"], []]


def test_codes_cover_the_latents_evenly():
    rows = torch.cat([torch.zeros(1000, 2) + torch.randn(1000, 2) * 0.01, torch.eye(2) * 5])
    chosen = train_emoji.farthest_points(rows, 3)
    assert {tuple(row.round().int().tolist()) for row in chosen} == {(0, 0), (5, 0), (0, 5)}
