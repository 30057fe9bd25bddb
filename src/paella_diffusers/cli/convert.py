"""Converting between the published layout and diffusers'."""

import argparse
import os

from .checks import check_new_folder, check_source


def convert(args: argparse.Namespace):
    """Convert a repository or folder to the other layout."""
    if args.to_original and args.leave_out:
        raise ValueError("--leave-out is for the way to diffusers' layout: the published one has no optional components.")
    if check_source("SOURCE", args.source):
        if not os.path.isdir(args.source):
            raise ValueError(f"SOURCE {args.source} is a file: give a folder or a Hub id.")
        if os.path.isfile(os.path.join(args.source, "model_index.json")) != args.to_original:
            layout = "the published layout" if args.to_original else "diffusers' layout already: it has a model_index.json"
            raise ValueError(f"SOURCE {args.source} is in {layout}.")
    check_new_folder(args.folder)

    import torch

    from ..convert import convert_to_diffusers, convert_to_original

    options = {name: getattr(args, name) for name in ("revision", "cache_dir") if getattr(args, name) is not None}
    options["dtype"] = getattr(torch, args.dtype)
    if args.to_original:
        convert_to_original(args.source, args.folder, **options)
    else:
        convert_to_diffusers(args.source, args.folder, leave_out=tuple(args.leave_out), **options)
    print(args.folder)
