"""
How long does a sampling step take at full size, where does the time go, and how near is it to what the machine can do?

    python benchmarks/inference.py [--published CLONE] [--dtypes float32 bfloat16] [--optimize] [--sizes 256 512 1024]
    python benchmarks/inference.py --parts [--dtypes float32 bfloat16]
    python benchmarks/inference.py --costs [--dtypes float32 bfloat16] [--sizes 256 320]
    python benchmarks/inference.py --by-size --sizes 256 512 1024 2048 [--dtypes float32] [--plot sizes.png]

`PaellaPipeline`'s loop with a U-Net of the published size and random weights, guidance 8. `--small` is for a try, and
`--layers 1 3 1` has the published width and a sixth of the depth.

* `--published CLONE`, of https://github.com/dome272/Paella: the same weights also run in that code as it is, in turns with
  ours. With `--compare`, each of its float32 steps is taken again by ours, from the same tokens and random numbers.
* `--previous CHECKOUT`, of this repository: it runs beside this one, each in a process, in at least ten pairs of turns.
* `--optimize`: with `pipe.optimize()` too. `--int8`: with linears quantized by torchao too, in int8: weights by channel,
  their inputs by token.
* `--parts`: an eager step by torch's operators.
* `--costs`: `pipe.optimize()`, `compile_repeated_blocks` and neither, each in processes of its own with an empty cache of
  compiled code: the first call, later ones in turns, a second size, memory.
* `--by-size`: each size in a process of its own, so that its peak of memory is its own; `--plot` is of time and memory a
  token.
* `--cpu-time`: processor time of all threads, and of compilers, in place of time. With one thread, other programs then
  matter little.

The ceiling is the machine's rate of a large matrix product in the same dtype, measured before and after each run, and the
share of it is the FLOPs of two passes ÷ ceiling ÷ time of a step. The peak of the memory and the pages that came in, as new
or as cleared ones, are the whole process's.
"""

import argparse
import ast
import contextlib
import copy
import functools
import importlib.util
import itertools
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from accelerate import init_empty_weights
from memory import peak, random_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from paella_diffusers import PaellaPipeline, PaellaScheduler, PaellaUNet, VQModel
from paella_diffusers.optimize import CompiledCalls

SMALL = {"block_out_channels": (64, 128, 256), "layers_per_block": (1, 1, 1)}


def processor_time() -> float:
    """Seconds of this process's threads, and of what it ran, such as a C++ compiler."""
    both = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


clock = time.perf_counter


def page_faults() -> int:
    """Of this process so far, without reading from disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def ceiling(dtype: torch.dtype, size: int = 4096) -> float:
    """FLOP/s of a square matrix product, the best of two."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    times = []
    for _ in range(3):
        start = clock()
        a @ b
        times.append(clock() - start)
    return 2 * size**3 / min(times[1:])


def embeddings(unet, batch_size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the text, and of CLIP's text."""
    generator = torch.Generator().manual_seed(length)
    text = torch.randn(batch_size, length, unet.config.text_embed_dim, generator=generator)
    clip = torch.randn(batch_size, unet.config.clip_embed_dim, generator=generator)
    return text.to(unet.dtype), clip.to(unet.dtype)


def flops_of_step(config: dict, batch_size: int, size: int) -> int:
    """Of two whole passes; counted without computing, and where attention consists of the products that are counted."""
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        unet = PaellaUNet.from_config(config)
        text = torch.empty(batch_size, 32, unet.config.text_embed_dim)
        clip = torch.empty(batch_size, unet.config.clip_embed_dim)
        unet(torch.empty(batch_size, size // 4, size // 4, dtype=torch.long), torch.empty(batch_size), text, clip)
    return 2 * counter.get_total_flops()


class Ours:
    """The pipeline's loop, with what its calls of the U-Net took."""

    def __init__(self, unet: PaellaUNet, call=None):
        self.unet = unet
        self.timed = {"_compiled_call_impl": call or unet._call_impl, "encode_conditioning": unet.encode_conditioning}
        self.pipe = PaellaPipeline(VQModel(embed_dim=16, bottleneck_blocks=1), unet, PaellaScheduler())
        self.pipe.set_progress_bar_config(disable=True)
        self.in_unet = 0.0

    def call(self, name, *args, **kwargs):
        start = clock()
        output = self.timed[name](*args, **kwargs)
        self.in_unet += clock() - start
        return output

    @contextlib.contextmanager
    def measured(self):
        """Meanwhile the U-Net is called our way, and its time is taken."""
        self.in_unet = 0.0
        for name in self.timed:
            setattr(self.unet, name, functools.partial(self.call, name))
        try:
            yield
        finally:
            for name in self.timed:
                delattr(self.unet, name)

    def run(self, steps: int, batch_size: int, size: int) -> tuple[float, float]:
        """Seconds a step, and of them seconds in the U-Net."""
        text, clip = embeddings(self.unet, batch_size, 32)
        negative_text, negative_clip = embeddings(self.unet, batch_size, 1)
        start = clock()
        with self.measured():
            self.pipe(
                prompt_embeds=text,
                negative_prompt_embeds=negative_text,
                clip_text_embeds=clip,
                negative_clip_text_embeds=negative_clip,
                height=size,
                width=size,
                num_inference_steps=steps,
                output_type="latent",
            )
        return (clock() - start) / steps, self.in_unet / steps

    def step(self, index: int, steps: int, tokens, noise, conditionings) -> torch.Tensor:
        """The tokens after one of the steps of a run."""
        from paella_diffusers import PaellaClassifierFreeGuidance
        from paella_diffusers.pipelines.conditioning import Conditioning
        from paella_diffusers.sampling.denoiser import Denoiser
        from paella_diffusers.sampling.steppers import make_stepper

        stepper = make_stepper(self.pipe.scheduler)
        step = stepper.plan(steps).steps[index]
        branches = [Conditioning(self.unet.config.clip_seq_len, *embeds) for embeds in conditionings]
        with self.measured():
            logits = Denoiser(self.unet, branches, PaellaClassifierFreeGuidance(), lambda step: 8.0)(tokens, step)
            return stepper.step(logits, step, tokens, noise)[0]


def pairs(previous: Path, args):
    """Steps of this checkout and of another, in turns, each in a process of its own: medians and their ratio."""
    print(
        "| dtype | pixels | step | step of the other | times its speed | quartiles of the pairs |\n|---|---|---|---|---|---|"
    )
    for dtype, size in itertools.product(args.dtypes, args.sizes):
        command = [sys.executable, __file__, "--worker", "eager", *same_model(args, dtype)]
        checkouts = (Path(__file__).parent.parent, previous)
        workers = [
            subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": str(checkout / "src")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for checkout in checkouts
        ]
        times = []
        for pair in range(args.repeats + 1):  # the first is to warm up
            order = (0, 1) if pair % 2 else (1, 0)
            seconds = [0.0, 0.0]
            for which in order:
                seconds[which] = ask(workers[which], size)
            times.append(seconds)
        for process in workers:
            process.communicate()
        ours, theirs = zip(*times[1:])
        low, ratio, high = statistics.quantiles([b / a for a, b in times[1:]], n=4)
        print(
            f"| {dtype} | {size} | {statistics.median(ours):.3f} s | {statistics.median(theirs):.3f} s | {ratio:.3f} | "
            f"{low:.3f} to {high:.3f} |",
            flush=True,
        )


def worker(unet: PaellaUNet, args):
    """Answers each line of standard input: a size with the seconds of a step, "memory" with the peak in GiB."""
    if args.worker == "compile_repeated_blocks":
        unet.compile_repeated_blocks(fullgraph=True)
    ours = Ours(unet, CompiledCalls(unet) if args.worker == "optimize" else None)
    for line in sys.stdin:
        if line == "memory\n":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, flush=True)
        else:
            print(ours.run(args.steps, 1, int(line))[0], flush=True)


def same_model(args, dtype: str) -> list[str]:
    """Options of a worker that has this process's model and clock."""
    options = ["--dtypes", dtype, "--steps", str(args.steps), "--layers", *map(str, args.layers)]
    return options + ["--small"] * args.small + ["--cpu-time"] * args.cpu_time


def ask(process: subprocess.Popen, question) -> float:
    """A worker's answer."""
    process.stdin.write(f"{question}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def costs(args):
    """What compiling costs and saves, for each way and dtype."""
    print("| dtype | way | first call | second process | later steps | second size | its later steps | peak memory |")
    print("|---" * 8 + "|")
    first_size, second_size = (args.sizes * 2)[:2] if len(args.sizes) > 1 else (args.sizes[0], args.sizes[0] + 64)
    for dtype in args.dtypes:
        start = {}
        with tempfile.TemporaryDirectory() as folder:
            for way in ("eager", "compile_repeated_blocks", "optimize"):
                command = [sys.executable, __file__, "--worker", way, *same_model(args, dtype)]
                environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/{way}"}
                start[way] = functools.partial(
                    subprocess.Popen, command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            workers = {way: new() for way, new in start.items()}
            rows = {way: [ask(process, first_size) * args.steps] for way, process in workers.items()}
            for way, new in start.items():
                again = new()
                rows[way].append(ask(again, first_size) * args.steps)
                again.communicate()
            for size in (first_size, second_size):
                first = {way: ask(process, size) * args.steps for way, process in workers.items()}
                later = {way: [] for way in workers}
                for _ in range(args.repeats):
                    for way, process in workers.items():
                        later[way].append(ask(process, size))
                for way, row in rows.items():
                    row += [first[way]] if size == second_size else []
                    row.append(statistics.median(later[way]))
            for way, process in workers.items():
                memory = ask(process, "memory")
                process.communicate()
                seconds = " | ".join(f"{value:.2f} s" for value in rows[way])
                print(f"| {dtype} | {way} | {seconds} | {memory:.2f} GiB |", flush=True)


def by_size(args):
    """A step's time and memory by size, in a table and, a token, in a plot."""
    print("| dtype | pixels | tokens | step | a token | memory before | peak | growth, a token |\n" + "|---" * 8 + "|")
    drawn = {}
    for dtype, size in itertools.product(args.dtypes, args.sizes):
        command = [sys.executable, __file__, "--worker", "eager", *same_model(args, dtype)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ask(process, 64)  # to warm up
        before = ask(process, "memory")
        seconds, memory, tokens = ask(process, size), ask(process, "memory"), (size // 4) ** 2
        process.communicate()
        growth = (memory - before) * 2**20 / tokens
        drawn.setdefault(dtype, []).append((size, seconds / tokens * 1e3, growth))
        print(
            f"| {dtype} | {size} | {tokens:,} | {seconds:.2f} s | {seconds / tokens * 1e3:.2f} ms | {before:.2f} GiB | "
            f"{memory:.2f} GiB | {growth:.0f} KiB |",
            flush=True,
        )
    if args.plot:
        plot_sizes(args.plot, drawn)


class Parts(TorchDispatchMode):
    """Time of torch's operators, and FLOPs of those that are products."""

    def __init__(self):
        super().__init__()
        self.seconds, self.calls, self.flops = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        start = clock()
        output = operator(*args, **kwargs or {})
        name = operator.overloadpacket
        self.seconds[name] += clock() - start
        self.calls[name] += 1
        if name in flop_registry:
            self.flops[name] += flop_registry[name](*args, **kwargs or {}, out_val=output)
        return output


def parts(unet: PaellaUNet, args):
    """An eager step by operators: those that take 1 % of it or more."""
    print("| dtype | operator | calls | a step | share | GFLOP/s |\n|---|---|---|---|---|---|")
    for dtype, size in itertools.product(args.dtypes, args.sizes):
        ours = Ours(unet.to(getattr(torch, dtype)))
        ours.run(1, 1, size)
        with Parts() as measured:
            start = clock()
            ours.run(args.steps, 1, size)
            total = clock() - start
        for name, seconds in measured.seconds.most_common():
            if seconds >= total / 100:
                calls, rate = measured.calls[name] / args.steps, measured.flops[name] / seconds / 1e9
                columns = f"{calls:.0f} | {seconds / args.steps * 1e3:.0f} ms | {seconds / total:.1%} | {rate:.0f}"
                print(f"| {dtype} | `{name}` | {columns if rate else columns[:-2]} |")
        rest = 1 - sum(seconds for seconds in measured.seconds.values() if seconds >= total / 100) / total
        print(
            f"| {dtype} | others, and what measuring takes | | {rest * total / args.steps * 1e3:.0f} ms | {rest:.1%} | |",
            flush=True,
        )


def machine() -> str:
    """The processor, what it can do, and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    values = {line.split(":")[0].strip(): line.split(":")[1].split() for line in lines if ":" in line}
    model, flags = values.get("model name", []), values.get("flags", [])
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8")
    features = " ".join(flag for flag in wanted if flag in flags)
    cores = torch.get_num_threads()
    return f"{' '.join(model)} ({features}), {cores} threads, torch {torch.__version__}, Python {sys.version.split()[0]}"


def quantized(unet: PaellaUNet, optimize: bool) -> dict[str, Ours]:
    """Ways with a copy of a U-Net whose linears are in int8."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    unet = copy.deepcopy(unet)
    quantize_(unet, Int8DynamicActivationInt8WeightConfig())
    ways = {"int8": Ours(unet)}
    return ways | {"int8, optimized": Ours(unet, CompiledCalls(unet))} if optimize else ways


class Published:
    """The published model and loop, from a clone of their repository."""

    def __init__(self, clone: Path, unet: PaellaUNet):
        spec = importlib.util.spec_from_file_location("published", clone / "src_distributed" / "modules.py")
        published = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(published)
        self.model = published.Paella(**unet.to_original_config()).eval()
        self.model.load_state_dict(unet.to_original_state_dict())
        tree = ast.parse((clone / "src_distributed" / "utils.py").read_text())  # which imports what sampling does not need
        loop = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "sample")
        names = {"torch": torch}
        exec(compile(ast.Module([loop], []), "sample", "exec"), names)
        self.sample, self.unet = names["sample"], unet

    def to(self, dtype: torch.dtype):
        self.model.to(dtype)
        embed = type(self.model).gen_r_embedding  # float32 whatever the weights are: the published code has autocast
        self.model.gen_r_embedding = lambda *args: embed(self.model, *args).to(dtype)

    def run(self, steps: int, batch_size: int, size: int) -> tuple[float, float]:
        names = ("byt5", "clip")
        inputs = dict(zip(names, embeddings(self.unet, batch_size, 32)))
        negative = dict(zip(names, embeddings(self.unet, batch_size, 1)))
        start = clock()
        self.sample(self.model, inputs, negative, (batch_size, size // 4, size // 4), steps=steps)
        return (clock() - start) / steps, float("nan")

    def differences(self, steps: int, size: int, ways: dict[str, "Ours"]) -> dict[str, list[int]]:
        """How many tokens each way's step chooses otherwise than the published one from the same state, by step."""
        seen = []

        def record(model, args, kwargs):
            if len(seen) == 0 or not torch.equal(seen[-1][0], args[0]):  # the second pass has the same tokens
                seen.append((args[0].clone(), torch.get_rng_state()))

        hook = self.model.register_forward_pre_hook(record, with_kwargs=True)
        names = ("byt5", "clip")
        conditionings = embeddings(self.unet, 1, 32), embeddings(self.unet, 1, 1)
        inputs, negative = (dict(zip(names, embeds)) for embeds in conditionings)
        last = self.sample(self.model, inputs, negative, (1, size // 4, size // 4), steps=steps)
        hook.remove()
        noise, following = seen[0][0], [tokens for tokens, _ in seen[1:]] + [last]
        counts = {name: [] for name in ways}
        for i, ((tokens, state), expected) in enumerate(zip(seen, following)):
            for name, way in ways.items():
                torch.set_rng_state(state)
                counts[name].append((way.step(i, steps, tokens, noise, conditionings) != expected).sum().item())
        return counts


def plot(path: Path, steps: dict[str, float]):
    """Seconds a step, by dtype and loop."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.5 * len(steps) + 1), layout="constrained")
    colours = ["0.6" if "published" in name else "tab:orange" for name in steps]
    bars = axes.barh(list(steps), list(steps.values()), color=colours)
    axes.bar_label(bars, fmt="%.1f s", padding=3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds a step, 256 × 256 pixels, two CPU cores")
    figure.savefig(path, dpi=110)


def plot_sizes(path: Path, drawn: dict[str, list[tuple[int, float, float]]]):
    """Milliseconds and KiB a token, by dtype and size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axes, title, column in zip(both, ("milliseconds a step, a token", "KiB of memory, a token"), (1, 2)):
        for dtype, rows in drawn.items():
            axes.plot([row[0] for row in rows], [row[column] for row in rows], "o-", label=dtype)
        sizes = sorted({row[0] for rows in drawn.values() for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("pixels a side")
        axes.spines[["top", "right"]].set_visible(False)
    both[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="a clone of the published code, to run beside ours")
    parser.add_argument("--previous", type=Path, metavar="CHECKOUT", help="another checkout of this repository")
    parser.add_argument("--worker", nargs="?", const="eager", help=argparse.SUPPRESS)
    parser.add_argument("--compare", action="store_true", help="count tokens in which 12 steps differ from theirs")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256], help="pixels a side")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=4, help="in each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--optimize", action="store_true", help="ours with `pipe.optimize()` too")
    parser.add_argument("--int8", action="store_true", help="ours with int8 linears too; needs torchao")
    parser.add_argument("--parts", action="store_true", help="a step by operators")
    parser.add_argument("--no-ceiling", action="store_true", help="save its time")
    parser.add_argument("--costs", action="store_true", help="of compiling")
    parser.add_argument("--by-size", action="store_true", help="time and memory a token")
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="bars of the first size and batch; by size: curves")
    parser.add_argument("--layers", type=int, nargs=3, default=[6, 16, 6], help="of the U-Net's levels")
    parser.add_argument("--cpu-time", action="store_true", help="where other programs run")
    parser.add_argument("--small", action="store_true", help="a small U-Net, to see that it runs")
    args = parser.parse_args()
    if args.compare and not args.published:
        parser.error("--compare is with --published")
    return args


def turns(ways: dict, args, dtype: torch.dtype, size: int, batch_size: int) -> tuple[dict, dict, dict]:
    """Of each way: step, of it in the U-Net, and ceiling in each turn; peak of memory in GiB; page faults a step."""
    runs, memory, faults = {name: [] for name in ways}, {}, {}
    for repeat in range(args.repeats + 1):  # the first is to warm up
        for name, way in ways.items():
            before = math.nan if args.no_ceiling else ceiling(dtype)
            peak()
            known = page_faults()
            times = way.run(args.steps, batch_size, size)
            memory[name], faults[name] = peak() / 2**30, (page_faults() - known) / args.steps
            if repeat:  # the ceiling is as the machine's neighbours let it
                runs[name].append((*times, (before + (math.nan if args.no_ceiling else ceiling(dtype))) / 2))
    return runs, memory, faults


def compare(unet: PaellaUNet, args) -> dict[str, float]:
    """A step of each loop, by dtype, size and batch: a table. Returns the steps of the first size and batch, by name."""
    published = Published(args.published, unet) if args.published else None
    ours = {"ours": Ours(unet)}
    if args.optimize:
        ours["ours, optimized"] = Ours(unet, CompiledCalls(unet))
    if args.compare:
        for name, counts in published.differences(12, 256, ours).items():
            print(f"Tokens in which each step of {name} differs from the published one, of 4,096: {counts}\n", flush=True)
    print(
        "| dtype | pixels | batch | loop | step | of it not U-Net | × published | × it in float32 | share of ceiling | "
        "peak memory | page faults a step |"
    )
    print("|---" * 11 + "|")
    drawn, yardstick = {}, {}  # the published loop's step in float32, by size and batch
    for dtype in args.dtypes:
        unet.to(getattr(torch, dtype))
        ways = ours | (quantized(unet, args.optimize) if args.int8 else {})
        if published:
            published.to(unet.dtype)
            ways = {"published": published} | ways
        top = 0.0
        for size, batch_size in itertools.product(args.sizes, args.batch_sizes):
            runs, memory, faults = turns(ways, args, unet.dtype, size, batch_size)
            steps = {name: statistics.median(step for step, *_ in times) for name, times in runs.items()}
            if "published" in steps:
                yardstick.setdefault((size, batch_size), steps["published"])
            if (size, batch_size) == (args.sizes[0], args.batch_sizes[0]):
                drawn |= {f"{name}, {dtype}": step for name, step in steps.items()}
            flops = flops_of_step(unet.config, batch_size, size)
            for name, times in runs.items():
                rest = 1 - statistics.median(in_unet / step for step, in_unet, _ in times)
                bases = steps.get("published"), yardstick.get((size, batch_size))
                ratios = " | ".join(f"{base / steps[name]:.2f}" if base else "" for base in bases)
                share = statistics.median(flops / around / step for step, _, around in times)
                top = max(top, *(around for *_, around in times))
                columns = f"{steps[name]:.2f} s | {rest:.1%} | {ratios} | {share:.2f}".replace("nan%", "").replace("nan", "")
                columns += f" | {memory[name]:.2f} GiB | {faults[name]:,.0f}"
                print(f"| {dtype} | {size} | {batch_size} | {name} | {columns} |", flush=True)
        print("" if args.no_ceiling else f"\nCeiling in {dtype}: {top / 1e9:.0f} GFLOP/s\n")
    return drawn


def main():
    args = arguments()
    if args.cpu_time:
        global clock
        clock = processor_time
    if args.previous:
        args.repeats = max(args.repeats, 10)
        pairs(args.previous, args)
        return
    if not args.worker:
        print(machine(), "\n")
    if args.costs:
        costs(args)
        return
    if args.by_size:
        by_size(args)
        return
    torch.manual_seed(0)
    with init_empty_weights():
        unet = PaellaUNet(**SMALL if args.small else {"layers_per_block": tuple(args.layers)})
    random_weights(unet, torch.float32)
    if args.parts:
        with torch.no_grad():  # inference mode would not show what linears are made of
            parts(unet, args)
        return
    with torch.inference_mode():
        if args.worker:
            worker(unet.to(getattr(torch, args.dtypes[0])), args)
            return
        drawn = compare(unet, args)
    if args.plot:
        plot(args.plot, drawn)


if __name__ == "__main__":
    main()
