"""
A training step's time and peak memory, beside the published single-GPU loop's.

    python benchmarks/training.py [--published CLONE] [--batch-size 8] [--steps 3] [--rounds 2]

All variants have the same U-Net of 50 M parameters and the same batch, 64 × 64 tokens of 8192 kinds with ByT5-XL embeddings,
and each runs in a process of its own, in turns. With `--published`, a clone of https://github.com/dome272/Paella, its model
and its loop take part: the loop is written out here, as it cannot be imported, with the optimizer's step that it forgets.

    python benchmarks/training.py --memory [--batch-size 2]

computes instead what a GPU needs to train the released U-Net: the sizes of all tensors that are alive at once in two steps
with fake tensors, which have sizes but no memory. It first does so for the U-Net of this benchmark, and trains that in
processes of their own, to compare. These have `MALLOC_MMAP_THRESHOLD_`, so that glibc returns to the system what is freed.
"""

import argparse
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

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
# of which `--memory` compares what is computed with what is measured: arguments of `step_bytes` and of the trainer
MEMORY = {
    "one process": ({}, []),
    "gradient checkpointing": ({"checkpointing": True}, ["--gradient-checkpointing"]),
    "averages": ({"average": True}, ["--ema-decay", "0.999"]),
    "DDP, each of two processes": ({"ddp": True}, []),
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


def our_steps(folder: Path, batch_size: int, steps: int, options: list[str]) -> tuple[list[float], int]:
    """When the steps of examples/train_paella.py's loop began and the last ended; resident bytes before the models."""
    from paella_diffusers.training.arguments import training_arguments
    from paella_diffusers.training.run import TrainingRun
    from paella_diffusers.training.unet import FrozenParts, add_unet_arguments, train_unet

    parser = training_arguments("")
    add_unet_arguments(parser)
    arguments = ["--data", str(folder / "data"), "--pretrained", str(folder), "--batch-size", str(batch_size)]
    side = json.loads((folder / "unet/config.json").read_text())["sample_size"]
    arguments += ["--resolution", str(4 * side), "--report-to", "none", "--log-every", "1", "--num-workers", "0", *options]
    with tempfile.TemporaryDirectory() as output:
        run = TrainingRun(parser.parse_args([*arguments, "--output-dir", output]))
        run.load_data()
        before = resident()
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
        run.release()
        return times, before


def write_inputs(folder: Path, batch_size: int, sizes: dict = SIZES):
    """A pipeline without encoders, and as much data as one batch needs, as examples/precompute.py writes them."""
    from safetensors.torch import save_file
    from webdataset import TarWriter

    from paella_diffusers import PaellaPipeline, PaellaScheduler, PaellaUNet, VQModel

    torch.manual_seed(0)
    unet = PaellaUNet(**sizes)
    codes, side, channels = (getattr(unet.config, name) for name in ("num_vq_embeddings", "sample_size", "text_embed_dim"))
    print(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.0f} M parameters, batches of {batch_size}")
    vqgan = VQModel(embed_dim=16, bottleneck_blocks=1, num_vq_embeddings=codes)
    pipe = PaellaPipeline(vqgan, unet, PaellaScheduler())
    pipe.save_pretrained(folder)
    (folder / "original.json").write_text(json.dumps(unet.to_original_config()))
    (folder / "data").mkdir()
    empty = {"prompt_embeds": torch.zeros(1, 1, channels)}
    save_file(empty, folder / "data/empty.safetensors", {"computed": "prompt_embeds"})
    with TarWriter(str(folder / "data" / "0.tar")) as shard:
        for index in range(batch_size):
            arrays = {"tokens.npy": np.random.randint(codes, size=(side, side))}
            arrays["prompt_embeds.npy"] = np.random.randn(48, channels)
            shard.write({"__key__": f"{index:04d}", "txt": "", **arrays})


class AliveBytes(TorchDispatchMode):
    """Within, `now` is the size of all tensors that were made and are alive, and `peak` what it was at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.count, result)
        return result

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            size = storage.nbytes()
            self.known.add(storage._cdata)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int):
        self.known.discard(key)
        self.now -= size


def step_bytes(
    sizes: dict, batch_size: int, checkpointing=False, bf16=False, ddp=False, average=False, clip=True, length=48
) -> int:
    """
    The bytes of all tensors that are alive at once, at most, in two steps of `train_unet` with AdamW: weights, optimizer
    states, gradients, activations, logits. Under `ddp` the gradients stay, as they are views of buckets.

    Args:
        clip (`bool`, defaults to `True`): Whether there are CLIP embeddings.
        length (`int`, defaults to 48): Of the text.
    """
    from diffusers.training_utils import EMAModel

    from paella_diffusers import PaellaUNet
    from paella_diffusers.training.losses import paella_loss

    with FakeTensorMode(), AliveBytes() as alive:
        model = PaellaUNet(**sizes).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        average = EMAModel(model.parameters(), foreach=True) if average else None
        for parameter in model.parameters() if ddp else ():
            parameter.grad = torch.zeros_like(parameter)
        config = model.config
        tokens = torch.randint(config.num_vq_embeddings, (batch_size, config.sample_size, config.sample_size))
        timestep, text = torch.rand(batch_size), torch.randn(batch_size, length, config.text_embed_dim)
        embeds = torch.randn(batch_size, config.clip_embed_dim) if clip else None
        alive.peak = alive.now  # without what making the weights needed
        for _ in range(2):  # in the second there are also the states, and the first one's logits
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(tokens, timestep, text, clip_text_embeds=embeds, clip_image_embeds=embeds).sample
            paella_loss(logits, tokens, torch.ones_like(tokens), timestep).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not ddp)
            if average is not None:
                average.step(model.parameters())
        return alive.peak


def print_memory(batch_size: int):
    """The tables of `--memory`."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), batch_size)
        print("| GiB | computed | measured | |\n|---|---|---|---|")
        for name, (case, _) in MEMORY.items():
            computed = step_bytes(SIZES, batch_size, clip=False, **case) / 2**30
            measured = max(result["peak"] - result["before"] for result in train_alone(Path(folder), batch_size, name))
            print(f"| {name} | {computed:.2f} | {measured:.2f} | {computed / measured - 1:+.1%} |", flush=True)
    print("| released U-Net, bfloat16, DDP, GB | 8 images | 16 images |\n|---|---|---|")
    for checkpointing in (False, True):
        few, many = (step_bytes({}, size, checkpointing, True, True, length=78) / 1e9 for size in (8, 16))
        what = "`--gradient-checkpointing`" if checkpointing else ""
        print(f"| {what} | {few:.1f} | {many:.1f} |", flush=True)


def train_alone(folder: Path, batch_size: int, case: str) -> list[dict]:
    """What `measure` finds in processes of their own; their C library returns to the system what is freed."""
    command = [sys.executable, __file__, "--variant", case, "--folder", str(folder), "--steps", "1"]
    command += ["--batch-size", str(batch_size)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ranks = [{}]
    if MEMORY[case][0].get("ddp"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"ACCELERATE_USE_CPU": "true"}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    start = lambda rank: subprocess.Popen(command, env=environment | rank, stdout=subprocess.PIPE, text=True)
    outputs = [process.communicate()[0] for process in [start(rank) for rank in ranks]]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def resident(peak: bool = False) -> int:
    """This process's resident memory in bytes, or its highest."""
    name, status = "VmHWM" if peak else "VmRSS", Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) * 1024


def measure(folder: Path, args) -> dict:
    """Median seconds of a step, and the process's resident memory in GiB: before it had models, and at its highest."""
    before, options = 0, VARIANTS[args.variant] if args.variant in VARIANTS else MEMORY[args.variant][1]
    if args.variant == "published":
        times = [time.perf_counter() for _ in published_steps(folder, args.published, args.batch_size, args.steps + 1)]
    else:
        times, before = our_steps(folder, args.batch_size, args.steps + 1, options)
    seconds = [later - earlier for earlier, later in pairwise(times[1:])]  # without the first, which is slower
    return {"seconds": statistics.median(seconds), "before": before / 2**30, "peak": resident(peak=True) / 2**30}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="a clone of the published code, to run beside ours")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="compute what a GPU needs, instead of measuring steps")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--variant", choices=[*VARIANTS, *MEMORY], help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print_memory(args.batch_size)
        return
    if args.variant is not None:
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
