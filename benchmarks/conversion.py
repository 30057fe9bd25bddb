"""
Conversion at full size: published layout to diffusers' and back, with random weights. Are all bits the same, and how much
memory did it take?

    python benchmarks/conversion.py --work-dir /tmp/conversion

Needs about 25 GB of disk. Memory is the process's peak resident size (VmHWM), pages of mapped files included; "before" is
what it had after its imports.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from paella_diffusers import PaellaPrior, PaellaUNet, VQModel

MODELS = {"unet": PaellaUNet, "vqgan": VQModel, "prior": PaellaPrior}
CONVERT = """
import json, resource, sys, time
import torch
from paella_diffusers.convert import convert_to_diffusers, convert_to_original
status = lambda name: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
before, start = status("VmRSS:"), time.time()
source, target, direction = sys.argv[1:]
if direction == "there":
    convert_to_diffusers(source, target, leave_out=("text_encoder", "text_encoder_2", "image_encoder"))
else:
    convert_to_original(source, target)
print(json.dumps({"peak": status("VmHWM:"), "before": before, "seconds": time.time() - start}))
"""


def make(folder: Path):
    """The three published files at full size, with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for cls in MODELS.values():
        path = folder / cls._original_checkpoint
        if not path.exists():
            torch.manual_seed(0)
            model = cls()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            torch.save(model.to_original_state_dict(), path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            del model


def convert(source: Path, target: Path, direction: str) -> dict:
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-c", CONVERT, str(source), str(target), direction]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("conversion"))
    args = parser.parse_args()
    published, converted, back = (args.work_dir / name for name in ("published", "diffusers", "back"))
    make(published)
    sizes = {path.name: path.stat().st_size for path in published.glob("*.pt")}
    print(", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items()))
    print("| direction | peak memory | of the largest file | before | time |\n|---|---|---|---|---|")
    for direction, source, target in (("there", published, converted), ("back", converted, back)):
        measured = convert(source, target, direction)
        share = measured["peak"] / max(sizes.values())
        print(
            f"| {direction} | {measured['peak'] / 1e9:.2f} GB | {share:.2f} | {measured['before'] / 1e9:.2f} GB | "
            f"{measured['seconds']:.0f} s |",
            flush=True,
        )
    start = time.time()
    for name in sizes:
        load = lambda folder, name=name: torch.load(folder / name, weights_only=True, mmap=True)
        first, second = load(published), load(back)
        same = first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        print(f"{name}: {len(first)} tensors, {'bit for bit the same' if same else 'DIFFERENT'}")
    print(f"compared in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
