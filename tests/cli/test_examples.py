import subprocess
import sys
from pathlib import Path

from paella_diffusers.cli import main

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_examples_are_copied(tmp_path, capsys):
    folder = tmp_path / "examples"
    assert main(["examples", str(folder)]) == 0
    assert capsys.readouterr().out.split() == [str(folder)]
    originals = {path.relative_to(EXAMPLES): path.read_bytes() for path in EXAMPLES.rglob("*") if path.suffix != ".pyc"
                 and path.is_file()}  # fmt: skip
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == originals
    usage = subprocess.run([sys.executable, folder / "train_vqgan.py", "--help"], capture_output=True, text=True, check=True)
    assert "--output-dir" in usage.stdout
    assert main(["examples", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err
