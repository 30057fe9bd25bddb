"""The launch configurations; `test_train_paella.py` trains with FSDP's."""

import os
import subprocess
import sys

import train_paella
from accelerate.commands.launch import launch_command_parser
from trainers import EXAMPLES


def test_the_published_case_under_slurm(tmp_path):
    """With stand-ins for Slurm's commands, two nodes launch what accelerate and the trainer understand."""
    # more names than a pipe holds, so that a reader of the first would cut the others off
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node-a\nseq -f node-%.0f 20000\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nfor i in 0 1; do shift; SLURM_NODEID=$i "$@"; set -- x "$@"; done\n')
    script = f"#!{sys.executable}\nimport sys\nprint(*sys.argv[1:], '=====', sep='\\n')\n"
    (tmp_path / "accelerate").write_text(script)
    for name in ("scontrol", "srun", "accelerate"):
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "96",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "DATA": "a folder/{0..9}.tar",
    }
    script = EXAMPLES / "configs" / "train_paella.sbatch"
    output = subprocess.run(["bash", script], env=environment, check=True, capture_output=True, text=True).stdout
    commands = [command.strip().splitlines() for command in output.split("=====\n") if command]
    for rank, command in enumerate(commands):
        assert command[0] == "launch"
        launch = launch_command_parser().parse_args(command[1:])
        assert (launch.machine_rank, launch.num_machines, launch.num_processes) == (rank, 2, 16)
        assert launch.main_process_ip == "node-a"
        args = train_paella.parse_args(launch.training_script_args)
        assert args.data == "a folder/{0..9}.tar" and len(args.prompts) == 2 and args.resume == "latest"
    assert len(commands) == 2
