"""
A training step's time and peak memory, beside the published single-GPU loop's.

    python benchmarks/training.py [--published CLONE] [--batch-size 8] [--steps 3] [--rounds 2]

All variants have the same U-Net of 50 M parameters and the same batch, 64 × 64 tokens of 8192 kinds with ByT5-XL embeddings,
and each runs in a process of its own, in turns. With `--published`, a clone of https://github.com/dome272/Paella, its model
and its loop take part: the loop is written out here, as it cannot be imported, with the optimizer's step that it forgets.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SIZES = dict(
    cross_attention_dim=384, block_out_channels=(192, 384, 384), layers_per_block=(3, 6, 3), num_attention_heads=(-1, 6, 6)
)
BF16 = ["--mixed-precision", "bf16"]
VARIANTS = {
    "published": [],
    "ours": [],
    "ours, gradient checkpointing": ["--gradient-checkpointing"],
    "ours, bfloat16": BF16,
    "ours, bfloat16, gradient checkpointing": [*BF16, "--gradient-checkpointing"],
}


def published_steps(folder: Path, clone: Path, batch_size: int, steps: int):
    spec = importlib.util.spec_from_file_location("published", clone / "src" / "modules.py")
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    model = published.Paella(**json.loads((folder / "original.json").read_text())).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(8192, (batch_size, 64, 64))
    text = torch.randn(batch_size, 48, 2560)
    for _ in range(steps):
        yield
        t = 1 - torch.rand(len(tokens))
        noised, _ = model.add_noise(tokens, t)
        predicted = model(noised, t, text)
        loss = F.cross_entropy(predicted, tokens, label_smoothing=0.1)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accuracy = (predicted.argmax(1) == tokens).float().mean()
        {"loss": loss.item(), "acc": accuracy.item(), "grad_norm": norm.item()}  # shown after every step
    yield


def our_steps(folder: Path, batch_size: int, steps: int, options: list[str]) -> list[float]:
    """When the steps of examples/train_paella.py's loop began, and when the last ended."""
    from paella_diffusers.training.arguments import training_arguments
    from paella_diffusers.training.run import TrainingRun
    from paella_diffusers.training.unet import FrozenParts, add_unet_arguments, train_unet

    parser = training_arguments("")
    add_unet_arguments(parser)
    arguments = ["--data", str(folder / "data"), "--pretrained", str(folder), "--batch-size", str(batch_size)]
    arguments += ["--report-to", "none", "--log-every", "1", "--num-workers", "0", *options]
    with tempfile.TemporaryDirectory() as output:
        run = TrainingRun(parser.parse_args([*arguments, "--output-dir", output]))
        run.load_data()
        frozen = FrozenParts(run)
        unet = run.prepare("unet", frozen.pipe.unet.requires_grad_(True))
        batches, times = run.batches, []

        def timed_batches(draw=None):
            for batch in islice(batches(draw), steps):
                times.append(time.perf_counter())
                yield batch
            times.append(time.perf_counter())

        run.batches = timed_batches
        train_unet(run, unet, frozen)
        return times


def write_inputs(folder: Path, batch_size: int):
    """A pipeline without encoders, and as much data as one batch needs, as examples/precompute.py writes them."""
    from safetensors.torch import save_file
    from webdataset import TarWriter

    from paella_diffusers import PaellaPipeline, PaellaScheduler, PaellaUNet, VQModel

    torch.manual_seed(0)
    unet = PaellaUNet(**SIZES)
    print(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.0f} M parameters, batches of {batch_size}")
    pipe = PaellaPipeline(VQModel(embed_dim=16, bottleneck_blocks=1), unet, PaellaScheduler())
    pipe.save_pretrained(folder)
    (folder / "original.json").write_text(json.dumps(unet.to_original_config()))
    (folder / "data").mkdir()
    save_file({"prompt_embeds": torch.zeros(1, 1, 2560)}, folder / "data/empty.safetensors", {"computed": "prompt_embeds"})
    with TarWriter(str(folder / "data" / "0.tar")) as shard:
        for index in range(batch_size):
            arrays = {"tokens.npy": np.random.randint(8192, size=(64, 64)), "prompt_embeds.npy": np.random.randn(48, 2560)}
            shard.write({"__key__": f"{index:04d}", "txt": "", **arrays})


def measure(folder: Path, args) -> dict:
    """Median seconds of a step, and the process's highest resident memory in GiB."""
    if args.variant == "published":
        times = [time.perf_counter() for _ in published_steps(folder, args.published, args.batch_size, args.steps + 1)]
    else:
        times = our_steps(folder, args.batch_size, args.steps + 1, VARIANTS[args.variant])
    seconds = [later - earlier for earlier, later in pairwise(times[1:])]  # without the first, which is slower
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**20
    return {"seconds": statistics.median(seconds), "peak": peak}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="a clone of the published code, to run beside ours")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.folder, args)))
        return
    variants = [variant for variant in args.variants if variant != "published" or args.published]
    results = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), args.batch_size)
        for _ in range(args.rounds):
            for variant in variants:
                own = ["--variant", variant, "--folder", folder]
                command = [sys.executable, __file__, *sys.argv[1:], *own]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                results[variant].append(json.loads(output.splitlines()[-1]))
    print("| variant | step | images/s | × | peak memory | × |")
    print("|---|---|---|---|---|---|")
    median = lambda variant, name: statistics.median(result[name] for result in results[variant])
    first = variants[0]
    for variant in variants:
        seconds, peak = median(variant, "seconds"), median(variant, "peak")
        faster, smaller = median(first, "seconds") / seconds, peak / median(first, "peak")
        rate = args.batch_size / seconds
        print(f"| {variant} | {seconds:.2f} s | {rate:.2f} | {faster:.2f} | {peak:.2f} GiB | {smaller:.2f} |")


if __name__ == "__main__":
    main()
