"""Paella's sampler: predict all tokens, then re-noise fewer and fewer of them."""

import torch
from diffusers.configuration_utils import register_to_config

from .categorical import add_uniform_noise, sample_tokens
from .scheduling_utils import PaellaSchedulerOutput, RenoisingSchedulerBase

__all__ = ["PaellaScheduler", "PaellaSchedulerOutput", "typical_filter"]


class PaellaScheduler(RenoisingSchedulerBase):
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
        if sampling_rule not in ("multinomial", "argmax", "quantized"):
            raise ValueError(f"`sampling_rule` must be 'multinomial', 'argmax' or 'quantized', got {sampling_rule!r}.")
        if quantized_steps < 0:
            raise ValueError(f"`quantized_steps` must be at least 0, got {quantized_steps}.")
        if typical_mass is not None and not 0 < typical_mass <= 1:
            raise ValueError(f"`typical_mass` must be in (0, 1], or None for no typical filtering, got {typical_mass}.")
        if typical_min_tokens < 1:
            raise ValueError(f"`typical_min_tokens` must be at least 1, got {typical_min_tokens}.")
        self.set_timesteps(num_inference_steps)

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
        logits = self._logits(model_output, sample)
        sampled_tokens = self._sample(logits, index, codebook, generator)
        if mask is not None:
            sampled_tokens = torch.where(mask.bool(), sampled_tokens, sample)

        prev_sample = sampled_tokens
        if index < self.renoise_steps:
            noise = self._noise(sample, noise)
            prev_sample, _ = add_uniform_noise(sampled_tokens, self._levels[index + 1], logits.shape[-1], noise, generator)
            if mask is not None:
                prev_sample = torch.where(mask.bool(), prev_sample, sample)

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
            return logits.argmax(-1)
        if self.config.sampling_rule == "quantized" or quantized:
            if codebook is None:
                raise ValueError("Quantized sampling needs `codebook`, which `vqgan.codebook(device)` gives.")
            probabilities = (logits.float() / self.temperatures[index]).softmax(-1)
            codebook = codebook.to(probabilities)
            return torch.cdist(probabilities.flatten(1, -2) @ codebook, codebook).argmin(-1).view(logits.shape[:-1])
        return sample_tokens(logits, self.temperatures[index], generator)


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
