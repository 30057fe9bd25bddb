import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import train_paella_few_steps
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook
from trainers import TINY

from paella_diffusers import PaellaPipeline, PaellaUNet


@pytest.fixture
def options(pretrained):
    return [*TINY, "--pretrained", pretrained, "--batch-size", "4"]


def train(options, data, folder, *more):
    command = [*options, "--data", data, "--output-dir", folder, *more]
    args = train_paella_few_steps.parse_args(list(map(str, command)))
    train_paella_few_steps.main(args)


def draw(pipe, **call):
    pipe.set_progress_bar_config(disable=True)
    return pipe("red", generator=torch.Generator().manual_seed(0), output_type="latent", **call)


def test_the_result_draws_with_few_steps_and_without_guidance(options, pairs, tmp_path, pretrained):
    folder = tmp_path / "out"
    train(options, pairs, folder, "--max-steps", 3, "--num-inference-steps", 2, "--temperature", 0.5, "--prompts", "red")
    assert (folder / "samples" / "00000003.png").exists()
    pipe = PaellaPipeline.from_pretrained(folder)
    output = draw(pipe)
    assert output.steps_taken == [2]  # without a second pass
    explicit = draw(pipe, num_inference_steps=2, guidance_scale=None, temperature=0.5, use_prior=False)
    assert torch.equal(output.images, explicit.images)
    before = PaellaPipeline.from_pretrained(pretrained).unet.state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())
    card = (folder / "README.md").read_text()
    assert "--num-inference-steps 2" in card and str(tmp_path) not in card
    # and is the model of a second round
    train([*options, "--pretrained", folder], pairs, tmp_path / "second", "--max-steps", 1, "--last-round")
    assert draw(PaellaPipeline.from_pretrained(tmp_path / "second")).steps_taken == [1]


def test_resumed_it_ends_as_if_not_interrupted(options, pairs, tmp_path):
    def weights(folder):
        return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")

    train(options, pairs, tmp_path / "whole", "--max-steps", 4)
    train(options, pairs, tmp_path / "parts", "--max-steps", 2)
    train(options, pairs, tmp_path / "parts", "--max-steps", 4, "--resume", "latest")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_an_adapter(options, pairs, tmp_path, pretrained):
    folder = tmp_path / "out"
    train(options, pairs, folder, "--max-steps", 2, "--rank", 2, "--num-inference-steps", 2)
    pipe = PaellaPipeline.from_pretrained(pretrained)
    call = dict(num_inference_steps=2, temperature=0.3, guidance_scale=1, use_prior=False)
    sample = torch.zeros(1, 8, 8, dtype=torch.long), 1.0, torch.ones(1, 3, 16)
    before = pipe.unet(*sample).sample
    pipe.load_lora_weights(folder)
    assert not torch.equal(pipe.unet(*sample).sample, before)
    assert draw(pipe, **call).steps_taken == [2]
    arguments = '"a prompt", ' + ", ".join(f"{name}={value:g}" for name, value in list(call.items())[:3])
    assert f"pipe({arguments}, use_prior=False)" in (folder / "README.md").read_text()


def read(pairs: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Initial noise and tokens of each pair."""
    arrays = {"noise": [], "tokens": []}
    for path in sorted(Path(pairs).glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".npy"):
                    array = np.load(io.BytesIO(archive.extractfile(member).read()))
                    arrays[member.name.split(".")[1]].append(torch.from_numpy(array))
    return list(zip(*arrays.values()))


def test_training_sees_a_pairs_own_noise(options, pairs, tmp_path):
    seen = []
    watch = lambda model, inputs: seen.append(inputs[:2]) if isinstance(model, PaellaUNet) else None
    with register_module_forward_pre_hook(watch):
        train(options, pairs, tmp_path / "out", "--max-steps", 6, "--last-round", "--num-inference-steps", 2)
    samples, levels = map(torch.cat, zip(*seen))
    assert set(levels.tolist()) == {0.5, 1.0}  # of two steps
    known = read(pairs)
    for sample, level in zip(samples, levels):
        whole = [bool((sample == noise).all()) for noise, _ in known]
        mixed = [bool(((sample == noise) | (sample == tokens)).all()) for noise, tokens in known]
        assert sum(mixed) == 1 and sum(whole) == (level == 1)


def write(folder, **changes: bytes | None) -> str:
    """One pair of a model with 32 tokens, with other files, or without those that are None."""
    folder.mkdir()
    grid = npy(np.full((8, 8), 3, np.int32))
    files = {"json": b'{"prompt": "red"}', "tokens.npy": grid, "noise.npy": grid} | changes
    with tarfile.open(folder / "000000.tar", "w") as archive:
        for name, content in files.items():
            if content is not None:
                member = tarfile.TarInfo(f"0.{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(folder)


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def made(**values) -> dict:
    return {"json": json.dumps({"prompt": "red"} | values).encode()}


@pytest.mark.parametrize(
    "files, message",
    [
        ({"noise.npy": None}, "it has no `noise`; pairs are written by `paella-diffusers batch"),
        ({"tokens.npy": None, "png": b"a picture"}, "it has no `tokens`; pairs are written by"),
        ({"noise.npy": npy(np.zeros((8, 4), np.int32))}, r"`noise` has the shape \(8, 4\), but must have \(8, 8\)"),
        ({"tokens.npy": npy(np.full((8, 8), 40))}, "`tokens` must be from 0 to 32 - 1, got 40 to 40"),
        ({"json": b"{}"}, "it has no caption"),
        (made(made_with={"scheduler": {"num_vq_embeddings": 64}}), "by a model of 64 tokens, but --pretrained has 32"),
        (made(made_with={"use_prior": True}), "was drawn with the prior.*--no-prior"),
        (made(arguments={"use_prior": True}), "was drawn with the prior.*--no-prior"),
    ],
)
def test_pairs_that_are_refused(options, tmp_path, files, message):
    data = write(tmp_path / "bad", **files)
    with pytest.raises(ValueError, match=message):
        train(options, data, tmp_path / "out", "--max-steps", 1)


def test_data_without_pairs_are_refused(options, tmp_path, pictures):
    with pytest.raises(ValueError, match=r"--data .*pictures has no shards: pairs are written by"):
        train(options, pictures, tmp_path / "out", "--max-steps", 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-inference-steps", "0"], "`num_inference_steps` must be an integer of at least 1, got 0"),
        (["--temperature", "0"], "`temperature` must be"),
        (["--aspect-ratio-buckets"], "--aspect-ratio-buckets crops pictures"),
        (["--text-dropout", "0.1"], "--text-dropout trains for guidance"),
    ],
)
def test_arguments_that_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        train_paella_few_steps.parse_args(["--pretrained", "a", "--data", "b", "--output-dir", "c", *arguments])
    assert message in capsys.readouterr().err
