"""The result of a run with its model card: what it was trained from, on what and how, and what it draws."""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import create_repo, upload_folder

from ..loaders.model_card import model_card

if TYPE_CHECKING:
    from .run import TrainingRun

SETTINGS = [
    "resolution",
    "batch_size",
    "gradient_accumulation_steps",
    "processes",
    "max_steps",
    "learning_rate",
    "lr_scheduler",
    "warmup_steps",
]
SETTINGS += ["weight_decay", "ema_decay", "mixed_precision", "seed", "rank", "alpha"]


def publish(run: "TrainingRun", result: Any) -> None:
    """
    Write a pipeline or a model to the output folder with a model card, and upload both if `--push-to-hub` asks for it. In
    the main process only, after `run.finish`.
    """
    details = {"base_model": base_model(run.args), "training": training_table(run)}
    result.save_pretrained(run.args.output_dir)
    _write_card(run, result, details)
    if run.args.push_to_hub:
        result.push_to_hub(run.hub_id, token=run.args.hub_token, samples=run.samples, **details)
    run.release()
    print(f"{type(result).__name__} is in {run.args.output_dir}.")


def publish_files(run: "TrainingRun", pipe: Any, files: Sequence[str], **kind: Any) -> None:
    """
    The same for files that the output folder has already: `pipe` is the pipeline that they are for, and `kind` are arguments
    of `model_card`.
    """
    _write_card(run, pipe, {"base_model": base_model(run.args), "training": training_table(run)} | kind)
    if run.args.push_to_hub:
        hub_id = create_repo(run.hub_id, exist_ok=True, token=run.args.hub_token).repo_id
        files = ["README.md", "images/*", *files]
        upload_folder(repo_id=hub_id, folder_path=run.args.output_dir, allow_patterns=files, token=run.args.hub_token)
    run.release()
    print(f"The result is in {run.args.output_dir}.")


def _write_card(run, thing, details: dict):
    folder, samples = run.args.output_dir, []
    for number, sample in enumerate(run.samples):
        path = Path("images", f"sample-{number}.png")
        (folder / path).parent.mkdir(exist_ok=True)
        sample["image"].save(folder / path)
        samples.append({"path": str(path), "prompt": sample["prompt"], "seed": sample["seed"]})
    (folder / "README.md").write_text(model_card(thing, run.hub_id, samples=samples, **details), encoding="utf-8")


def base_model(args: argparse.Namespace) -> str | None:
    """The Hub id that training started from, if it did from one."""
    pretrained = getattr(args, "pretrained", None)
    return None if pretrained is None or Path(pretrained).exists() else pretrained


def training_table(run: "TrainingRun") -> dict[str, str]:
    """Base, data, settings and command, for a model card. Local paths are cut to their names."""
    values = vars(run.args) | {"processes": run.accelerator.num_processes}
    table = {"base": without_folders(values.get("pretrained") or "none"), "data": without_folders(values["data"])}
    table |= {name.replace("_", " "): values[name] for name in SETTINGS if values.get(name) is not None}
    command = [values["script"], *map(without_folders, values["command"])]
    return table | {"command": f"`{shlex.join(command)}`"}


def without_folders(argument: str) -> str:
    """An argument, without the folders of a path on this machine."""
    name, equals, value = argument.rpartition("=")
    local = value.startswith(("/", ".", "~")) or ("/" in value and os.path.exists(value))
    return f"{name}{equals}{Path(value).name}" if local else argument
