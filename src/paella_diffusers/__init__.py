"""Paella, text to image by renoising discrete tokens (https://huggingface.co/papers/2211.07292), for diffusers."""

import importlib
from pathlib import Path

from . import registration
from .about import __version__ as __version__

# Each name is imported when it is first used: importing the package costs next to nothing.
_MODULES = {
    "PaellaVQModel": "models.vq_model",
    "VQModel": "models.vq_model",
    "PaellaUNet": "models.unet_paella",
    "PaellaPrior": "models.prior_paella",
    "PaellaScheduler": "schedulers.scheduling_paella",
    "PaellaConfidenceScheduler": "schedulers.scheduling_paella_confidence",
    "PaellaFlowMatchEulerScheduler": "schedulers.scheduling_paella_flow_match_euler",
    "PaellaFlowMatchTrapezoidalScheduler": "schedulers.scheduling_paella_flow_match_trapezoidal",
    "PaellaPsiScheduler": "schedulers.scheduling_paella_psi",
    "DDIMWuerstchenScheduler": "schedulers.scheduling_ddim_wuerstchen",
    "GuidanceMixin": "sampling.guidance.base",
    "PaellaClassifierFreeGuidance": "sampling.guidance.classifier_free_guidance",
    "PaellaAdaptiveProjectedGuidance": "sampling.guidance.adaptive_projected_guidance",
    "PaellaClassifierFreeZeroStarGuidance": "sampling.guidance.classifier_free_zero_star_guidance",
    "PaellaRescaledGuidance": "sampling.guidance.rescaled_guidance",
    "PaellaPerturbedAttentionGuidance": "sampling.guidance.perturbed_attention_guidance",
    "PaellaSmoothedEnergyGuidance": "sampling.guidance.smoothed_energy_guidance",
    "PaellaSemanticGuidance": "sampling.guidance.semantic_guidance",
    "SequentialMonteCarlo": "sampling.steering",
    "IterativeRefinement": "sampling.steering",
    "BestOfN": "sampling.steering",
    "ClipReward": "sampling.rewards",
    "LayoutReward": "sampling.rewards",
    "ClassifierReward": "sampling.rewards",
    "RewardSum": "sampling.rewards",
    "PaellaPipeline": "pipelines.pipeline_paella",
    "PaellaImg2ImgPipeline": "pipelines.pipeline_paella_img2img",
    "PaellaInversionPipeline": "pipelines.pipeline_paella_inversion",
    "PaellaInpaintPipeline": "pipelines.pipeline_paella_inpaint",
    "PaellaModularPipeline": "modular.modular_pipeline_paella",
    "PaellaAutoBlocks": "modular.modular_blocks_paella",
}

EMOJI_MODEL = str(Path(__file__).parent / "pretrained" / "emoji")  # the embedded model, in diffusers' layout

__all__ = ["EMOJI_MODEL", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *_MODULES})


registration.install()
