"""Paella's sampler: predict all tokens, then re-noise fewer and fewer of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from ..loaders.hub import PaellaHubMixin


@dataclass
class PaellaSchedulerOutput(BaseOutput):
    """
    Output of [`PaellaScheduler.step`].

    Args:
        prev_sample (`torch.LongTensor` of the shape of `sample`): The re-noised tokens, the next input of the model.
        sampled_tokens (`torch.LongTensor` of the same shape): The predicted clean tokens, before re-noising.
    """

    prev_sample: torch.LongTensor
    sampled_tokens: torch.LongTensor


class PaellaScheduler(PaellaHubMixin, SchedulerMixin, ConfigMixin):
    r"""
    The renoising sampler of Paella (https://huggingface.co/papers/2211.07292, algorithm 2).

    The noise level t, the fraction of tokens that are noise, descends linearly. Each step draws a clean token for every
    position from `softmax(logits / temperature)`, independently, and then makes noise again of each with probability
    t_next.

    Args:
        num_inference_steps (`int`, defaults to 12): Steps, unless `set_timesteps` says otherwise.
        t_start (`float`, defaults to 1.0): First noise level, in (0, 1].
        t_end (`float`, defaults to 0.0): Noise level after the last step, in [0, t_start).
        temperature (`float` or `tuple[float, float]`, defaults to `(0.7, 0.3)`):
            Sampling temperature, above 0: from the first step to the last, linearly.
        renoise_steps (`int`, *optional*): Only the first so many steps re-noise; all but the last unless given.
        noise_source (`str`, defaults to `"initial"`):
            What re-noised tokens become: `"initial"`, the noise that sampling began with (the `noise` of `step`); `"fresh"`,
            uniformly random tokens; `"previous"`, the tokens that entered the step.
        sampling_rule (`str`, defaults to `"multinomial"`):
            `"multinomial"`, a draw; `"argmax"`, the most likely token; `"quantized"`, the token whose code is nearest to the
            probability-weighted mean of the codebook. The latter two draw nothing.
        quantized_steps (`int`, defaults to 0): The last so many steps use `"quantized"`, whatever `sampling_rule` is.
        typical_mass (`float`, *optional*):
            Turns on typical filtering (the paper's first release; https://huggingface.co/papers/2202.00666): before the
            temperature, only tokens whose surprisal is nearest to the entropy stay, until they have this probability.
        typical_min_tokens (`int`, defaults to 1): So many tokens stay at least.
        num_vq_embeddings (`int`, defaults to 8192): Number of different tokens, for `add_noise` to draw from.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_inference_steps: int = 12,
        t_start: float = 1.0,
        t_end: float = 0.0,
        temperature: float | tuple[float, float] = (0.7, 0.3),
        renoise_steps: int | None = None,
        noise_source: str = "initial",
        sampling_rule: str = "multinomial",
        quantized_steps: int = 0,
        typical_mass: float | None = None,
        typical_min_tokens: int = 1,
        num_vq_embeddings: int = 8192,
    ):
        if not 0 <= t_end < t_start <= 1:
            raise ValueError(f"`t_start` and `t_end` must satisfy 0 <= t_end < t_start <= 1, got {t_start} and {t_end}.")
        if noise_source not in ("initial", "fresh", "previous"):
            raise ValueError(f"`noise_source` must be 'initial', 'fresh' or 'previous', got {noise_source!r}.")
        if sampling_rule not in ("multinomial", "argmax", "quantized"):
            raise ValueError(f"`sampling_rule` must be 'multinomial', 'argmax' or 'quantized', got {sampling_rule!r}.")
        if quantized_steps < 0:
            raise ValueError(f"`quantized_steps` must be at least 0, got {quantized_steps}.")
        if typical_mass is not None and not 0 < typical_mass <= 1:
            raise ValueError(f"`typical_mass` must be in (0, 1], or None for no typical filtering, got {typical_mass}.")
        if typical_min_tokens < 1:
            raise ValueError(f"`typical_min_tokens` must be at least 1, got {typical_min_tokens}.")
        self.set_timesteps(num_inference_steps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | torch.Tensor | None = None,
        temperature: float | tuple[float, float] | None = None,
        renoise_steps: int | None = None,
    ):
        """
        Prepare a run. What is not given comes from the configuration, which no argument changes.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps, at least 1.
            device (`str` or `torch.device`, *optional*): Where `timesteps` lie.
            timesteps (`list[float]` or `torch.Tensor`, *optional*):
                The noise level of every step, descending, in (0, 1], in place of the linear descent.
            temperature (`float` or `tuple[float, float]`, *optional*): Replaces the configured one in this run.
            renoise_steps (`int`, *optional*): Likewise.

        Raises:
            ValueError: If a value is out of its range, or `timesteps` do not descend.
        """
        if timesteps is None:
            steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
            if steps < 1:
                raise ValueError(f"`num_inference_steps` must be at least 1, got {steps}.")
            levels = torch.linspace(self.config.t_start, self.config.t_end, steps + 1)
        else:
            levels = torch.as_tensor(timesteps, dtype=torch.float32).cpu()
            steps = len(levels)
            if steps < 1 or num_inference_steps not in (None, steps):
                raise ValueError(f"`timesteps` must have `num_inference_steps`={num_inference_steps} entries, got {steps}.")
            if not (levels[-1] > 0 and levels[0] <= 1 and (levels.diff() < 0).all()):
                raise ValueError(f"`timesteps` must descend within (0, 1], got {levels.tolist()}.")
            levels = torch.cat([levels, levels.new_tensor([min(self.config.t_end, levels[-1])])])

        temperature = self.config.temperature if temperature is None else temperature
        ramp = temperature if isinstance(temperature, tuple | list) else (temperature, temperature)
        if len(ramp) != 2 or not all(value > 0 for value in ramp):  # a NaN is not above 0 either
            raise ValueError(
                f"`temperature` must be above 0, one number or (first, last), got {temperature}; "
                "`sampling_rule='argmax'` is its limit at 0."
            )
        renoise_steps = self.config.renoise_steps if renoise_steps is None else renoise_steps
        if renoise_steps is not None and renoise_steps < 0:
            raise ValueError(f"`renoise_steps` must be at least 0, got {renoise_steps}.")

        self.num_inference_steps = steps
        self.timesteps = levels[:-1].to(device)
        self.temperatures = torch.linspace(*ramp, steps).tolist()
        self.renoise_steps = steps - 1 if renoise_steps is None else renoise_steps
        self._levels = levels.tolist()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.LongTensor,
        noise: torch.LongTensor | None = None,
        mask: torch.Tensor | None = None,
        codebook: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PaellaSchedulerOutput | tuple[torch.LongTensor, torch.LongTensor]:
        """
        Sample every token, then re-noise each with the probability that the next noise level says.

        Args:
            model_output (`torch.Tensor`):
                Logits of the clean tokens, `(batch_size, length, num_tokens)` or `(batch_size, num_tokens, height, width)`.
            timestep (`float` or `torch.Tensor`): The noise level of this step, one of `timesteps`.
            sample (`torch.LongTensor` of shape `(batch_size, length)` or `(batch_size, height, width)`):
                The tokens that the model was given.
            noise (`torch.LongTensor` of the shape of `sample`, *optional*):
                The tokens that sampling began with, which re-noised tokens become again if `noise_source` is `"initial"`.
            mask (`torch.Tensor` of the shape of `sample`, *optional*):
                1 where tokens are generated; elsewhere `sample` is known and stays.
            codebook (`torch.Tensor` of shape `(num_tokens, channels)`, *optional*): For `"quantized"` sampling.
            generator (`torch.Generator` or a list with one for each image, *optional*): The source of randomness.

        Raises:
            ValueError: If `timestep` is none of `timesteps`, or `noise` or `codebook` is missing where it is needed.
        """
        index = self._index(timestep)
        logits = model_output.movedim(1, -1) if sample.ndim == 3 else model_output
        sampled_tokens = self._sample(logits.float(), index, codebook, generator)
        if mask is not None:
            sampled_tokens = torch.where(mask.bool(), sampled_tokens, sample)

        prev_sample = sampled_tokens
        if index < self.renoise_steps:
            renoise = draw(torch.rand, sample.shape, sample.device, generator) <= self._levels[index + 1]
            if mask is not None:
                renoise &= mask.bool()
            if self.config.noise_source == "fresh":
                noise = random_tokens(logits.shape[-1], sample.shape, sample.device, generator)
            elif self.config.noise_source == "previous":
                noise = sample
            elif noise is None:
                raise ValueError("`noise_source='initial'` needs `noise`, the tokens that sampling began with.")
            prev_sample = torch.where(renoise, noise, sampled_tokens)

        if not return_dict:
            return (prev_sample, sampled_tokens)
        return PaellaSchedulerOutput(prev_sample=prev_sample, sampled_tokens=sampled_tokens)

    def _sample(self, logits, index, codebook, generator):
        """Clean tokens `(batch_size, ...)` from logits `(batch_size, ..., num_tokens)`."""
        if self.config.typical_mass is not None:
            removed = typical_filter(logits, self.config.typical_mass, self.config.typical_min_tokens)
            logits = logits.masked_fill(removed, -torch.inf)
        quantized = index >= self.num_inference_steps - self.config.quantized_steps
        if self.config.sampling_rule == "argmax" and not quantized:
            return logits.argmax(-1)
        probabilities = (logits / self.temperatures[index]).softmax(-1)
        if self.config.sampling_rule == "quantized" or quantized:
            if codebook is None:
                raise ValueError("Quantized sampling needs `codebook`, which `vqgan.codebook(device)` gives.")
            codebook = codebook.to(probabilities)
            return torch.cdist(probabilities.flatten(1, -2) @ codebook, codebook).argmin(-1).view(logits.shape[:-1])
        if isinstance(generator, list):
            _check_generators(generator, len(probabilities))
            return torch.cat([_multinomial(image, g) for image, g in zip(probabilities.split(1), generator)])
        return _multinomial(probabilities, generator)

    def add_noise(
        self,
        original_samples: torch.LongTensor,
        noise: torch.LongTensor | None,
        timesteps: float | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.LongTensor:
        """
        Make noise of each token with probability t.

        Args:
            original_samples (`torch.LongTensor` of shape `(batch_size, ...)`): Clean tokens.
            noise (`torch.LongTensor` of the same shape, *optional*):
                What noised tokens become; drawn if None, uniformly from `num_vq_embeddings` tokens, after the mask.
            timesteps (`float` or `torch.Tensor` of shape `(batch_size,)`): Noise levels in [0, 1].
            generator (`torch.Generator` or a list with one for each image, *optional*): The source of randomness.
        """
        shape, device = original_samples.shape, original_samples.device
        timesteps = torch.as_tensor(timesteps, device=device).view(-1, *[1] * (len(shape) - 1))
        noised = draw(torch.rand, shape, device, generator) <= timesteps
        if noise is None:
            noise = random_tokens(self.config.num_vq_embeddings, shape, device, generator)
        return torch.where(noised, noise, original_samples)

    def _index(self, timestep: float | torch.Tensor) -> int:
        timestep = float(timestep)
        index = min(range(self.num_inference_steps), key=lambda i: abs(self._levels[i] - timestep))
        if abs(self._levels[index] - timestep) > 1e-5:
            raise ValueError(f"`timestep` must be one of `timesteps`, {self.timesteps.tolist()}, got {timestep}.")
        return index

    def __len__(self) -> int:
        return self.num_inference_steps


def typical_filter(logits: torch.Tensor, mass: float, min_tokens: int = 1) -> torch.BoolTensor:
    """
    Which tokens typical filtering removes (https://huggingface.co/papers/2202.00666, section 3): it keeps those whose
    surprisal is nearest to the entropy of the distribution, until their probability passes `mass`, and ties with the last.

    Args:
        logits (`torch.Tensor` of shape `(..., num_tokens)`): Unnormalised.
        mass (`float`): In (0, 1].
        min_tokens (`int`): So many stay at least.
    """
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    entropy = -(log_probabilities * probabilities).nansum(-1, keepdim=True)
    atypicality = (-log_probabilities - entropy).abs()
    nearest, order = atypicality.sort(-1)
    kept = (probabilities.gather(-1, order).cumsum(-1) < mass).sum(-1, keepdim=True)
    kept = kept.clamp(min=min_tokens - 1, max=logits.shape[-1] - 1)  # rounding may leave the whole sum below a mass of 1
    return atypicality > nearest.gather(-1, kept)


def random_tokens(
    num_tokens: int,
    shape: tuple[int, ...],
    device: str | torch.device,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.LongTensor:
    """Uniform tokens in `[0, num_tokens)`; with a list of generators, each image from its own."""
    return draw(lambda size, **kwargs: torch.randint(num_tokens, size, **kwargs), shape, device, generator)


def draw(function: Callable, shape, device, generator) -> torch.Tensor:
    """A random tensor, drawn where the generator lives; with a list of generators, each image from its own."""
    if isinstance(generator, list):
        _check_generators(generator, shape[0])
        return torch.cat([draw(function, (1, *shape[1:]), device, g) for g in generator])
    return function(shape, generator=generator, device=generator.device if generator else device).to(device)


def _check_generators(generators: list, batch_size: int):
    if len(generators) != batch_size:
        raise ValueError(f"`generator` is a list of {len(generators)} for a batch of {batch_size}: pass one for each image.")


def _multinomial(probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.LongTensor:
    rows = probabilities.flatten(0, -2).to(generator.device if generator else probabilities.device)
    return torch.multinomial(rows, 1, generator=generator).view(probabilities.shape[:-1]).to(probabilities.device)
