from pathlib import Path

import minimal
from PIL import Image


def test_it_trains_and_draws_in_less_than_140_lines(tmp_path, capsys):
    minimal.main(count=64, steps=2, path=str(tmp_path / "shapes.png"))
    assert Image.open(tmp_path / "shapes.png").size == (8 * 64, 4 * 64)
    assert "step 1: loss" in capsys.readouterr().out
    assert len(Path(minimal.__file__).read_text().splitlines()) < 140
