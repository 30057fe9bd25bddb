"""How the package is built. What changes at a release (version, address) is in src/paella_diffusers/about.py."""

import re
import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
ABOUT = runpy.run_path(str(HERE / "src/paella_diffusers/about.py"))

EXTRAS = {
    "lora": ["peft>=0.18"],
    # the trainers in examples/
    "train": [
        "accelerate>=1.6",
        "peft>=0.18",
        "datasets>=3.0",
        "psutil>=5.9",
        "webdataset>=0.2.100",
        "torchdata>=0.11",
        "tensorboard>=2.15",
        "prodigyopt>=1.1",
    ],
    "web": ["gradio>=6.0", "starlette>=0.40"],
    "serve": [
        *("fastapi>=0.115", "starlette>=0.40", "pydantic>=2.7"),
        *("uvicorn>=0.30", "python-multipart>=0.0.18", "prometheus-client>=0.20"),
    ],
    "batch": ["datasets>=3.0", "fsspec>=2024.2", "pyarrow>=16.0", "webdataset>=0.2.100"],
    "ray": ["ray[data]>=2.40"],
    "emoji": ["resvg_py>=0.2"],  # examples/train_emoji.py
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
EXTRAS["docs"] = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"]
EXTRAS["test"] = [
    *("pytest>=8.0", "pytest-xdist", "pytest-cov", "nbmake", "hypothesis"),
    *("ruff", "pyright[nodejs]", "codespell"),
    *("flow_matching", "scipy"),
    *("openai>=2.0", "playwright>=1.49"),  # clients of the server and of the web page
]


def long_description(readme: str, url: str) -> str:
    """
    The README as a package index shows it, where relative links lead nowhere: they become absolute. Without the address of
    a repository, pictures are dropped and links become their text.
    """

    def resolve(match: re.Match) -> str:
        is_picture, text, target = match.groups()
        if not url:
            return "" if is_picture else text
        return f"{is_picture}[{text}]({url}/{'raw' if is_picture else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)", resolve, readme).lstrip()


class BuildPy(build_py):
    """Puts examples/ into the package as well, from where `paella-diffusers examples` copies them."""

    def run(self):
        super().run()
        if not self.editable_mode:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(
                HERE / "examples", Path(self.build_lib, "paella_diffusers/examples"), ignore=ignored, dirs_exist_ok=True
            )


if __name__ == "__main__":
    setup(
        name="paella-diffusers",
        version=ABOUT["__version__"],
        description="Paella, text to image by renoising discrete tokens, for HuggingFace diffusers",
        long_description=long_description((HERE / "README.md").read_text(encoding="utf-8"), ABOUT["URL"]),
        long_description_content_type="text/markdown",
        author=ABOUT["AUTHOR"],
        project_urls={"Source": ABOUT["URL"]} if ABOUT["URL"] else {},
        license="MIT",
        license_files=["LICENSE"],
        python_requires=">=3.11",
        package_dir={"": "src"},
        packages=find_packages("src"),
        package_data={"paella_diffusers": ["py.typed", "*.pyi", "pretrained/emoji/*", "pretrained/emoji/*/*"]},
        cmdclass={"build_py": BuildPy},
        install_requires=[
            "torch>=2.13",
            ABOUT["DIFFUSERS"],
            "transformers>=5.0",
            "huggingface_hub>=1.32",
            "safetensors>=0.8",
            "accelerate>=1.6",
            "numpy>=2.0.2",
            "pillow>=10.3",
            "tqdm>=4.60",
        ],
        extras_require=EXTRAS,
        entry_points={"console_scripts": ["paella-diffusers = paella_diffusers.cli:main"]},
        classifiers=[
            "Programming Language :: Python :: 3",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
            "Typing :: Typed",
        ],
    )
