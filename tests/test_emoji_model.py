"""The model inside the package."""

import re
from pathlib import Path

import pytest
import torch

from paella_diffusers import EMOJI_MODEL, PaellaPipeline


@pytest.fixture(scope="module")
def pipe():
    pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_says_where_it_comes_from():
    files = [path for path in Path(EMOJI_MODEL).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert "MIT License" in (Path(EMOJI_MODEL) / "LICENSE.md").read_text()
    assert "Fluent Emoji" in (Path(EMOJI_MODEL) / "README.md").read_text()


def test_prompts_decide_what_is_drawn(pipe):
    hearts = {"red": 0, "green": 1, "blue": 2}
    prompts = [f"{colour} heart" for colour in hearts]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = pipe(prompts, guidance_scale=2.0, generator=generators, output_type="pt").images
    assert images.shape == (3, 3, 64, 64)
    for image, channel in zip(images, hearts.values()):
        assert image[:, :, [0, -1]].mean() > 0.9  # white at the sides
        center = image[:, 28:36, 28:36].mean((1, 2))
        assert center.argmax() == channel


def test_the_readme_runs(tmp_path, monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    first = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(first, {})
    assert (tmp_path / "heart.png").exists()
