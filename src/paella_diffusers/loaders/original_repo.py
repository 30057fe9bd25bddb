"""`dome272/Paella` as its authors published it: three pickled state dicts, and the encoders in repositories of their own."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
)

from .atomic import check_not_interrupted
from .hub_files import HUB_OPTIONS, download, find_file, read_json
from .quiet import ignore_message

CHECKPOINT = "paella_v3.pt"  # what tells the layout

BYT5_REPO = "google/byt5-xl"
CLIP_REPO = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def has_original_layout(path: str | Path, revision: str | None = None, **kwargs: Any) -> bool:
    """
    Whether a folder or Hub repository is in the published layout rather than in diffusers'.

    Raises:
        ValueError: If it is in neither.
    """
    options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs and name != "force_download"}
    if Path(path).is_dir():
        if (Path(path) / "model_index.json").is_file():
            return False
        check_not_interrupted(path)
        found = (Path(path) / CHECKPOINT).is_file()
    else:
        path = str(path)
        try:
            download(path, "model_index.json", revision, options)
            return False
        except LocalEntryNotFoundError:  # offline
            found = isinstance(try_to_load_from_cache(path, CHECKPOINT, options.get("cache_dir"), revision), str)
            if not found:
                raise OSError(
                    f"{path} has neither model_index.json nor {CHECKPOINT} in the cache, and the Hub is out of reach: load "
                    "it once while online, without `local_files_only`, or pass the `cache_dir` that it is in."
                ) from None
        except FileNotFoundError:
            found = file_exists(path, CHECKPOINT, revision=revision, token=options.get("token"))
    if not found:
        raise ValueError(
            f"{path} is in neither layout that can be loaded: it has no `model_index.json`, as `save_pretrained` writes, "
            f"and no `{CHECKPOINT}`, as `dome272/Paella` has."
        )
    return True


def read_original_config(path: str | Path, revision: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The published constructors' arguments in `config.json`, which a repository may have, or none."""
    try:
        file = find_file(path, "config.json", revision, options)
    except FileNotFoundError:
        return {}
    config = read_json(file)
    if not all(isinstance(part, dict) for part in config.values()):
        raise ValueError(f"{file} should have the published constructors' arguments under `paella`, `vqgan` and `prior`.")
    return config


def load_encoder(name: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """
    An encoder, tokenizer or image processor, by its name in the pipeline, from the repository that Paella was trained with.

    Args:
        options (`dict`): For the Hub's client, of `HUB_OPTIONS`.
    """
    if name == "text_encoder":
        return T5EncoderModel.from_pretrained(BYT5_REPO, dtype=dtype, **options)
    if name in ("tokenizer", "tokenizer_2"):
        return AutoTokenizer.from_pretrained(BYT5_REPO if name == "tokenizer" else CLIP_REPO, **options)
    if name == "feature_extractor":
        from transformers import CLIPImageProcessor  # of which transformers speaks when it is imported

        return CLIPImageProcessor.from_pretrained(CLIP_REPO, **options)
    config = CLIPConfig.from_pretrained(CLIP_REPO, **options)
    cls, part = {
        "text_encoder_2": (CLIPTextModelWithProjection, config.text_config),
        "image_encoder": (CLIPVisionModelWithProjection, config.vision_config),
    }[name]
    part.projection_dim = config.projection_dim  # the parts' own is a default that nobody set
    # transformers lists the weights of the other half; what it says of missing ones is heard
    with ignore_message("transformers.modeling_utils", "UNEXPECTED", unless=("MISSING", "MISMATCH", "CONVERSION")):
        return cls.from_pretrained(CLIP_REPO, config=part, dtype=dtype, **options)
