"""
The long run of one process: `make soak`, or `python -m fuzz.soak` with src/ and tests/ on the path.

Many calls with changing sizes and tasks, and the growth of memory; kills of every writer, before each of its file
operations; several threads on one pipeline, against results without threads. It prints the table of `make fuzz`.
"""

import argparse
import functools
import gc
import io
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import psutil
import torch
from conftest import tiny_pipeline
from kills import contents, killed_before, leftovers

from paella_diffusers import PaellaClassifierFreeGuidance, PaellaPipeline, PaellaScheduler
from paella_diffusers.cli.output import write
from paella_diffusers.convert import convert_to_diffusers, convert_to_original

from .__main__ import _be_quiet
from .calls import SCHEDULERS, TASKS, Call, attempt_call, normal, picture, pipeline, seeded
from .files import ENCODERS, good
from .outcomes import Outcome, Report


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--calls", type=int, default=1000, help="calls in one process (default: 1000)")
    parser.add_argument("--kills", type=int, default=30, help="kills of each writer, at least (default: 30)")
    parser.add_argument("--threads", type=int, default=8, help="threads on one pipeline (default: 8)")
    parser.add_argument("--calls-per-thread", type=int, default=10, help="(default: 10)")
    args = parser.parse_args()
    _be_quiet()
    report = Report()
    memory = call_often(report, args.calls)
    with tempfile.TemporaryDirectory(prefix="paella-soak-") as folder:
        for name, (first, second) in WRITERS.items():
            kill(report, name, Path(folder), first, second, args.kills)
    call_from_threads(report, args.threads, args.calls_per_thread)
    print(report.table())
    print(f"\nMemory: {memory[0]:.0f} MiB after the first tenth of the calls, {memory[1]:.0f} MiB after all of them.")
    if failed := report.failed():
        print(f"\nFailed: {', '.join(failed)}.")
    return bool(failed)


# --------------------------------------------------------------------------------------------------------------- calls


def call_often(report: Report, number: int) -> tuple[float, float]:
    """Calls of all tasks; the process's memory in MiB after a tenth of them, and after all."""
    rng, measured = random.Random(0), []
    for index in range(number):
        case = random_call(rng)
        report.add("calls", *attempt_call(case), case)
        if index + 1 in (max(1, number // 10), number):
            gc.collect()
            measured.append(psutil.Process().memory_info().rss / 2**20)
    return measured[0], measured[-1]


def random_call(rng: random.Random) -> Call:
    task, num_images = rng.choice(sorted(TASKS)), rng.randint(1, 4)
    height, width, seed = 16 * rng.randint(1, 4), 16 * rng.randint(1, 4), rng.getrandbits(32)
    call = {
        "num_inference_steps": rng.randint(1, 6),
        "prior_num_inference_steps": 2,
        "output_type": rng.choice(["pil", "np", "pt", "latent"]),
        "guidance_scale": rng.choice([None, 3.0, (1.0, 8.0)]),
        "generator": seeded(seed),
    }
    if task == "interpolation":
        call |= {"a": "red", "b": rng.choice(["blue", picture(seed, 20, 20)]), "num_images": num_images + 1}
        return Call(
            task, "float32", rng.choice(sorted(SCHEDULERS)), num_images + 1, call | {"height": height, "width": width}
        )
    call["prompt"] = ["a" * rng.randint(0, 40) for _ in range(num_images)]
    if task == "text to image":
        call |= {"height": height, "width": width}
    else:
        call |= {"image": picture(seed, rng.randint(8, 64), rng.randint(8, 64)), "resize_mode": "default"}
    if task == "inpainting":
        mask = torch.zeros(call["image"].height, call["image"].width)
        mask[: rng.randint(1, 8)] = 1
        call |= {"mask_image": mask, "keep_original_pixels": True, "feather_radius": 0}
    return Call(task, "float32", rng.choice(sorted(SCHEDULERS)), num_images, call)


# --------------------------------------------------------------------------------------------------------------- kills


@functools.cache
def _pipeline(scale: float):
    pipe = tiny_pipeline()
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(scale)
    return pipe


def _save_adapter(scale: float, folder: Path):
    PaellaPipeline.save_lora_weights(folder, {"to_q.lora_A.weight": normal(0, 2, 16) * scale})


def _picture(seed: int, folder: Path):
    folder.mkdir(exist_ok=True)
    write(picture(seed, 32, 32), folder / "picture.png")


Writer = Callable[[Path], None]
WRITERS: dict[str, tuple[Writer | None, Writer]] = {  # what writes the first version, if any, and what writes the second
    "a pipeline": (
        lambda folder: _pipeline(1.0).save_pretrained(folder),
        lambda folder: _pipeline(2.0).save_pretrained(folder),
    ),
    "a model": (
        lambda folder: _pipeline(1.0).unet.save_pretrained(folder),
        lambda folder: _pipeline(2.0).unet.save_pretrained(folder, max_shard_size="40KB"),
    ),
    "a scheduler": (
        lambda folder: PaellaScheduler().save_pretrained(folder),
        lambda folder: PaellaScheduler(num_inference_steps=8).save_pretrained(folder),
    ),
    "a guider": (
        lambda folder: PaellaClassifierFreeGuidance(3.0).save_pretrained(folder),
        lambda folder: PaellaClassifierFreeGuidance(4.0).save_pretrained(folder),
    ),
    "an adapter": (partial(_save_adapter, 1.0), partial(_save_adapter, 2.0)),
    "a picture": (partial(_picture, 1), partial(_picture, 2)),
    "a converted folder": (None, lambda folder: convert_to_diffusers(good() / "published", folder, **_NO_ENCODERS)),
    "the published layout": (None, lambda folder: convert_to_original(good() / "pipeline", folder)),
}
_NO_ENCODERS = {"leave_out": ENCODERS}


def kill(report: Report, name: str, parent: Path, first: Writer | None, second: Writer, least: int):
    """
    Kill a writer before its first file operation, its second and so on until it ends, and again until it was killed as often
    as wanted: whenever, what is there must be the first version or the second, and the next run removes what was left.
    """
    parent = parent / name.replace(" ", "-")
    folder, kept, kills = parent / "folder", parent / "kept", 0
    parent.mkdir()

    def write_second(folder: Path):
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # paths and bars
            second(folder)

    write_second(parent / "finished")
    new = contents(parent / "finished")
    old = {}
    if first is not None:
        first(kept)
        old = contents(kept)
    while kills < least:
        operation = 0
        _reset(folder, kept)
        while killed_before(operation, parent, lambda: write_second(folder)):
            operation += 1
            now = contents(folder)
            whole = now in (old, new) or (not now and first is None)
            what = "" if whole else f"after file operation {operation} it is neither the first version nor the second"
            report.add(f"kills of {name}", Outcome.RESULT if whole else Outcome.LOST, what)
            if now != old:
                _reset(folder, kept)
        kills += operation
        left = leftovers(parent)
        report.add(f"kills of {name}", Outcome.SILENT if left else Outcome.RESULT, left and f"left behind: {left[:3]}")


def _reset(folder: Path, kept: Path):
    """The first version again, or nothing; what killed processes left beside it stays."""
    shutil.rmtree(folder, ignore_errors=True)
    if kept.exists():
        shutil.copytree(kept, folder)


# -------------------------------------------------------------------------------------------------------------- threads


def call_from_threads(report: Report, threads: int, each: int):
    """Every call in float64 gives the tokens that it gives alone."""
    rng = random.Random(0)
    cases = [_text_call(rng) for _ in range(threads * each)]
    pipe = pipeline("text to image", "float64", "PaellaScheduler")
    draw = lambda call: pipe(**call | {"generator": seeded(call["generator"])}).images
    alone = [draw(call) for call in cases]
    with ThreadPoolExecutor(threads) as pool:
        together = list(pool.map(draw, cases))
    for call, one, other in zip(cases, alone, together):
        same = torch.equal(one, other)
        report.add(
            "calls from threads", Outcome.RESULT if same else Outcome.SILENT, "" if same else "other tokens than alone", call
        )


def _text_call(rng: random.Random) -> dict:
    return {
        "prompt": "a" * rng.randint(0, 20),
        "height": 16 * rng.randint(1, 3),
        "width": 16 * rng.randint(1, 3),
        "num_inference_steps": rng.randint(1, 6),
        "prior_num_inference_steps": 2,
        "guidance_scale": rng.choice([None, 3.0, (1.0, 8.0)]),
        "temperature": rng.choice([0.5, (1.2, 0.2)]),
        "generator": rng.getrandbits(32),
        "output_type": "latent",
    }


if __name__ == "__main__":
    sys.exit(main())
