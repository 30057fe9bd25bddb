"""The code of docs/guidance.md runs, and the page names every method and guider."""

import re
from pathlib import Path

import diffusers.guiders

import paella_diffusers

PAGE = Path(__file__).parents[2] / "docs" / "guidance.md"


def test_the_page_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 2 and names["image"].size == (64, 64)
    assert type(names["pipe"].guider) is paella_diffusers.PaellaSemanticGuidance


def test_every_method_is_there():
    ours = [name for name in paella_diffusers.__all__ if name.endswith("Guidance")]
    theirs = [name for name in dir(diffusers.guiders) if name.endswith("Guidance") and name != "BaseGuidance"]
    missing = [name for name in ours + theirs if f"`{name}`" not in PAGE.read_text()]
    assert len(ours) == 7 and not missing
