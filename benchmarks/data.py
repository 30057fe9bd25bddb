"""
Does a stream of WebDataset shards keep the trainer busy? 10,000 generated pictures, 2 % of them broken.

    python benchmarks/data.py [--samples 10000] [--steps 30]

First the stream alone: JPEGs of 384 × 320 pixels to crops of 256. Then `examples/train_paella.py`'s loop on it with the
embedded model, at 64 pixels, and the share of its time that it waits for data.
"""

import argparse
import io
import random
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader
from webdataset import TarWriter

from paella_diffusers import EMOJI_MODEL
from paella_diffusers.training.arguments import training_arguments
from paella_diffusers.training.data import SampleTransform, collate, load_stream
from paella_diffusers.training.run import TrainingRun
from paella_diffusers.training.unet import FrozenParts, add_unet_arguments, train_unet


def write_shards(folder: Path, samples: int) -> int:
    """Smooth random pictures in shards of 1,000; the number of broken ones: cut off, not a picture, or without a caption."""
    numbers, rng, broken = np.random.default_rng(0), random.Random(0), 0
    for first in range(0, samples, 1000):
        with TarWriter(str(folder / f"{first // 1000:05d}.tar")) as shard:
            for index in range(first, min(first + 1000, samples)):
                image = Image.fromarray(numbers.integers(256, size=(10, 12, 3), dtype=np.uint8)).resize((384, 320))
                buffer = io.BytesIO()
                image.save(buffer, "JPEG")
                sample = {"__key__": f"{index:08d}", "jpg": buffer.getvalue(), "txt": f"picture {index}"}
                if rng.random() < 0.02:
                    broken += 1
                    sample |= rng.choice([{"jpg": sample["jpg"][:2000]}, {"jpg": b"no picture"}, {"txt": b"\xff"}])
                shard.write(sample)
    return broken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--num-workers", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        broken = write_shards(Path(folder), args.samples)
        print(f"{args.samples} samples, {broken} of them broken")
        print("| workers | read | skipped | pictures/s | of a trainer's time waiting |\n|---|---|---|---|---|")
        for workers in args.num_workers:
            stream = load_stream(folder, SampleTransform(256), epochs=1)
            loader = StatefulDataLoader(stream, batch_size=50, num_workers=workers, collate_fn=collate)
            start, read, skipped = time.perf_counter(), 0, 0
            for batch in loader:
                read, skipped = read + len(batch["text"]), skipped + batch["unreadable"]
            rate = read / (time.perf_counter() - start)
            print(
                f"| {workers} | {read} | {skipped} | {rate:.0f} | {waiting(folder, workers, args.steps):.1%} |", flush=True
            )


def waiting(data: str, workers: int, steps: int) -> float:
    parser = training_arguments("")
    add_unet_arguments(parser)
    options = ["--data", data, "--pretrained", str(EMOJI_MODEL), "--resolution", "64", "--batch-size", "32"]
    options += ["--num-workers", str(workers), "--report-to", "none", "--log-every", "1000000"]
    with tempfile.TemporaryDirectory() as output:
        run = TrainingRun(parser.parse_args([*options, "--output-dir", output]))
        run.load_data()
        frozen = FrozenParts(run)
        unet = run.prepare("unet", frozen.pipe.unet.requires_grad_(True))
        batches = run.batches

        def counted(draw=None):
            for step, batch in enumerate(islice(batches(draw), steps + 1)):
                if step == 1:  # workers take their time to start
                    run.started, run.waited = time.perf_counter(), 0.0
                yield batch

        run.batches = counted
        train_unet(run, unet, frozen)
        return run.waited / (time.perf_counter() - run.started)


if __name__ == "__main__":
    main()
