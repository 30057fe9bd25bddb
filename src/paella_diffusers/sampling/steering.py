"""Steering by rewards, without training: several particles for each image, of which those with a high reward go on."""

from collections.abc import Callable
from dataclasses import replace

import torch

from ..checks import check_integer, check_number
from ..schedulers.categorical import add_uniform_noise
from .denoiser import Denoiser
from .plan import Step
from .steppers import Stepper

Grids = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # of tokens, of predicted clean tokens, and of the noise


class SteeringMethod:
    """What pipelines take as `steering_method`. It keeps nothing of a run: that is in [`Steering`]."""

    def steer(self, run: "Steering", step: Step, tokens: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> Grids:
        """After a step of the sampler: the particles' token grids to go on with, and the noise that each began with."""
        return tokens, clean, noise

    def final_log_weights(self, run: "Steering", rewards: torch.Tensor) -> torch.Tensor:
        """From the rewards of the final pictures, `(num_images, num_particles)`, to log-weights, up to a constant."""
        raise NotImplementedError

    def check(self, stepper: Stepper) -> None:
        """Refuse a sampler with which the method cannot work, by a ValueError."""


class SequentialMonteCarlo(SteeringMethod):
    r"""
    Sequential Monte Carlo with the sampler as its proposal (https://huggingface.co/papers/2505.22524; Feynman-Kac steering,
    https://huggingface.co/papers/2501.06848, section 3, with differences as potentials). After step i of n, from the noise
    level t to s, each particle's predicted clean picture x̂ᵢ has the reward rᵢ, which counts for the share 1 - s. The
    particle's weight is multiplied by the potential

        Gᵢ = exp((φᵢ - φᵢ₋₁) / T),    φᵢ = (1 - s) rᵢ,    φ₀ = 0,    φₙ = r(x₀).

    Where the effective sample size of an image's particles, 1 / Σ w², falls below a share of their number, they are
    resampled (systematically): some are dropped, others copied, and all weigh the same again. The product of a particle's
    potentials is exp(r(x₀) / T) whatever the predictions were. So with more and more particles, a picture drawn by the final
    weights is from p(x₀) exp(r(x₀) / T), renormalised, where p is what the sampler draws without a reward.

    Args:
        temperature (`float`, defaults to 1.0): T, above 0: lower values follow the reward more.
        resample_threshold (`float`, defaults to 0.5):
            The share in [0, 1] of the number of particles; 0 never resamples, which is importance sampling.
    """

    def __init__(self, temperature: float = 1.0, resample_threshold: float = 0.5):
        check_number("temperature", temperature, above=0)
        check_number("resample_threshold", resample_threshold, at_least=0, at_most=1)
        self.temperature, self.resample_threshold = float(temperature), float(resample_threshold)

    def steer(self, run: "Steering", step: Step, tokens: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> Grids:
        if step.is_last or (step.index + 1) % run.stepper.order:  # the last picture's reward counts in the final weights
            return tokens, clean, noise
        run.weigh((1 - step.next_level) / self.temperature * run.rewards(clean))
        ancestors = run.resample(self.resample_threshold)
        return (tokens, clean, noise) if ancestors is None else (tokens[ancestors], clean[ancestors], noise[ancestors])

    def final_log_weights(self, run: "Steering", rewards: torch.Tensor) -> torch.Tensor:
        run.weigh(rewards / self.temperature)
        return run.log_weights


class IterativeRefinement(SteeringMethod):
    r"""
    Iterative reward-guided refinement (after https://huggingface.co/papers/2511.05562). The particles of an image are
    candidates for one state. After each step, from the noise level t to s,

    1. one candidate is drawn by the weights exp((1 - s) r / T), where r is the reward of its predicted clean picture;
    2. `num_refinements` times, the state is noised back to the level t and denoised again, once for each particle, and the
       next state is drawn by the same weights from these candidates and the present state.

    The paper noises the state for each candidate and balances them with a second set of candidates (multiple-try
    Metropolis). Here all candidates of a refinement come from the same noised state. Given this, the present state is
    distributed as a candidate, where the denoiser is exact, so that the choice among all of them keeps the distribution
    p(x) exp((1 - s) r / T) with half the evaluations. At s = 0 that is the one that [`SequentialMonteCarlo`] aims at.

    A run of n steps takes n (1 + `num_refinements`) evaluations of the model for each particle.

    Args:
        temperature (`float`, defaults to 1.0): T, above 0: lower values follow the reward more.
        num_refinements (`int`, defaults to 1): Of each step, at least 0.
    """

    def __init__(self, temperature: float = 1.0, num_refinements: int = 1):
        check_number("temperature", temperature, above=0)
        check_integer("num_refinements", num_refinements, 0)
        self.temperature, self.num_refinements = float(temperature), int(num_refinements)

    def steer(self, run: "Steering", step: Step, tokens: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> Grids:
        scale = (1 - step.next_level) / self.temperature
        weights = scale * run.rewards(clean)
        chosen = run.draw(weights)
        tokens, clean, noise = (run.copies(grid, chosen) for grid in (tokens, clean, noise))
        run.reorder(run.rows(chosen[:, None].expand(weights.shape)))
        weight = weights.gather(1, chosen[:, None])
        for _ in range(self.num_refinements):
            noised = run.noise_again(tokens, step)
            logits = run.denoiser(noised, replace(step, is_sweep=True))
            candidates = run.stepper.step(logits, step, noised, noise, run.mask, run.particle_generators)
            run.extra_evaluations += 1
            weights = torch.cat([weight, scale * run.rewards(candidates[1])], dim=1)
            chosen = run.draw(weights)
            weight = weights.gather(1, chosen[:, None])
            moved = (chosen > 0).repeat_interleave(run.num_particles).to(tokens.device)[:, None, None]
            pairs = zip(candidates, (tokens, clean))
            tokens, clean = (torch.where(moved, run.copies(new, (chosen - 1).clamp(min=0)), old) for new, old in pairs)
        return tokens, clean, noise

    def final_log_weights(self, run: "Steering", rewards: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(rewards)  # all particles are the state that was chosen

    def check(self, stepper: Stepper) -> None:
        if not stepper.repeats_steps:
            raise ValueError(
                "`steering_method`, an IterativeRefinement, takes each step again, which neither inversion nor a scheduler "
                "with two evaluations for a step allows: take SequentialMonteCarlo."
            )


class BestOfN(SteeringMethod):
    """
    The picture with the highest reward, of as many as there are particles: the baseline for the other methods. With more
    particles it follows the reward at any cost, whatever the model finds likely.
    """

    def final_log_weights(self, run: "Steering", rewards: torch.Tensor) -> torch.Tensor:
        best = rewards.argmax(1, keepdim=True)
        return torch.full_like(rewards, -torch.inf).scatter(1, best, 0.0)


class Steering:
    """
    The particles of a run: rows of the batch are images, and for each image its particles.

    Args:
        method ([`SteeringMethod`]): What is done with them.
        reward (`Callable`): From token grids `(num_images * num_particles, height, width)` to their rewards, `(rows,)`.
        num_particles (`int`): Of each image.
        generators (`list[torch.Generator]`): One for each image, for what is drawn of its particles.
        particle_generators (`list[torch.Generator]`): One for each row, for the sampler.
        denoiser ([`Denoiser`]), stepper: Whose images are reordered with the particles.
        mask (`torch.BoolTensor` of shape `(rows, height, width)`, *optional*): Where tokens are generated.
    """

    def __init__(
        self,
        method: SteeringMethod,
        reward: Callable,
        num_particles: int,
        generators: list[torch.Generator],
        particle_generators: list[torch.Generator],
        denoiser: Denoiser,
        stepper: Stepper,
        mask: torch.Tensor | None = None,
    ):
        self.method, self.reward, self.num_particles = method, reward, num_particles
        self.generators, self.particle_generators = generators, particle_generators
        self.denoiser, self.stepper, self.mask = denoiser, stepper, mask
        self.log_weights = torch.zeros(len(generators), num_particles, dtype=torch.float64)
        self.log_potentials = torch.zeros_like(self.log_weights)  # φ / T of each particle's last prediction
        self.extra_evaluations = 0  # of the model, for each particle, beside those of the loop

    def __call__(self, step: Step, tokens: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> Grids:
        """After a step of the loop: as [`SteeringMethod.steer`]."""
        tokens, clean, self.noise = self.method.steer(self, step, tokens, clean, noise)
        return tokens, clean, self.noise

    def finish(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        A picture for each image, drawn by the final weights, and the noise that it began with, `(num_images, height,
        width)`; and the rewards and log-weights of all particles, float32 `(num_images, num_particles)`.
        """
        rewards = self.rewards(tokens)
        log_weights = self.method.final_log_weights(self, rewards).log_softmax(1)
        chosen = self.rows(self.draw(log_weights)[:, None])
        return tokens[chosen], self.noise[chosen], rewards.float(), log_weights.float()

    def rewards(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of each image's particles, float64 `(num_images, num_particles)` on the CPU."""
        return self.reward(tokens).view(self.log_weights.shape)

    def weigh(self, log_potentials: torch.Tensor) -> None:
        """Multiply each particle's weight by its new potential, over that of its last prediction."""
        self.log_weights = (self.log_weights + log_potentials - self.log_potentials).log_softmax(1)
        self.log_potentials = log_potentials

    def resample(self, threshold: float) -> torch.Tensor | None:
        """The row whose copy each row becomes, where too few particles carry the weight; None where nothing changes."""
        weights = self.log_weights.exp()
        degenerate = 1 / weights.square().sum(1) < threshold * self.num_particles
        if not degenerate.any():
            return None
        ancestors = torch.arange(self.num_particles).repeat(len(weights), 1)
        for image in degenerate.nonzero().flatten().tolist():
            ancestors[image] = systematic(weights[image], _uniform(self.generators[image]))
        self.log_weights[degenerate] = torch.zeros(self.num_particles, dtype=torch.float64).log_softmax(0)
        self.log_potentials = self.log_potentials.gather(1, ancestors)
        rows = self.rows(ancestors)
        self.reorder(rows)
        return rows

    def draw(self, log_weights: torch.Tensor) -> torch.Tensor:
        """For each image, one of its columns by the weights: `(num_images,)`."""
        cumulative = log_weights.softmax(1).cumsum(1)
        points = torch.tensor([_uniform(generator) for generator in self.generators], dtype=torch.float64)
        return torch.searchsorted(cumulative, points[:, None] * cumulative[:, -1:], right=True)[:, 0]

    def rows(self, particles: torch.Tensor) -> torch.Tensor:
        """The rows of the batch of particles `(num_images, n)` that are numbered in each image, `(num_images * n,)`."""
        return (particles + self.num_particles * torch.arange(len(particles))[:, None]).flatten()

    def copies(self, grids: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Each image's chosen particle, in the rows of all of its particles."""
        return grids[self.rows(chosen[:, None])].repeat_interleave(self.num_particles, dim=0)

    def reorder(self, rows: torch.Tensor) -> None:
        """Let each row go on as another, in what is kept of the images along a run."""
        self.denoiser.reorder(rows)
        self.stepper.reorder(rows)

    def noise_again(self, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        """Copies of one state for each image, back from the level after a step to that before it, and alike again."""
        states = tokens[:: self.num_particles]
        share = 1 - (1 - float(step.level)) / (1 - step.next_level)  # of the tokens that survived so far
        num_tokens = self.denoiser.unet.config.num_vq_embeddings
        noised, _ = add_uniform_noise(states, share, num_tokens, generator=self.generators)
        noised = noised.repeat_interleave(self.num_particles, dim=0)
        return noised if self.mask is None else torch.where(self.mask, noised, tokens)


def systematic(weights: torch.Tensor, uniform: float) -> torch.Tensor:
    """
    Systematic resampling (Kitagawa 1996): each particle's number of copies is n times its weight, rounded up or down.

    Args:
        weights (`torch.Tensor` of shape `(n,)`): Summing to 1.
        uniform (`float`): In [0, 1).
    """
    cumulative = weights.cumsum(0)
    points = (torch.arange(len(weights), dtype=weights.dtype) + uniform) / len(weights) * cumulative[-1]
    return torch.searchsorted(cumulative, points, right=True).clamp(max=len(weights) - 1)


def spawn_generators(
    generator: torch.Generator | list[torch.Generator], num_images: int, num_particles: int
) -> tuple[list[torch.Generator], list[torch.Generator]]:
    """
    A generator for each image, on the CPU, where particles are chosen, and one for each of its particles, image by image,
    seeded by the images' own or by one.
    """
    count = num_particles + 1
    sources = generator if isinstance(generator, list) else [generator] * num_images
    spawned = []
    for source in sources:
        seeds = torch.randint(2**62, (count,), generator=source, device=source.device).tolist()
        devices = ["cpu"] + [source.device] * num_particles
        spawned += [torch.Generator(device).manual_seed(seed) for device, seed in zip(devices, seeds)]
    return spawned[::count], [one for index, one in enumerate(spawned) if index % count]


def reward_of_pictures(reward: Callable, images: torch.Tensor, prompts: list[str] | None) -> torch.Tensor:
    """
    The rewards of pictures `(n, 3, height, width)` in [0, 1], float64 `(n,)` on the CPU.

    Raises:
        ValueError: If the function returns no finite number for each picture.
    """
    values = torch.as_tensor(reward(images, prompts)).detach().cpu().double()  # some devices have no float64
    if values.shape != images.shape[:1]:
        raise ValueError(
            f"`reward` must return a number for each of {len(images)} pictures, got the shape {tuple(values.shape)}."
        )
    if not values.isfinite().all():
        raise ValueError(f"`reward` must return finite numbers, got {values.tolist()}.")
    return values


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), dtype=torch.float64, generator=generator, device=generator.device).item()
