"""
How long does a sampling step take at full size, where does the time go, and how near is it to what the machine can do?

    python benchmarks/inference.py [--dtypes float32 bfloat16] [--compile]

The U-Net has the published size and random weights (`--small` for a try). A plain loop, in the same run, is the yardstick:
two passes of the same U-Net, guidance in float32, softmax and multinomial sampling for all tokens. The ceiling is the
machine's rate of a large matrix product in the same dtype, and the share of it is FLOPs of two passes ÷ ceiling ÷ time of a
step.
"""

import argparse
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from paella_diffusers import PaellaScheduler, PaellaUNet

PARTS = ["U-Net", "guidance", "sampling"]


def ceiling(dtype: torch.dtype, size: int = 4096) -> float:
    """FLOP/s of a square matrix product, the best of five."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])


def conditioning(unet: PaellaUNet, rows: int, length: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(rows, length, unet.config.text_embed_dim, generator=generator)
    clip = torch.randn(rows, unet.config.clip_embed_dim, generator=generator)
    return {"encoder_hidden_states": text.to(unet.dtype), "clip_text_embeds": clip.to(unet.dtype)}


class Clock:
    def __init__(self):
        self.times = dict.fromkeys(PARTS, 0.0)

    def measure(self, part, function):
        start = time.perf_counter()
        result = function()
        self.times[part] += time.perf_counter() - start
        return result


def plain_step(unet, forward, scheduler, tokens, noise, level, scale) -> dict[str, float]:
    """Two passes and nothing clever: what the yardstick does."""
    clock, batch_size = Clock(), len(tokens)
    both = conditioning(unet, 2)
    branches = [
        {name: value[i : i + 1].expand(batch_size, *value.shape[1:]) for name, value in both.items()} for i in (0, 1)
    ]
    first, second = (clock.measure("U-Net", lambda b=b: forward(tokens, level, **b).sample) for b in branches)
    logits = clock.measure("guidance", lambda: first.float() * scale + second.float() * (1 - scale))

    def sample():
        rows = (logits.movedim(1, -1).flatten(0, -2) / 0.7).softmax(-1)
        sampled = torch.multinomial(rows, 1).view_as(tokens)
        return torch.where(torch.rand(tokens.shape) <= level - 1 / 12, noise, sampled)

    clock.measure("sampling", sample)
    return clock.times


def our_step(unet, forward, scheduler, tokens, noise, level, scale) -> dict[str, float]:
    """As `PaellaPipelineBase.denoise` does it."""
    clock, batch_size = Clock(), len(tokens)
    both = {name: value.repeat_interleave(batch_size, 0) for name, value in conditioning(unet, 2).items()}
    logits = clock.measure("U-Net", lambda: forward(torch.cat([tokens, tokens]), level, **both).sample)

    def guide():
        conditional, unconditional = logits.chunk(2)
        if logits.dtype == torch.float32:
            return scale * conditional + (1 - scale) * unconditional
        return torch.lerp(unconditional, conditional, scale)

    guided = clock.measure("guidance", guide)
    rows = guided.flatten(2).transpose(1, 2)
    step = lambda: scheduler.step(rows, level, tokens.flatten(1), noise=noise.flatten(1))
    clock.measure("sampling", step)
    return clock.times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256], help="pixels a side")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile too")
    parser.add_argument("--small", action="store_true", help="a small U-Net, to see that it runs")
    args = parser.parse_args()

    sizes = {"block_out_channels": (64, 128, 256), "layers_per_block": (1, 1, 1)} if args.small else {}
    torch.manual_seed(0)
    unet = PaellaUNet(**sizes).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    scheduler = PaellaScheduler()
    level = scheduler.timesteps[3]
    print("| dtype | pixels | batch | loop | U-Net | guidance | sampling | step | faster | share of ceiling |")
    print("|---" * 10 + "|")
    yardstick = {}  # the plain loop in float32, by size and batch
    with torch.inference_mode():
        for dtype in args.dtypes:
            unet.to(getattr(torch, dtype))
            top = ceiling(unet.dtype)
            ways = {"plain": (plain_step, unet), "ours": (our_step, unet)}
            if args.compile:
                ways["ours, compiled"] = (our_step, torch.compile(unet))
            for size in args.sizes:
                for batch_size in args.batch_sizes:
                    grid = (batch_size, size // 4, size // 4)
                    tokens, noise = torch.randint(8192, grid), torch.randint(8192, grid)
                    with FlopCounterMode(display=False) as counter:
                        unet(tokens, level, **conditioning(unet, batch_size))
                    runs = {name: [] for name in ways}
                    for repeat in range(args.repeats + 1):  # in turns, and the first is to warm up
                        for name, (step, forward) in ways.items():
                            times = step(unet, forward, scheduler, tokens, noise, level, 8.0)
                            if repeat:
                                runs[name].append(times)
                    for name, times in runs.items():
                        parts = [statistics.median(run[part] for run in times) for part in PARTS]
                        total = statistics.median(sum(run.values()) for run in times)
                        base = yardstick.setdefault((size, batch_size), total)
                        share = 2 * counter.get_total_flops() / top / total
                        figures = " | ".join(f"{1000 * part:.0f} ms" for part in [*parts, total])
                        print(
                            f"| {dtype} | {size} | {batch_size} | {name} | {figures} | {base / total:.2f}× | {share:.2f} |",
                            flush=True,
                        )
            print(f"\nCeiling in {dtype}: {top / 1e9:.0f} GFLOP/s\n")


if __name__ == "__main__":
    main()
