"""`paella-diffusers batch`, from its options to the folder it fills."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from conftest import tiny_pipeline
from kills import contents, leftovers

from paella_diffusers.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"caption": f"picture {number}", "id": number}) + "\n" for number in range(24)))
    return str(path)


def command(model, prompts, out, *options) -> list[str]:
    sizes = ["--shard-size", "3", "--batch-size", "2", "--steps", "2", "--device", "cpu", "--no-prior"]
    return ["batch", prompts, "--out", str(out), "--columns", "prompt=caption", "key=id", "--model", model, *sizes, *options]


def test_a_folder_of_shards(model, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--size", "16x32", "--guidance-scale", "2", "--scheduler", "PaellaPsiScheduler", "--seed", "3"]
    assert main(command(model, prompts, out, *options)) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}: 8 of 8 shards\n"
    assert "24/24" in printed.err and "row" in printed.err
    with tarfile.open(out / "000007.tar") as archive:
        made = json.loads(archive.extractfile("000000023.json").read())
    assert (made["key"], made["prompt"]) == ("23", "picture 23")
    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 32, "width": 16, "use_prior": False}
    assert made["arguments"] == arguments
    assert made["made_with"]["scheduler"]["_class_name"] == "PaellaPsiScheduler"
    assert made["made_with"]["model"] == model
    assert main(command(model, prompts, out, *options[:-1], "4")) == 2
    assert "seed was 3, not 4" in capsys.readouterr().err


def test_ranks_of_a_launcher(model, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, printed in (("1", ""), ("0", "8 of 8 shards")):
        monkeypatch.setenv("RANK", rank)
        assert main(command(model, prompts, tmp_path / "out")) == 0
        assert printed in capsys.readouterr().out
    assert main(command(model, prompts, tmp_path / "out", "--processes", "2")) == 2
    assert "do not start them under a launcher" in capsys.readouterr().err


@pytest.mark.parametrize("rank, world_size", [("2", None), ("2", "2"), ("-1", "2")])
def test_a_rank_outside_of_its_world_is_refused(tmp_path, capsys, monkeypatch, rank, world_size):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size) if world_size else monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["batch", "rows.jsonl", "--out", "out"]) == 2
    assert f"RANK={rank} with WORLD_SIZE={world_size or 1}: set both" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.jsonl", "--out", "out"], "PROMPTS none.jsonl: there is no such file."),
        (["rows.txt", "--out", "out"], "PROMPTS rows.txt: give a .jsonl, .csv or .parquet file, or a dataset of the Hub."),
        (["rows.jsonl", "--out", "rows.txt"], "--out rows.txt is a file: give a folder."),
        (["rows.jsonl", "--out", "out", "--columns", "prompt"], "--columns prompt: give ARGUMENT=COLUMN"),
        (["rows.jsonl", "--out", "out", "--columns", "key=id"], "--columns must name the prompts' column as well"),
        (["rows.jsonl", "--out", "out", "--model", "no such model"], "--model no such model: there is no such file"),
    ],
)
def test_what_is_refused(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("rows.txt", "rows.jsonl"):
        (tmp_path / name).touch()
    assert main(["batch", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------- kills


def start(arguments: list[str], wait_for, of_child: bool = False) -> subprocess.Popen:
    """Start a command, and kill it, or one of its processes, as soon as `wait_for()` is true."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-m", "paella_diffusers.cli", *arguments], env=environment)
    while process.poll() is None and not wait_for():
        time.sleep(0.01)
    os.kill(children(process.pid)[-1] if of_child else process.pid, signal.SIGKILL)
    process.wait()
    return process


def children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.kills
@pytest.mark.parametrize("first, then", [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_killed_with_any_number_of_processes_and_started_with_another(model, prompts, tmp_path, first, then):
    out = tmp_path / "out"
    for shards, processes in ((1, first), (4, then), (6, first)):
        process = start(
            command(model, prompts, out, "--processes", str(processes)),
            lambda: len(list(out.glob("??????.json"))) >= shards,  # noqa: B023
        )
        assert process.returncode == -signal.SIGKILL
    assert main(command(model, prompts, out, "--processes", str(then))) == 0
    assert main(command(model, prompts, tmp_path / "whole")) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert not leftovers(out)


@pytest.mark.kills
def test_a_killed_process_of_several_ends_the_command(model, prompts, tmp_path, capfd):
    out = tmp_path / "out"
    arguments = command(model, prompts, out, "--processes", "2")
    process = start(arguments, lambda: len(list(out.glob("??????.json"))) >= 2, of_child=True)
    assert process.returncode == 1
    assert "Run the same command again" in capfd.readouterr().err
    assert main(arguments) == 0
    assert main(command(model, prompts, tmp_path / "whole")) == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.kills
def test_too_many_errors_end_all_processes(model, prompts, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text("no JSON\n" * 24)
    arguments = command(model, str(tmp_path / "bad.jsonl"), tmp_path / "out", "--processes", "2", "--max-errors", "2")
    assert main(arguments) == 2
    assert "rows were refused, more than 2" in capsys.readouterr().err
