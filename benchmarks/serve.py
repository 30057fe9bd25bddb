"""
How does the server compare with the bare pipeline, and does it stay well under load? With the embedded model, float32.

    python benchmarks/serve.py [--minutes 10] [--turns 5] [--batch-size 16] [--steps 12] [--exact]

First, in turns, the same pictures: from calls of the pipeline with full batches, in this process, and from the server, of
which twice as many clients as a batch has rows ask without a pause, so that a full batch waits while one is drawn. Time in
calls is the share that the server's worker spent in the pipeline. The first turn warms both up and does not count.

Then the clients ask for some minutes, and every answer is compared with the pictures that the pipeline drew for all prompts
and seeds: one that is nearer to another's picture than to its own counts as mixed up. One request in twenty is given up by
its client after a moment. Memory is the server's own (RSS), as medians of the first and the last tenth of the time.
"""

import argparse
import asyncio
import base64
import io
import itertools
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field

import numpy as np
import openai
import psutil
import torch
from PIL import Image

from paella_diffusers import EMOJI_MODEL, PaellaPipeline
from paella_diffusers.apps.rows import Row, draw

PROMPTS = ("red heart", "grinning face", "pizza", "dog face", "rocket", "sunflower", "green apple", "a guitar on the beach")
SEEDS = 8
LEAVING, PATIENCE = 0.05, 0.3  # share of requests that are given up, and after how many seconds
CALLS_IN_A_TURN = 4


@dataclass
class Load:
    """What came of the requests."""

    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MiB
    identical: int = 0
    mixed_up: int = 0
    left: int = 0
    errors: int = 0


def start_server(args) -> tuple[subprocess.Popen, str]:
    """The server's process and its address."""
    command = [sys.executable, "-m", "paella_diffusers.cli", "serve", "--port", "0", "--batch-size", str(args.batch_size)]
    command += ["--max-waiting", str(4 * args.batch_size), *(["--exact"] if args.exact else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return process, process.stdout.readline().partition(" ")[0]


async def ask(client, row: Row) -> np.ndarray:
    """The picture of a row, from the server."""
    ours = {"seed": row.seed, "steps": row.arguments["num_inference_steps"]}
    answer = await client.images.generate(prompt=row.prompt, extra_body=ours)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))), np.int16)


async def server_turn(client, address: str, rows: list[Row], batch_size: int) -> tuple[float, float, float]:
    """
    Seconds for as many pictures as there are rows, while a full batch waits; the share of them that the server spent in the
    pipeline, and the pictures in a call. The first batch does not count, nor what clients still wait for at the end.
    """
    answers, marks = 0, {}

    async def work(first: int):
        nonlocal answers
        for row in itertools.cycle(rows[first:] + rows[:first]):
            await ask(client, row)
            answers += 1
            if answers in (batch_size, batch_size + len(rows)):
                marks[answers] = time.monotonic(), await asyncio.to_thread(server_metrics, address)
            if answers >= batch_size + len(rows):
                return

    await asyncio.gather(*(work(index) for index in range(2 * batch_size)))
    (begun, before), (ended, after) = marks.values()
    seconds = ended - begun
    in_calls, calls, pictures = (
        after[f"paella_{name}"] - before[f"paella_{name}"]
        for name in ("call_seconds_sum", "call_seconds_count", "pictures_total")
    )
    return seconds, in_calls / seconds, pictures / calls


def server_metrics(address: str) -> dict[str, float]:
    """What the server counts, by name."""
    with urllib.request.urlopen(f"{address.removesuffix('/v1')}/metrics") as answer:
        lines = [line.split() for line in answer.read().decode().splitlines()]
    return {line[0]: float(line[1]) for line in lines if line[0].startswith("paella_") and "{" not in line[0]}


def pipeline_turn(pipe, rows: list[Row], batch_size: int) -> float:
    """Seconds for all rows, drawn in full batches."""
    begun = time.monotonic()
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        generators = [torch.Generator().manual_seed(row.seed) for row in batch]
        pipe([row.prompt for row in batch], generator=generators, **batch[0].arguments)
    return time.monotonic() - begun


async def soak(client, process, rows: list[Row], expected: np.ndarray, num_clients: int, minutes: float) -> Load:
    """Ask for some minutes."""
    load, chance, impatient = Load(), random.Random(0), client.with_options(max_retries=0, timeout=PATIENCE)
    end = time.monotonic() + 60 * minutes

    async def work():
        while time.monotonic() < end:
            index, begun = chance.randrange(len(rows)), time.monotonic()
            is_leaving = chance.random() < LEAVING
            try:
                picture = await ask(impatient if is_leaving else client, rows[index])
            except openai.APITimeoutError:
                load.left += 1
                continue
            except openai.OpenAIError as error:
                print(error, file=sys.stderr)
                load.errors += 1
                continue
            load.seconds.append(time.monotonic() - begun)
            distances = np.abs(expected - picture).mean((1, 2, 3))
            load.identical += distances[index] == 0
            load.mixed_up += distances[index] > distances.min()

    async def watch():
        memory = psutil.Process(process.pid).memory_info
        while time.monotonic() < end:
            load.memory.append(memory().rss / 2**20)
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(work() for _ in range(num_clients)))
    return load


async def measure(args, process, address: str):
    pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": args.steps}
    rows = [Row("", prompt, seed, arguments) for seed in range(SEEDS) for prompt in PROMPTS]
    client = openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=5)
    turn = (rows * args.batch_size)[: CALLS_IN_A_TURN * args.batch_size]

    bare, served, in_calls, together = [], [], [], []
    for _ in range(args.turns + 1):
        bare.append(len(turn) / pipeline_turn(pipe, turn, args.batch_size))
        seconds, *rest = await server_turn(client, address, turn, args.batch_size)
        served.append(len(turn) / seconds)
        in_calls.append(rest[0])
        together.append(rest[1])
    ratios = [ours / theirs for ours, theirs in zip(served[1:], bare[1:])]
    print("| | pictures/s | of the pipeline's | time in calls | pictures in a call |\n" + "|---" * 5 + "|")
    print(f"| pipeline, batch {args.batch_size} | {statistics.median(bare[1:]):.2f} | 1 | | {args.batch_size} |")
    print(f"| server, {args.batch_size} waiting{', --exact' * args.exact} | {statistics.median(served[1:]):.2f} "
          f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) "
          f"| {statistics.median(in_calls[1:]):.1%} | {statistics.mean(together[1:]):.1f} |")  # fmt: skip
    print(f"\nMedians of {args.turns} turns of {len(turn)} pictures; the range in brackets.\n", flush=True)
    if not args.minutes:
        return

    expected = []
    for first in range(0, len(rows), args.batch_size):
        expected += draw(pipe, rows[first : first + args.batch_size], args.batch_size, args.exact)
    expected = np.stack([np.asarray(one.image, np.int16) for one in expected])
    load = await soak(client, process, rows, expected, 2 * args.batch_size, args.minutes)
    p50, p95, p99 = np.percentile(load.seconds, [50, 95, 99])
    tenth = max(1, len(load.memory) // 10)
    memory = statistics.median(load.memory[:tenth]), statistics.median(load.memory[-tenth:])
    print("| minutes | answers | p50 | p95 | p99 | memory, first to last | identical bits | mixed up | given up | errors |")
    print("|---" * 10 + "|")
    print(f"| {args.minutes:g} | {len(load.seconds)} | {p50:.2f} s | {p95:.2f} s | {p99:.2f} s "
          f"| {memory[0]:.0f} to {memory[1]:.0f} MiB | {load.identical / len(load.seconds):.1%} | {load.mixed_up} "
          f"| {load.left} | {load.errors} |")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of the second part; 0 leaves it out")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--exact", action="store_true", help="serve --exact")
    args = parser.parse_args()
    process, address = start_server(args)
    try:
        asyncio.run(measure(args, process, address))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
