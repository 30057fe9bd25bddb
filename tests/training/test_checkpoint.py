import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from paella_diffusers.training import checkpoint


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two checkpoints, and a copy that someone made of one."""
    for name in ("00000002", "00000004", "00000002-backup"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "files.json").write_text("{}")
    return tmp_path


def test_a_copy_with_another_name_is_no_checkpoint(folder):
    assert [path.name for path in checkpoint.find_checkpoints(folder)] == ["00000002", "00000004"]
    checkpoint._delete_others(folder / "00000004", keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["00000002-backup", "00000004"]


def test_files_that_cannot_be_deleted_do_not_end_a_run(folder, monkeypatch):
    """As on NFS, where a file that is open keeps its folder."""

    def rmtree(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError("Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    checkpoint.discard(folder / "00000002")
    assert [path.name for path in checkpoint.find_checkpoints(folder)] == ["00000004"]
    checkpoint._new_folder(folder / "00000006")


def test_all_files_are_on_the_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    unfinished, log = tmp_path / ".00000002-unfinished", []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: log.append(os.readlink(f"/proc/self/fd/{file}")) or sync(file))
    monkeypatch.setattr(os, "replace", lambda *names: log.append(str(names[1])) or replace(*names))
    (unfinished / "unet").mkdir(parents=True)
    files = [unfinished / "state.pt", unfinished / "unet" / "weights.safetensors"]
    for path in files:
        path.write_bytes(b"content")
    checkpoint.complete(unfinished, tmp_path / "00000002")
    named = log.index(str(tmp_path / "00000002"))
    assert {*map(str, files), str(unfinished / "files.json"), str(unfinished), str(unfinished / "unet")} <= {*log[:named]}
    assert str(tmp_path) in log[named:]  # and the name, too


def test_only_the_process_that_writes_copies_weights_and_optimizer_states():
    model = torch.nn.Linear(3, 2)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    weights, states = checkpoint.whole_weights(model), checkpoint.optimizer_state(optimizer, names)
    assert all(torch.equal(weights[name], parameter) for parameter, name in names.items())
    assert weights["weight"].data_ptr() != model.weight.data_ptr()
    assert states["weight"]["exp_avg"].shape == (2, 3)
    assert set(checkpoint.whole_weights(model, keep=False).values()) == {None}
    states = checkpoint.optimizer_state(optimizer, names, keep=False)
    assert {value for state in states.values() for value in state.values()} == {None}


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_random_numbers_are_continued_on_this_processs_device(monkeypatch, kind):
    """Whatever its index, and however many there are."""
    loaded = []
    get, put = lambda device: torch.tensor([device.index]), lambda *call: loaded.append(call)
    device_module = SimpleNamespace(get_rng_state=get, set_rng_state=put)
    monkeypatch.setattr(torch, "get_device_module", lambda device: device_module)
    states = checkpoint.random_states(torch.device(kind, 3))
    expected = torch.rand(3)
    checkpoint.load_random_states(states, torch.device(kind, 0))
    assert loaded == [(torch.tensor([3]), torch.device(kind, 0))] and torch.equal(torch.rand(3), expected)
    checkpoint.load_random_states(states, torch.device("cpu"))  # or on another kind of device
    assert torch.equal(torch.rand(3), expected)
    checkpoint.load_random_states(checkpoint.random_states(torch.device("cpu")), torch.device(kind))
    assert len(loaded) == 1


def test_a_checkpoint_is_chosen_by_its_path_or_its_name(folder):
    for name in (str(folder / "00000002"), "00000002", "00000002/"):
        assert checkpoint.choose_checkpoint(name, folder) == folder / "00000002"
    with pytest.raises(FileNotFoundError, match="--resume 00000003 is no checkpoint; there are .*00000002"):
        checkpoint.choose_checkpoint("00000003", folder)
