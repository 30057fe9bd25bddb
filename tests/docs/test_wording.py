"""Phrases that had to be read twice do not come back."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "docs", "examples", "benchmarks", "integrations")
PHRASES = [
    r"noise again, and repeat",
    r"more often than not",
    r"What is killed goes on",
    r"train as one does",
    r"again and again",
    r"if it has so many",
    r"so many nats",
    r"not to be had",
    r"One script a model",
    r"what to draw, beside",
    r"with both ends",
    r"likewise",
    r"(?-i:\(default: None\))",
]


@pytest.mark.parametrize("phrase", PHRASES)
def test_phrase_is_not_used(phrase):
    paths = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    paths = [path for path in paths if path.suffix in (".py", ".md", ".ipynb") and path.is_file()]
    pattern = re.compile(phrase.replace(" ", r"[\s#]+"), re.IGNORECASE)  # a comment may break the line
    found = [path.relative_to(ROOT).as_posix() for path in paths if pattern.search(path.read_text(encoding="utf-8"))]
    assert len(paths) > 100 and not found
