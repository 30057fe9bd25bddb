"""Training steps by accelerate against the published one."""

import re
from types import SimpleNamespace

import pytest
import train_paella
from accelerate import DistributedType
from golden_step import golden_step
from trainers import Launch

from paella_diffusers.training import run


@pytest.mark.parametrize("passes", [1, 2])
def test_golden_step_in_passes(golden, passes):
    loss, norm = golden_step(golden.folder, passes)
    assert loss == pytest.approx(golden.paella_io["train_loss"].item(), rel=1e-5)
    assert norm == pytest.approx(golden.paella_io["train_grad_norm"].item(), rel=1e-5)


def test_golden_step_in_two_processes(golden_a):
    output = Launch("golden_step", [golden_a.folder], processes=2).finish()
    loss, norm = map(float, re.search(r"golden (\S+) (\S+)", output).groups())
    assert loss == pytest.approx(golden_a.paella_io["train_loss"].item(), rel=1e-5)
    assert norm == pytest.approx(golden_a.paella_io["train_grad_norm"].item(), rel=1e-5)


@pytest.mark.parametrize("option", [["--optimizer", "prodigy"], ["--adam-8bit"]])
def test_optimizers_that_cannot_be_sharded_are_refused_before_any_work(option, tmp_path, monkeypatch):
    monkeypatch.setattr("paella_diffusers.training.arguments.find_spec", lambda name: True)  # as if it was installed
    sharding = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(run.TrainingRun, "_make_accelerator", lambda self: sharding)
    options = ["--data", "nowhere", "--pretrained", "nothing", "--output-dir", str(tmp_path / "out"), *option]
    with pytest.raises(
        ValueError, match=f"{' '.join(option)} cannot be sharded: leave it out with FSDP, or take .*ddp.yaml"
    ):
        train_paella.main(train_paella.parse_args(options))
    assert not (tmp_path / "out").exists()


def test_accelerates_own_compilation_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    options = ["--data", "nowhere", "--pretrained", "nothing", "--output-dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="the dynamo backend EAGER.*take it out.*, and give --compile instead"):
        train_paella.main(train_paella.parse_args(options))
    assert not (tmp_path / "out").exists()


def test_deepspeed_is_refused_by_name(tmp_path, monkeypatch):
    sharding = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr(run, "Accelerator", lambda **options: sharding)
    options = ["--data", "nowhere", "--pretrained", "nothing", "--output-dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="DeepSpeed is not supported: take examples/configs/fsdp.yaml"):
        train_paella.main(train_paella.parse_args(options))
