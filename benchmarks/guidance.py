"""
Which guidance draws best? On the embedded model by guidance scale, and on a posterior that is known exactly.

    pip install ".[emoji]" matplotlib
    python benchmarks/guidance.py emoji|truth

`emoji`: icon names, objects in a style that is new for them, and sentences are drawn by each method at each scale, without
the prior, all from the same seeds. A picture is right if, of all icons of the style, the nearest in pixels is one that was
asked for; PSNR is to the nearest of these. Standard errors are over the pictures. A cell is marked + if its PSNR or its
share right is above that of linear guidance at the same scale by more than two standard errors of the paired difference,
and - if one of them is below by as much and none above. A method without a + where at least half of its pictures are right
is "never better".

`truth`: the model is replaced by the exact posterior of a single token out of 8, with a conditional prior p_c and an
unconditional one p_u. The distribution that 16 steps end with is computed exactly, without sampling (`PaellaScheduler` with
fresh noise and temperature 1): the table has its total variation distance to the prior p_c^w p_u^(1-w), and the mass it
gives to tokens that are less than 0.05 times as likely as the likeliest by p_c.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.schedulers import standard_error, table
from paella_diffusers import (
    EMOJI_MODEL,
    PaellaAdaptiveProjectedGuidance,
    PaellaClassifierFreeGuidance,
    PaellaClassifierFreeZeroStarGuidance,
    PaellaPipeline,
    PaellaRescaledGuidance,
    PaellaSmoothedEnergyGuidance,
)

LINEAR = "linear"
METHODS = {  # perturbed-attention guidance needs self-attention, which the embedded model has not
    LINEAR: PaellaClassifierFreeGuidance(),
    "linear, cut 0.2": PaellaClassifierFreeGuidance(plausibility_threshold=0.2),
    "APG": PaellaAdaptiveProjectedGuidance(),
    "APG, no limit": PaellaAdaptiveProjectedGuidance(norm_threshold=None),
    "CFG-Zero*": PaellaClassifierFreeZeroStarGuidance(),
    "rescaled, φ = 0.7": PaellaRescaledGuidance(),
    "SEG, s = 1": PaellaSmoothedEnergyGuidance(seg_guidance_scale=1.0),
    "SEG, s = 3": PaellaSmoothedEnergyGuidance(seg_guidance_scale=3.0),
}


def compared(right: torch.Tensor, psnr: torch.Tensor, linear: tuple[torch.Tensor, torch.Tensor]) -> str:
    """Whether a method draws better (+) or worse (-) than linear guidance does the same pictures."""
    differences = right - linear[0], psnr - linear[1]
    signs = [d.mean().item() / max(standard_error(d), 1e-9) for d in differences]
    return "+" if max(signs) > 2 else "-" if min(signs) < -2 else ""


@torch.no_grad()
def emoji(args):
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from emoji_model import prompt_sets
    from emoji_model.scoring import draw

    sets = prompt_sets.load(args.work_dir, args.prompts)
    pipe = PaellaPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    for kind, asked in sets.items():
        results = {}

        def rows(asked=asked, results=results):
            for name, guider in METHODS.items():
                pipe.guider, cells = guider, []
                for scale in args.scales:
                    call = {"num_inference_steps": args.steps, "guidance_scale": scale, "use_prior": False}
                    right, psnr = results[name, scale] = asked.measure(draw(pipe, asked.prompts, **call))
                    mark = compared(right, psnr, results[LINEAR, scale])
                    share = f"{right.mean():.0%} ± {standard_error(right):.0%}"
                    cells.append(f"{share}, {psnr.mean():.1f} ± {standard_error(psnr):.1f}{mark and ' '}{mark}")
                is_right = [results[name, scale][0].mean() >= 0.5 for scale in args.scales]
                better = any(cell.endswith("+") for cell, counts in zip(cells, is_right) if counts)
                yield [name, *cells, "" if better or name == LINEAR else "never better"]

        print(f"\n{len(asked.prompts)} {kind}, {args.steps} steps; right, and PSNR in dB, with their standard errors:\n")
        table(["guidance scale", *args.scales, ""], rows())
        if args.plot:
            plot(args.plot.with_stem(f"{args.plot.stem}-{kind.replace(' ', '-')}"), args.scales, results)


def plot(path: Path, scales: list[float], results: dict):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for number, name in enumerate(METHODS):
        for ax, index in zip(axes, (0, 1)):
            values = [results[name, scale][index] for scale in scales]
            means, errors = [v.mean().item() for v in values], [standard_error(v) for v in values]
            style = {"marker": "osD^vP*X"[number], "markersize": 4, "linewidth": 1.2, "capsize": 2}
            ax.errorbar(scales, means, errors, label=name, **style)
    for ax, label in zip(axes, ("share right", "PSNR to the icon, dB")):
        ax.set_xscale("log")
        ax.set_xticks(scales, [f"{scale:g}" for scale in scales])
        ax.minorticks_off()
        ax.set_xlabel("guidance scale")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


EXACT = {name: METHODS[name] for name in (LINEAR, "CFG-Zero*", "rescaled, φ = 0.7")} | {
    # without momentum, which would depend on the way that a token took
    "linear, cut 0.05": PaellaClassifierFreeGuidance(plausibility_threshold=0.05),
    "APG": PaellaAdaptiveProjectedGuidance(momentum=0.0),
    "APG, no limit": PaellaAdaptiveProjectedGuidance(momentum=0.0, norm_threshold=None),
}


def final_distribution(guidance, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float, steps: int):
    """Of a single token, `(size,)`, from noise: predict, draw, re-noise."""
    size = len(conditional)
    one, state = torch.eye(size, dtype=torch.float64), torch.full((size,), 1 / size, dtype=torch.float64)
    levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for level, after in itertools.pairwise(levels):
        likelihood = (1 - level) * one + level / size  # of the token seen (rows) given the clean one
        branches = [(likelihood * prior).log()[..., None, None] for prior in (conditional, unconditional)]
        weights = guidance.mixing_weights(scale, guidance.branches(None, scale))
        logits = [sum(w * branch for w, branch in zip(row, branches)) for row in weights]
        drawn = guidance.forward(*logits, step=None, guidance_scale=scale).softmax(1)[..., 0, 0]
        state = (state @ drawn) @ ((1 - after) * one + after / size)
    return state


def truth(args):
    logits = 2 * torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    conditional, unconditional = logits.softmax(-1)

    def rows():
        for name, guidance in EXACT.items():
            cells = []
            for scale in args.scales:
                tilted = (scale * logits[0] + (1 - scale) * logits[1]).softmax(-1)
                final = final_distribution(guidance, conditional, unconditional, scale, args.steps)
                unlikely = final[conditional < 0.05 * conditional.max()].sum()
                cells.append(f"{0.5 * (final - tilted).abs().sum():.3f}, {unlikely:.3f}")
            yield [name, *cells]

    table(["guidance scale", *args.scales], rows())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["emoji", "truth"])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.5, 3.0, 5.0, 8.0, 15.0])
    parser.add_argument("--prompts", type=int, default=200, help="emoji: at most so many of each kind")
    parser.add_argument("--steps", type=int, help="12 for emoji and 16 for truth unless given")
    parser.add_argument("--model", default=EMOJI_MODEL)
    parser.add_argument("--work-dir", type=Path, default=Path("emoji-training"), help="emoji: where the icons are, or go")
    parser.add_argument("--plot", type=Path, help="emoji: write a plot there, such as docs/guidance/emoji.png")
    args = parser.parse_args()
    args.steps = args.steps or {"emoji": 12, "truth": 16}[args.what]
    {"emoji": emoji, "truth": truth}[args.what](args)


if __name__ == "__main__":
    main()
