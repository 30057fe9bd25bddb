"""From the published layout to diffusers' and back, whole or not at all, without a whole pipeline in memory."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from tqdm import tqdm

from .. import registration
from ..loaders.hub import find_file
from ..loaders.original_checkpoint import to_original
from ..models.prior_paella import PaellaPrior
from ..models.unet_paella import PaellaUNet
from ..models.vq_model import PaellaVQModel
from .low_memory import MappedWeights, check_weights
from .original_repo import has_original_layout, original_components
from .pipeline_paella import PaellaPipeline

MODELS = {"unet": (PaellaUNet, "paella"), "vqgan": (PaellaVQModel, "vqgan"), "prior": (PaellaPrior, "prior")}


def convert_to_diffusers(
    source: str | Path,
    output_dir: str | Path,
    dtype: torch.dtype = torch.float32,
    leave_out: tuple[str, ...] = (),
    **kwargs,
):
    """
    Convert a repository in the published layout, such as `dome272/Paella`, to a folder in diffusers' layout.

    Args:
        source (`str` or `Path`): A Hub id or a folder.
        output_dir (`str` or `Path`): A new folder; it is there once everything is in it.
        dtype (`torch.dtype`, defaults to `torch.float32`): Of the weights.
        leave_out (`tuple[str]`, *optional*): Optional components that shall be None, with their tokenizers and so on.
        kwargs: `revision`, `cache_dir`, `token`, … as for `PaellaPipeline.from_pretrained`.

    Raises:
        ValueError: If the source is not in the published layout, or a name is no optional component.
        FileExistsError: If there is something at `output_dir`.
    """
    names, optional = PaellaPipeline._get_signature_keys(PaellaPipeline)
    unknown = set(leave_out) - set(PaellaPipeline._optional_components)
    if unknown:
        raise ValueError(f"Only optional components can be left out, {sorted(optional)}, not {sorted(unknown)}.")
    with _new_folder(output_dir) as folder:
        if not has_original_layout(source, **kwargs):
            raise ValueError(f"{source} is in diffusers' layout already: it has a `model_index.json`.")
        index = {"_class_name": "PaellaPipeline", "_diffusers_version": diffusers.__version__}
        components = original_components(source, names, dtype, **dict.fromkeys(leave_out), **kwargs)
        for name, (load, convert) in tqdm(components.items(), desc="components"):
            if convert is None:
                component = load()
                if component is not None:
                    component.save_pretrained(folder / name)
                index[name] = _library_name(name, component)
                del component  # before the next one is loaded
            else:
                convert(folder / name)
                index[name] = (registration.LIBRARY, MODELS[name][0].__name__)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def convert_to_original(source: str | Path, output_dir: str | Path, dtype: torch.dtype = torch.float32, **kwargs):
    """
    Convert a pipeline's models in diffusers' layout to published checkpoints, which the published code loads strictly, with
    its constructors' arguments in `config.json`. Arguments and errors as for [`convert_to_diffusers`].
    """
    with _new_folder(output_dir) as folder:
        original_config = {}
        index = PaellaPipeline.load_config(source, **kwargs)
        present = [name for name in MODELS if index.get(name, (None, None)) not in ([None, None], (None, None))]
        for name in tqdm(present, desc="models"):
            cls, config_name = MODELS[name]
            with init_empty_weights():
                model = cls.from_config(cls.load_config(source, subfolder=name, **kwargs))
            original_config[config_name] = model.to_original_config()
            revision, options = kwargs.get("revision"), {k: v for k, v in kwargs.items() if k != "revision"}
            find = lambda filename: find_file(source, f"{name}/{filename}", revision, options)  # noqa: B023
            weights = MappedWeights(find, ("diffusion_pytorch_model",))
            check_weights(model, weights, f"{source}/{name}")
            torch.save(to_original(model, weights, dtype), folder / cls._original_checkpoint)
        (folder / "config.json").write_text(json.dumps(original_config, indent=2) + "\n")


@contextmanager
def _new_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside `path` to write into, which takes its name at the end, or is gone if there is an error."""
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is there already: choose another folder, or remove it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {path.parent} does not exist: make it first.")
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-unfinished-", dir=path.parent))
    try:
        yield unfinished
        os.chmod(unfinished, 0o777 & ~_umask())
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _library_name(name: str, component) -> tuple[str | None, str | None]:
    """What `model_index.json` says of a component."""
    if component is None:
        return (None, None)
    ours = registration.library_names({name: component})
    return ours.get(name, (type(component).__module__.split(".")[0], type(component).__name__))
