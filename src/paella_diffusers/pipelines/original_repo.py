"""`dome272/Paella` as its authors published it: three pickled state dicts, and the encoders in repositories of their own."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.utils import logging
from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
)

from ..loaders.hub import HUB_OPTIONS, download, find_file
from ..models.prior_paella import PaellaPrior
from ..models.unet_paella import PaellaUNet
from ..models.vq_model import PaellaVQModel
from ..schedulers.scheduling_paella import PaellaScheduler

logger = logging.get_logger(__name__)

BYT5_REPO = "google/byt5-xl"
CLIP_REPO = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def has_original_layout(path: str | Path, revision: str | None = None, **kwargs) -> bool:
    """
    Whether a folder or Hub repository is in the published layout rather than in diffusers'.

    Raises:
        ValueError: If it is in neither.
    """
    options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs and name != "force_download"}
    checkpoint = PaellaUNet._original_checkpoint
    if Path(path).is_dir():
        if (Path(path) / "model_index.json").is_file():
            return False
        found = (Path(path) / checkpoint).is_file()
    else:
        path = str(path)
        try:
            download(path, "model_index.json", revision, options)
            return False
        except LocalEntryNotFoundError:  # offline
            found = isinstance(try_to_load_from_cache(path, checkpoint, options.get("cache_dir"), revision), str)
            if not found:
                raise OSError(
                    f"{path} has neither model_index.json nor {checkpoint} in the cache, and the Hub is out of reach: load "
                    "it once while online, without `local_files_only`, or pass the `cache_dir` that it is in."
                ) from None
        except FileNotFoundError:
            found = file_exists(path, checkpoint, revision=revision, token=options.get("token"))
    if not found:
        raise ValueError(
            f"{path} is in neither layout that can be loaded: it has no `model_index.json`, which `save_pretrained` writes "
            f"last (was it interrupted?), and no `{checkpoint}`, as `dome272/Paella` has."
        )
    return True


def load_original_components(path: str | Path, names: list[str], dtype: torch.dtype | dict, **kwargs) -> dict:
    """A pipeline's components from the published layout: see [`original_components`]."""
    return {name: load() for name, (load, _) in original_components(path, names, dtype, **kwargs).items()}


def original_components(
    path: str | Path,
    names: list[str],
    dtype: torch.dtype | dict,
    revision: str | None = None,
    original_config: dict | None = None,
    **kwargs,
) -> dict[str, tuple[Callable, Callable | None]]:
    """
    For every component a function that loads it, and, for the models of this package, one that converts it to a folder
    without loading it whole. Components in `kwargs` are taken as they are, None included.

    Args:
        path (`str` or `Path`): A folder or Hub repository with `paella_v3.pt`, `vqgan_f4.pt` and `prior_v1.pt`.
        names (`list[str]`): The pipeline's components.
        dtype (`torch.dtype` or `dict`): Of the weights, or by component name, with `"default"`.
        original_config (`dict`, *optional*):
            The published constructors' arguments under `paella`, `vqgan` and `prior`, where they differ from the released
            model's; read from the repository's `config.json` if it has one.
    """
    if kwargs.pop("variant", None) is not None:
        raise ValueError("The published layout has no variants: leave `variant` out, and pass `dtype` for half precision.")
    components = {name: kwargs.pop(name) for name in names if name in kwargs}
    options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    if kwargs:
        logger.warning(f"Keyword arguments {sorted(kwargs)} have no effect in the published layout and are ignored.")
    for encoder, companion in (
        ("text_encoder", "tokenizer"),
        ("text_encoder_2", "tokenizer_2"),
        ("image_encoder", "feature_extractor"),
        ("prior", "prior_scheduler"),
    ):
        if encoder in components and components[encoder] is None:
            components.setdefault(companion, None)
    if original_config is None:
        try:
            original_config = json.loads(Path(find_file(path, "config.json", revision, options)).read_text())
        except FileNotFoundError:
            original_config = {}

    def dtype_of(name):
        return dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype

    def model(cls, name, config_name):
        def arguments(*folder):
            file = find_file(path, cls._original_checkpoint, revision, options)
            return file, *folder, original_config.get(config_name), dtype_of(name)

        return lambda: cls.from_single_file(*arguments()), lambda folder: cls.convert_single_file(*arguments(folder))

    def clip(cls, name):
        config = CLIPConfig.from_pretrained(CLIP_REPO, **options)
        part = config.text_config if cls is CLIPTextModelWithProjection else config.vision_config
        part.projection_dim = config.projection_dim  # the parts' own is a default that nobody set
        return cls.from_pretrained(CLIP_REPO, config=part, dtype=dtype_of(name), **options)

    def image_processor():
        from transformers import CLIPImageProcessor  # warns when it is imported without torchvision

        return CLIPImageProcessor.from_pretrained(CLIP_REPO, **options)

    def scheduler():
        given = components.get("unet")
        num_labels = original_config.get("paella", {}).get("num_labels", 8192)
        return PaellaScheduler(num_vq_embeddings=given.config.num_vq_embeddings if given else num_labels)

    loaders = {
        "unet": model(PaellaUNet, "unet", "paella"),
        "vqgan": model(PaellaVQModel, "vqgan", "vqgan"),
        "scheduler": scheduler,
        "text_encoder": lambda: T5EncoderModel.from_pretrained(BYT5_REPO, dtype=dtype_of("text_encoder"), **options),
        "tokenizer": lambda: AutoTokenizer.from_pretrained(BYT5_REPO, **options),
        "text_encoder_2": lambda: clip(CLIPTextModelWithProjection, "text_encoder_2"),
        "tokenizer_2": lambda: AutoTokenizer.from_pretrained(CLIP_REPO, **options),
        "image_encoder": lambda: clip(CLIPVisionModelWithProjection, "image_encoder"),
        "feature_extractor": image_processor,
        "prior": model(PaellaPrior, "prior", "prior"),
        "prior_scheduler": lambda: DDPMWuerstchenScheduler(),
    }
    loaders = {name: load if isinstance(load, tuple) else (load, None) for name, load in loaders.items()}
    return loaders | {name: (lambda given=given: given, None) for name, given in components.items()}
