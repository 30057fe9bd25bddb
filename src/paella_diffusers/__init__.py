"""Paella, text to image by renoising discrete tokens (https://huggingface.co/papers/2211.07292), for diffusers."""

import gc
import importlib
from contextlib import contextmanager
from pathlib import Path

from . import registration

__version__ = "0.1.0"

# Each name is imported when it is first used: importing the package costs next to nothing.
_MODULES = {
    "PaellaVQModel": "models.vq_model",
    "VQModel": "models.vq_model",
    "PaellaUNet": "models.unet_paella",
    "PaellaPrior": "models.prior_paella",
    "PaellaScheduler": "schedulers.scheduling_paella",
    "PaellaConfidenceScheduler": "schedulers.scheduling_paella_confidence",
    "PaellaFlowMatchEulerScheduler": "schedulers.scheduling_paella_flow_match_euler",
    "DDIMWuerstchenScheduler": "schedulers.scheduling_ddim_wuerstchen",
    "PaellaPipeline": "pipelines.pipeline_paella",
    "PaellaImg2ImgPipeline": "pipelines.pipeline_paella_img2img",
    "PaellaInversionPipeline": "pipelines.pipeline_paella_inversion",
    "PaellaInpaintPipeline": "pipelines.pipeline_paella_inpaint",
}

EMOJI_MODEL = str(Path(__file__).parent / "pretrained" / "emoji")  # the embedded model, in diffusers' layout

__all__ = ["EMOJI_MODEL", *_MODULES]


@contextmanager
def _no_collection():
    """What torch, transformers and diffusers make when imported stays; a quarter of the time, it is searched for garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():  # what others froze stays so
                gc.freeze()
                gc.unfreeze()  # both together: it counts as old now, as it would if it had been searched
            gc.enable()


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _no_collection():
        globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *_MODULES})


registration.install()
