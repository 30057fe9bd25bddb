"""The launch configurations, with stand-ins for Slurm's commands."""

import json
import os
import subprocess
import sys

import pytest
import train_paella
from safetensors.torch import load_file
from trainers import EXAMPLES, FSDP, TIMEOUT, TINY, finish, free_port, kill_group, start

from paella_diffusers import PaellaPipeline

SRUN = f"""#!{sys.executable}
# srun: as many tasks as there are, on nodes with two; one that fails ends all
import os, subprocess, sys, time
assert "--kill-on-bad-exit=1" in sys.argv
count = int(os.environ["SLURM_NTASKS"])
command = sys.argv[sys.argv.index("bash"):]
numbers = [{{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % 2), "SLURM_NODEID": str(i // 2)}} for i in range(count)]
tasks = [subprocess.Popen(command, env=os.environ | number) for number in numbers]
while any(task.poll() is None for task in tasks) and not any(task.poll() for task in tasks):
    time.sleep(0.05)
    if os.path.exists(os.environ.get("KILL_AFTER", "/none")):
        tasks[-1].kill()
for task in tasks:
    if any(other.poll() for other in tasks):
        task.kill()
sys.exit(max(abs(task.wait()) for task in tasks))
"""


@pytest.mark.parametrize("config, expected", [("ddp", {}), ("fsdp", FSDP)])
def test_what_the_trainers_find_in_their_environment(config, expected, tmp_path):
    """It is what `Launch` gives them in other tests."""
    script, names = tmp_path / "show.py", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU", *FSDP]
    show = f"json.dumps([os.environ.get(name) for name in {names}]) + os.linesep"
    script.write_text(f"import json, os\nos.write(1, ({show}).encode())\n")  # at once: both write to one pipe
    lines = finish(start(script, processes=2, config=config)).splitlines()
    found = [dict(zip(names, json.loads(line))) for line in lines if line.startswith("[")]
    assert sorted(own["RANK"] for own in found) == ["0", "1"]
    for own in found:
        assert own["LOCAL_RANK"] == own["RANK"] and own["WORLD_SIZE"] == "2" and own["ACCELERATE_USE_CPU"] == "true"
        assert {name: own[name] for name in FSDP if own[name] is not None} == expected


@pytest.mark.kills
def test_the_launch_configuration_of_fsdp(tmp_path, pictures, pretrained):
    """Two processes with half of each weight; what is published is whole."""
    options = [*TINY, "--data", pictures, "--pretrained", pretrained, "--output-dir", tmp_path / "out", "--max-steps", 2]
    finish(start("train_paella.py", *options, "--log-every", 1, processes=2, config="fsdp"))
    assert PaellaPipeline.from_pretrained(tmp_path / "out")("red", num_inference_steps=2).images[0].size == (32, 32)
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Runs the recipe in a job of so many nodes; `requeued` says how often it has submitted itself again."""
    commands = tmp_path / "commands"
    commands.mkdir()
    requeued = tmp_path / "requeued"
    # more names than a pipe holds, so that a reader of the first would cut the others off
    scontrol = f'#!/bin/sh\nif [ "$1" = requeue ]; then echo "$2" >> {requeued}; exit; fi\n'
    (commands / "scontrol").write_text(f"{scontrol}echo 127.0.0.1\nseq -f node-%.0f 20000\n")
    (commands / "srun").write_text(SRUN)
    (commands / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for path in commands.iterdir():
        path.chmod(0o755)

    def submit(*options, nodes=2, **environment):
        environment |= {"SLURM_NTASKS": str(2 * nodes), "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "7"}
        environment |= {"SLURM_CPUS_PER_TASK": "1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        environment |= {"PATH": f"{commands}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true"}
        command = ["bash", EXAMPLES / "configs" / "train_paella.sbatch", *map(str, options)]
        options = dict(env=os.environ | environment, cwd=EXAMPLES.parent, text=True, start_new_session=True)
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        try:
            stdout, stderr = job.communicate(timeout=2 * TIMEOUT)
        finally:
            kill_group(job.pid)
            job.wait()
        return subprocess.CompletedProcess(command, job.returncode, stdout, stderr)

    submit.requeued = lambda: len(requeued.read_text().splitlines()) if requeued.exists() else 0
    submit.commands = commands
    return submit


def test_the_released_case(slurm, tmp_path):
    """What every task is given is what the trainer understands."""
    script = f"#!{sys.executable}\nimport os, sys\nnames = 'RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR'.split()\n"
    script += "lines = [*(os.environ[name] for name in names), *sys.argv[1:], '====='] "
    script += "\nos.write(1, ('\\n'.join(lines) + '\\n').encode())\n"  # at once: the tasks write to one pipe
    (slurm.commands / "python").write_text(script)
    done = slurm("--batch-size", 8, DATA="a folder/{0..9}.tar", OUTPUT=str(tmp_path / "out"))
    assert done.returncode == 0 and slurm.requeued() == 0, done.stderr
    tasks = sorted(task.strip().splitlines() for task in done.stdout.split("=====\n") if task)
    assert [task[:4] for task in tasks] == [[str(i), str(i % 2), "4", "127.0.0.1"] for i in range(4)]
    for task in tasks:
        assert task[4] == "examples/train_paella.py"
        args = train_paella.parse_args(task[5:])
        assert args.data == "a folder/{0..9}.tar" and len(args.prompts) == 2 and args.resume == "latest"
        assert args.batch_size == 8 and args.gradient_checkpointing and args.mixed_precision == "bf16"


def test_slurm_warns_before_the_limit_and_keeps_the_log():
    lines = (EXAMPLES / "configs" / "train_paella.sbatch").read_text().splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--signal=USR1@600", "--requeue", "--open-mode=append", "--time=24:00:00"} <= options


def test_it_gives_up_when_nothing_moves(slurm, tmp_path):
    (slurm.commands / "python").write_text("#!/bin/sh\nexit 3\n")
    codes = [slurm(OUTPUT=str(tmp_path / "out")).returncode for _ in range(3)]
    assert codes[:2] == [0, 0] and codes[2] != 0 and slurm.requeued() == 2
    saved = tmp_path / "out" / "checkpoints"
    saved.mkdir()
    (slurm.commands / "python").write_text(f'#!/bin/sh\nmkdir -p {saved}/"$(ls {saved} | wc -l)"\nexit 3\n')
    (tmp_path / "out" / "failures").unlink()
    assert [slurm(OUTPUT=str(tmp_path / "out")).returncode for _ in range(4)] == [0] * 4  # each with a new checkpoint


@pytest.mark.kills
def test_two_nodes_of_which_one_dies_and_then_one_goes_on(slurm, tmp_path, pictures, pretrained):
    out = tmp_path / "out"
    options = [*TINY, "--pretrained", pretrained, "--batch-size", 1, "--mixed-precision", "no", "--save-every", 2]
    options += ["--max-steps", 400, "--log-every", 1]
    environment = {"DATA": pictures, "OUTPUT": str(out), "HF_HUB_OFFLINE": "1", "FILTERS": ""}
    done = slurm(*options, KILL_AFTER=str(out / "checkpoints" / "00000002"), **environment)
    assert done.returncode == 0 and slurm.requeued() == 1, done.stderr[-5000:]
    newest = max(int(path.name) for path in (out / "checkpoints").glob("*[0-9]"))
    done = slurm(*options, "--max-steps", newest + 2, nodes=1, **environment)
    assert done.returncode == 0 and slurm.requeued() == 1, done.stderr[-5000:]
    assert "processes 2 (was 4)" in done.stdout + done.stderr and (out / "model_index.json").exists()
