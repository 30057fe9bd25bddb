"""
What the site adds to the pages in docs/: the texts in the repository's root, notebooks, the sources that pages link to, and
the command line's help. Links are written for the repository; here they become links within the site.
"""

import base64
import json
import os
import re
from functools import partial
from pathlib import Path

from mkdocs.structure.files import File

from paella_diffusers.cli.options import make_parser

ROOT = Path(__file__).parents[2]
# pages made of files outside docs/
ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "SECURITY.md": "security.md",
    "integrations/comfyui/README.md": "comfyui.md",
    "src/paella_diffusers/pretrained/emoji/README.md": "embedded-model.md",
    "tests/golden/README.md": "golden.md",
}
LINK = re.compile(r"(\]\()(?!https?://|#|mailto:)([^)#\s]+)(#[^)]*)?(\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sbatch": "bash", ".json": "json"}


def on_files(files, config):
    """Adds the pages that are not in docs/."""
    origins = {}  # where a page's text lies in the repository
    texts = {}
    for path in ROOT.joinpath("docs").rglob("*"):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".md":
            origins[name.removeprefix("docs/")] = name
        elif path.suffix == ".ipynb":
            page = name.removeprefix("docs/").replace(".ipynb", ".md")
            origins[page] = name
            texts[page] = notebook(json.loads(path.read_text(encoding="utf-8")), page, files, config)
            files.remove(files.get_file_from_path(name.removeprefix("docs/")))
    for name, page in ROOT_PAGES.items():
        origins[page] = name
        texts[page] = re.sub(r"\A---\n.*?\n---\n", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    pages = {origin: page for page, origin in origins.items()}
    texts["reference/command-line.md"] = command_line()
    for page, origin in origins.items():
        resolve = partial(within, page=page, origin=origin, pages=pages, texts=texts)
        texts[page] = LINK.sub(resolve, texts.get(page) or (ROOT / origin).read_text(encoding="utf-8"))
    for page, text in texts.items():
        if old := files.get_file_from_path(page):
            files.remove(old)
        files.append(File.generated(config, page, content=text))
    return files


def within(link: re.Match, page: str, origin: str, pages: dict[str, str], texts: dict[str, str | bytes]) -> str:
    """A link as the site needs it. A source file gets a page of its own in `texts`."""
    before, target, anchor, after = link.groups("")
    path = os.path.normpath(os.path.join(os.path.dirname(origin), target))
    if path.startswith("..") or not (ROOT / path).exists():
        return link[0]  # MkDocs reports it
    if (ROOT / path).is_dir():
        path = f"{path}/{'README.md' if (ROOT / path / 'README.md').exists() else '__init__.py'}"
    if path in pages:
        found = pages[path]
    elif path.startswith("docs/"):
        found = path.removeprefix("docs/").replace(".ipynb", ".md")
    elif (ROOT / path).suffix == ".png":
        found = f"source/{path}"
        texts[found] = (ROOT / path).read_bytes()
    else:
        found = f"source/{path}.md"
        language = LANGUAGES.get((ROOT / path).suffix, "text")
        code = (ROOT / path).read_text(encoding="utf-8")
        texts.setdefault(found, f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n````{language}\n{code}````\n")
    return f"{before}{os.path.relpath(found, os.path.dirname(page) or '.')}{anchor}{after}"


def notebook(content: dict, page: str, files, config) -> str:
    """A notebook as Markdown; pictures of its outputs become files beside it."""
    parts = []
    for number, cell in enumerate(content["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", "")))
            if "image/png" in data:
                name = f"{page.removesuffix('.md')}-{number}.png"
                files.append(File.generated(config, name, content=base64.b64decode("".join(data["image/png"]))))
                parts.append(f"![The output of the code above]({os.path.basename(name)})")
            elif text:
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)


def command_line() -> str:
    """The help of every command."""
    os.environ["COLUMNS"] = "100"
    parser = make_parser()
    (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    parts = ["# Command line", f"```text\n{parser.format_help()}```"]
    parts += [f"## {name}\n\n```text\n{command.format_help()}```" for name, command in commands.items()]
    return "\n\n".join(parts) + "\n"
