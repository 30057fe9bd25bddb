"""
How long does the embedded model take to its first picture, from the start of Python, and how much of it is ours?

    python benchmarks/first_picture.py [--repeats 5]

Each time in a new process: the pipeline is imported, loaded and called once, at 12 steps. Python's garbage collector is off
until the model is loaded, as in the command line. Beside it, in turns, another process imports what the pipeline is built on
(torch, transformers and diffusers' pipelines) and nothing else, with the garbage collector on. The first turn warms the
system's file cache up and does not count. Medians, in seconds.
"""

import argparse
import statistics
import subprocess
import sys
from itertools import pairwise

FIRST_PICTURE = """
import gc, time
times = [time.time()]
gc.disable()
from paella_diffusers import EMOJI_MODEL, PaellaPipeline
times.append(time.time())
pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)
gc.freeze()
gc.enable()
times.append(time.time())
pipe("red heart", num_inference_steps=12).images[0]
print(*times, time.time())
"""
LIBRARIES = """
import time
start = time.time()
import torch, transformers, diffusers.pipelines.pipeline_utils
print(start, time.time())
"""


def times(code: str) -> list[float]:
    """Seconds between the times that it prints."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    printed = [float(value) for value in process.stdout.split()]
    return [after - before for before, after in pairwise(printed)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    ours, libraries = [], []
    for _ in range(args.repeats + 1):
        ours.append(times(FIRST_PICTURE))
        libraries.append(sum(times(LIBRARIES)))
    columns = [*zip(*ours[1:]), [sum(run) for run in ours[1:]], libraries[1:]]
    print("| import | load | draw | all | the libraries alone |")
    print("|---" * 5 + "|")
    print("| " + " | ".join(f"{statistics.median(column):.2f} s" for column in columns) + " |")
    print(f"\nAll, from {min(columns[3]):.2f} to {max(columns[3]):.2f} s in {args.repeats} runs.")


if __name__ == "__main__":
    main()
