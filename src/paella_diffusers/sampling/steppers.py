"""How each family of schedulers plans a run and takes its steps. A stepper works on its own copy of the scheduler."""

import copy
import inspect
from typing import Any

import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler

from ..schedulers.categorical import add_uniform_noise, check_finite, check_logits
from ..schedulers.scheduling_utils import PaellaSchedulerBase, RenoisingSchedulerBase
from .plan import Plan, Step, linear_ramp

MAX_TOTAL_STEPS = 1_000_000  # of a longer run whose last steps are taken: they fit into memory


def make_stepper(scheduler) -> "PaellaStepper | DiscreteStepper":
    """
    The stepper for a scheduler.

    Raises:
        ValueError: If the scheduler is not made for discrete tokens whose noise is uniform.
    """
    if isinstance(scheduler, PaellaSchedulerBase):
        return PaellaStepper(scheduler)
    reason = None
    if isinstance(scheduler, AmusedScheduler | BlockRefinementScheduler):
        reason = "its noise is a mask token, but Paella's noise is uniformly random tokens"
    elif "num_train_timesteps" in scheduler.config:
        reason = "it is made for continuous latents, but Paella's latents are tokens"
    if reason is not None:
        raise ValueError(
            f"`scheduler`, a {type(scheduler).__name__}, cannot sample from Paella: {reason}. Take one of "
            f"{', '.join(PaellaSchedulerBase._compatibles)}."
        )
    return DiscreteStepper(scheduler)


class PaellaStepper:
    """For the schedulers of this package: they take token grids, noise levels and lists of generators."""

    def __init__(self, scheduler: PaellaSchedulerBase):
        self.scheduler = copy.deepcopy(scheduler)
        self.uses_codebook = "codebook" in inspect.signature(scheduler.step).parameters
        self.codebook = None
        self.order = scheduler.order  # evaluations of the model for a whole step
        self.repeats_steps = scheduler.order == 1  # whether a step may be taken again

    def plan(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        temperature: float | tuple[float, float] | None = None,
        renoise_steps: int | None = None,
        strength: float = 1.0,
    ) -> Plan:
        """
        A run down from the noise level `strength`, in `num_inference_steps` evaluations of the model.

        Raises:
            ValueError: If an override is out of range, or not taken by this scheduler.
        """
        overrides: dict[str, Any] = {"temperature": temperature}
        if isinstance(self.scheduler, RenoisingSchedulerBase):
            overrides["renoise_steps"] = renoise_steps
        elif renoise_steps is not None:
            raise refused_override(self.scheduler, "renoise_steps")
        if strength < 1:
            overrides["t_start"] = strength
        self.scheduler.set_timesteps(num_inference_steps, device=device, **overrides)
        levels = list(self.scheduler.timesteps)
        return Plan(make_steps(levels, levels, [None] * len(levels), [0] * len(levels)), strength)

    def step(self, logits, step: Step, tokens, noise, mask=None, generator=None):
        """The next token grid, and the predicted clean one, `(batch_size, height, width)`."""
        arguments = {"codebook": self.codebook} if self.uses_codebook else {}
        if isinstance(self.scheduler, RenoisingSchedulerBase):
            arguments["noise"] = noise
        output = self.scheduler.step(logits, step.timestep, tokens, mask=mask, generator=generator, **arguments)
        return output.prev_sample, output.sampled_tokens

    def reorder(self, rows: torch.Tensor):
        """Let every image go on as that of another row, `(batch_size,)`: nothing is kept of them between whole steps."""

    def why_no_draw(self, plan: Plan) -> str | None:
        """Why no step of a run draws tokens, if so."""
        config = self.scheduler.config
        rule = config.get("sampling_rule", "multinomial")
        if rule != "multinomial":
            return f"`sampling_rule='{rule}'` draws no tokens: take 'multinomial'"
        if config.get("quantized_steps", 0) >= len(plan):
            return f"`quantized_steps={config.quantized_steps}` leaves no step that draws tokens: take 0"
        return None


class DiscreteStepper:
    """
    For diffusers' discrete schedulers, and others with their interface, made for sequences as text models have them: logits
    `(batch_size, length, num_tokens)` and tokens `(batch_size, length)`. Timesteps count steps upwards, as integers, or are
    noise levels that fall within (0, 1]. `step` is given what it takes of `noise`, `mask`, `codebook`, `temperature` and
    `generator`; a temperature in the configuration alone is set there before each step. It returns `prev_sample`, and the
    clean tokens as `sampled_tokens` or `pred_original_sample`. A corrector (`step_correct`, `corrector_steps` in the
    configuration) is part of the budget of evaluations: as many of the first steps as it allows are corrected.
    """

    def __init__(self, scheduler):
        self.scheduler = copy.deepcopy(scheduler)
        parameters = inspect.signature(scheduler.step).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        options = ("noise", "mask", "codebook", "temperature", "generator")
        self.accepted = {name for name in options if takes_all or name in parameters}
        self.uses_codebook = "codebook" in self.accepted
        self.codebook = None
        # its own, or left there by the scheduler that it was swapped for, which counts where `step` takes one
        self.has_temperature = "temperature" in scheduler.config
        own = inspect.signature(type(scheduler).__init__).parameters
        self.takes_temperature = "temperature" in self.accepted or "temperature" in own
        self.default_temperature = parameters["temperature"].default if "temperature" in parameters else 1.0
        self.order, self.repeats_steps = 1, not hasattr(scheduler, "step_index")  # those with one count their steps
        self.by_image = []  # steppers of single images, each with its own generator

    def plan(self, num_inference_steps, device=None, temperature=None, renoise_steps=None, strength=1.0) -> Plan:
        """As [`PaellaStepper.plan`]."""
        overrides = {
            "temperature": temperature,
            "renoise_steps": renoise_steps,
            "t_start": None if strength == 1 else strength,
        }
        overrides = {name: value for name, value in overrides.items() if value is not None}
        set_timesteps = inspect.signature(self.scheduler.set_timesteps).parameters
        taken = {name: overrides.pop(name) for name in set_timesteps if name in overrides}
        if "renoise_steps" in overrides:
            raise refused_override(self.scheduler, "renoise_steps")
        ramp = overrides.get("temperature")
        if ramp is not None and not self.takes_temperature:
            raise refused_override(self.scheduler, "temperature")
        if ramp is None and self.has_temperature and self.takes_temperature:
            own = self.scheduler.config["temperature"]
            ramp = own if "temperature" in self.accepted or isinstance(own, tuple | list) else None

        per_step = self.scheduler.config.get("corrector_steps", 0) if hasattr(self.scheduler, "step_correct") else 0
        corrected = (num_inference_steps - 1) // (1 + per_step) if per_step else 0
        num_steps = num_inference_steps - corrected * per_step
        total = num_steps
        if "t_start" in overrides:  # not taken: the last steps of a longer run
            total = max(num_steps + 1, round(num_steps / strength))
            if total > MAX_TOTAL_STEPS:
                raise ValueError(
                    f"`strength`={strength} in {num_steps} steps takes the last of {total} with a "
                    f"{type(self.scheduler).__name__}, which plans at most {MAX_TOTAL_STEPS}: raise `strength`."
                )
        self.scheduler.set_timesteps(total, device=device, **taken)
        if total > num_steps and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(total - num_steps)
        timesteps = self.scheduler.timesteps[-num_steps:]
        levels = timesteps if timesteps.is_floating_point() else 1 - timesteps / total
        sweeps = [per_step] * corrected + [0] * (num_steps - corrected)
        return Plan(make_steps(timesteps, levels, linear_ramp(ramp, num_steps), sweeps), float(levels[0]))

    def step(self, logits, step: Step, tokens, noise, mask=None, generator=None):
        """As [`PaellaStepper.step`]; with a list of generators, image by image."""
        if isinstance(generator, list):
            images = self._images(generator, mask, logits, tokens, noise)
            steps = [stepper.step(row, step, x, n, m, g) for stepper, g, m, row, x, n in images]
            return tuple(torch.cat(part) for part in zip(*steps))
        logits, generator = self._prepare(logits, tokens, mask, generator)
        options = {"noise": noise.flatten(1), "mask": None if mask is None else mask.flatten(1), "generator": generator}
        options |= {"codebook": self.codebook, "temperature": step.temperature}
        if step.temperature is None:
            del options["temperature"]
        elif "temperature" not in self.accepted:
            self.scheduler.register_to_config(temperature=step.temperature)  # the copy's own, for this step
        options = {name: value for name, value in options.items() if name in self.accepted}
        output = self.scheduler.step(logits, step.timestep, tokens.flatten(1), **options)
        after, clean = output.prev_sample.view_as(tokens), _clean_tokens(output, self.scheduler).view_as(tokens)
        if step.is_last and ("accepted_index" in output or "committed_mask" in output):  # the others shall not stay noise
            after = clean
        if mask is not None and "mask" not in self.accepted:
            after, clean = (torch.where(mask, grid, tokens) for grid in (after, clean))
        return after, clean

    def reorder(self, rows: torch.Tensor):
        """As [`PaellaStepper.reorder`]: these schedulers keep nothing of the images."""

    def why_no_draw(self, plan: Plan) -> str | None:
        """As [`PaellaStepper.why_no_draw`]."""
        if "generator" not in self.accepted:
            return "its `step` takes no `generator`, and draws nothing: take another scheduler"
        temperatures = [step.temperature for step in plan]
        if not any(self.default_temperature if value is None else value for value in temperatures):
            return "at temperature 0 it takes the most likely tokens: pass `temperature`, such as 1.0"
        return None

    def correct(self, logits, step: Step, tokens, mask=None, generator=None) -> torch.Tensor:
        """One sweep of the scheduler's corrector after `step`: the corrected token grid."""
        if isinstance(generator, list):
            images = self._images(generator, mask, logits, tokens)
            return torch.cat([stepper.correct(row, step, x, m, g) for stepper, g, m, row, x in images])
        logits, generator = self._prepare(logits, tokens, mask, generator)
        output = self.scheduler.step_correct(logits, step.timestep, tokens.flatten(1), generator=generator)
        corrected = output.prev_sample.view_as(tokens)
        return corrected if mask is None else torch.where(mask, corrected, tokens)

    def _images(self, generators, mask, *tensors):
        """A stepper, a generator, a mask or None, and the tensors of every image; schedulers keep count of their steps."""
        if not self.by_image:
            self.by_image = [copy.copy(self) for _ in generators]
            for stepper in self.by_image:
                stepper.scheduler = copy.deepcopy(self.scheduler)
        masks = [None] * len(generators) if mask is None else mask.split(1)
        return zip(self.by_image, generators, masks, *(tensor.split(1) for tensor in tensors))

    def _prepare(self, logits, tokens, mask, generator):
        """
        Finite logits as a sequence, certain of known tokens, which the scheduler would otherwise spend its choice on; and a
        generator on their device.
        """
        check_logits(logits, dim=1)
        if mask is not None:
            certain = torch.zeros_like(logits).scatter_(1, tokens[:, None], 50.0)
            logits = torch.where(mask[:, None], logits, certain)
        if generator is not None and generator.device != logits.device:
            seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
            generator = torch.Generator(logits.device).manual_seed(seed)
        return logits.flatten(2).transpose(1, 2), generator  # channels-last: no copy


class InversionStepper:
    """
    Discrete inversion (DICE, https://huggingface.co/papers/2410.08207). A second run with the source prompt, which is told
    the image's tokens x₀, has the same noise as the run with the target prompt. At every level t it gives the residual

        z = log δ(x₀) - log p(x₀ | source prompt, xₜ),

    which is put back with the weight λ in the run with the target prompt, where the most likely token is taken,

        x̃₀ = argmax log p(x₀ | target prompt, x̃ₜ) + λ z.

    All three distributions are smoothed as labels are in training, (1 - s) p + s / V, so that what is impossible to both
    runs counts for nothing. With the source prompt as target and λ = 1, the result is x₀.

    Before its first step it needs `source_denoiser`, the logits of the run with the source prompt, and `clean`, the tokens
    x₀, `(batch_size, height, width)`.

    Args:
        scheduler: Whose noise levels are followed; its own steps are not taken.
        residual_scale (`float`): λ, at least 0.
        smoothing (`float`): s in (0, 1).
    """

    uses_codebook = False
    order, repeats_steps = 1, False  # it keeps a second run's state

    def __init__(self, scheduler, residual_scale: float, smoothing: float):
        self.stepper = make_stepper(scheduler)
        self.residual_scale, self.smoothing = residual_scale, smoothing
        self.source = None  # x_t of the run with the source prompt

    def plan(self, num_inference_steps, device=None, temperature=None, renoise_steps=None, strength=1.0) -> Plan:
        """As [`PaellaStepper.plan`], but the most likely tokens are taken, so that there is no temperature."""
        if temperature is not None:
            raise ValueError("`temperature` is not used by discrete inversion, which takes the most likely tokens.")
        if "corrector_steps" in self.stepper.scheduler.config:
            self.stepper.scheduler.register_to_config(corrector_steps=0)
        self.renoise_steps = num_inference_steps - 1 if renoise_steps is None else renoise_steps
        return self.stepper.plan(num_inference_steps, device, strength=strength)

    def step(self, logits, step: Step, tokens, noise, mask=None, generator=None):
        """As [`PaellaStepper.step`]."""
        self.source = tokens if self.source is None else self.source
        target, source = map(self._log_probabilities, (logits, self.source_denoiser(self.source, step)))
        certain = self._smoothed(torch.zeros_like(source).scatter_(-1, self.clean[..., None], 1.0))
        edited = (target + self.residual_scale * (certain - source)).argmax(-1)
        if step.is_last or step.index >= self.renoise_steps:
            self.source = self.clean
            return edited, edited
        self.source, replaced = add_uniform_noise(self.clean, step.next_level, noise=noise, generator=generator)
        return torch.where(replaced, noise, edited), edited

    def reorder(self, rows: torch.Tensor):
        """As [`PaellaStepper.reorder`]."""
        self.source = self.source[rows]
        self.source_denoiser.reorder(rows)

    def why_no_draw(self, plan: Plan) -> str | None:
        """As [`PaellaStepper.why_no_draw`]: which tokens are noise is drawn."""

    def _log_probabilities(self, logits):
        probabilities = logits.float().softmax(1).movedim(1, -1)
        check_finite(probabilities[..., 0])  # logits that are NaN, or infinite, make a whole row NaN
        return self._smoothed(probabilities)

    def _smoothed(self, probabilities):
        return (probabilities * (1 - self.smoothing) + self.smoothing / probabilities.shape[-1]).log()


Stepper = PaellaStepper | DiscreteStepper | InversionStepper


def make_steps(timesteps, levels, temperatures, sweeps) -> tuple[Step, ...]:
    """The steps of a plan, from what each has of its own."""
    next_levels = [*map(float, levels[1:]), 0.0]
    rows = enumerate(zip(timesteps, levels, next_levels, temperatures, sweeps))
    return tuple(Step(i, t, level, after, len(levels), temp, n) for i, (t, level, after, temp, n) in rows)


def refused_override(scheduler, name: str) -> ValueError:
    return ValueError(f"{type(scheduler).__name__} takes no `{name}`: leave it out, or take another scheduler.")


def _clean_tokens(output, scheduler) -> torch.Tensor:
    for name in ("sampled_tokens", "pred_original_sample"):
        if name in output:
            return output[name]
    raise ValueError(
        f"`scheduler`, a {type(scheduler).__name__}, cannot sample from Paella: its `step` returns no `sampled_tokens`."
    )
