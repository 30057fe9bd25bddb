"""Training steps by accelerate against the published one."""

import re
from types import SimpleNamespace

import pytest
import torch
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


def test_readers_that_share_shards_are_said_at_the_start(tmp_path, pretrained, caplog):
    for number in range(3):
        (tmp_path / f"{number}.tar").touch()
    options = ["--data", str(tmp_path), "--pretrained", pretrained, "--report-to", "none"]
    for workers, message in [
        (4, "4 readers (processes × workers) share 3 shards: every shard is read 2 times in an epoch. Write 4 shards or"),
        (2, "3 shards cannot be dealt out evenly to 2 readers: when as many samples were used as there are, 17% of them"),
        (3, None),
    ]:
        caplog.clear()
        more = ["--num-workers", str(workers), "--output-dir", str(tmp_path / str(workers))]
        start = run.TrainingRun(train_paella.parse_args([*options, *more]))
        start.load_data()
        start.release()
        assert message in caplog.text if message else "readers" not in caplog.text


def test_arguments_reach_what_they_are_of(tmp_path, pretrained, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=False))
    options = ["--data", "nowhere", "--pretrained", pretrained, "--output-dir", str(tmp_path / "out"), "--report-to", "none"]
    options += ["--learning-rate", "1e-4", "--scale-lr", "--batch-size", "4", "--gradient-accumulation-steps", "2"]
    options += ["--adam-epsilon", "1e-7", "--adam-beta1", "0.8", "--allow-tf32"]
    start = run.TrainingRun(train_paella.parse_args(options))
    start.release()
    expected = dict(lr=pytest.approx(8e-4), betas=(0.8, 0.999), eps=1e-7, weight_decay=0.01)
    assert start.optimizer_options() == expected and torch.backends.cuda.matmul.allow_tf32
    # which the memory table of docs/training.md counts on
    assert start.accelerator.ddp_handler.gradient_as_bucket_view


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
