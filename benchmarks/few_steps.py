"""
What does distillation by rectified couplings do? On distributions that are known exactly, and on the embedded model.

    pip install ".[emoji,batch]" matplotlib
    python benchmarks/few_steps.py truth|emoji

`truth`: in place of a U-Net there is the exact posterior of a distribution over 2 × 2 grids of 3 tokens. Nothing is sampled:
a coupling is a matrix of the probabilities of each picture given each initial noise. The student is what training would
reach at best, the exact marginals of each token given a noised grid; its couplings are those of the next round.

`emoji`: the model draws pairs by `paella-diffusers batch`, `examples/train_paella_few_steps.py` trains a student on them, as
often as `--rounds` says, and pictures of names and sentences are counted that are right. All is kept in the work folder: the
same command goes on where it was stopped.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.schedulers import TOKENS, ExactPosterior, plot, table
from paella_diffusers import EMOJI_MODEL, PaellaFlowMatchEulerScheduler, PaellaPipeline, PaellaScheduler
from paella_diffusers.sampling.steppers import make_stepper

# -------------------------------------------------------------------------------------------------- what is known exactly


class Couplings:
    """
    Couplings of noise x₁ and pictures x₀, all of them grids of a small vocabulary: matrices π(x₀ | x₁) of float64, a row for
    each noise.

    Args:
        num_tokens (`int`): Of the vocabulary; there are num_tokens⁴ grids.
    """

    def __init__(self, num_tokens: int = TOKENS):
        unet = ExactPosterior(num_vq_embeddings=num_tokens)
        self.grids, self.truth, self.num_tokens = unet.grids, unet.truth.double(), num_tokens
        self.present = F.one_hot(self.grids, num_tokens).double()  # grid, place, token
        self.same = (self.grids[:, None] == self.grids).double()  # grid, grid, place

    def independent(self) -> torch.Tensor:
        """What a model is trained on: any noise for any picture."""
        return self.truth.expand(len(self.grids), -1)

    def student(self, coupling: torch.Tensor, level: float) -> torch.Tensor:
        """The probabilities of each clean token given a noised grid, `(num_grids, length, num_tokens)`: E[x₀ | x_t]."""
        # of a noised grid given noise and picture: each token is that of the noise with probability t
        kept, replaced = (1 - level) * self.same[None], level * self.same[:, None]
        noised = (kept + replaced).prod(-1)  # noise, picture, noised
        joint = torch.einsum("npx,np->xp", noised, coupling)
        share = joint / joint.sum(1, keepdim=True).clamp(min=1e-300)
        return torch.einsum("xp,plv->xlv", share, self.present)

    def drawn(self, probabilities: torch.Tensor) -> torch.Tensor:
        """The probability of each grid if its tokens are drawn independently, `(rows, num_grids)`."""
        places = range(self.grids.shape[1])
        return torch.stack([probabilities[:, place, self.grids[:, place]] for place in places]).prod(0)

    def sampled(self, coupling: torch.Tensor, scheduler, steps: int) -> torch.Tensor:
        """The coupling that a sampler makes with the student of another."""
        states = torch.eye(len(self.grids)).double()  # noise, noised
        for step in make_stepper(scheduler).plan(steps):
            predicted, level, after = self.student(coupling, float(step.level)), float(step.level), step.next_level
            if isinstance(scheduler, PaellaScheduler):  # re-noised to the initial noise
                tokens = (1 - after) * predicted[None] + after * self.present[:, None]
                states = torch.cat([state[None] @ self.drawn(one) for state, one in zip(states, tokens)])
            else:
                states = states @ self.drawn((1 - after / level) * predicted + after / level * self.present)
        return states

    def total_correlation(self, coupling: torch.Tensor) -> float:
        """The mean over noise of KL(π(x₀ | x₁) | product of its marginals), in nats."""
        product = self.drawn(torch.einsum("np,plv->nlv", coupling, self.present))
        return (coupling * (coupling.clamp(min=1e-300).log() - product.clamp(min=1e-300).log())).sum(1).mean().item()


def total_variation(one: torch.Tensor, other: torch.Tensor) -> float:
    return 0.5 * (one - other).abs().sum().item()


def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """KL(one | other), in nats."""
    return (one * (one.clamp(min=1e-300).log() - other.clamp(min=1e-300).log())).sum().item()


PAELLA = PaellaScheduler(num_vq_embeddings=TOKENS, temperature=1.0)
EULER = PaellaFlowMatchEulerScheduler(num_vq_embeddings=TOKENS, temperature=1.0)


def rounds(couplings: Couplings, scheduler, steps: int, count: int):
    """For the teacher, round 0, and each round: what its coupling is, and what its student draws."""
    coupling = couplings.independent()
    teacher = couplings.sampled(coupling, scheduler, steps).mean(0)
    for number in range(count + 1):
        one, two = (couplings.sampled(coupling, PAELLA, n).mean(0) for n in (1, 2))
        yield {
            "round": number,
            "total correlation": couplings.total_correlation(coupling),
            "one step, TV": total_variation(one, teacher),
            "one step, KL": divergence(teacher, one),
            "two steps, TV": total_variation(two, teacher),
            "pairs, TV": total_variation(coupling.mean(0), teacher) if number else None,
        }
        coupling = couplings.sampled(coupling, scheduler, steps)


def truth(args):
    couplings, curves = Couplings(), {}
    for scheduler, steps in ((PAELLA, 4), (PAELLA, 12), (PAELLA, 48), (EULER, 12), (EULER, 48)):
        name = f"{type(scheduler).__name__}, {steps} steps"
        records = list(rounds(couplings, scheduler, steps, args.rounds))
        curves[name] = [record["one step, KL"] for record in records]
        print(f"\nPairs by {name}:\n")
        cells = [["" if v is None else f"{v:.4f}" if isinstance(v, float) else v for v in one.values()] for one in records]
        table(list(records[0]), cells)
    if args.plot:
        numbers = list(range(args.rounds + 1))
        plot(args.plot, numbers, curves, "KL(teacher | one step)", log=True, xlabel="round", base=None)


# ------------------------------------------------------------------------------------------------------------ pictures


class Distillation:
    """The work folder's teacher, pairs and students; and what they draw."""

    def __init__(self, args):
        from emoji_model import data, prompt_sets
        from emoji_model.captions import Captions, colours_of, keywords_of

        args.work_dir.mkdir(parents=True, exist_ok=True)
        self.args, self.icons = args, data.load(args.work_dir)
        self.captions = Captions(self.icons.names, keywords_of(self.icons, args.work_dir), colours_of(self.icons.images(0)))
        self.cells = data.training_cells(self.icons, data.HELD_OUT)
        known = self.cells[0].nonzero().flatten().tolist()
        random.Random(0).shuffle(known)
        self.learnt = known[: args.names]
        self.sets = {
            f"{args.names} names of the pairs": prompt_sets.names_of(self.icons, self.learnt[: args.limit]),
            "other names": prompt_sets.names_of(self.icons, known[args.names :][: args.limit]),
            "sentences": prompt_sets.sentences(self.icons, args.limit),
        }
        if args.styles:
            self.sets["new styles"] = prompt_sets.new_styles(self.icons, self.cells, args.limit)

    def write_prompts(self) -> Path:
        """Captions of the objects to learn, in a style that each was trained in: a file of lines."""
        args, rng, lines = self.args, random.Random(1), []
        for number, row in enumerate(self.learnt * args.seeds):
            styles = self.cells[:, row].nonzero().flatten().tolist() if args.styles else [0]
            prompt = self.captions.draw([row], styles[number % len(styles)], rng, 1 - args.sentence_share, bool(args.styles))
            lines.append(json.dumps({"prompt": prompt, "key": str(number)}) + "\n")
        path = args.work_dir / "prompts.jsonl"
        path.write_text("".join(lines))
        return path

    def draw_pairs(self, model: str, number: int) -> Path:
        """By the teacher as it draws by itself; in later rounds by the student, at as many steps."""
        from paella_diffusers.cli import main

        out, args = self.args.work_dir / f"pairs-{number}", self.args
        command = ["batch", self.write_prompts(), "--model", model, "--out", out, "--output", "tokens", "--no-prior"]
        command += ["--steps", args.steps, "--batch-size", 32, "--seed", number]
        if number > 1 and args.scheduler:
            command += ["--scheduler", args.scheduler, "temperature=1.0"]
        if main(list(map(str, command))):
            raise SystemExit(1)
        return out

    def train(self, model: str, pairs: Path, number: int) -> str:
        from train_paella_few_steps import main, parse_args

        out, args = self.args.work_dir / f"student-{number}", self.args
        if not (out / "model_index.json").exists():
            command = ["--pretrained", model, "--data", pairs, "--output-dir", out, "--resume", "latest"]
            command += ["--batch-size", args.batch_size, "--max-steps", args.train_steps, "--num-workers", 0]
            command += ["--learning-rate", args.learning_rate, "--lr-scheduler", "cosine", "--warmup-steps", 20]
            command += ["--mixed-precision", args.mixed_precision, "--report-to", "none", "--save-every", 50, "--keep", 1]
            main(parse_args(list(map(str, command))))
        return str(out)

    @torch.no_grad()
    def measure(self, pipe: PaellaPipeline, **call) -> list[str]:
        """For each set of prompts the share right and the PSNR; and the processor time of a picture."""
        from emoji_model.scoring import draw

        cells, start = [], time.process_time()
        for asked in self.sets.values():
            right, psnr = asked.measure(draw(pipe, asked.prompts, use_prior=False, **call))
            cells.append(f"{right.mean():.1%}, {psnr.mean():.1f} dB")
        seconds = (time.process_time() - start) / sum(len(asked.prompts) for asked in self.sets.values())
        return [*cells, f"{1000 * seconds:.0f} ms"]


def emoji(args):
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    distillation, models = Distillation(args), [str(args.model)]
    for number in range(1, args.rounds + 1):
        pairs = distillation.draw_pairs(models[-1], number)
        models.append(distillation.train(models[-1], pairs, number))

    def rows():
        for number, model in enumerate(models):
            pipe = PaellaPipeline.from_pretrained(model)
            pipe.set_progress_bar_config(disable=True)
            name = f"student of round {number}" if number else "teacher"
            if not number:
                own = distillation.measure(pipe, num_inference_steps=args.steps)
                yield [f"teacher, {args.steps} steps, with its guidance", *own]
            for steps in (1, 2):
                for temperature in args.temperatures:
                    call = dict(num_inference_steps=steps, guidance_scale=1.0, temperature=temperature)
                    yield [f"{name}, {steps}, T = {temperature:g}", *distillation.measure(pipe, **call)]

    table(["", *distillation.sets, "processor time a picture"], rows())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["truth", "emoji"])
    parser.add_argument("--rounds", type=int, help="truth: 5 unless given; emoji: 1")
    parser.add_argument("--plot", type=Path, help="truth: write a plot there, such as docs/few-steps/truth.png")
    parser.add_argument("--model", default=EMOJI_MODEL, help="emoji: the teacher")
    parser.add_argument("--work-dir", type=Path, default=Path("emoji-training"), help="emoji: where all is kept")
    parser.add_argument("--names", type=int, default=1200, help="emoji: how many objects are learnt")
    parser.add_argument("--seeds", type=int, default=8, help="emoji: pairs of each")
    parser.add_argument(
        "--styles", action=argparse.BooleanOptionalAction, default=True, help="emoji: in all styles, or flat"
    )
    parser.add_argument("--sentence-share", type=float, default=0.5, help="emoji: of the captions; others are names")
    parser.add_argument("--steps", type=int, default=12, help="emoji: of the teacher, and of students that draw pairs")
    parser.add_argument("--scheduler", help="emoji: by which students draw pairs; their own unless given")
    parser.add_argument("--train-steps", type=int, default=3000, help="emoji: in each round")
    parser.add_argument("--batch-size", type=int, default=64, help="emoji: of training")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.3], help="emoji: of one and two steps")
    parser.add_argument("--limit", type=int, default=200, help="emoji: at most so many pictures for each figure")
    args = parser.parse_args()
    args.rounds = args.rounds or {"truth": 5, "emoji": 1}[args.what]
    if args.what == "truth":
        with torch.no_grad():
            truth(args)
    else:
        emoji(args)


if __name__ == "__main__":
    main()
