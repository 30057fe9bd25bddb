"""Paella's sampler: predict all tokens, then re-noise a shrinking share of them."""

import torch
from diffusers.configuration_utils import register_to_config

from ..checks import check_choice, check_integer, check_number
from .categorical import add_uniform_noise, check_finite, sample_tokens
from .scheduling_utils import PaellaSchedulerOutput, RenoisingSchedulerBase, check_codebook

__all__ = ["PaellaScheduler", "PaellaSchedulerOutput", "typical_filter"]


class PaellaScheduler(RenoisingSchedulerBase):
    r"""
    The renoising sampler of Paella (https://huggingface.co/papers/2211.07292, algorithm 2).

    The noise level t, the fraction of tokens that are noise, descends linearly from t_start to t_end: t₀, t₁, ... In step i

    1. the logits are divided by the temperature, and every position's clean token is sampled from their softmax,
       independently;
    2. if i < `renoise_steps`, each token is replaced with probability t_{i+1} by the initial noise at its place.

    Args:
        num_inference_steps (`int`, defaults to 12): Number of steps if `set_timesteps` is not given one, up to 10,000.
        t_start (`float`, defaults to 1.0): First noise level, in (0, 1].
        t_end (`float`, defaults to 0.0): Noise level after the last step, in [0, t_start).
        temperature (`float` or `tuple[float, float]`, defaults to `(0.7, 0.3)`):
            Sampling temperature, from 1e-6 to 1e6. A pair is a linear ramp from the first step to the last.
        renoise_steps (`int`, *optional*): Number of steps, from the first, that re-noise. By default all but the last.
        noise_source (`str`, defaults to `"initial"`):
            What replaces re-noised tokens: `"initial"`, the noise that sampling began with (the `noise` of `step`);
            `"fresh"`, uniformly random tokens; `"previous"`, the tokens that entered the step.
        sampling_rule (`str`, defaults to `"multinomial"`):
            `"multinomial"`: sample from the softmax. `"argmax"`: take the most likely token. `"quantized"`: take the token
            whose code is nearest to the probability-weighted mean of the codebook. The latter two use no random numbers.
        quantized_steps (`int`, defaults to 0): How many of the last steps use `"quantized"` in any case.
        typical_mass (`float`, *optional*):
            Typical filtering (the paper's first release; https://huggingface.co/papers/2202.00666), in (0, 1]. Before the
            temperature is applied, it keeps the tokens whose surprisal is nearest to the entropy, until their total
            probability reaches this value.
        typical_min_tokens (`int`, defaults to 1): Minimum number of tokens that typical filtering keeps.
        num_vq_embeddings (`int`, defaults to 8192): Number of different tokens, for `add_noise` to draw from.

    Raises:
        ValueError: If a value is not in its range, or not a number where it must be one.
    """

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
        self._check_config()
        check_choice("sampling_rule", sampling_rule, ("multinomial", "argmax", "quantized"))
        check_integer("quantized_steps", quantized_steps, 0)
        if typical_mass is not None:
            check_number("typical_mass", typical_mass, above=0, at_most=1, remedy="None turns typical filtering off.")
        check_integer("typical_min_tokens", typical_min_tokens, 1)
        self.set_timesteps(num_inference_steps)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        noise: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        codebook: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PaellaSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Sample every token, then replace each by noise with probability t_{i+1}.

        Args:
            model_output (`torch.Tensor`):
                Logits of the clean tokens, `(batch_size, length, num_tokens)` or `(batch_size, num_tokens, height, width)`,
                in float32, float64, bfloat16 or float16. -inf excludes a token.
            timestep (`float` or `torch.Tensor`): The noise level t_i of this step, one of `timesteps`.
            sample (`torch.LongTensor` of shape `(batch_size, length)` or `(batch_size, height, width)`):
                The tokens that the model was given.
            noise (`torch.LongTensor` of the shape of `sample`, *optional*):
                The tokens that sampling began with: the replacements if `noise_source` is `"initial"`.
            mask (`torch.Tensor` of the shape of `sample`, *optional*):
                1 where tokens are generated. Where it is 0, the tokens of `sample` are known and stay.
            codebook (`torch.Tensor` of shape `(num_tokens, channels)`, *optional*): For `"quantized"` sampling.
            generator (`torch.Generator` or a list with one for each image, *optional*): The source of randomness.

        Returns:
            [`PaellaSchedulerOutput`], or a tuple of its two tensors if `return_dict` is `False`.

        Raises:
            ValueError: If `timestep` is none of `timesteps`, shapes do not fit, logits are NaN or +inf, the batch is empty,
                or `noise` or `codebook` is missing where it is needed.
            TypeError: If a dtype is wrong.
        """
        index = self._index(timestep)
        logits, mask = self._check_step(model_output, sample, noise, mask, generator)

        # 1. sample every position; known tokens are put back
        sampled_tokens = self._sample(logits, index, codebook, generator)
        if mask is not None:
            sampled_tokens = torch.where(mask, sampled_tokens, sample)

        # 2. re-noise
        prev_sample = sampled_tokens
        if index < self.renoise_steps:
            noise = self._noise(sample, noise)
            prev_sample, _ = add_uniform_noise(sampled_tokens, self._levels[index + 1], logits.shape[-1], noise, generator)
            if mask is not None:
                prev_sample = torch.where(mask, prev_sample, sample)

        if not return_dict:
            return (prev_sample, sampled_tokens)
        return PaellaSchedulerOutput(prev_sample=prev_sample, sampled_tokens=sampled_tokens)

    def _sample(self, logits, index, codebook, generator):
        """Clean tokens `(batch_size, ...)` from logits `(batch_size, ..., num_tokens)`."""
        if self.config.typical_mass is not None:
            logits = logits.float()
            removed = typical_filter(logits, self.config.typical_mass, self.config.typical_min_tokens)
            logits = logits.masked_fill(removed, -torch.inf)
        quantized = index >= self.num_inference_steps - self.config.quantized_steps
        if self.config.sampling_rule == "argmax" and not quantized:
            tokens = logits.argmax(-1)
            check_finite(logits.gather(-1, tokens[..., None]))
            return tokens
        if self.config.sampling_rule == "quantized" or quantized:
            check_codebook(codebook, logits.shape[-1])
            probabilities = (logits.float() / self.temperatures[index]).softmax(-1)
            check_finite(probabilities[..., 0])
            codebook = codebook.to(probabilities)
            return torch.cdist(probabilities.flatten(1, -2) @ codebook, codebook).argmin(-1).view(logits.shape[:-1])
        return sample_tokens(logits, self.temperatures[index], generator)


def typical_filter(logits: torch.Tensor, mass: float, min_tokens: int = 1) -> torch.Tensor:
    """
    Which tokens typical filtering removes (https://huggingface.co/papers/2202.00666, section 3). It keeps the tokens whose
    surprisal is nearest to the entropy of the distribution, until their probability passes `mass`, and ties with the last.

    Args:
        logits (`torch.Tensor` of shape `(..., num_tokens)`): Unnormalised log-probabilities.
        mass (`float`): In (0, 1].
        min_tokens (`int`): Minimum number of tokens that it keeps, at least 1.

    Returns:
        `torch.BoolTensor` of the shape of `logits`: True where a token is removed.
    """
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    entropy = -(log_probabilities * probabilities).nansum(-1, keepdim=True)
    atypicality = (-log_probabilities - entropy).abs()
    nearest, order = atypicality.sort(-1)
    kept = (probabilities.gather(-1, order).cumsum(-1) < mass).sum(-1, keepdim=True)
    kept = kept.clamp(min=min_tokens - 1, max=logits.shape[-1] - 1)  # rounding may leave the whole sum below a mass of 1
    return atypicality > nearest.gather(-1, kept)
