"""
Do rewards steer? Exactly, on grids whose distribution is known, and in pictures of the embedded model.

    pip install ".[emoji]"
    python benchmarks/steering.py truth
    python benchmarks/steering.py emoji --log steering.jsonl

`truth` steers grids of 2 × 2 tokens towards a reward that each grid has, and prints the total variation distance between
what comes out and p(x) exp(r(x)), renormalised. For sequential Monte Carlo and best of n, p is what the sampler draws
without a reward, computed from the matrices of its steps. For iterative refinement it is the distribution that the model
knows: it does not follow the sampler alone.

`emoji` draws some of the 80 sentences that the model was not trained on. A picture is right if the nearest icon, in pixels,
is one that the sentence means. The reward `clip` is similarity with the sentence, by the model's own CLIP; `judge` is the
nearness to the icons that count as right, as an example of a reward that knows what is wanted. Best of n takes the first n
of 16 pictures. Refinement has half as many candidates, and refines once, so that it takes as many evaluations. What is
measured is kept in the log: a second run goes on where the first was stopped.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.schedulers import TOKENS, ExactPosterior, plot, table
from paella_diffusers import (
    EMOJI_MODEL,
    BestOfN,
    ClipReward,
    IterativeRefinement,
    PaellaFlowMatchEulerScheduler,
    PaellaPipeline,
    PaellaScheduler,
    SequentialMonteCarlo,
)
from paella_diffusers.sampling.loop import sample
from paella_diffusers.sampling.steering import Steering
from paella_diffusers.sampling.steppers import make_stepper

# -------------------------------------------------------------------------------------------------- what is known exactly

FRESH = PaellaScheduler(num_vq_embeddings=TOKENS, temperature=1.0, noise_source="fresh")
EULER = PaellaFlowMatchEulerScheduler(num_vq_embeddings=TOKENS, temperature=1.0)


class ExactDenoiser:
    """The posterior of an `ExactPosterior`, without guidance."""

    def __init__(self):
        self.unet = ExactPosterior()

    def __call__(self, tokens, step):
        return self.unet(tokens, step.level).sample

    def reorder(self, rows):
        """Nothing is kept."""


def grid_rewards(unet: ExactPosterior) -> torch.Tensor:
    """A reward for each grid: tokens like to be the largest, and each grid has a taste of its own."""
    tastes = torch.randn(len(unet.grids), generator=torch.Generator().manual_seed(1))
    return (unet.grids == TOKENS - 1).sum(1) + 0.7 * tastes.double()


def sampler_distribution(unet: ExactPosterior, scheduler, steps: int) -> torch.Tensor:
    """The share of each grid in what the sampler draws, from the matrices of its steps."""
    side = unet.config.sample_size
    grids = unet.grids.view(-1, side, side)
    present = F.one_hot(unet.grids, TOKENS).double()
    share = torch.full((len(grids),), 1 / len(grids)).double()
    for step in make_stepper(scheduler).plan(steps):
        predicted = unet(grids, step.level).sample.double().softmax(1).flatten(2).transpose(1, 2)
        level, after = float(step.level), step.next_level
        if scheduler is FRESH:
            tokens = (1 - after) * predicted + after / TOKENS
        else:
            tokens = (1 - after / level) * predicted + after / level * present
        chosen = torch.stack([tokens[:, place, unet.grids[:, place]] for place in range(side**2)])  # place, before, after
        share = share @ chosen.prod(0)
    return share


def tilted(share: torch.Tensor, rewards: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return (share.double().log() + rewards / temperature).softmax(0)


def steered_distribution(method, scheduler, steps: int, num_particles: int, num_images: int, seed: int = 0) -> torch.Tensor:
    """The mean, over images, of the probabilities by which a picture is drawn from the particles: a share for each grid."""
    denoiser, stepper = ExactDenoiser(), make_stepper(scheduler)
    unet = denoiser.unet
    generator = torch.Generator().manual_seed(seed)
    rows, side = num_images * num_particles, unet.config.sample_size
    rewards = grid_rewards(unet)
    steering = Steering(
        method,
        lambda tokens: rewards[unet.states(tokens)],
        num_particles,
        [generator] * num_images,
        generator,
        denoiser,
        stepper,
    )
    noise = torch.randint(TOKENS, (rows, side, side), generator=generator)
    tokens = sample(denoiser, stepper, stepper.plan(steps), noise, noise, generator=generator, steer=steering)
    weights = method.final_log_weights(steering, steering.rewards(tokens)).softmax(1).flatten()
    return torch.zeros(len(rewards)).double().index_add(0, unet.states(tokens), weights) / num_images


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return 0.5 * (one - other).abs().sum().item()


def truth(args):
    """Tables of total variation distances; with their statistical part: half of the images against the other half."""
    unet = ExactPosterior()
    rewards = grid_rewards(unet)
    particles = [1, 2, 4, 8, 16, 32, 64, 128]
    methods = {
        "SMC, resampled at half": SequentialMonteCarlo(),
        "SMC, resampled at each step": SequentialMonteCarlo(resample_threshold=1.0),
        "importance sampling": SequentialMonteCarlo(resample_threshold=0.0),
        "best of n": BestOfN(),
    }
    curves = {}
    for scheduler, steps in ((FRESH, 4), (FRESH, 16), (EULER, 4)):
        target = tilted(sampler_distribution(unet, scheduler, steps), rewards)
        rule = "PaellaScheduler, fresh noise" if scheduler is FRESH else "PaellaFlowMatchEulerScheduler"
        print(f"\n{rule}, {steps} steps:\n")

        def rows(scheduler=scheduler, steps=steps, target=target, rule=rule):
            for name, method in methods.items():
                values = []
                for count in particles:
                    images = max(args.samples // count, 1)
                    halves = [steered_distribution(method, scheduler, steps, count, images // 2, seed) for seed in (0, 1)]
                    values.append((distance(sum(halves) / 2, target), distance(*halves) / 2))
                if scheduler is FRESH and steps == 4:
                    curves[name] = [value for value, _ in values]
                yield [name, *(f"{value:.3f} ± {error:.3f}" for value, error in values)]

        table(["TV with particles", *particles], rows())

    print("\nIterative refinement with 4 particles, PaellaScheduler with fresh noise:\n")
    target, numbers = tilted(unet.truth, rewards), [0, 1, 4, 16]

    def refined():
        for steps in (4, 16):
            shares = [steered_distribution(IterativeRefinement(num_refinements=n), FRESH, steps, 4, 3000) for n in numbers]
            without = distance(tilted(sampler_distribution(unet, FRESH, steps), rewards), target)
            yield [steps, *(f"{distance(share, target):.3f}" for share in shares), f"{without:.3f}"]

    table(["TV: steps, refinements", *numbers, "the sampler's own p, tilted"], refined())
    if args.plot:
        plot(args.plot, particles, curves, "total variation distance to p(x) exp(r(x))", log=True, xlabel="particles")


# ------------------------------------------------------------------------------------------------------------ pictures

PARTICLES = [2, 4, 8, 16]


class JudgeReward:
    """How near a picture is to one of its prompt's icons: a log-likelihood of pixels with the deviation σ."""

    def __init__(self, wanted: dict[str, torch.Tensor], sigma: float = 0.03):
        self.wanted, self.sigma = wanted, sigma

    def __call__(self, images, prompts):
        errors = [(self.wanted[prompt] - image).square().mean((1, 2, 3)).amin() for prompt, image in zip(prompts, images)]
        return -torch.stack(errors) / (2 * self.sigma**2)


class Sentences:
    """Draws sentences, each with a seed of its own, and judges the pictures."""

    def __init__(self, args):
        from emoji_model import data, prompt_sets

        args.work_dir.mkdir(parents=True, exist_ok=True)
        icons = data.load(args.work_dir)
        self.asked = prompt_sets.sentences(icons, args.sentences)
        self.pipe = PaellaPipeline.from_pretrained(args.model)
        self.pipe.set_progress_bar_config(disable=True)
        wanted = {text: icons.images(0, rows) for text, rows in zip(self.asked.prompts, self.asked.objects)}
        self.rewards = {"clip": (ClipReward(self.pipe), args.clip_temperature), "judge": (JudgeReward(wanted), 1.0)}
        self.steps = args.steps

    def draw(self, seed: int, **call):
        generators = [torch.Generator().manual_seed(1000 * seed + index) for index in range(len(self.asked.prompts))]
        options = {"num_inference_steps": self.steps, "output_type": "pt", "particle_batch_size": 16}
        if "reward" not in call:
            generators = [one for g in generators for one in self.several(g, call["num_images_per_prompt"])]
            del options["particle_batch_size"]
        return self.pipe(self.asked.prompts, generator=generators, **options, **call)

    @staticmethod
    def several(generator: torch.Generator, count: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in torch.randint(2**62, (count,), generator=generator).tolist()]

    def right(self, images: torch.Tensor, copies: int = 1) -> torch.Tensor:
        """Whether each picture is, `(num_sentences, copies)`."""
        return torch.stack([self.asked.measure(part)[0].bool() for part in images.unflatten(0, (-1, copies)).unbind(1)], 1)

    def plain(self, seed: int) -> list[dict]:
        """Pictures without steering; and the best of the first n, by each reward."""
        copies = max(PARTICLES)
        images = self.draw(seed, num_images_per_prompt=copies).images
        right = self.right(images, copies)
        records = [{"way": "plain", "reward": "", "particles": 1, "right": right[:, 0].tolist()}]
        texts = [text for text in self.asked.prompts for _ in range(copies)]
        for name, (reward, _) in self.rewards.items():
            values = torch.as_tensor(reward(images, texts)).view(-1, copies)
            for count in PARTICLES:
                best = values[:, :count].argmax(1, keepdim=True)
                record = {"way": "best of n", "reward": name, "particles": count}
                record |= {"right": right.gather(1, best)[:, 0].tolist(), "value": values.gather(1, best).mean().item()}
                records.append(record)
        return records

    def steered(self, seed: int, way: str, name: str, count: int) -> list[dict]:
        reward, temperature = self.rewards[name]
        method, particles = SequentialMonteCarlo(temperature), count
        if way == "refinement":
            method, particles = IterativeRefinement(temperature), count // 2
        output = self.draw(seed, reward=reward, num_particles=particles, steering_method=method)
        value = (output.rewards * output.log_weights.exp()).sum(1).mean().item()
        record = {"way": way, "reward": name, "particles": count, "right": self.right(output.images)[:, 0].tolist()}
        return [record | {"value": value}]


def emoji(args):
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    sentences = Sentences(args)
    done = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log.exists() else []
    ways = [("SMC", name, count) for name in args.rewards for count in PARTICLES]
    ways += [("refinement", name, count) for name in args.rewards for count in PARTICLES]
    for seed in range(args.seeds):
        known = {(record["way"], record["reward"], record["particles"]) for record in done if record["seed"] == seed}
        jobs = [lambda seed=seed: sentences.plain(seed)] if ("plain", "", 1) not in known else []
        jobs += [lambda way=way, seed=seed: sentences.steered(seed, *way) for way in ways if way not in known]
        for job in jobs:
            records = [{"seed": seed} | record for record in job()]
            done += records
            with args.log.open("a") as log:
                log.write("".join(json.dumps(record) + "\n" for record in records))
    print_emoji(done, args)


def print_emoji(records: list[dict], args):
    """The share of right pictures by particles: means over seeds, and their standard errors."""

    def cell(way: str, name: str, count: int, value=lambda record: statistics.mean(record["right"]), shown=".0%") -> str:
        values = [value(r) for r in records if (r["way"], r["reward"], r["particles"]) == (way, name, count)]
        if len(values) < 2:
            return ""
        return f"{statistics.mean(values):{shown}} ± {statistics.stdev(values) / len(values) ** 0.5:{shown}}"

    seeds = len({record["seed"] for record in records})
    print(f"{args.sentences} sentences, {args.steps} steps, {seeds} seeds; plain: {cell('plain', '', 1)}\n")
    ways = [(way, name) for name in args.rewards for way in ("best of n", "SMC", "refinement")]
    table(
        ["right, by evaluations in each step", *PARTICLES],
        [[f"{way}, {name}", *(cell(way, name, count) for count in PARTICLES)] for way, name in ways],
    )
    print()
    table(
        ["reward", *PARTICLES],
        [[f"{way}, {name}", *(cell(way, name, n, lambda r: r["value"], ".2f") for n in PARTICLES)] for way, name in ways],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["truth", "emoji"])
    parser.add_argument("--samples", type=int, default=16_000, help="truth: particles in all for each figure")
    parser.add_argument("--plot", type=Path, help="truth: write a plot there, such as docs/steering/truth.png")
    parser.add_argument("--sentences", type=int, default=20, help="emoji: how many of the 80")
    parser.add_argument("--steps", type=int, default=6, help="emoji: of each picture")
    parser.add_argument("--seeds", type=int, default=5, help="emoji: pictures of each sentence and way")
    parser.add_argument("--rewards", nargs="+", choices=["clip", "judge"], default=["clip", "judge"], help="emoji: which")
    parser.add_argument("--clip-temperature", type=float, default=2.0, help="emoji: of similarities, times 100")
    parser.add_argument("--log", type=Path, default=Path("steering.jsonl"), help="emoji: what was measured before")
    parser.add_argument("--model", default=EMOJI_MODEL)
    parser.add_argument("--work-dir", type=Path, default=Path("emoji-training"), help="emoji: where the icons are, or go")
    args = parser.parse_args()
    with torch.no_grad():
        {"truth": truth, "emoji": emoji}[args.what](args)


if __name__ == "__main__":
    main()
