import io
from pathlib import Path

import numpy as np
import precompute
import pytest
import torch
import train_paella
import train_prior
import webdataset
from safetensors.torch import load_file
from trainers import TINY

from paella_diffusers import PaellaPipeline
from paella_diffusers.training.conditioning import Encoder
from paella_diffusers.training.data import SampleTransform, collate, load_stream
from paella_diffusers.training.unet import Computed


@pytest.fixture
def options(pictures, pretrained, tmp_path):
    options = ["--data", pictures, "--pretrained", pretrained, "--output-dir", str(tmp_path / "computed")]
    return [*options, "--resolution", "32", "--num-workers", "0", "--batch-size", "3", "--shard-size", "6"]


def read(folder, **kwargs):
    stream = load_stream(str(folder), SampleTransform(32), shuffle=False, epochs=1, **kwargs)
    return {sample["text"]: sample for sample in stream}


def test_computed_is_what_would_be_computed(options, pictures, pretrained, tmp_path):
    precompute.main(precompute.parse_args(options))
    computed = read(tmp_path / "computed")
    assert len(list((tmp_path / "computed").glob("*.tar"))) == 4 and len(computed) == 20
    encoder = Encoder(PaellaPipeline.from_pretrained(pretrained))
    originals = load_stream(pictures, SampleTransform(32), epochs=1)  # the same seed: the same crops and captions
    for sample in originals:
        batch, other = collate([sample]), collate([computed[sample["text"]]])
        assert torch.equal(encoder.tokens(batch), encoder.tokens(other))
        for dropped in ((False, False, False), (True, True, True)):
            expected, found = encoder.conditioning(batch, dropped), encoder.conditioning(other, dropped)
            for name, value in expected.items():
                assert (value is None) == (found[name] is None)
                if value is not None:
                    torch.testing.assert_close(found[name], value, atol=2e-3, rtol=2e-3)
    stored = Computed.read(str(tmp_path / "computed"))
    assert stored.empty["prompt_embeds"].shape == (1, 1, 16) and stored.resolution == 32
    assert stored.spare == ["text_encoder", "text_encoder_2", "image_encoder"]
    assert Computed.read(str(tmp_path / "computed" / "{00000..00003}.tar")).parts == stored.parts


def test_arguments_of_pictures_are_said_to_have_no_effect(options, pretrained, tmp_path, caplog):
    precompute.main(precompute.parse_args([*options, "--parts", "tokens"]))
    train = ["--data", str(tmp_path / "computed"), "--pretrained", pretrained, *TINY, "--max-steps", "1"]
    train += ["--resolution", "48", "--random-flip", "--output-dir", str(tmp_path / "out")]
    train_paella.main(train_paella.parse_args(train))
    assert "No effect of --resolution, --random-flip: " in caplog.text
    assert "| resolution | 32 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("prompts", [[], ["--prompts", "red"]])
def test_training_on_it(options, pretrained, tmp_path, prompts):
    precompute.main(precompute.parse_args(options))
    train = [
        *TINY,
        "--data",
        str(tmp_path / "computed"),
        "--pretrained",
        pretrained,
        "--max-steps",
        "2",
        "--batch-size",
        "4",
    ]
    more = ["--output-dir", str(tmp_path / "unet"), "--clip-image-dropout", "0", "--sample-every", "2", *prompts]
    train_paella.main(train_paella.parse_args([*train, *more]))
    assert PaellaPipeline.from_pretrained(tmp_path / "unet").text_encoder is not None  # what is published is whole
    train_prior.main(train_prior.parse_args([*train, "--output-dir", str(tmp_path / "prior")]))


def test_training_on_float8_is_training_on_its_floats(options, pretrained, tmp_path):
    computed, results = tmp_path / "computed", []
    precompute.main(precompute.parse_args([*options, "--float8"]))
    for name in ("float8", "floats"):
        if name == "floats":
            replace_float8(computed)
        train = [*TINY, "--data", str(computed), "--pretrained", pretrained, "--max-steps", "2", "--batch-size", "4"]
        train_paella.main(train_paella.parse_args([*train, "--output-dir", str(tmp_path / name)]))
        results.append(load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def replace_float8(folder: Path):
    """Write shards anew, with float16 in place of float8."""
    for path in folder.glob("*.tar"):
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
        with webdataset.TarWriter(str(path)) as shard:
            for sample in samples:
                contents = (sample.pop(f"prompt_embeds{end}.npy") for end in ("", "_scales"))
                embeds, scales = (torch.from_numpy(np.load(io.BytesIO(content))) for content in contents)
                floats = embeds.view(torch.float8_e4m3fn).float() * scales[:, None]
                shard.write(sample | {"prompt_embeds.npy": floats.half().numpy()})


@pytest.mark.parametrize("script", [train_paella, train_prior])
def test_damaged_arrays_do_not_end_a_run(options, pretrained, tmp_path, script, caplog):
    """Tokens that do not exist, embeddings that are not finite, other shapes, and missing files are skipped and counted."""
    precompute.main(precompute.parse_args(options))
    path = tmp_path / "computed" / "0000-000000.tar"
    bad = [("tokens", np.full((8, 8), 1000, np.int16)), ("clip_text_embeds", np.full(12, np.nan, np.float16))]
    bad += [("prompt_embeds", np.ones((3, 8), np.float16)), ("clip_image_embeds", None)]
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    for sample, (name, array) in zip(samples, bad):
        del sample[f"{name}.npy"]
        if array is not None:
            buffer = io.BytesIO()
            np.save(buffer, array)
            sample[f"{name}.npy"] = buffer.getvalue()
    with webdataset.TarWriter(str(path)) as shard:
        for sample in samples:
            shard.write(sample)
    train = [*TINY, "--data", str(tmp_path / "computed"), "--pretrained", pretrained, "--batch-size", "8"]
    script.main(script.parse_args([*train, "--max-steps", "2", "--output-dir", str(tmp_path / "out")]))
    expected = 4 if script is train_paella else 2  # a prior needs neither tokens nor prompts
    assert f"{expected} samples could not be read, beside 16 that were used" in caplog.text


def test_tokens_alone(options, pretrained, tmp_path):
    precompute.main(precompute.parse_args([*options, "--parts", "tokens"]))
    sample = next(iter(read(tmp_path / "computed").values()))
    assert sample["tokens"].dtype == torch.int16 and sample.keys() == {"text", "tokens", "unreadable", "filtered", "epochs"}
    train = [*TINY, "--data", str(tmp_path / "computed"), "--pretrained", pretrained, "--max-steps", "1"]
    train_paella.main(train_paella.parse_args([*train, "--output-dir", str(tmp_path / "out")]))


def test_interrupted_it_goes_on(options, tmp_path, monkeypatch):
    whole = precompute.compute

    def interrupted(*args, calls=[]):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(precompute, "compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        precompute.main(precompute.parse_args(options))
    assert [path.name for path in sorted((tmp_path / "computed").glob("*.tar"))] == ["0000-000000.tar", "0000-000001.tar"]
    precompute.main(precompute.parse_args(options))
    assert len(read(tmp_path / "computed")) == 20


def test_embeddings_that_are_not_finite_are_skipped_and_counted(options, tmp_path, monkeypatch, caplog, capsys):
    image_embeds = Encoder.clip_image_embeds

    def broken(self, batch):
        embeds = image_embeds(self, batch)
        broken = [text.split()[-1] in ("3", "11") for text in batch["text"]]
        return torch.where(torch.tensor(broken)[:, None], torch.nan, embeds)

    monkeypatch.setattr(Encoder, "clip_image_embeds", broken)
    precompute.main(precompute.parse_args([*options, "--parts", "tokens", "clip_image_embeds"]))
    assert {text.split()[-1] for text in read(tmp_path / "computed")} == set(map(str, range(20))) - {"3", "11"}
    assert "18 samples in" in capsys.readouterr().out and "Skipped the sample with the caption" in caplog.text


def test_finished_it_stays_as_it_is(options, tmp_path):
    options = [*options, "--num-workers", "2", "--parts", "tokens"]
    precompute.main(precompute.parse_args(options))
    files = sorted((tmp_path / "computed").iterdir())
    precompute.main(precompute.parse_args(options))
    assert sorted((tmp_path / "computed").iterdir()) == files
    with pytest.raises(ValueError, match="take the same to go on, or another --output-dir"):
        precompute.main(precompute.parse_args([*options, "--resolution", "48"]))
