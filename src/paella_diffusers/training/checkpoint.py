"""
Checkpoints of a run: the trained models as `save_pretrained` writes them, and what the next step depends on besides.

    checkpoints/00002000/
        unet/  unet_ema/            the model and its averages, for `from_pretrained`; adapters, for `load_lora_weights`
        optimizer-unet.pt           optimizer states by the parameters' names
        process-0.pt  ...           each process's random states and position in the data
        state.pt                    step, settings, counters
        files.json                  every file's size and CRC-32, written last

Tensors are whole, not sharded, so that a checkpoint can be resumed with any number of processes, sharded or not.
"""

import json
import os
import random
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate.utils import set_seed
from diffusers.utils import logging
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..loaders.atomic import publish, unfinished_path

if TYPE_CHECKING:
    from .run import TrainingRun

logger = logging.get_logger(__name__)

FILES = "files.json"
# arguments that change nothing that is trained
FREE = ["output_dir", "resume", "skip_batches", "save_every", "keep", "sample_every", "log_every", "report_to", "prompts"]
FREE += ["tracker_project_name", "logging_dir", "push_to_hub", "hub_model_id", "hub_token", "guidance_scale", "cache_dir"]
FREE += ["script", "command", "local_rank", "foreach_ema", "set_grads_to_none", "default_steps", "num_train_epochs"]
FIXED = [
    "adam_8bit",
    "optimizer",
    "rank",
    "targets",
    "train_text_encoder",
    "decoder_only",
    "placeholder_token",
    "initializer_token",
    "num_vectors",
    "initializer_scale",
]  # checkpoints of others do not fit
POSITION = [
    "data",
    "dataset_config_name",
    "batch_size",
    "num_workers",
    "seed",
    "max_train_samples",
    "processes",
    "aspect_ratio_buckets",
]  # others cannot resume mid-epoch


class DamagedCheckpoint(Exception):
    """A checkpoint's files are not those that were written."""


# ------------------------------------------------------------------------------------------------------------------ tensors


def whole(tensor: Any, keep: bool = True) -> Any:
    """
    A tensor's copy on the CPU, gathered from all processes if it is sharded. Without `keep`, None: the process then only
    takes part in gathering it.
    """
    if not isinstance(tensor, torch.Tensor):
        return tensor
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if not keep:
        return None
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.cpu().contiguous()


def sharded_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor as this process's part of it, on the parameter's device, if the parameter is sharded so."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor


def whole_weights(model: nn.Module, frozen: bool = True, keep: bool = True) -> dict[str, Any]:
    """
    A model's weights and buffers, whole; without `frozen`, only the trained ones. All processes must take part, those that
    have no use for them without `keep`.
    """
    skipped = set() if frozen else {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: whole(value, keep) for name, value in model.state_dict().items() if name not in skipped}


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], where: Path) -> None:
    """
    Put whole weights into a model, sharded or not.

    Raises:
        ValueError: If names or shapes are another model's.
    """
    own = model.state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = (trained - weights.keys()) | (weights.keys() - own.keys())
    wrong |= {name for name in weights.keys() & own.keys() if weights[name].shape != own[name].shape}
    if wrong:
        raise ValueError(
            f"{where} is of another model: {sorted(wrong)[:3]} are in one of them only, or have other shapes. Give the "
            "sizes that the run began with, or another --output-dir."
        )
    for name, value in weights.items():
        own[name].copy_(sharded_like(value, own[name]))


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], keep: bool = True) -> dict[str, Any]:
    """An optimizer's states by the parameters' names, whole. All processes must take part, as in [`whole_weights`]."""
    return {
        name: {key: whole(value, keep) for key, value in optimizer.state[parameter].items()}
        for parameter, name in names.items()
        if parameter in optimizer.state
    }


def estimates(optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer has found out about all parameters together, such as Prodigy's distance; not its options."""
    fixed = {"params", "initial_lr", *options}
    group, defaults = optimizer.param_groups[0], optimizer.defaults
    return {name: value for name, value in group.items() if name not in fixed and defaults.get(name) != value}


def load_optimizer_state(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], state: dict[str, Any]) -> None:
    """Put what [`optimizer_state`] gave into an optimizer of such parameters, sharded or not."""
    for parameter, name in names.items():
        if name in state:
            optimizer.state[parameter] = {
                key: sharded_like(value.clone(), parameter) if isinstance(value, torch.Tensor) else value
                for key, value in state[name].items()
            }


# ------------------------------------------------------------------------------------------------------------------- random


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of this process's global generators, also of that on its device, as plain numbers and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        device.type: None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device),
    }


def load_random_states(states: dict[str, Any], device: torch.device) -> None:
    kind, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if isinstance(own := states.get(device.type), torch.Tensor):  # saved on a device of this kind
        torch.get_device_module(device).set_rng_state(own, device)


# -------------------------------------------------------------------------------------------------------------------- files


def write_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or of the safetensors files in a folder."""
    files = [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def complete(unfinished: Path, folder: Path) -> None:
    """Sync a finished checkpoint to the disk, then give it its name. A power cut leaves a whole one there or none."""
    paths = sorted(path for path in unfinished.rglob("*") if path.is_file())
    listing = {str(path.relative_to(unfinished)): [path.stat().st_size, _checksum(path)] for path in paths}
    (unfinished / FILES).write_text(json.dumps(listing, indent=1) + "\n")
    if folder.exists():
        discard(folder)
    publish(unfinished, folder)


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            checksum = zlib.crc32(part, checksum)
    return checksum


def discard(folder: Path) -> None:
    """Delete a checkpoint. Half deleted, it must not be taken for one, so it loses its name first."""
    trash = unfinished_path(folder)
    os.replace(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)  # NFS keeps files that are open; the next checkpoint deletes the rest


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if path.name.isdigit())


def verify(folder: Path) -> None:
    """
    Compare a checkpoint's files with their sizes and checksums.

    Raises:
        DamagedCheckpoint: Names the file.
    """
    try:
        listing = json.loads((folder / FILES).read_text())
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{folder} has no readable {FILES} ({error})") from error
    for name, (size, checksum) in listing.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise DamagedCheckpoint(f"{path} has {found or 'no'} bytes, but was written with {size}")
        if _checksum(path) != checksum:
            raise DamagedCheckpoint(f"{path} is not what was written: its checksum differs")


def choose_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """
    The checkpoint that `--resume` asks for, by its path or its name; with `latest`, the newest that is undamaged; None to
    begin anew.

    Raises:
        ValueError: If there are checkpoints but `resume` is None, or all of them are damaged.
        FileNotFoundError: If `resume` names no checkpoint.
    """
    found = find_checkpoints(folder)
    if resume is None:
        if found:
            raise ValueError(
                f"{folder} has another run's checkpoints: resume it with `--resume latest`, or take another --output-dir."
            )
        return None
    if resume != "latest":
        named = [path for path in (Path(resume), folder / resume) if (path / FILES).is_file()]
        if not named:
            raise FileNotFoundError(f"--resume {resume} is no checkpoint; there are {[str(path) for path in found]}.")
        found = named[:1]
    problems = []
    for path in reversed(found):
        try:
            verify(path)
        except DamagedCheckpoint as problem:
            problems.append(str(problem))
            logger.warning(f"Damaged checkpoint: {problem}.")
            continue
        if problems:
            logger.warning(f"Resuming from the one before, {path}.")
        return path
    if problems:
        raise ValueError(
            f"No checkpoint of {folder} is whole: {'; '.join(problems)}. Restore one from a copy, or take another "
            "--output-dir."
        )
    return None  # so that a job can be started again with the same command


# ------------------------------------------------------------------------------------------------------ saving and loading


def settings(run: "TrainingRun") -> dict[str, Any]:
    """A run's arguments as plain values, and its number of processes."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(run.args).items()}
    plain.pop("hub_token", None)
    return plain | {"processes": run.accelerator.num_processes}


def save_checkpoint(run: "TrainingRun") -> None:
    """
    Save a run, whole or not at all. All processes must call it.

    Raises:
        RuntimeError: If another run has taken over the output folder.
    """
    if not run.on_main_process(lambda: run.lock.is_own()):
        raise RuntimeError(f"Another run has taken over {run.args.output_dir}, as this one stood still: it ends here.")
    folder, main = run.folder / f"{run.step:08d}", run.accelerator.is_main_process
    unfinished = run.on_main_process(lambda: _new_folder(folder))
    totals = run.totals()
    for trained in run.trained:
        _save_trained(run, trained, unfinished)
    own = {"random": random_states(run.accelerator.device), "data": run.loader.state_dict()}
    own |= {"used": run.used, "skipped": run.skipped, "epochs": run.epochs}
    own["kept"] = {name: part.state_dict() for name, part in run.kept.items()}
    torch.save(own, unfinished / f"process-{run.accelerator.process_index}.pt")
    if main:
        state = {"step": run.step, "passes": run.passes, "settings": settings(run), "totals": totals}
        state["schedules"] = {trained.name: trained.schedule.scheduler.last_epoch for trained in run.trained}
        state["estimates"] = {
            trained.name: estimates(trained.optimizer.optimizer, run.optimizer_options()) for trained in run.trained
        }
        state["averaged"] = run.trained[0].average.optimization_step if run.trained[0].average else None
        state["scaler"] = run.accelerator.scaler.state_dict() if run.accelerator.scaler else None
        torch.save(state, unfinished / "state.pt")
    run.accelerator.wait_for_everyone()
    if main:
        complete(unfinished, folder)
        _delete_others(folder, run.args.keep)
    run.accelerator.wait_for_everyone()


def _new_folder(folder: Path) -> Path:
    # what a run that was killed left behind, on whatever host: the lock says that it is over
    for path in folder.parent.glob(".*-unfinished-*"):
        shutil.rmtree(path, ignore_errors=True)
    unfinished = unfinished_path(folder)
    unfinished.mkdir(parents=True)
    return unfinished


def _save_trained(run, trained, folder: Path):
    model, main = run.unwrapped(trained), run.accelerator.is_main_process
    weights = whole_weights(model, trained.frozen, keep=main)
    if main:
        trained.write(weights, folder / trained.name)
    if trained.average is not None:
        with run.averaged():
            weights = whole_weights(model, trained.frozen, keep=main)
        if main:
            trained.write(weights, folder / f"{trained.name}_ema")
    state = optimizer_state(trained.optimizer.optimizer, trained.names, keep=main)
    if main:
        torch.save(state, folder / f"optimizer-{trained.name}.pt")


def _delete_others(folder: Path, keep: int):
    others = [path for path in find_checkpoints(folder.parent) if path != folder]
    older = [path for path in others if path < folder]
    # and those after it: the run was resumed from before them
    for path in (set(others) - set(older)) | set(older[: max(0, len(older) + 1 - keep)]):
        discard(path)


def read_state(run: "TrainingRun") -> dict[str, Any]:
    """
    The state of the checkpoint that a run resumes from; `changed` has the settings that differ now, with their old values.

    Raises:
        ValueError: If a setting changed with which the checkpoint does not fit.
    """
    state = torch.load(run.checkpoint / "state.pt", weights_only=True)
    saved, now = state["settings"], settings(run)
    for name in FIXED:
        if name in now and name in saved and saved[name] != now[name]:
            raise ValueError(
                f"{run.checkpoint} was saved with --{name.replace('_', '-')} {saved.get(name)}, but now it is {now[name]}: "
                "its states do not fit. Give the same, or another --output-dir."
            )
    state["changed"] = {name: saved.get(name) for name in now if name not in FREE and saved.get(name) != now[name]}
    return state


def load_checkpoint(run: "TrainingRun") -> None:
    """
    Go on from `run.checkpoint`. Settings that changed since are honoured, and named in the log. If they change which samples
    come when, such as the batch size or the number of processes, the data go on after the same share of the epoch.
    """
    folder, state = cast(Path, run.checkpoint), cast(dict[str, Any], run.resumed)
    index, now = run.accelerator.process_index, settings(run)
    # some follow from the data or the model, and were not known when the checkpoint was read
    changed = {name: before for name, before in state["changed"].items() if now[name] != before}
    exact = not changed.keys() & set(POSITION)
    if changed and run.accelerator.is_main_process:
        texts = [f"--{name.replace('_', '-')} {now[name]} (was {before})" for name, before in changed.items()]
        order = "" if exact else " The data go on after the same number of epochs, in another order: not bit for bit."
        logger.warning(f"Resuming from {folder} with {', '.join(texts)}.{order}")
    run.step, run.passes = state["step"], state["passes"]
    for trained in run.trained:
        _load_trained(run, trained, folder)
    if run.accelerator.scaler is not None and state["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    own = torch.load(folder / f"process-{0 if 'processes' in changed else index}.pt", weights_only=True)
    for name, part in run.kept.items():
        if name in own["kept"]:
            part.load_state_dict(own["kept"][name])
    if exact:
        run.used, run.skipped, run.epochs = own["used"], own["skipped"], own["epochs"]
        run.loader.load_state_dict(own["data"])
        load_random_states(own["random"], run.accelerator.device)
        return
    set_seed(run.args.seed + run.step, device_specific=True)
    totals = state["totals"]
    run.epochs = totals["epochs"]
    if run.accelerator.is_main_process:
        run.used, run.skipped = totals["used"], {name: totals[name] for name in run.skipped}
    run.stream.start(totals["epochs"])


def _load_trained(run, trained, folder: Path):
    model, average, source = run.unwrapped(trained), trained.average, folder / trained.name
    if average is not None:
        averages = folder / f"{trained.name}_ema"
        averages = averages if averages.exists() else source  # or begin to average now
        load_weights(model, trained.read(averages), averages)
        average.shadow_params = [parameter.detach().clone() for parameter in trained.parameters]
        average.optimization_step = run.resumed["averaged"] or 0
    load_weights(model, trained.read(source), source)
    optimizer = trained.optimizer.optimizer
    state = torch.load(folder / f"optimizer-{trained.name}.pt", weights_only=True, map_location="cpu", mmap=True)
    load_optimizer_state(optimizer, trained.names, state)
    # the options and the schedule are those of this run's arguments, as they would be at this step
    schedule, options = trained.schedule.scheduler, run.optimizer_options()
    schedule.last_epoch = run.resumed["schedules"][trained.name]
    schedule.base_lrs = [options["lr"]] * len(optimizer.param_groups)
    found = run.resumed.get("estimates", {}).get(trained.name, {})
    for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas):
        group.update(found | options | {"lr": options["lr"] * factor(schedule.last_epoch), "initial_lr": options["lr"]})
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def write_pretrained(
    model_class: type, config: dict[str, Any] | None, weights: dict[str, torch.Tensor], folder: Path
) -> None:
    """Write whole weights as the model's `save_pretrained` does, or as a safetensors file if it is not one of diffusers'."""
    if config is None:
        write_weights(weights, folder / "model.safetensors")
        return
    with torch.device("meta"):
        model = model_class.from_config(config)
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(folder)
