"""Ending the sampling of images whose prediction has converged."""

import torch

from .plan import Step


class EarlyStop:
    """
    Freezes images whose prediction is sure and stable: the mean entropy of their tokens is below `confidence_threshold`, and
    a share of at least `stability_threshold` of their most likely tokens is that of the step before. Only tokens that are
    generated count. (Text in diffusers' `DiffusionGemmaPipeline` stops in the same way, by whole predictions.)

    Args:
        confidence_threshold (`float`): In nats, above 0.
        stability_threshold (`float`): In (0, 1].
        takes_clean (`bool`, defaults to `False`):
            The prediction is the stepper's clean tokens, which are more than the logits alone say: an inversion's.
    """

    def __init__(self, confidence_threshold: float, stability_threshold: float, takes_clean: bool = False):
        self.confidence_threshold = confidence_threshold
        self.stability_threshold = stability_threshold
        self.takes_clean = takes_clean
        self.prediction: torch.Tensor | None = None

    def __call__(
        self, logits: torch.Tensor, step: Step, tokens: torch.Tensor, clean: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """
        Both token grids, in which finished images have their prediction, and whether all images are finished.
        Afterwards `evaluations`, `(num_images,)`, has how many evaluations of the model each image took so far.
        """
        likely = clean if self.takes_clean else logits.argmax(1)
        if mask is not None:
            likely = torch.where(mask, likely, tokens)
        if self.prediction is None:
            self.prediction = torch.full_like(likely, -1)
            self.finished: torch.Tensor = torch.zeros(len(likely), dtype=torch.bool, device=likely.device)
            self.evaluations: torch.Tensor = torch.zeros_like(self.finished, dtype=torch.long)
        self.evaluations += ~self.finished * (1 + step.num_sweeps)
        log_probs = logits.float().log_softmax(1)
        weight = torch.ones_like(likely) if mask is None else mask.expand_as(likely)
        mean = lambda values: (values * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)
        entropy = mean(-(log_probs.exp() * log_probs).sum(1))
        stable = mean((likely == self.prediction).float()) >= self.stability_threshold
        self.prediction = torch.where(self.finished[:, None, None], self.prediction, likely)
        self.finished = self.finished | (stable & (entropy < self.confidence_threshold))
        frozen = self.finished[:, None, None]
        tokens, clean = (torch.where(frozen, self.prediction, grid) for grid in (tokens, clean))
        return tokens, clean, bool(self.finished.all())
