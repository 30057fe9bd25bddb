"""What is built, and what the texts say about installing it."""

import ast
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".ci", "benchmarks", "docs", "examples", "src", "tests")
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
ABOUT = SETUP["ABOUT"]


def files(folder: Path) -> set[str]:
    """The files in a folder, as relative paths, without what running or building leaves there."""
    left = {"__pycache__", ".pytest_cache", ".ruff_cache"}
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {
        path.as_posix() for path in paths if not left & set(path.parts) and not any(".egg-info" in p for p in path.parts)
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The unpacked source distribution (`source`), and the wheel built from it: as a `file`, and unpacked (`wheel`)."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "copy"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)

    def build(kind: str, source: Path) -> Path:
        code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(folder)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
        return next(folder.glob("*.tar.gz" if kind == "sdist" else "*.whl"))

    with tarfile.open(build("sdist", copy)) as archive:
        archive.extractall(folder, filter="data")
    source = folder / f"paella_diffusers-{ABOUT['__version__']}"
    wheel = build("wheel", source)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    return SimpleNamespace(source=source, wheel=folder / "wheel", file=wheel)


def test_the_source_distribution_is_complete(built):
    for name in FOLDERS:
        assert files(ROOT / name) <= files(built.source / name), name
    top = {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert {"LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml", "requirements.txt", "setup.py"} <= top
    assert top <= {path.name for path in built.source.iterdir()}


def test_the_source_distribution_passes_its_own_tests(built):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/models/test_prior_paella.py"]
    environment = os.environ | {"PYTHONPATH": str(built.source / "src")}
    result = subprocess.run(command, cwd=built.source, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]


def test_the_wheel_has_the_package_and_the_examples(built):
    package = built.wheel / "paella_diffusers"
    source = files(ROOT / "src/paella_diffusers")
    examples = {f"examples/{name}" for name in files(ROOT / "examples")}
    assert files(package) == source | examples
    assert "py.typed" in source and "examples/minimal.py" in examples
    assert built.file.stat().st_size < 23.5e6  # bytes; the embedded model makes up all but 0.1 MB


def test_metadata(built):
    metadata = importlib.metadata.Distribution.at(next(built.wheel.glob("*.dist-info"))).metadata
    assert metadata["Author"] == ABOUT["AUTHOR"]
    assert ABOUT["AUTHOR"] in (ROOT / "LICENSE").read_text().replace("(c) 2026 The", "The")
    assert metadata["Requires-Python"] == ">=3.11"
    assert importlib.metadata.metadata("diffusers")["Requires-Python"].startswith(">=3.11")
    assert metadata.get_all("Project-URL", []) == ([f"Source, {ABOUT['URL']}"] if ABOUT["URL"] else [])
    assert not re.search(r"\]\((?!https?://|#)", metadata.get_payload())  # no link into a repository that is not there


def test_the_readme_on_an_index_page():
    readme = "![A picture](docs/a.png)\n\nSee [`a.py`](src/a.py), [a paper](https://example.org/a) and [below](#below).\n"
    address = "https://example.org/me/it"
    assert SETUP["long_description"](readme, address) == (
        f"![A picture]({address}/raw/main/docs/a.png)\n\n"
        f"See [`a.py`]({address}/blob/main/src/a.py), [a paper](https://example.org/a) and [below](#below).\n"
    )
    assert SETUP["long_description"](readme, "") == "See `a.py`, [a paper](https://example.org/a) and [below](#below).\n"


def test_what_is_imported_is_declared(built):
    requires = importlib.metadata.Distribution.at(next(built.wheel.glob("*.dist-info"))).requires
    base = {re.match(r"[\w-]+", line)[0] for line in requires if "extra ==" not in line}

    def extras(*names):
        return {re.match(r"[\w-]+", line)[0] for name in names for line in SETUP["EXTRAS"][name]}

    declared = {"base": base, "training": base | extras("train"), "apps": base | extras("batch", "ray", "serve", "web")}
    imported = {where: set() for where in declared}
    for name in files(ROOT / "src/paella_diffusers"):
        if name.endswith(".py"):
            folder = name.split("/")[0]
            where = folder if folder in declared else "base"
            tree = ast.parse((ROOT / "src/paella_diffusers" / name).read_text(encoding="utf-8"))
            for node in tree.body:  # at the top: needed as soon as the module is imported
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                imported[where].update(module.split(".")[0] for module in modules)
    projects = {"PIL": "pillow", "prometheus_client": "prometheus-client"}
    imported["base"].discard("paella_diffusers")  # in templates for other repositories
    for where, modules in imported.items():
        assert {projects.get(name, name) for name in modules - sys.stdlib_module_names} <= declared[where]
    assert {"numpy", "tqdm"} <= base


def test_every_file_names_the_same_version():
    version = ABOUT["__version__"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"(?m)^## \[([\d.]+)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text())
    assert headings[0] == version


def test_extras():
    extras = SETUP["EXTRAS"]
    assert extras["lora"] == [requirement for requirement in extras["train"] if requirement.startswith("peft")]
    for name, requirements in extras.items():
        assert name in ("docs", "test") or set(requirements) <= set(extras["all"])


def test_texts_say_what_can_be_installed_today():
    """`about.PIP_TARGET` is the one place to change; what quotes it in plain text follows it, extras and all."""
    targets = []
    for folder in (ROOT / "README.md", ROOT / "docs", ROOT / "examples", ROOT / "benchmarks", ROOT / "src"):
        for path in [folder] if folder.is_file() else folder.rglob("*"):
            if path.suffix in (".md", ".py", ".sbatch", ".yaml") and path.name != "about.py":
                text = path.read_text(encoding="utf-8")
                targets += [(path, target) for target in re.findall(r"pip install (?:-e )?['\"]?([\w.\[\],-]+)", text)]
    ours = [(path, target) for path, target in targets if target.startswith((".", "paella-diffusers"))]
    assert len({path for path, _ in ours}) > 3
    for path, target in ours:
        name, _, extras = target.rstrip("]").partition("[")
        assert name == ABOUT["PIP_TARGET"], f"{path} installs {name}"
        assert not extras or set(extras.split(",")) <= SETUP["EXTRAS"].keys(), f"{path} names {extras}"
