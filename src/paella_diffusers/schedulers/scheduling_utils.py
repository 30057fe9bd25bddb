"""What the samplers of discrete tokens share: noise levels, temperatures, re-noising, and checks of their input."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from ..checks import check_choice, check_integer, check_number, check_ramp, is_number
from ..loaders.config_check import check_sizes
from ..loaders.hub import PaellaHubMixin
from .categorical import add_uniform_noise, check_generators, leave_one_out_shift

MAX_INFERENCE_STEPS = 10_000  # no run needs more, and a configuration may ask for any number
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6  # logits divided by them stay finite in float32
LOGITS_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class PaellaSchedulerOutput(BaseOutput):
    """
    Output of a scheduler's `step`.

    Args:
        prev_sample (`torch.LongTensor` of the shape of `sample`): The re-noised tokens, the next input of the model.
        sampled_tokens (`torch.LongTensor` of the same shape): The predicted clean tokens, before re-noising.
    """

    prev_sample: torch.Tensor
    sampled_tokens: torch.Tensor


class PaellaSchedulerBase(PaellaHubMixin, SchedulerMixin, ConfigMixin):
    """
    A run descends through the noise levels `timesteps`: t is the fraction of tokens that are noise. A sampler adds `step`
    and `__init__`, whose arguments are the configuration that the methods below read.
    """

    order = 1
    _compatibles = [
        "PaellaScheduler",
        "PaellaConfidenceScheduler",
        "PaellaFlowMatchEulerScheduler",
        "PaellaFlowMatchTrapezoidalScheduler",
        "PaellaPsiScheduler",
        "DiscreteDDIMScheduler",
        "EntropyBoundScheduler",
    ]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | torch.Tensor | None = None,
        temperature: float | tuple[float, float] | None = None,
        t_start: float | None = None,
    ) -> None:
        """
        Prepare a run. What is not given comes from the configuration, which no argument changes.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps, from 1 to 10,000.
            device (`str` or `torch.device`, *optional*): Where `timesteps` lie.
            timesteps (`list[float]` or `torch.Tensor`, *optional*):
                The noise level of each step, descending, in (0, 1]. They replace the configured descent.
            temperature (`float` or `tuple[float, float]`, *optional*): Replaces the configured one in this run.
            t_start (`float`, *optional*):
                Replaces the configured one in this run. A configured `t_end` above it is lowered to it,
                for a single step.

        Raises:
            ValueError: If a value is not a number in its range, or `timesteps` do not descend.
        """
        if num_inference_steps is not None or timesteps is None:
            steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
            check_integer("num_inference_steps", steps, 1, MAX_INFERENCE_STEPS)
        if timesteps is None:
            t_start = self.config.t_start if t_start is None else t_start
            check_number("t_start", t_start, above=0, at_most=1)
            if t_start <= self.config.t_end and steps > 1:
                raise ValueError(
                    f"`t_start`={t_start} (a pipeline's `strength`) must be above the configured `t_end`="
                    f"{self.config.t_end} for several steps: raise it, or set a lower `t_end`."
                )
            levels = self._descent(int(steps), float(t_start), min(self.config.t_end, float(t_start)))
        else:
            levels = check_timesteps(timesteps, num_inference_steps)
            steps = len(levels)
            levels = torch.cat([levels, levels.new_tensor([min(self.config.t_end, levels[-1])])])
        if steps > 1 and not (levels[:-1].diff() < 0).all():
            raise ValueError(
                f"`num_inference_steps`={steps} is too many for this descent, whose levels would be equal: take fewer."
            )
        ramp: Any = self.config.temperature if temperature is None else as_python(temperature)
        check_temperature(ramp)
        first, last = ramp if isinstance(ramp, tuple | list) else (ramp, ramp)

        self.num_inference_steps = int(steps)
        self.timesteps: torch.Tensor = levels[:-1].to(device)
        self.temperatures: list[float] = torch.linspace(float(first), float(last), int(steps)).tolist()
        self._levels = levels.tolist()

    def _descent(self, steps: int, t_start: float, t_end: float) -> torch.Tensor:
        """The noise levels before each step and after the last one, `(steps + 1,)`."""
        return torch.linspace(t_start, t_end, steps + 1)

    def _check_config(self):
        """Check the values that all samplers have. NumPy's are stored as Python's, and a list as the tuple that it was."""
        config = {name: as_python(value) for name, value in self.config.items()}
        if isinstance(config["temperature"], list):
            config["temperature"] = tuple(config["temperature"])
        self.register_to_config(**config)
        check_integer("num_inference_steps", self.config.num_inference_steps, 1, MAX_INFERENCE_STEPS)
        check_number("t_start", self.config.t_start, above=0, at_most=1)
        check_number("t_end", self.config.t_end, at_least=0, below=self.config.t_start)
        check_temperature(self.config.temperature)
        check_integer("num_vq_embeddings", self.config.num_vq_embeddings, 1, 2**31 - 1)
        check_sizes(type(self).__name__, dict(self.config))  # as when it is loaded

    def _check_step(
        self,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Check what a step is given; return the logits as `(batch_size, ..., num_tokens)`, and the mask."""
        check_tokens("sample", sample)
        check_generators(generator, len(sample))
        if sample.ndim not in (2, 3):
            raise ValueError(
                "`sample` must have the shape (batch_size, length) or (batch_size, height, width), "
                f"got {tuple(sample.shape)}."
            )
        if not isinstance(model_output, torch.Tensor) or model_output.dtype not in LOGITS_DTYPES:
            raise TypeError(
                f"`model_output` must be logits in float32, float64, bfloat16 or float16, got {describe(model_output)}: "
                "convert them, for example with `.float()`."
            )
        logits = model_output.movedim(1, -1) if model_output.ndim == 4 and sample.ndim == 3 else model_output
        if logits.shape[:-1] != sample.shape or not logits.shape[-1]:
            expected = "(batch_size, num_tokens, height, width)" if sample.ndim == 3 else "(batch_size, length, num_tokens)"
            raise ValueError(
                f"`model_output` must have the shape {expected} for a `sample` of shape {tuple(sample.shape)}, "
                f"got {tuple(model_output.shape)}."
            )
        if noise is not None:
            check_tokens("noise", noise, sample.shape)
        if mask is None:
            return logits, None
        if not isinstance(mask, torch.Tensor) or mask.is_complex():
            raise TypeError(f"`mask` must be a tensor of 0 and 1, got {describe(mask)}.")
        if mask.shape != sample.shape:
            raise ValueError(f"`mask` must have the shape of `sample`, {tuple(sample.shape)}, got {tuple(mask.shape)}.")
        return logits, mask.bool()

    def _tempered(self, logits: torch.Tensor, sample: torch.Tensor, index: int) -> torch.Tensor:
        """Logits to be divided by the temperature: as they are, or for `leave_one_out_temperature`."""
        if not self.config.leave_one_out_temperature:
            return logits
        return leave_one_out_shift(logits, sample, self._levels[index], self.temperatures[index])

    def add_noise(
        self,
        original_samples: torch.Tensor,
        noise: torch.Tensor | None,
        timesteps: float | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Replace each token by noise with probability t.

        Args:
            original_samples (`torch.LongTensor` of shape `(batch_size, ...)`): Clean tokens.
            noise (`torch.LongTensor` of the same shape, *optional*):
                The replacements. If None, they are drawn after the mask, uniformly from `num_vq_embeddings` tokens.
            timesteps (`float` or `torch.Tensor` of shape `(batch_size,)`): Noise levels t in [0, 1].
            generator (`torch.Generator` or a list with one for each image, *optional*): The source of randomness.

        Raises:
            ValueError: If a noise level is not a number in [0, 1], or shapes differ.
            TypeError: If tokens are not int64.
        """
        check_tokens("original_samples", original_samples)
        if noise is not None:
            check_tokens("noise", noise, original_samples.shape)
        levels = as_float_tensor("timesteps", timesteps)
        if levels.shape not in ((), (1,), original_samples.shape[:1]) or not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(
                f"`timesteps` must be a noise level in [0, 1], or one for each of {len(original_samples)} rows, "
                f"got {timesteps}."
            )
        noised, _ = add_uniform_noise(original_samples, levels, self.config.num_vq_embeddings, noise, generator)
        return noised

    def _index(self, timestep: float | torch.Tensor) -> int:
        """Which step this noise level belongs to."""
        number = as_python(timestep.squeeze() if isinstance(timestep, torch.Tensor) else timestep)
        if not is_number(number) or min(abs(level - number) for level in self._levels[:-1]) > 1e-5:
            raise ValueError(f"`timestep` must be one of `timesteps`, {self.timesteps.tolist()}, got {timestep}.")
        return min(range(self.num_inference_steps), key=lambda i: abs(self._levels[i] - number))

    def __len__(self) -> int:
        return self.num_inference_steps


class RenoisingSchedulerBase(PaellaSchedulerBase):
    """Samplers whose steps draw all tokens and re-noise some of them: `renoise_steps` and `noise_source`."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | torch.Tensor | None = None,
        temperature: float | tuple[float, float] | None = None,
        renoise_steps: int | None = None,
        t_start: float | None = None,
    ) -> None:
        """As [`PaellaSchedulerBase.set_timesteps`]; `renoise_steps` (`int`, *optional*) replaces the configured one too."""
        renoise_steps = self.config.renoise_steps if renoise_steps is None else renoise_steps
        if renoise_steps is not None:
            check_integer("renoise_steps", renoise_steps, 0)
        super().set_timesteps(num_inference_steps, device, timesteps, temperature, t_start)
        self.renoise_steps: int = self.num_inference_steps - 1 if renoise_steps is None else renoise_steps

    def _check_config(self):
        super()._check_config()
        check_choice("noise_source", self.config.noise_source, ("initial", "fresh", "previous"))

    def _noise(self, sample: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor | None:
        """The tokens that replace re-noised ones; None for fresh random ones."""
        if self.config.noise_source == "fresh":
            return None
        if self.config.noise_source == "previous":
            return sample
        if noise is None:
            raise ValueError("`noise_source='initial'` needs `noise`, the tokens that sampling began with.")
        return noise


# ------------------------------------------------------------------------------------------------------------- checks


def as_python(value: Any) -> Any:
    """NumPy's and torch's numbers and arrays as Python's numbers and lists; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_temperature(temperature: object) -> None:
    """One temperature, or the first and the last of a linear ramp."""
    remedy = "For the most likely tokens, use `sampling_rule='argmax'` of PaellaScheduler."
    check_ramp("temperature", temperature, remedy, at_least=MIN_TEMPERATURE, at_most=MAX_TEMPERATURE)


def check_timesteps(timesteps: Any, num_inference_steps: int | None) -> torch.Tensor:
    """Descending noise levels as float32 on the CPU, `(num_inference_steps,)`."""
    levels = as_float_tensor("timesteps", timesteps).cpu()
    if levels.ndim != 1 or not 0 < len(levels) <= MAX_INFERENCE_STEPS:
        raise ValueError(
            f"`timesteps` must be a list of 1 to {MAX_INFERENCE_STEPS} noise levels, got shape {tuple(levels.shape)}."
        )
    if num_inference_steps not in (None, len(levels)):
        raise ValueError(
            f"`timesteps` has {len(levels)} entries for `num_inference_steps`={num_inference_steps}: pass only one of them."
        )
    if not (levels[-1] > 0 and levels[0] <= 1 and (levels.diff() < 0).all()):
        raise ValueError(f"`timesteps` must descend within (0, 1], got {levels.tolist()}.")
    return levels


def check_tokens(name: str, tokens: object, shape: torch.Size | None = None) -> None:
    """Token ids are int64, there is at least one, and their shape is that of the sample."""
    if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.int64:
        raise TypeError(f"`{name}` must be a tensor of token ids in int64, got {describe(tokens)}.")
    if not tokens.numel() or not tokens.ndim:
        raise ValueError(f"`{name}` has no tokens, its shape is {tuple(tokens.shape)}: pass a batch of at least one image.")
    if shape is not None and tokens.shape != shape:
        raise ValueError(f"`{name}` must have the shape of the tokens, {tuple(shape)}, got {tuple(tokens.shape)}.")


def check_codebook(codebook: torch.Tensor | None, num_tokens: int) -> None:
    if codebook is None:
        raise ValueError("Quantized sampling needs `codebook`: pass `vqgan.codebook(device)`.")
    if not isinstance(codebook, torch.Tensor) or not codebook.is_floating_point():
        raise TypeError(f"`codebook` must be a floating-point tensor, got {describe(codebook)}.")
    if codebook.ndim != 2 or len(codebook) != num_tokens:
        raise ValueError(f"`codebook` must have the shape ({num_tokens}, channels), got {tuple(codebook.shape)}.")


def as_float_tensor(name: str, values: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(values).to(torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"`{name}` must be numbers, got {values!r}.") from error


def describe(value: object) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else repr(value)
