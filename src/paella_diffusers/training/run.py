"""What trainers do around their own few lines: accelerate, checkpoints, the data's position, averages, trackers, sheets."""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    PartialState,
)
from accelerate.utils import ProjectConfiguration, send_to_device, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo, upload_folder
from PIL import Image
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from ..about import pip_install
from .data import SampleTransform, add_filters, collate, load_stream, quality_filter


def training_arguments(description: str, **defaults) -> argparse.ArgumentParser:
    """The arguments that all trainers have. `defaults` replace the published U-Net's; the names are the arguments'."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, help="a folder of images with metadata.jsonl, WebDataset shards, or a dataset of the Hub")
    add("--image-column", default="image", help="where the images are")
    add("--text-column", default="text", help="where the captions are, one for an image or a list of them")
    add("--resolution", type=int, default=256, help="pixels a side")
    add("--num-workers", type=int, default=2, help="processes that read data, for each that trains")
    add_filters(add)

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, default=16, help="images a process and pass")
    add("--gradient-accumulation-steps", type=int, default=1, help="passes a step")
    add("--max-steps", type=int, default=1_500_000, help="steps of the optimizer")
    add("--learning-rate", type=float, default=1e-4)
    add("--lr-scheduler", default="constant_with_warmup", help="as in diffusers: cosine, linear, ...")
    add("--warmup-steps", type=int, default=10_000)
    add("--weight-decay", type=float, default=0.01)
    add("--adam-beta2", type=float, default=0.999)
    add("--adam-8bit", action="store_true", help="AdamW of bitsandbytes, with states of 8 bits")
    add("--max-grad-norm", type=float, default=1.0)
    add("--ema-decay", type=float, help="also average the weights, and publish and sample these")
    add("--ema-start", type=int, default=0, help="step at which averaging starts")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="accelerate's, unless given")
    add("--gradient-checkpointing", action="store_true", help="less memory for some more time")
    add("--compile", action="store_true", help="torch.compile the model's repeated blocks")
    add("--seed", type=int, default=0)

    add = parser.add_argument_group("output").add_argument
    add("--output-dir", type=Path, required=True, help="the trained pipeline; within: checkpoints, logs, samples")
    add("--resume", help="`latest`, or a folder in `checkpoints`, to go on with")
    add("--save-every", type=int, default=2000, help="steps")
    add("--keep", type=int, default=2, help="checkpoints to keep")
    add("--sample-every", type=int, default=2000, help="steps")
    add("--log-every", type=int, default=50, help="steps")
    add("--report-to", default="tensorboard", help="trackers of accelerate: tensorboard, wandb, trackio, ..., or none")
    add("--push-to-hub", action="store_true", help="upload the result")
    add("--hub-model-id", help="where to; the output folder's name unless given")
    parser.set_defaults(**defaults)
    return parser


class TrainingRun:
    """
    One run of a trainer, alike on one CPU and on many nodes:

        run = TrainingRun(args)
        run.load_data()
        model = run.prepare(model)
        for batch in run.batches():
            loss = ...
            run.update(model, loss)
            run.log(loss=loss)
        weights = run.finish(model)

    A checkpoint has the models, optimizers, schedules, averages, the random states of every process and the data's
    positions: a run that was killed and resumed ends as one that was not.

    Args:
        args (`argparse.Namespace`): Of `training_arguments`.

    Raises:
        ValueError: If an argument is out of range, or the output folder has checkpoints that `--resume` does not ask for.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.step, self.models, self.loader, self.sums = args, 0, [], None, {}
        counts = "batch_size gradient_accumulation_steps max_steps save_every sample_every log_every keep"
        for name in counts.split():
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
        self.args.ema_decay = args.ema_decay or None
        self.checkpoint = self._find_checkpoint()
        fsdp = FullyShardedDataParallelPlugin() if os.environ.get("ACCELERATE_USE_FSDP") == "true" else None
        self.accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to.split(","),
            project_config=ProjectConfiguration(str(args.output_dir), logging_dir=str(args.output_dir / "logs")),
            fsdp_plugin=fsdp,
            # in most batches some of the conditioning is left out
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
            step_scheduler_with_optimizer=False,  # else warm-up would be as many times shorter as there are processes
        )
        if fsdp is not None and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            # torch shards on CPUs as well, but accelerate does not ask it to
            for state in (PartialState(), self.accelerator.state):
                state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = fsdp
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if args.ema_decay is not None and self.sharded:
            raise ValueError("--ema-decay averages whole models, but FSDP has a shard in each process: leave one out.")
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            settings = {"train_micro_batch_size_per_gpu": args.batch_size, "gradient_clipping": args.max_grad_norm}
            self.accelerator.deepspeed_plugin.deepspeed_config.update(settings)
        if self.checkpoint is not None:
            self._check_settings(self.checkpoint)
        if args.push_to_hub and self.accelerator.is_main_process:  # what would fail at the end fails now
            create_repo(self.hub_id, exist_ok=True)
        set_seed(args.seed)  # new weights are the same in every process
        self.ema = None
        self.kept = {}  # what else, with `state_dict` and `load_state_dict`, belongs into each process's checkpoint
        self.skipped = {"unreadable": 0, "filtered": 0}

    @property
    def part(self) -> tuple[int, int]:
        """This process and the number of processes: for `corrupt` and other draws for the batch of all."""
        return self.accelerator.process_index, self.accelerator.num_processes

    @property
    def hub_id(self) -> str:
        return self.args.hub_model_id or self.args.output_dir.resolve().name

    def generator(self) -> torch.Generator:
        """The random numbers of this pass: of the seed and the number of the pass, and the same in every process."""
        return torch.Generator().manual_seed((self.args.seed << 32) + self.passes)

    # ------------------------------------------------------------------------------------------------------------ set-up

    def prepare(self, model: nn.Module) -> nn.Module:
        """Give a model an optimizer and a schedule, and make it parallel. The first one is that which is averaged."""
        args = self.args
        if args.gradient_checkpointing and hasattr(model, "enable_gradient_checkpointing"):
            model.enable_gradient_checkpointing()
        if args.compile and hasattr(model, "compile_repeated_blocks"):
            model.compile_repeated_blocks()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        options = dict(lr=args.learning_rate, betas=(0.9, args.adam_beta2), weight_decay=args.weight_decay)
        optimizer = self._optimizer_class()(parameters, **options)
        lengths = dict(num_warmup_steps=args.warmup_steps, num_training_steps=args.max_steps)
        schedule = get_scheduler(args.lr_scheduler, optimizer, **lengths)
        if not self.models and args.ema_decay is not None:
            self.ema = EMAModel(parameters, args.ema_decay, update_after_step=args.ema_start, foreach=True)
            self.ema.to(self.accelerator.device)
        model, optimizer, schedule = self.accelerator.prepare(model, optimizer, schedule)
        # losses take logits in half precision: a float32 copy of them would be gigabytes
        self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self.models.append((model, optimizer, schedule, parameters))
        return model

    def _optimizer_class(self):
        if not self.args.adam_8bit:
            return partial(torch.optim.AdamW, fused=True)
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ImportError("--adam-8bit needs bitsandbytes: pip install bitsandbytes") from error
        return AdamW8bit

    def load_data(self):
        """Make the loader for `--data`, of this process's share of the samples."""
        try:
            from torchdata.stateful_dataloader import StatefulDataLoader
        except ImportError as error:
            raise ImportError(f"Training needs torchdata: {pip_install('train')}") from error
        args = self.args
        transform = SampleTransform(args.resolution, quality_filter(args), captions=args.text_column is not None)
        index, count = self.part
        columns = dict(image_column=args.image_column, text_column=args.text_column)
        stream = load_stream(args.data, transform, args.seed, process_index=index, num_processes=count, **columns)
        self.loader = StatefulDataLoader(
            stream,
            args.batch_size,
            num_workers=args.num_workers,
            collate_fn=collate,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # of its own: a resumed run shall not draw from the one that is continued
        )

    # ---------------------------------------------------------------------------------------------------------- the loop

    def batches(self, draw: Callable[[], Image.Image] | None = None) -> Iterator[dict]:
        """
        Batches on this process's device until `--max-steps` are done; after steps it saves, logs, and has `draw` make a
        sheet of samples, which goes to the folder `samples` and to the trackers.
        """
        args, accelerator = self.args, self.accelerator
        if accelerator.is_main_process:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
            (args.output_dir / "training_args.json").write_text(json.dumps(settings, indent=2) + "\n")
        if args.report_to != "none":
            accelerator.init_trackers("paella")
        set_seed(args.seed, device_specific=True)  # dropout is not; and noise has generators of its own
        if self.checkpoint is not None:
            self._check_models(self.checkpoint)
            self._load(self.checkpoint)
        self.passes = self.step * args.gradient_accumulation_steps
        for model, *_ in self.models:
            model.train()
        loader, models = iter(self.loader), [model for model, *_ in self.models]
        progress = tqdm(initial=self.step, total=args.max_steps, disable=not accelerator.is_main_process, mininterval=5)
        self.started, self.waited = time.perf_counter(), 0.0
        while self.step < args.max_steps:
            asked = time.perf_counter()
            batch = next(loader)
            self.waited += time.perf_counter() - asked
            for name in self.skipped:
                self.skipped[name] += batch.pop(name)
            with accelerator.accumulate(*models):
                yield send_to_device(batch, accelerator.device)
            self.passes += 1
            if not accelerator.sync_gradients:
                continue
            self.step += 1
            progress.update()
            last = self.step == args.max_steps
            save = last or self.step % args.save_every == 0
            if save or self.step % args.log_every == 0:
                self._report(progress)  # and fail before a checkpoint of nothing replaces a good one
            if save:
                self._save()
            if draw is not None and (last or self.step % args.sample_every == 0):
                self._draw(draw)
        progress.close()

    def update(self, model: nn.Module, loss: torch.Tensor):
        """Backward; and, when the gradients of a step are complete: clip them, step, and average."""
        optimizer, schedule, parameters = next(rest for own, *rest in self.models if own is model)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            if self.sharded:  # an optimizer that has seen nothing of a parameter could not be loaded again
                for parameter in model.parameters():
                    if parameter.requires_grad and parameter.grad is None and parameter not in optimizer.state:
                        parameter.grad = torch.zeros_like(parameter)
            if self.accelerator.distributed_type != DistributedType.DEEPSPEED:  # which clips by itself
                self.accelerator.unscale_gradients(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
                if model is self.models[0][0]:
                    self.log(**{"gradient norm": norm})
        optimizer.step()
        if self.accelerator.sync_gradients:
            schedule.step()
            if self.ema is not None and model is self.models[0][0]:
                self.ema.step(parameters)
        optimizer.zero_grad()

    def log(self, **values: torch.Tensor | float):
        """Report the mean of these values since the last report, over all processes."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0, 0))
            value = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(float(value))
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            self.sums[name] = (total + value.float().to(self.accelerator.device), count + 1)

    def _report(self, progress):
        elapsed = time.perf_counter() - self.started
        means = self.accelerator.reduce({name: total / count for name, (total, count) in self.sums.items()}, "mean")
        skipped = torch.tensor(list(self.skipped.values()), device=self.accelerator.device)
        skipped = dict(zip(self.skipped, self.accelerator.reduce(skipped, "sum").tolist()))
        values = {name: value.item() for name, value in means.items()}
        watched = ["loss"] if self.accelerator.scaler is not None else ["loss", "gradient norm"]  # a scaler tries out norms
        bad = [f"the {name} is {values[name]}" for name in watched if not math.isfinite(values.get(name, 0))]
        if bad:
            raise FloatingPointError(
                f"At step {self.step} {' and '.join(bad)}: lower --learning-rate, or take --mixed-precision bf16 or no. "
                f"{self.args.output_dir / 'checkpoints'} has the checkpoints from before."
            )
        values |= {"learning rate": self.models[0][2].get_last_lr()[0], "data wait": self.waited / elapsed} | skipped
        progress.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=True)
        self.accelerator.log(values, step=self.step)
        self.sums, self.started, self.waited = {}, time.perf_counter(), 0.0

    def _draw(self, draw):
        if not self.accelerator.is_main_process:
            return
        model = self.models[0][0]
        model.eval()
        with torch.random.fork_rng(), torch.no_grad(), self.averaged(), self.accelerator.autocast():
            sheet = draw()
        model.train()
        folder = self.args.output_dir / "samples"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"{self.step:08d}.png")
        images = np.asarray(sheet.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": images}, step=self.step, **options)

    # --------------------------------------------------------------------------------------------------------- the result

    @contextmanager
    def averaged(self):
        """The first model with its averaged weights, if there are any."""
        if self.ema is None:
            yield
            return
        parameters = self.models[0][3]
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def finish(self, model: nn.Module, only: str = "") -> dict[str, torch.Tensor] | None:
        """
        End the run. The whole model's weights, averaged if they are, whose names have `only` in them, in the main process;
        None in the others.
        """
        with self.averaged():
            weights = self.accelerator.get_state_dict(model)
            if self.accelerator.is_main_process:
                weights = {name: weight.detach().cpu().clone() for name, weight in weights.items() if only in name}
        self.accelerator.end_training()
        return weights if self.accelerator.is_main_process else None

    def publish(self, result):
        """
        Write a pipeline or a model to the output folder, in the main process, and upload it if wanted. A string is the name
        of what the folder has already.
        """
        args = self.args
        if isinstance(result, str):
            if args.push_to_hub:
                hub_id = create_repo(self.hub_id, exist_ok=True).repo_id
                upload_folder(repo_id=hub_id, folder_path=args.output_dir, ignore_patterns=["checkpoints/*", "logs/*"])
        else:
            result.save_pretrained(args.output_dir)
            if args.push_to_hub:
                result.push_to_hub(self.hub_id)
            result = type(result).__name__
        print(f"{result} is in {args.output_dir}.")

    # -------------------------------------------------------------------------------------------------------- checkpoints

    def _find_checkpoint(self) -> Path | None:
        folder = self.args.output_dir / "checkpoints"
        found = sorted(path for path in folder.glob("[0-9]*") if path.suffix != ".tmp")
        resume = self.args.resume
        if resume is None:
            if found:
                raise ValueError(
                    f"{folder} has the checkpoints of another run: go on with `--resume latest`, or take another "
                    "--output-dir."
                )
            return None
        if resume == "latest":
            return found[-1] if found else None  # so that a job may be started again with the same command
        if not (Path(resume) / "run-0.pt").is_file():
            raise FileNotFoundError(f"--resume {resume} is no checkpoint; there are {[str(path) for path in found]}.")
        return Path(resume)

    def _save(self):
        """Whole or not at all: under another name until all is there."""
        folder = self.args.output_dir / "checkpoints" / f"{self.step:08d}"
        partial = folder.with_suffix(".tmp")
        if self.accelerator.is_main_process:
            for path in folder.parent.glob("*.tmp"):  # of a run that was killed
                shutil.rmtree(path)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        with self._without_frozen():
            self.accelerator.save_state(str(partial))
        state = {"step": self.step, "data": self.loader.state_dict(), "skipped": self.skipped}
        state["settings"] = self._settings()
        state["kept"] = {name: part.state_dict() for name, part in self.kept.items()}
        torch.save(state, partial / f"run-{self.accelerator.process_index}.pt")
        if self.ema is not None and self.accelerator.is_main_process:
            torch.save(self.ema.state_dict(), partial / "averages.pt")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if folder.exists():
                os.replace(folder, folder.with_suffix(".old.tmp"))
            os.replace(partial, folder)
            for path in folder.parent.glob("*.tmp"):
                shutil.rmtree(path)
            others = [path for path in sorted(folder.parent.glob("[0-9]*")) if path != folder]
            older = [path for path in others if path < folder]
            # and those after it: the run was resumed from before them
            for path in (set(others) - set(older)) | set(older[: max(0, len(older) + 1 - self.args.keep)]):
                trash = path.with_suffix(".tmp")  # half of it deleted, it shall not be taken for a checkpoint
                os.replace(path, trash)
                shutil.rmtree(trash)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _without_frozen(self):
        """Leave what is not trained out of checkpoints: all but a few megabytes, with a LoRA adapter."""

        def keep_trained(models, weights, folder):  # accelerate's own list, to be changed in place
            for model, own in zip(models, weights):
                for name, parameter in model.named_parameters():
                    if not parameter.requires_grad:
                        own.pop(name, None)

        hook = self.accelerator.register_save_state_pre_hook(keep_trained)
        try:
            yield
        finally:
            hook.remove()

    def _settings(self) -> dict:
        """What must stay the same for a run to go on as it would have."""
        names = ["data", "resolution", "batch_size", "gradient_accumulation_steps", "num_workers", "seed"]
        return {name: getattr(self.args, name) for name in names} | {"processes": self.accelerator.num_processes}

    def _load(self, folder: Path):
        state = torch.load(folder / f"run-{self.accelerator.process_index}.pt", weights_only=True)
        self.step, self.skipped = state["step"], state["skipped"]
        # what is not trained is not there
        options = {} if self.accelerator.distributed_type == DistributedType.DEEPSPEED else {"strict": False}
        self.accelerator.load_state(str(folder), **options)
        self.loader.load_state_dict(state["data"])
        for name, part in self.kept.items():
            part.load_state_dict(state["kept"][name])
        if self.ema is not None:
            self.ema.load_state_dict(torch.load(folder / "averages.pt", weights_only=True))
            self.ema.to(self.accelerator.device)

    def _check_settings(self, folder: Path):
        """Whether the checkpoint is one of such a run."""
        saved, settings = torch.load(folder / "run-0.pt", weights_only=True)["settings"], self._settings()
        for name, value in settings.items():
            if saved[name] != value:
                option = "the number of processes" if name == "processes" else f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{folder} was saved with {option} {saved[name]}, but now it is {value}: take the same to go on, or "
                    "begin anew from the pipeline in the output folder."
                )

    def _check_models(self, folder: Path):
        """Whether the checkpoint is one of such models, of which it has all that is trained."""
        if self.sharded or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return  # which find out by themselves
        for number, (model, *_) in enumerate(self.models):
            model = self.accelerator.unwrap_model(model)  # under DDP its names have a prefix, but not in the checkpoint
            frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
            with safe_open(folder / f"model{f'_{number}' if number else ''}.safetensors", "pt") as file:
                saved = set(file.keys())
            expected = set(model.state_dict()) - frozen
            if saved != expected:
                raise ValueError(f"{folder} is of another model: {sorted(saved ^ expected)[:3]} are in one of them only.")
