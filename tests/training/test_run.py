"""Training steps by accelerate against the published one."""

import re
from pathlib import Path

import pytest
from golden_step import golden_step
from trainers import finish, start


@pytest.mark.parametrize("passes", [1, 2])
def test_golden_step_in_passes(golden, passes):
    loss, norm = golden_step(golden.folder, passes)
    assert loss == pytest.approx(golden.paella_io["train_loss"].item(), rel=1e-5)
    assert norm == pytest.approx(golden.paella_io["train_grad_norm"].item(), rel=1e-5)


def test_golden_step_in_two_processes(golden_a):
    output = finish(start(Path(__file__).parent / "golden_step.py", golden_a.folder, processes=2))
    loss, norm = map(float, re.search(r"golden (\S+) (\S+)", output).groups())
    assert loss == pytest.approx(golden_a.paella_io["train_loss"].item(), rel=1e-5)
    assert norm == pytest.approx(golden_a.paella_io["train_grad_norm"].item(), rel=1e-5)
