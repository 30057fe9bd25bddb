from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "src/paella_diffusers/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="paella-diffusers",
    version=version,
    description="Paella, text to image by renoising discrete tokens, for HuggingFace diffusers",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"paella_diffusers": ["pretrained/emoji/*", "pretrained/emoji/*/*"]},
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.42",
        "transformers>=5.0",
        "huggingface_hub>=1.0",
        "safetensors>=0.5",
        "accelerate>=1.0",
        "pillow>=10.0",
    ],
    extras_require={
        "emoji": ["resvg_py>=0.2", "tqdm"],  # examples/train_emoji.py
        # LoRA adapters, and the trainers in examples/
        "train": [
            "accelerate>=1.6",
            "peft>=0.17",
            "datasets>=3.0",
            "webdataset>=0.2.100",
            "torchdata>=0.11",
            "tensorboard>=2.15",
        ],
        "test": ["pytest>=8.0", "pytest-xdist", "ruff", "flow_matching", "scipy"],
    },
    entry_points={"console_scripts": ["paella-diffusers = paella_diffusers.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
