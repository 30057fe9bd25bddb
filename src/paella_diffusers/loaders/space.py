"""The few files of a Hub Space that shows a pipeline: the page of `paella-diffusers web`."""

from pathlib import Path

from ..about import requirement

FILES = {
    "app.py": '''"""The page of {repo_id}."""

import torch
from paella_diffusers import PaellaPipeline
from paella_diffusers.apps.web import launch, make_page

pipe = PaellaPipeline.from_pretrained("{repo_id}").to("cuda" if torch.cuda.is_available() else "cpu")
launch(make_page(pipe))
''',
    "requirements.txt": "{requirement}\n",
    "README.md": """---
title: {name}
sdk: gradio
sdk_version: 6.31.0
app_file: app.py
models:
- {repo_id}
---

The page of [{repo_id}](https://huggingface.co/{repo_id}). These commands make a Space of it:

```bash
hf download {repo_id} --include "space/*" --local-dir .
hf repos create {repo_id} --type space --space-sdk gradio
hf upload {repo_id} space . --type space
```

`requirements.txt` installs `paella-diffusers`. If it names a wheel, put the address of one there.
""",
}


def write_space(repo_id: str, folder: Path) -> None:
    """Write them to a new folder, for the pipeline in the repository."""
    folder.mkdir()
    values = {"repo_id": repo_id, "name": repo_id.split("/")[-1], "requirement": requirement("web")}
    for file, template in FILES.items():
        (folder / file).write_text(template.format(**values), encoding="utf-8")
