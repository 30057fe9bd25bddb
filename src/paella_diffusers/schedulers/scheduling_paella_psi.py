"""Between ancestral sampling and renoising: the Ψ-samplers of uniform noise."""

import torch
from diffusers.configuration_utils import register_to_config

from ..checks import check_boolean, check_number
from .categorical import rand_tensor, random_tokens, sample_tokens
from .scheduling_utils import PaellaSchedulerBase, PaellaSchedulerOutput


class PaellaPsiScheduler(PaellaSchedulerBase):
    r"""
    The Ψ-samplers (Duo, chapter II, https://huggingface.co/papers/2602.21185) for uniform noise. At every position a clean
    token x̂ ~ `softmax(logits / temperature)` is sampled. From the noise level t to s, the next token is drawn from

        κ q(x_s | x_t, x̂) + (1 - κ) q(x_s | x̂),

    a mixture of the predictor, which is the posterior of the noise process, and of the corrector, which re-noises x̂. With
    either, and so with any κ, the result is at the level s. The predictor may keep the present token. The corrector does not
    depend on it.

    κ = 0 is renoising: draw for draw [`PaellaScheduler`] with `noise_source="fresh"`. κ = 1 is ancestral sampling (D3PM,
    https://huggingface.co/papers/2107.03006): in distribution diffusers' `DiscreteDDIMScheduler` at the same temperature.
    The last step takes x̂.

    Args:
        num_inference_steps (`int`, defaults to 12): Number of steps if `set_timesteps` is not given one, up to 10,000.
        t_start (`float`, defaults to 1.0): First noise level, in (0, 1].
        t_end (`float`, defaults to 0.0): Where the noise level descends to, in [0, t_start). The last step ends at 0.
        temperature (`float` or `tuple[float, float]`, defaults to `(0.7, 0.3)`):
            Sampling temperature, from 1e-6 to 1e6. A pair is a linear ramp from the first step to the last.
        kappa (`float`, defaults to 0.5): κ in [0, 1].
        leave_one_out_temperature (`bool`, defaults to `False`):
            Apply the temperature to what the other tokens say of each token only: see [`leave_one_out_shift`]. One token
            alone is then sampled from exactly p^(1/T), renormalised, with any κ and number of steps.
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
        kappa: float = 0.5,
        leave_one_out_temperature: bool = False,
        num_vq_embeddings: int = 8192,
    ):
        self._check_config()
        check_number("kappa", kappa, at_least=0, at_most=1)
        check_boolean("leave_one_out_temperature", leave_one_out_temperature)
        self.set_timesteps(num_inference_steps)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        mask: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PaellaSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        Sample every clean token, then the next token given it and the present one.

        Args:
            model_output, timestep, sample, mask, generator: As in [`PaellaScheduler.step`].

        Returns:
            [`PaellaSchedulerOutput`], or a tuple of its two tensors if `return_dict` is `False`.

        Raises:
            ValueError, TypeError: As [`PaellaScheduler.step`].
        """
        index = self._index(timestep)
        logits, mask = self._check_step(model_output, sample, mask=mask, generator=generator)

        sampled_tokens = sample_tokens(self._tempered(logits, sample, index), self.temperatures[index], generator)
        prev_sample = sampled_tokens
        if index + 1 < self.num_inference_steps:
            renoise, stay = self._routes(index, sample == sampled_tokens, logits.shape[-1])
            # one random number decides among three routes: renoising is compared as in `add_uniform_noise`
            uniform = rand_tensor(sample.shape, generator, sample.device)
            noise = random_tokens(logits.shape[-1], sample.shape, generator, sample.device)
            prev_sample = torch.where(uniform <= renoise, noise, sampled_tokens)
            prev_sample = torch.where(uniform > 1 - stay, sample, prev_sample)
        if mask is not None:
            prev_sample, sampled_tokens = (torch.where(mask, x, sample) for x in (prev_sample, sampled_tokens))

        if not return_dict:
            return (prev_sample, sampled_tokens)
        return PaellaSchedulerOutput(prev_sample=prev_sample, sampled_tokens=sampled_tokens)

    def _routes(self, index: int, agrees: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        The probabilities that the next token is uniform noise and that the present token stays, in float32 of the shape of
        `agrees`, which says where the present token is x̂. Otherwise the next token is x̂.

        The predictor is q(x_t | x_s) q(x_s | x̂) / q(x_t | x̂). With r = (1 - t) / (1 - s), the probability that a token
        survives from s to t, its three routes have the weights

            x̂: (1 - s) ((1 - r) / V + r [x_t = x̂]),    stay: r s / V,    noise: (1 - r) s / V.
        """
        t, s, kappa = self._levels[index], self._levels[index + 1], self.config.kappa
        survival = (1 - t) / (1 - s)
        stay, noise = survival * s / num_tokens, (1 - survival) * s / num_tokens
        shares = []
        for is_same in (True, False):  # Python's floats are float64, which not every device has
            total = (1 - s) * ((1 - survival) / num_tokens + survival * is_same) + stay + noise
            shares.append((kappa * noise / total + (1 - kappa) * s, kappa * stay / total))
        renoise, stay = (torch.where(agrees, same, other) for same, other in zip(*shares))
        return renoise, stay
