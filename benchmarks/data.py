"""
Does a stream of WebDataset shards keep the trainer busy? 10,000 generated pictures, 2 % of them broken.

    python benchmarks/data.py [--samples 10000] [--steps 30]

    python benchmarks/data.py --simulate [--readers 1024] [--shards 10000] [--shard-size 20]

First the stream alone: JPEGs of 384 × 320 pixels to crops of 256. Then `examples/train_paella.py`'s loop on it with the
embedded model, at 64 pixels, and the share of its time that it waits for data.

The simulation reads no files. It asks the trainers' own streams what each of many readers (processes × workers) would read
of many shards: how often each sample comes in a number of epochs, how much is read, and what a restart reads again.
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
from paella_diffusers.training.data import SampleTransform, ShardStream, collate, load_stream
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


class SimulatedShards(ShardStream):
    """Shards whose samples are only numbers; `read` counts those that were read to find one's own."""

    def __init__(self, shards: int, size: int, **kwargs):
        super().__init__([f"{shard:06d}" for shard in range(shards)], lambda raw, rng: raw, window=1 + size // 20, **kwargs)
        self.size, self.read = size, 0

    def _read(self, shard: str):
        for index in range(self.size):
            self.read += 1
            yield {"__key__": index, "number": int(shard) * self.size + index}

    @staticmethod
    def _parse(sample: dict) -> dict:
        return {"number": sample["number"]}


def simulate(readers: int, shards: int, size: int, epochs: int) -> dict:
    """
    Have readers take equal numbers of samples, as in training, until as many were taken as `epochs` have.

    Returns:
        `dict`: `counts` `(shards * size,)`, how often each sample was taken; `read`, how many samples each reader read; and
        `again`, how many it would read again after a restart, somewhere in its last shard.
    """
    counts, read, again = np.zeros(shards * size, dtype=np.int64), [], []
    quota = shards * size * epochs // readers
    for part in range(readers):
        stream = SimulatedShards(shards, size, process_index=part, num_processes=readers)
        for index, sample in enumerate(islice(stream, quota)):
            counts[sample["number"]] += 1
            if index == max(0, quota - 1 - part % size):
                state = stream.state_dict()
        read.append(stream.read)
        resumed = SimulatedShards(shards, size, process_index=part, num_processes=readers)
        resumed.load_state_dict(state)
        next(iter(resumed))
        again.append(resumed.read - 1)
    return {"counts": counts, "read": np.array(read), "again": np.array(again)}


def print_simulation(readers: int, shards: int, size: int):
    print(f"{readers} readers, {shards} shards of {size} samples")
    print("| epochs | samples never | more than once an epoch | read for one used | read again after a restart |")
    print("|---|---|---|---|---|")
    for epochs in (1, 2):
        result = simulate(readers, shards, size, epochs)
        counts, used = result["counts"], result["counts"].sum() / readers
        never, more = (counts == 0).mean(), (counts > epochs).mean()
        waste = f"{result['read'].mean() / used:.2f} (at most {result['read'].max() / used:.2f})"
        print(f"| {epochs} | {never:.1%} | {more:.1%} | {waste} | {result['again'].mean() / size:.2f} shards |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--num-workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--simulate", action="store_true", help="only compute what readers would read")
    parser.add_argument("--readers", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--shard-size", type=int, default=20, help="samples in a simulated shard")
    args = parser.parse_args()
    if args.simulate:
        print_simulation(args.readers, args.shards, args.shard_size)
        return
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
