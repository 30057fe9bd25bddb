"""Saving models and pipelines over earlier ones, and refusing weights that do not fit."""

import errno
import json
import os

import peft
import pytest
import safetensors.torch
import torch
from conftest import tiny_pipeline, tiny_unet
from kills import contents, killed_before, leftovers
from safetensors.torch import load_file, save_file

from paella_diffusers import PaellaPipeline, PaellaUNet
from paella_diffusers.loaders import atomic
from paella_diffusers.loaders.atomic import restore_folder

SMALL = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer_2", "image_encoder", "feature_extractor"])
OTHERS = {"README.md": b"edited", "checkpoints/00000001/state": b"mine", "logs/events": b"mine", ".git/HEAD": b"mine"}


def pipeline_of(value: float) -> PaellaPipeline:
    """A small pipeline all of whose weights are equal."""
    pipe = tiny_pipeline(prior=None, prior_scheduler=None, **SMALL)
    for model in (pipe.unet, pipe.vqgan):
        for parameter in model.parameters():
            parameter.data.fill_(value)
    return pipe


@pytest.fixture
def pipe() -> PaellaPipeline:
    return tiny_pipeline(prior=None, prior_scheduler=None, **SMALL)


@pytest.fixture
def no_sync(monkeypatch):
    """Kills need none, and the tests are faster without."""
    monkeypatch.setattr(atomic, "_sync", lambda path: None)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("what", ["pipeline", "model"])
def test_killed_at_any_file_operation_a_folder_is_old_or_new(tmp_path, monkeypatch, no_sync, what, exchange):
    """Without an exchange there is a gap, in which nothing loads; the next save or `restore_folder` restores the old."""
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *names: False)
    part = (lambda value: pipeline_of(value)) if what == "pipeline" else (lambda value: pipeline_of(value).unet)
    first, second = part(1.0), part(2.0)
    second.save_pretrained(tmp_path / "reference", max_shard_size="40KB")
    folder = tmp_path / "folder"
    first.save_pretrained(folder)
    for name, data in OTHERS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "checkpoints" / "00000001").chmod(0o555)
    old, new = contents(folder), contents(tmp_path / "reference") | OTHERS
    seen, operation = [], 0
    while killed_before(operation, tmp_path, lambda: second.save_pretrained(folder, max_shard_size="40KB")):
        state = contents(folder)
        if state not in (old, new):
            assert not exchange and f"{first.config_name}" not in state
            with pytest.raises(OSError, match="was interrupted. Restore what was there before"):
                type(first).from_pretrained(folder)
            restore_folder(folder)
            assert contents(folder) == old
            seen.append("interrupted")
        else:
            seen.append("new" if state == new else "old")
        if state == new:
            break
        operation += 1 if exchange or seen[-1] == "interrupted" else 3
    assert "old" in seen and seen[-1] == "new" and ("interrupted" in seen) == (not exchange), seen
    assert type(first).from_pretrained(folder)
    first.save_pretrained(folder)  # removes what the killed processes left
    assert contents(folder) == old and not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda index: index | {"weight_map": {"a": "../other.safetensors"}}, ValueError, "names files outside its folder"),
        (lambda index: index | {"weight_map": {"a": ".."}}, ValueError, "names files outside its folder"),
        (lambda index: index | {"weight_map": {"a": 5}}, ValueError, "its `weight_map` must have a file for each tensor"),
        (lambda index: {"weight_map": index["weight_map"]}, ValueError, "its `metadata` must be an object"),
        (lambda index: index | {"weight_map": {"a": "b.safetensors"}}, FileNotFoundError, "has no b.safetensors, which"),
        (lambda index: [], ValueError, "must hold a JSON object"),
    ],
)
def test_damaged_indices_of_shards_are_refused_by_name(tmp_path, change, error, message):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(error, match=message):
        type(unet).from_pretrained(tmp_path)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    pipeline_of(1.0).save_pretrained(tmp_path / "folder")
    before = contents(tmp_path / "folder")
    real = safetensors.torch.save_file
    for component in (1, 2):
        saved = []

        def save_file(*args, saved=saved, component=component, **kwargs):
            saved.append(args)
            if len(saved) == component:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(safetensors.torch, "save_file", save_file)
        with pytest.raises(OSError, match="No space left"):
            pipeline_of(2.0).save_pretrained(tmp_path / "folder")
        assert contents(tmp_path / "folder") == before and not leftovers(tmp_path)


def test_two_processes_save_to_one_folder(tmp_path, no_sync):
    pipe, children = pipeline_of(1.0), []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(5):
                    pipe.save_pretrained(tmp_path / "folder")
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    pipe.save_pretrained(tmp_path / "reference")
    assert contents(tmp_path / "folder") == contents(tmp_path / "reference") and not leftovers(tmp_path)


def test_saving_one_variant_leaves_another(tmp_path):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path)
    unet.save_pretrained(tmp_path, variant="bf16", max_shard_size="10KB")
    unet.save_pretrained(tmp_path, variant="bf16")
    names = ["config.json", "diffusion_pytorch_model.bf16.safetensors", "diffusion_pytorch_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


# ------------------------------------------------------------------------------------------------- weights that do not fit


def test_deceiving_safetensors_are_refused_by_name(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    state_dict = load_file(path)

    path.write_bytes(whole[:-100])
    with pytest.raises((OSError, ValueError), match="is damaged.*again|Unable to load weights.*safetensors"):
        PaellaUNet.from_pretrained(tmp_path)
    path.write_bytes((10**9).to_bytes(8, "little") + whole[8:])  # the header's length is a lie
    with pytest.raises((OSError, ValueError), match="is damaged.*again|Unable to load weights.*safetensors"):
        PaellaUNet.from_pretrained(tmp_path)
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header["head.weight"]["shape"][0] *= 2  # so is a tensor's shape
    path.write_bytes(whole[:8] + json.dumps(header).encode().ljust(size)[:size] + whole[8 + size :])
    with pytest.raises((OSError, ValueError), match="is damaged.*again|Unable to load weights.*safetensors"):
        PaellaUNet.from_pretrained(tmp_path)
    save_file(state_dict | {"head.weight": state_dict["head.weight"][:5].clone()}, path)
    with pytest.raises((ValueError, RuntimeError), match="head.weight"):
        PaellaUNet.from_pretrained(tmp_path)
    save_file(state_dict | {"head.weight": state_dict["head.weight"].long()}, path)
    with pytest.raises(ValueError, match="does not fit PaellaUNet: wrong tensors head.weight is integer"):
        PaellaUNet.from_pretrained(tmp_path)
    path.unlink()
    torch.save(state_dict | {"head.weight": state_dict["head.weight"].long()}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="does not fit PaellaUNet: wrong tensors head.weight is integer"):
        PaellaUNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_incomplete_weights_are_refused_by_name(pipe, tmp_path, low_cpu_mem_usage):
    for name, missing in (("unet", "head.weight"), ("vqgan", "down_blocks.1.1.running_var")):
        model = getattr(pipe, name)
        missing = missing if missing in model.state_dict() else list(model.state_dict())[-1]
        model.save_pretrained(tmp_path / name)
        path = tmp_path / name / "diffusion_pytorch_model.safetensors"
        state_dict = load_file(path)
        del state_dict[missing]
        save_file(state_dict, path)
        with pytest.raises(ValueError, match=f"does not fit {type(model).__name__}: missing keys {missing}"):
            type(model).from_pretrained(tmp_path / name, low_cpu_mem_usage=low_cpu_mem_usage)


def test_saving_with_adapters_attached_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    before = contents(tmp_path)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="Adapters are attached.*push_lora_to_hub"):
        pipe.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="Adapters are attached.*push_lora_to_hub"):
        pipe.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
