import json

import pytest
import torch
from conftest import GOLDEN, load_golden, load_golden_models
from kills import killed_before, leftovers
from safetensors.torch import load_file, save_file

from paella_diffusers import PaellaPipeline, PaellaUNet
from paella_diffusers.cli import main
from paella_diffusers.convert import convert_to_diffusers, convert_to_original

FILES = {"paella": "paella_v3.pt", "vqgan": "vqgan_f4.pt", "prior": "prior_v1.pt"}


def tokens(pipe):
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 64, "num_inference_steps": 2, "output_type": "latent", "prior_num_inference_steps": 2}
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images


def test_published_to_diffusers(published, tmp_path):
    convert_to_diffusers("dome272/Paella", tmp_path / "converted", **published)
    expected = tokens(PaellaPipeline.from_pretrained("dome272/Paella", **published))
    assert torch.equal(tokens(PaellaPipeline.from_pretrained(tmp_path / "converted")), expected)
    saved = PaellaPipeline.from_pretrained("dome272/Paella", **published)
    saved.save_pretrained(tmp_path / "saved")
    ours, theirs = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("converted", "saved"))
    ours.pop("_name_or_path", None), theirs.pop("_name_or_path", None)
    assert ours == theirs
    assert not list(tmp_path.glob(".*unfinished*"))


def test_parts_left_out_and_half_precision(published, tmp_path):
    leave_out = ("prior", "prior_scheduler", "image_encoder", "feature_extractor", "text_encoder_2", "tokenizer_2")
    convert_to_diffusers("dome272/Paella", tmp_path / "half", torch.bfloat16, leave_out, **published)
    pipe = PaellaPipeline.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert pipe.prior is None and pipe.text_encoder_2 is None and pipe.unet.dtype == torch.bfloat16
    reference = PaellaPipeline.from_pretrained(
        "dome272/Paella", dtype=torch.bfloat16, **dict.fromkeys(leave_out), **published
    )
    assert torch.equal(tokens(pipe), tokens(reference))


@pytest.mark.parametrize("config", ["a", "b"])
def test_there_and_back_is_bit_identical(config, tmp_path):
    golden = load_golden(config)
    models = vars(load_golden_models(golden))
    PaellaPipeline(models["vqgan"], models["unet"], None, prior=models["prior"]).save_pretrained(tmp_path / "diffusers")
    convert_to_original(tmp_path / "diffusers", tmp_path / "original")
    for name, file in FILES.items():
        expected = torch.load(GOLDEN / config / f"{name}.pt", weights_only=True)
        state_dict = torch.load(tmp_path / "original" / file, weights_only=True)
        assert state_dict.keys() == expected.keys()
        assert all(
            torch.equal(state_dict[key], tensor) and state_dict[key].dtype == tensor.dtype
            for key, tensor in expected.items()
        )
    original_config = json.loads((tmp_path / "original" / "config.json").read_text())
    for name, values in golden.config.items():
        if name in original_config:
            assert values.items() <= original_config[name].items()


def test_shards(tmp_path):
    golden = load_golden("a")
    PaellaUNet.convert_single_file(golden.folder / "paella.pt", tmp_path, golden.config["paella"], max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    unet, expected = PaellaUNet.from_pretrained(tmp_path), load_golden_models(golden).unet
    assert dict(unet.config).items() >= {k: v for k, v in expected.config.items() if not k.startswith("_")}.items()
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), expected.state_dict().values()))


def test_whole_or_nothing(published, hub, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists already"):
        convert_to_diffusers("dome272/Paella", tmp_path / "there", **published)
    (hub.root / "dome272/Paella" / "prior_v1.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="prior_v1.pt is not a state dict"):
        convert_to_diffusers("dome272/Paella", tmp_path / "new", **published)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*unfinished*"))
    with pytest.raises(ValueError, match="Only optional components can be left out.*unet"):
        convert_to_diffusers("dome272/Paella", tmp_path / "new", leave_out=("unet",), **published)


def test_a_killed_conversion_leaves_nothing_that_the_next_does_not_remove(published, hub, tmp_path):
    source = hub.root / "dome272/Paella"
    options = {
        "leave_out": tuple(name for name in PaellaPipeline._optional_components if not name.startswith("prior")),
        "original_config": published["original_config"],
    }
    folder = tmp_path / "result" / "converted"
    folder.parent.mkdir()
    left, operation = [], 0
    while killed_before(operation, folder.parent, lambda: convert_to_diffusers(source, folder, **options)):
        left.append(len(list(folder.parent.glob(".*"))))
        if folder.exists():
            break
        operation += 7
    assert max(left) == 1 and len(left) > 3  # of one run; the next has removed those before
    if not folder.exists():
        convert_to_diffusers(source, folder, **options)
    assert PaellaPipeline.from_pretrained(folder).prior is not None and not leftovers(folder.parent)


def test_commands(published, hub, tmp_path, monkeypatch, capsys):
    golden = load_golden("a")
    (hub.root / "dome272/Paella" / "config.json").write_text(json.dumps(golden.config))
    source = str(hub.root / "dome272/Paella")
    parts = ["text_encoder", "text_encoder_2", "image_encoder"]
    assert main(["convert", source, str(tmp_path / "one"), "--leave-out", *parts]) == 0
    assert main(["convert", str(tmp_path / "one"), str(tmp_path / "two"), "--to-original"]) == 0
    for name, file in FILES.items():
        expected = torch.load(GOLDEN / "a" / f"{name}.pt", weights_only=True)
        state_dict = torch.load(tmp_path / "two" / file, weights_only=True)
        assert all(torch.equal(state_dict[key], tensor) for key, tensor in expected.items())
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "one"), str(tmp_path / "three")]) == 2
    assert "is in diffusers' layout already" in capsys.readouterr().err
    assert main(["convert", source, str(tmp_path / "one")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused_by_name(published, tmp_path):
    convert_to_diffusers("dome272/Paella", tmp_path / "there", **published)
    path = tmp_path / "there" / "unet" / "diffusion_pytorch_model.safetensors"
    whole, weights = path.read_bytes(), load_file(path)
    head = weights["head.weight"]
    for broken, message in (
        (weights | {"head.weight": head[:5].clone()}, r"head.weight is floating point \[5,"),
        (weights | {"head.weight": head.long()}, "head.weight is integer"),
        (weights | {"tail.weight": head.clone()}, "unexpected keys tail.weight"),
        ({key: tensor for key, tensor in weights.items() if key != "head.weight"}, "missing keys head.weight"),
    ):
        save_file(broken, path)
        with pytest.raises(ValueError, match=message):
            convert_to_original(tmp_path / "there", tmp_path / "back")
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="damaged"):
        convert_to_original(tmp_path / "there", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_shards_are_in_their_folder(tmp_path):
    models = vars(load_golden_models(load_golden("a")))
    PaellaPipeline(models["vqgan"], models["unet"], None).save_pretrained(tmp_path / "diffusers")
    folder = tmp_path / "diffusers" / "unet"
    weights = folder / "diffusion_pytorch_model.safetensors"
    names = load_file(weights)
    weights.rename(tmp_path / "outside.safetensors")
    for name in ("../../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
        (folder / f"{weights.name}.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="names files outside its folder, which are not read: .*outside.safetensors"):
            convert_to_original(tmp_path / "diffusers", tmp_path / "original")
