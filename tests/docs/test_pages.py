"""
The code of the pages runs, block after block, Python and shell. `<!-- not run: REASON -->` before a block leaves it out, and
`<!-- run with: ARGUMENTS -->` adds arguments to its last command. Notebooks are run by nbmake.
"""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:<!-- (not run|run with): ([^\n]+) -->\n)?^(```+)(python|py|sh|bash)\n(.*?)^\3$", re.DOTALL | re.MULTILINE
)
FIRST = ["README.md", "docs/usage.md", "docs/guidance.md", "docs/schedulers.md", "docs/extending.md"]
TUTORIAL = "docs/tutorials/finetune.md"  # makes the pictures that other pages use


def blocks(page: str) -> list[tuple[str, str, str, str]]:
    """What is said of each block (`not run`, `run with` or nothing), the reason or arguments, the language and the code."""
    return [(said, text, language, code) for said, text, _, language, code in BLOCK.findall((ROOT / page).read_text())]


def with_code() -> list[str]:
    """All pages that have Python or shell code."""
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "integrations").rglob("*.md")]
    return sorted(page for page in (path.relative_to(ROOT).as_posix() for path in paths) if blocks(page))


def run(page: str) -> dict:
    """Run a page's code in the current folder."""
    names = {"__name__": "page"}
    for said, text, language, code in blocks(page):
        if said == "not run":
            continue
        if language in ("python", "py"):
            exec(compile(code, page, "exec"), names)
            continue
        if said == "run with":
            code = f"{code.rstrip()} {text}\n"
        run_shell(code)
    return names


def run_shell(code: str):
    """Run commands, which may take five minutes: a server that nobody marked as not to be run does not stop the tests."""
    command, pipe = ["bash", "-euo", "pipefail", "-c", code], subprocess.PIPE
    with subprocess.Popen(command, env=shell(), stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            errors = process.communicate(timeout=300)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"does not end:\n{code}")
    assert process.returncode == 0, f"{code}\n{errors}"


def shell() -> dict[str, str]:
    """The environment of a shell in which this package is installed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder with the checkout's scripts."""
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "benchmarks", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_readme(folder):
    run("README.md")
    assert (folder / "heart.png").exists()


def test_usage(folder):
    run("docs/usage.md")
    assert {"step-00.png", "step-11.png", "my-paella"} <= {path.name for path in folder.iterdir()}


def test_guidance():
    run("docs/guidance.md")


def test_schedulers():
    run("docs/schedulers.md")


def test_extending():
    names = run("docs/extending.md")
    assert names["image"].size == (64, 64) and type(names["pipe"].scheduler).__name__ == "GreedyScheduler"


@pytest.mark.pages
@pytest.mark.parametrize("page", [page for page in with_code() if page not in FIRST])
def test_page(page, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "practice")
    if page != TUTORIAL and "--data pictures" in (ROOT / page).read_text():
        said, _, language, code = blocks(TUTORIAL)[0]
        assert (said, language) == ("", "python")
        exec(compile(code, TUTORIAL, "exec"), {})
    run(page)


def test_code_is_left_out_for_a_reason():
    """Most code runs."""
    said = [said for page in with_code() for said, *_ in blocks(page)]
    assert said.count("not run") < len(said) / 2


def test_links_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "integrations").rglob("*.md")]
    texts = {page: page.read_text() for page in pages}
    for page in (ROOT / "docs").rglob("*.ipynb"):
        texts[page] = "\n".join("".join(cell["source"]) for cell in json.loads(page.read_text())["cells"])
    for page, text in texts.items():
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_quoted_message_is_in_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^```text\n(.*?)\n```", page, re.DOTALL | re.MULTILINE)
    printed = "\n".join(texts_of(path) for path in (ROOT / "src").rglob("*.py"))
    missing = [message for message in quoted if message.removesuffix("…") not in printed]
    assert len(quoted) > 20 and not missing


def texts_of(path: Path) -> str:
    """All strings of a file, with "…" for what an f-string inserts."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return "\n".join(texts)
