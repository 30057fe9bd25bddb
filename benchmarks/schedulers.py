"""
Which scheduler samples best? Against a distribution that is known exactly, on the embedded model, and by cost of a step.

    pip install ".[emoji]" matplotlib
    python benchmarks/schedulers.py truth|bias|emoji|cost

`truth`: the model is replaced by the exact posterior of a distribution over 2 × 2 grids of 3 tokens, and the total
variation distance between it and 100,000 samples is printed by number of steps. `bias`: how far a token with the
probabilities p is from p^(1/T) when it is sampled with the temperature T, plain and leave-one-out, computed without
sampling. `emoji`: the share of pictures that come out right, by U-Net evaluations, with standard errors: of icon names, of
objects in a style that is new for them, and of sentences. `cost`: medians of the time of a `step` on 64 × 64 tokens out of
8192, and of its ratio to the `PaellaScheduler` step just before it.
"""

import argparse
import inspect
import itertools
import statistics
import sys
import time
from operator import truediv
from pathlib import Path

import torch
from diffusers import DiscreteDDIMScheduler, EntropyBoundScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from paella_diffusers import (
    EMOJI_MODEL,
    PaellaConfidenceScheduler,
    PaellaFlowMatchEulerScheduler,
    PaellaFlowMatchTrapezoidalScheduler,
    PaellaPipeline,
    PaellaPsiScheduler,
    PaellaScheduler,
    VQModel,
)

SIDE, TOKENS = 2, 3


class ExactPosterior(ModelMixin, ConfigMixin):
    """In place of a U-Net: the posterior of each clean token given a noised grid, by summing over all clean grids."""

    sample_multiple = 1

    @register_to_config
    def __init__(
        self,
        sample_size: int = SIDE,
        num_vq_embeddings: int = TOKENS,
        text_embed_dim: int = 1,
        clip_embed_dim: int = 1,
        clip_seq_len: int = 1,
    ):
        super().__init__()
        length = sample_size**2
        self.grids = torch.tensor(list(itertools.product(range(num_vq_embeddings), repeat=length)))
        # neighbours like to be equal, and each position has tastes of its own
        generator = torch.Generator().manual_seed(0)
        pairs = [(a, b) for a, b in itertools.combinations(range(length), 2) if (b - a) in (1, sample_size)]
        energy = sum(0.8 * (self.grids[:, a] == self.grids[:, b]) for a, b in pairs)
        tastes = torch.randn(length, num_vq_embeddings, generator=generator)
        energy = energy + 0.5 * tastes[torch.arange(length), self.grids].sum(1)
        self.truth = energy.softmax(0)
        self.place = num_vq_embeddings ** torch.arange(length).flip(0)
        self.register_buffer("unused", torch.zeros(1))  # a model has a dtype

    def states(self, tokens: torch.LongTensor) -> torch.LongTensor:
        """The number of each grid in `grids`."""
        return (tokens.flatten(1) * self.place).sum(1)

    def encode_conditioning(self, **kwargs) -> None:
        """There is none."""

    def forward(self, sample, timestep, *args, **kwargs) -> BaseOutput:
        level, vocabulary = float(timestep), self.config.num_vq_embeddings
        same = (self.grids[:, None] == self.grids).double()
        likelihood = ((1 - level) * same + level / vocabulary).prod(-1)  # of noised grids (rows) given clean ones
        joint = likelihood * self.truth
        clean = torch.nn.functional.one_hot(self.grids, vocabulary).double()
        posterior = torch.einsum("nc,clv->nlv", joint, clean) / joint.sum(1)[:, None, None]
        logits = posterior.clamp(min=1e-30).log().float()[self.states(sample)]
        return BaseOutput(sample=logits.transpose(1, 2).unflatten(2, sample.shape[1:]))


def exact_pipeline() -> PaellaPipeline:
    vqgan = VQModel(num_vq_embeddings=TOKENS, levels=2, bottleneck_blocks=1, embed_dim=8)
    pipe = PaellaPipeline(vqgan, ExactPosterior(), PaellaScheduler(num_vq_embeddings=TOKENS))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def total_variation(pipe: PaellaPipeline, steps: int, samples: int, seed: int = 0, **call) -> float:
    """Half the sum of absolute differences between the shares of the samples and the truth."""
    tokens = pipe(
        prompt_embeds=torch.zeros(1, 1, 1),
        num_inference_steps=steps,
        num_images_per_prompt=samples,
        guidance_scale=None,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **call,
    ).images
    share = torch.bincount(pipe.unet.states(tokens), minlength=len(pipe.unet.truth)) / samples
    return 0.5 * (share - pipe.unet.truth).abs().sum().item()


# each with what `from_config` changes and what the call adds
EXACT = {
    "PaellaScheduler, published settings": (PaellaScheduler, {}, {}),
    "PaellaScheduler, temperature 1": (PaellaScheduler, {"temperature": 1.0}, {}),
    "… fresh noise": (PaellaScheduler, {"temperature": 1.0, "noise_source": "fresh"}, {}),
    "PaellaConfidenceScheduler, temperature 1": (PaellaConfidenceScheduler, {"temperature": 1.0}, {}),
    "Halton's order, temperature 1": (PaellaConfidenceScheduler, {"temperature": 1.0, "ranking": "halton"}, {}),
    "PaellaFlowMatchEulerScheduler, temperature 1": (PaellaFlowMatchEulerScheduler, {"temperature": 1.0}, {}),
    "… cosine grid": (PaellaFlowMatchEulerScheduler, {"temperature": 1.0, "time_grid": "cosine"}, {}),
    "… corrector rate 4": (PaellaFlowMatchEulerScheduler, {"temperature": 1.0, "corrector_rate": 4.0}, {}),
    "PaellaFlowMatchTrapezoidalScheduler, temperature 1": (PaellaFlowMatchTrapezoidalScheduler, {"temperature": 1.0}, {}),
    "PaellaPsiScheduler, temperature 1, κ 0.5": (PaellaPsiScheduler, {"temperature": 1.0}, {}),
    "PaellaPsiScheduler, temperature 1, κ 0.9": (PaellaPsiScheduler, {"temperature": 1.0, "kappa": 0.9}, {}),
    "PaellaPsiScheduler, temperature 1, κ 1": (PaellaPsiScheduler, {"temperature": 1.0, "kappa": 1.0}, {}),
    "DiscreteDDIMScheduler, temperature 1": (DiscreteDDIMScheduler, {}, {"temperature": 1.0}),
    "… 1 corrector step": (DiscreteDDIMScheduler, {"corrector_steps": 1}, {"temperature": 1.0}),
    "… at random positions": (
        DiscreteDDIMScheduler,
        {"corrector_steps": 1, "corrector_selection": "random"},
        {"temperature": 1.0},
    ),
    "EntropyBoundScheduler, temperature 1": (EntropyBoundScheduler, {"t_max": 1.0, "t_min": 1.0}, {}),
}


def chosen(samplers: dict, only: list[str] | None) -> list:
    """The samplers whose names contain one of these words; all without any."""
    return [(name, sampler) for name, sampler in samplers.items() if not only or any(word in name for word in only)]


def table(head: list, rows):
    print("| " + " | ".join(map(str, head)) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def truth(args):
    pipe = exact_pipeline()
    base = pipe.scheduler.config
    steps = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    curves = {}

    def rows():
        for name, (scheduler, settings, call) in chosen(EXACT, args.only):
            pipe.scheduler = scheduler.from_config(base, **settings)
            curves[name] = [total_variation(pipe, n, args.samples, **call) for n in steps]
            yield [name, *(f"{value:.3f}" for value in curves[name])]

    table(["TV after steps", *steps], rows())
    ideal = torch.multinomial(pipe.unet.truth, args.samples, replacement=True)
    share = torch.bincount(ideal, minlength=len(pipe.unet.truth)) / args.samples
    floor = 0.5 * (share - pipe.unet.truth).abs().sum().item()
    print(f"\nSo many samples of the truth itself are at {floor:.3f}.")
    if args.plot:
        plot(args.plot, steps, curves, "total variation distance to the truth", log=True)


ONE_TOKEN = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).double()


def temperature_bias(steps: int, temperature: float, leave_one_out: bool) -> float:
    """
    The total variation distance between what flow matching makes of one token, whose probabilities p are `ONE_TOKEN`, with
    this temperature, and p^(1/T), renormalised; computed without sampling.
    """
    scheduler = PaellaFlowMatchEulerScheduler(steps, temperature=temperature, leave_one_out_temperature=leave_one_out)
    size, present = len(ONE_TOKEN), torch.arange(len(ONE_TOKEN))[None]
    share = torch.full_like(ONE_TOKEN, 1 / size)
    for index, (t, s) in enumerate(itertools.pairwise(scheduler._levels)):
        likelihood = (1 - t) * torch.eye(size).double() + t / size
        logits = scheduler._tempered((likelihood * ONE_TOKEN).log()[None], present, index)
        share = share @ ((1 - s / t) * (logits[0] / temperature).softmax(-1) + s / t * torch.eye(size))
    wanted = ONE_TOKEN ** (1 / temperature)
    return 0.5 * (share - wanted / wanted.sum()).abs().sum().item()


def bias(args):
    steps = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    rows = [
        [f"T = {temperature}, {name}", *(f"{temperature_bias(n, temperature, value):.3f}" for n in steps)]
        for temperature in (0.3, 0.7, 1.5)
        for name, value in (("plain", False), ("leave-one-out", True))
    ]
    table(["TV after steps", *steps], rows)


def plot(path: Path, steps: list[int], curves: dict, label: str, log: bool, xlabel: str = "U-Net evaluations", base=2):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    for number, (name, values) in enumerate(curves.items()):
        style = {"marker": "osD^vP*X<>"[number % 10], "linestyle": "--" if number >= 10 else "-"}  # colours repeat after ten
        axes.plot(steps, values, markersize=4, linewidth=1.2, label=name, **style)
    if base is not None:
        axes.set_xscale("log", base=base)
    axes.set_xticks(steps, steps)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


DRAWN = {
    "PaellaScheduler": (PaellaScheduler, {}, {}),
    "PaellaScheduler, argmax": (PaellaScheduler, {"sampling_rule": "argmax"}, {}),
    "PaellaConfidenceScheduler": (PaellaConfidenceScheduler, {}, {}),
    "… Halton's order": (PaellaConfidenceScheduler, {"ranking": "halton"}, {}),
    "PaellaFlowMatchEulerScheduler": (PaellaFlowMatchEulerScheduler, {}, {}),
    "… corrector rate 4": (PaellaFlowMatchEulerScheduler, {"corrector_rate": 4.0}, {}),
    "PaellaFlowMatchTrapezoidalScheduler": (PaellaFlowMatchTrapezoidalScheduler, {}, {}),
    "PaellaPsiScheduler, κ 0.5": (PaellaPsiScheduler, {}, {}),
    "PaellaPsiScheduler, κ 1": (PaellaPsiScheduler, {"kappa": 1.0}, {}),
    "DiscreteDDIMScheduler": (DiscreteDDIMScheduler, {}, {}),
    "EntropyBoundScheduler": (EntropyBoundScheduler, {}, {}),
}


def standard_error(values: torch.Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item()


def emoji(args):
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from emoji_model import prompt_sets
    from emoji_model.scoring import draw

    sets = prompt_sets.load(args.work_dir, args.prompts)
    pipe = PaellaPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    base, steps = pipe.scheduler.config, args.steps
    for guidance_scale, (kind, asked) in itertools.product(args.guidance_scales, sets.items()):
        curves = {}

        def rows(guidance_scale=guidance_scale, asked=asked, curves=curves):
            for name, (scheduler, settings, call) in chosen(DRAWN, args.only):
                pipe.scheduler = scheduler.from_config(base, **settings)
                right = []
                for n in steps:
                    pictures = draw(pipe, asked.prompts, num_inference_steps=n, guidance_scale=guidance_scale, **call)
                    right.append(asked.measure(pictures)[0])
                curves[name] = [values.mean().item() for values in right]
                yield [name, *(f"{values.mean():.0%} ± {standard_error(values):.0%}" for values in right)]

        print(f"\nGuidance {guidance_scale:g}, {len(asked.prompts)} {kind}:\n")
        table(["right after steps", *steps], rows())
        if args.plot:
            name = f"{args.plot.stem}-{kind.replace(' ', '-')}-{guidance_scale:g}{args.plot.suffix}"
            plot(args.plot.with_name(name), steps, curves, f"share of {kind} right", log=False)


def cost(args):
    """Steps of one image of 256 × 256 pixels, taken in turns, so that other load on the machine hits all alike."""
    tokens = torch.randint(8192, (1, 64, 64))
    schedulers = {
        "PaellaScheduler": PaellaScheduler(),
        "PaellaConfidenceScheduler": PaellaConfidenceScheduler(),
        "… Halton's order": PaellaConfidenceScheduler(ranking="halton"),
        "PaellaFlowMatchEulerScheduler": PaellaFlowMatchEulerScheduler(),
        "… corrector rate 4": PaellaFlowMatchEulerScheduler(corrector_rate=4.0),
        "PaellaFlowMatchTrapezoidalScheduler, first stage": PaellaFlowMatchTrapezoidalScheduler(),
        "… second stage": PaellaFlowMatchTrapezoidalScheduler(),
        "PaellaPsiScheduler": PaellaPsiScheduler(),
    }
    columns = {}
    for dtype, threads in itertools.product((torch.float32, torch.bfloat16), args.threads):
        torch.set_num_threads(threads)
        logits = torch.randn(1, 64, 64, 8192).to(dtype).movedim(-1, 1)  # channels-last, as the U-Net returns them
        seconds = {name: [] for name in schedulers}
        for _ in range(args.repeats):
            for name, scheduler in schedulers.items():
                extra = {"noise": tokens} if "noise" in inspect.signature(scheduler.step).parameters else {}
                index = 2 if "first stage" in name else 3
                if "second stage" in name:
                    scheduler.step(logits, scheduler.timesteps[2], tokens)
                start = time.perf_counter()
                scheduler.step(logits, scheduler.timesteps[index], tokens, **extra)
                seconds[name].append(time.perf_counter() - start)
        ratios = {
            name: statistics.median(map(truediv, times, seconds["PaellaScheduler"])) for name, times in seconds.items()
        }
        columns[f"{str(dtype).removeprefix('torch.')}, {threads} thread{'s' * (threads > 1)}"] = [
            f"{1000 * statistics.median(times):.0f} ms, {ratios[name]:.2f}×" for name, times in seconds.items()
        ]
    table(["step", *columns], zip(schedulers, *columns.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["truth", "bias", "emoji", "cost"])
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="truth, emoji: the samplers with such a word in their name"
    )
    parser.add_argument("--samples", type=int, default=100_000, help="truth: grids for each figure")
    parser.add_argument("--prompts", type=int, default=200, help="emoji: at most so many of each kind")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 6, 8, 12, 24, 48], help="emoji: numbers of steps")
    parser.add_argument("--guidance-scales", type=float, nargs="+", default=[3.0, 1.0], help="emoji: 1 is no guidance")
    parser.add_argument("--model", default=EMOJI_MODEL)
    parser.add_argument("--work-dir", type=Path, default=Path("emoji-training"), help="emoji: where the icons are, or go")
    parser.add_argument("--repeats", type=int, default=9, help="cost: steps of each")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="cost: numbers of threads")
    parser.add_argument("--plot", type=Path, help="write a plot there, such as docs/schedulers-truth.png")
    args = parser.parse_args()
    with torch.no_grad():
        {"truth": truth, "bias": bias, "emoji": emoji, "cost": cost}[args.what](args)


if __name__ == "__main__":
    main()
