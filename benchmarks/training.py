"""
A training step's time and peak memory, beside the published single-GPU loop's.

    python benchmarks/training.py [--published CLONE] [--batch-size 8] [--steps 3] [--rounds 2]

All variants have the same U-Net of 50 M parameters and the same batch, 64 × 64 tokens of 8192 kinds with ByT5-XL embeddings,
and each runs in a process of its own, in turns. With `--published`, a clone of https://github.com/dome272/Paella, its model
and its loop take part: the loop is written out here, as it cannot be imported, with the optimizer's step that it forgets.

    python benchmarks/training.py --memory

computes instead what a GPU needs to train the released U-Net: the sizes of all tensors that are alive at once in a step with
fake tensors, which have sizes but no memory. It first does so for the U-Net of this benchmark, to be compared with the peaks
that are measured without `--memory`.
"""

import argparse
import importlib.util
import json
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


class AliveBytes(TorchDispatchMode):
    """Within, `now` is the size of all tensors that were made and are alive, and `peak` what it was at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor):
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


def step_bytes(sizes: dict, batch_size: int, checkpointing: bool, bf16=False, buckets=False) -> tuple[int, int]:
    """
    Number of parameters, and the bytes that forward, loss and backward of `train_unet` add at most to the weights; with
    DDP's `buckets`, in which the gradients always are, to weights and gradients.
    """
    from paella_diffusers import PaellaUNet
    from paella_diffusers.training.losses import paella_loss

    with FakeTensorMode():
        model = PaellaUNet(**sizes).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        for parameter in model.parameters() if buckets else ():
            parameter.grad = torch.zeros_like(parameter)
        config = model.config
        tokens = torch.randint(config.num_vq_embeddings, (batch_size, config.sample_size, config.sample_size))
        timestep, text = torch.rand(batch_size), torch.randn(batch_size, 78, config.text_embed_dim)
        clip = torch.randn(batch_size, config.clip_embed_dim)
        with AliveBytes() as alive:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(tokens, timestep, text, clip_text_embeds=clip, clip_image_embeds=clip).sample
            paella_loss(logits, tokens, torch.ones_like(tokens), timestep).backward()
        return sum(parameter.numel() for parameter in model.parameters()), alive.peak


def print_memory(batch_size: int):
    """The tables of `--memory`."""
    importlib.import_module("paella_diffusers.training.run")
    print(f"Python and its libraries: {resident() / 2**30:.2f} GiB")
    print(f"| U-Net of this benchmark, float32, {batch_size} images | GiB |\n|---|---|")
    for checkpointing in (False, True):
        parameters, added = step_bytes(SIZES, batch_size, checkpointing)
        states = parameters * 4 * 3  # weights and AdamW's two
        print(f"| {'gradient checkpointing' if checkpointing else ''} | {(states + added) / 2**30:.2f} |", flush=True)
    print("| released U-Net, bfloat16, DDP | fixed, GB | GB an image |\n|---|---|---|")
    for checkpointing in (False, True):
        (parameters, few), (_, many) = (step_bytes({}, size, checkpointing, True, True) for size in (8, 16))
        states, image = parameters * 4 * 4, (many - few) / 8  # weights, gradients and AdamW's two
        what = "gradient checkpointing" if checkpointing else ""
        print(f"| {what} | {(states + few - 8 * image) / 1e9:.1f} | {image / 1e9:.2f} |", flush=True)


def resident(peak: bool = False) -> int:
    """This process's resident memory in bytes, or its highest."""
    name, status = "VmHWM" if peak else "VmRSS", Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1]) * 1024


def measure(folder: Path, args) -> dict:
    """Median seconds of a step, and the process's highest resident memory in GiB."""
    if args.variant == "published":
        times = [time.perf_counter() for _ in published_steps(folder, args.published, args.batch_size, args.steps + 1)]
    else:
        times = our_steps(folder, args.batch_size, args.steps + 1, VARIANTS[args.variant])
    seconds = [later - earlier for earlier, later in pairwise(times[1:])]  # without the first, which is slower
    return {"seconds": statistics.median(seconds), "peak": resident(peak=True) / 2**30}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="a clone of the published code, to run beside ours")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="compute what a GPU needs, instead of measuring steps")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print_memory(args.batch_size)
        return
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
