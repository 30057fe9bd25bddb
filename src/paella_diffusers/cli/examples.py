"""Copying the example scripts out of the package."""

import argparse
import shutil
from pathlib import Path

from ..loaders.atomic import atomic_folder
from .checks import check_new_folder

PACKAGE = Path(__file__).parent.parent


def copy_examples(args: argparse.Namespace):
    """Copy the examples to a new folder: from the package, where setup.py puts them, or from the checkout."""
    check_new_folder(args.folder)
    source = PACKAGE / "examples"
    if not source.is_dir():
        source = PACKAGE.parent.parent / "examples"
    with atomic_folder(args.folder) as folder:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    print(args.folder)
