"""The Python code of the pages runs, block after block; what follows `<!-- not run: REASON -->` is left out."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run(page: str) -> dict:
    blocks = [code for left_out, code in BLOCK.findall((ROOT / page).read_text()) if not left_out]
    assert blocks
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme(folder):
    run("README.md")
    assert (folder / "heart.png").exists()


def test_usage(folder):
    run("docs/usage.md")
    assert {"step-00.png", "step-11.png", "my-paella"} <= {path.name for path in folder.iterdir()}


def test_guidance():
    run("docs/guidance.md")


def test_extending():
    names = run("docs/extending.md")
    assert names["image"].size == (64, 64) and type(names["pipe"].scheduler).__name__ == "GreedyScheduler"


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "integrations").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
