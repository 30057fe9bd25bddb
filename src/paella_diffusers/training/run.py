"""What surrounds a training loop: accelerate, data, checkpoints and their resumption, reports, sample sheets, the result."""

import argparse
import ctypes
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    PartialState,
)
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, send_to_device, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from huggingface_hub import create_repo
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from ..about import pip_install
from .arguments import check_arguments
from .checkpoint import (
    choose_checkpoint,
    find_checkpoints,
    load_checkpoint,
    read_state,
    read_weights,
    save_checkpoint,
    settings,
    whole_weights,
    write_pretrained,
)
from .data import RowStream, SampleStream, SampleTransform, ShardStream, collate, load_stream, quality_filter
from .lock import FolderLock

logger = logging.get_logger(__name__)

# on which the number of steps in an epoch depends
EPOCH_LENGTH = {"batch_size", "gradient_accumulation_steps", "processes", "data", "dataset_config_name", "max_train_samples"}
SIGNALS = [signal.SIGTERM] if sys.platform == "win32" else [signal.SIGTERM, signal.SIGUSR1]
STOPPED = 75  # the exit status of a run that saved a checkpoint because of a signal: start it again


@dataclass
class Trained:
    """A model in training, and what belongs to it: `name` is its folder in checkpoints."""

    name: str
    model: nn.Module  # as accelerate made it parallel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    parameters: list[nn.Parameter]  # those that are trained
    average: EMAModel | None
    frozen: bool  # whether what is not trained is written, too
    write: Callable[[dict[str, torch.Tensor], Path], None]  # whole weights, in the form that is published
    read: Callable[[Path], dict[str, torch.Tensor]]

    @property
    def names(self) -> dict[nn.Parameter, str]:
        """The names of the trained parameters, without those of wrappers."""
        inner = self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model
        return {parameter: name for name, parameter in inner.named_parameters() if parameter.requires_grad}


class TrainingRun:
    """
    One run of a trainer, alike on one CPU and on many nodes:

        run = TrainingRun(args)
        run.load_data()
        unet = run.prepare("unet", model)
        for batch in run.batches():
            ...                             # loss, backward, optimizer; see `train_unet`
            run.log(loss=loss)
        weights = run.finish()

    A killed run resumes bit for bit if the settings are the same: it ends with the same weights as one that was not killed.
    `load_checkpoint` says what happens with other settings.

    Args:
        args (`argparse.Namespace`): Of `training_arguments`.

    Raises:
        ValueError: If an argument is out of range or does not fit the launch, or the output folder has checkpoints that
            `--resume` does not ask for.
        RuntimeError: If another run is at work in the output folder.
    """

    def __init__(self, args: argparse.Namespace):
        check_arguments(args)
        self.args = args
        self.step = 0
        self.passes = 0
        self.trained: list[Trained] = []
        self.sums: dict[str, Any] = {}
        # what else, with `state_dict` and `load_state_dict`, belongs into each process's checkpoint
        self.kept: dict[str, Any] = {}
        self.skipped: dict[str, int] = {"unreadable": 0, "filtered": 0}
        self.used = 0
        self.epochs = 0.0
        self.samples: list[dict[str, Any]] = []
        self.stopped_by: str | None = None
        self.stop_asked: torch.Tensor | None = None
        self.waited = 0.0
        self.accelerator: Accelerator = self._make_accelerator()
        self.sharded: bool = self.accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and (args.adam_8bit or args.optimizer != "adamw"):
            what = "--adam-8bit" if args.adam_8bit else f"--optimizer {args.optimizer}"
            raise ValueError(f"{what} cannot be sharded: leave it out with FSDP, or take examples/configs/ddp.yaml.")
        self.lock: FolderLock | None = self.on_main_process(lambda: FolderLock(args.output_dir), share=False)
        self.checkpoint: Path | None = self.on_main_process(lambda: choose_checkpoint(args.resume, self.folder))
        self.resumed: dict[str, Any] | None = None if self.checkpoint is None else read_state(self)
        if args.push_to_hub and self.accelerator.is_main_process:  # what would fail at the end fails now
            create_repo(self.hub_id, exist_ok=True, token=args.hub_token)
        if args.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        set_seed(args.seed)  # new weights are the same in every process

    def _make_accelerator(self) -> Accelerator:
        args = self.args
        if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
            raise ValueError(
                f"accelerate's configuration has the dynamo backend {backend}, which renames the weights in checkpoints: "
                "take it out of that, or ACCELERATE_DYNAMO_BACKEND out of the environment, and give --compile instead."
            )
        fsdp = FullyShardedDataParallelPlugin() if os.environ.get("ACCELERATE_USE_FSDP") == "true" else None
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to.split(","),
            project_config=ProjectConfiguration(str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)),
            fsdp_plugin=fsdp,
            # in most batches some of the conditioning is left out; and gradients need not be there twice
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)],
            step_scheduler_with_optimizer=False,  # else warm-up would be as many times shorter as there are processes
        )
        if torch.distributed.is_initialized() and "gloo" in torch.distributed.get_backend():
            # When a Gloo group is freed, it joins its threads while it holds Python's lock; a thread that is about to free a
            # tensor waits for that lock, and the process hangs at its end. So the group lives as long as the process.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(torch.distributed.group.WORLD))
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError("DeepSpeed is not supported: take examples/configs/fsdp.yaml, which shards the same.")
        if fsdp is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
            # torch shards on CPUs as well, but accelerate does not ask it to
            for state in (PartialState(), accelerator.state):
                state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = fsdp
        return accelerator

    def on_main_process(self, function: Callable, share: bool = True) -> Any:
        """Its result, in all processes with `share`; its error, too, so that none waits for the others."""
        result, error = None, None
        if self.accelerator.is_main_process:
            try:
                result = function()
            except Exception as problem:
                error = problem
        shared = [(result if share else None, error)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(shared)
        shared_result, error = shared[0]
        if error is not None:
            raise error
        return result if result is not None else shared_result

    @property
    def part(self) -> tuple[int, int]:
        """This process and the number of processes: for `corrupt` and other draws for the batch of all."""
        return self.accelerator.process_index, self.accelerator.num_processes

    @property
    def hub_id(self) -> str:
        return self.args.hub_model_id or self.args.output_dir.resolve().name

    @property
    def folder(self) -> Path:
        return self.args.output_dir / "checkpoints"

    def generator(self) -> torch.Generator:
        """The random numbers of this pass: of the seed and the number of the pass, and the same in every process."""
        return torch.Generator().manual_seed((self.args.seed << 32) + self.passes)

    # ------------------------------------------------------------------------------------------------------------ set-up

    def prepare(
        self,
        name: str,
        model: Any,
        write: Callable | None = None,
        read: Callable = read_weights,
        frozen: bool = True,
        shard: bool = True,
    ) -> Trained:
        """
        Give a model an optimizer and a schedule, and make it parallel. The first model also gets averages, if the arguments
        ask for them.

        Args:
            name (`str`): Of its folder in checkpoints.
            model (`nn.Module`): Its parameters that require gradients are trained.
            write, read (`Callable`, *optional*):
                `write(weights, folder)` writes whole weights and `read(folder)` reads them. Unless given, a model of
                diffusers is written as `save_pretrained` does, and any other model as one safetensors file.
            frozen (`bool`, defaults to `True`): Whether `weights` also have the parameters that are not trained.
            shard (`bool`, defaults to `True`): Whether FSDP may shard it; otherwise each process has all of it.
        """
        args = self.args
        if args.gradient_checkpointing and hasattr(model, "enable_gradient_checkpointing"):
            model.enable_gradient_checkpointing()
        if args.compile and hasattr(model, "compile_repeated_blocks"):
            model.compile_repeated_blocks()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = self._optimizer_class()(parameters, **self.optimizer_options())
        if args.max_steps is None:
            raise ValueError("--num-train-epochs needs `load_data` before `prepare`.")
        lengths = dict(num_warmup_steps=args.warmup_steps, num_training_steps=args.max_steps)
        shape = dict(num_cycles=args.lr_num_cycles, power=args.lr_power)
        schedule = get_scheduler(args.lr_scheduler, optimizer, **lengths, **shape)
        writer = partial(write_pretrained, type(model), getattr(model, "config", None))
        if self.sharded and not shard:
            model = nn.parallel.DistributedDataParallel(model.to(self.accelerator.device), find_unused_parameters=True)
            # what accelerate calls in a step's passes before the last
            cast(Any, model).set_requires_gradient_sync = partial(setattr, model, "require_backward_grad_sync")
            optimizer = self.accelerator.prepare_optimizer(optimizer)
            schedule = self.accelerator.prepare_scheduler(schedule)
        else:
            model, optimizer, schedule = self.accelerator.prepare(model, optimizer, schedule)
            # losses take logits in half precision: a float32 copy of them would be gigabytes
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        average = None
        if not self.trained and args.ema_decay is not None:
            foreach = not self.sharded  # of sharded tensors there is no such operation
            average = EMAModel(parameters, args.ema_decay, update_after_step=args.ema_start, foreach=foreach)
        own = Trained(name, model, optimizer, schedule, parameters, average, frozen, write or writer, read)
        self.trained.append(own)
        return own

    def _optimizer_class(self):
        prodigy = self.args.optimizer == "prodigy"
        if not prodigy and not self.args.adam_8bit:
            return partial(torch.optim.AdamW, fused=True)
        if prodigy:
            from prodigyopt import Prodigy

            # as its authors recommend for diffusion models
            return partial(Prodigy, use_bias_correction=True, safeguard_warmup=True)
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  # only on GPUs

        return AdamW8bit

    def optimizer_options(self) -> dict[str, Any]:
        args, rate = self.args, self.args.learning_rate
        if args.scale_lr:
            rate *= args.batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        betas = (args.adam_beta1, args.adam_beta2)
        return dict(lr=rate, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay)

    def load_data(self) -> None:
        """Make the loader for `--data`, of this process's share of the samples."""
        try:
            from torchdata.stateful_dataloader import StatefulDataLoader
        except ImportError as error:
            raise ImportError(f"Training needs torchdata: {pip_install('train')}") from error
        args = self.args
        transform = SampleTransform(
            args.resolution,
            quality_filter(args),
            args.text_column is not None,
            args.center_crop,
            args.random_flip,
            args.image_interpolation_mode,
        )
        index, count = self.part
        columns = dict(image_column=args.image_column, text_column=args.text_column)
        places = dict(process_index=index, num_processes=count, seed=args.seed)
        selection = dict(config_name=args.dataset_config_name, max_samples=args.max_train_samples)
        selection["cache_dir"] = getattr(args, "cache_dir", None)  # of `add_pretrained`
        with self.accelerator.main_process_first():  # which prepares a folder of images for the others
            self.stream: SampleStream = load_stream(args.data, transform, **places, **columns, **selection)
        if args.max_steps is None:
            if not isinstance(self.stream, RowStream):
                raise ValueError(
                    f"--num-train-epochs {args.num_train_epochs}: shards' samples are not counted; give --max-steps."
                )
            args.max_steps = steps_of_epochs(args, count, len(self.stream.rows), self.resumed)
        if isinstance(self.stream, ShardStream) and self.accelerator.is_main_process:
            self._say_how_shards_are_shared(count * max(args.num_workers, 1))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata calls it, and no user can help it
            self.loader = StatefulDataLoader(
                self.stream,
                args.batch_size,
                num_workers=args.num_workers,
                collate_fn=collate,
                pin_memory=self.accelerator.device.type == "cuda",
                generator=torch.Generator(),  # of its own: a resumed run shall not draw from the one that is continued
                worker_init_fn=_leave_process_group,
            )

    def _say_how_shards_are_shared(self, readers: int):
        shards = len(self.stream.shards)
        split, twice = ShardStream.sharing(shards, readers)
        if split > 1:
            logger.warning(
                f"{readers} readers (processes × workers) share {shards} shards: every shard is read {split} times in an "
                f"epoch. Write {readers} shards or more, or lower --num-workers."
            )
        if twice > 0.05:
            logger.warning(
                f"{shards} shards cannot be dealt out evenly to {readers} readers: when as many samples were used as there "
                f"are, {twice:.0%} of them came twice and as many not yet."
            )

    # ---------------------------------------------------------------------------------------------------------- the loop

    def batches(self, draw: Callable[[], Image.Image | None] | None = None) -> Iterator[dict[str, Any]]:
        """
        Batches on this process's device until `--max-steps` are done. Between steps this method reports and saves. It also
        has `draw` make a sheet of samples, which goes to the folder `samples` and to the trackers.

        Raises:
            FloatingPointError: If the loss or the gradient norm is not finite.
            SystemExit: With status 75 after a checkpoint, if this process was sent SIGTERM or SIGUSR1.
        """
        args, accelerator = self.args, self.accelerator
        self._begin()
        if draw is not None and self._lacks_sheet():
            self._draw(draw)
        loader, models = iter(self.loader), [trained.model for trained in self.trained]
        for _ in range(args.skip_batches if self.resumed else 0):
            self._next(loader)
        progress = tqdm(initial=self.step, total=args.max_steps, disable=not accelerator.is_main_process, mininterval=5)
        self.started, self.waited = time.perf_counter(), 0.0
        with self._signals():
            while self.step < args.max_steps:
                batch = self._next(loader)
                with accelerator.accumulate(*models):
                    yield send_to_device(batch, accelerator.device)
                self.passes += 1
                if not accelerator.sync_gradients:
                    continue
                self.step += 1
                progress.update()
                last, stopped = self.step == args.max_steps, self._is_stopped()
                save = last or stopped or self.step % args.save_every == 0
                if save or self.step % args.log_every == 0:
                    self._report(progress)  # and fail before a checkpoint of nothing replaces a good one
                if save:
                    save_checkpoint(self)
                if stopped and not last:
                    self._stop()
                if draw is not None and (last or self.step % args.sample_every == 0):
                    self._draw(draw)
        progress.close()

    def _begin(self):
        args, accelerator = self.args, self.accelerator
        if accelerator.is_main_process:
            (args.output_dir / "training_args.json").write_text(json.dumps(settings(self), indent=2) + "\n")
        if args.report_to != "none":
            accelerator.init_trackers(args.tracker_project_name)
        set_seed(args.seed, device_specific=True)  # dropout is each process's own; noise has generators of its own
        if self.resumed is not None:
            load_checkpoint(self)
        for trained in self.trained:
            trained.model.train()

    def _next(self, loader: Iterator) -> dict:
        asked = time.perf_counter()
        batch = next(loader)
        self.waited += time.perf_counter() - asked
        for name in self.skipped:
            self.skipped[name] += batch.pop(name)
        self.used += len(batch["text"])
        self.epochs = max(self.epochs, batch.pop("epochs"))
        return batch

    @contextmanager
    def _signals(self):
        """Within, SIGTERM and SIGUSR1 are remembered: the step is ended and a checkpoint written before the process ends."""

        def remember(number, frame):
            self.stopped_by = signal.Signals(number).name

        handlers = {number: signal.signal(number, remember) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _is_stopped(self) -> bool:
        """Whether any process has had a signal. With several, what they had a step ago: so that no device waits for it."""
        if self.accelerator.num_processes == 1:
            return self.stopped_by is not None
        earlier = self.stop_asked
        flag = torch.tensor(float(self.stopped_by is not None), device=self.accelerator.device)
        self.stop_asked = self.accelerator.reduce(flag, "sum")
        return earlier is not None and earlier.item() > 0

    def _stop(self):
        if self.accelerator.is_main_process:
            print(f"Stopped by a signal at step {self.step}; its checkpoint is written. Resume with `--resume latest`.")
        self._end()
        self.release()
        raise SystemExit(STOPPED)

    def _end(self):
        self.accelerator.wait_for_everyone()  # what ends while others still communicate can make them hang
        self.accelerator.end_training()

    def release(self) -> None:
        """Let the next run have the output folder, once the result is written; else it has it when this process ends."""
        if self.lock is not None:
            self.lock.release()

    # ----------------------------------------------------------------------------------------------------------- reports

    def log(self, **values: torch.Tensor | float) -> None:
        """Report the mean of these values since the last report, over all processes; underscores become spaces."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0, 0))
            value = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(float(value))
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            self.sums[name] = (total + value.float().to(self.accelerator.device), count + 1)

    def _report(self, progress):
        elapsed = time.perf_counter() - self.started
        means = self.accelerator.reduce({name: total / count for name, (total, count) in self.sums.items()}, "mean")
        values = {name.replace("_", " "): value.item() for name, value in means.items()}
        watched = ["loss"] if self.accelerator.scaler is not None else ["loss", "gradient norm"]  # a scaler tries out norms
        bad = [f"the {name} is {values[name]}" for name in watched if not math.isfinite(values.get(name, 0))]
        if bad:
            saved = find_checkpoints(self.folder)
            passes = (self.step - int(saved[-1].name if saved else 0)) * self.args.gradient_accumulation_steps
            raise FloatingPointError(
                f"At step {self.step} {' and '.join(bad)}. Resume from {saved[-1] if saved else 'the beginning'} with a "
                "lower --learning-rate, with --mixed-precision bf16 or no, or, if some batch is to blame, with "
                f"--skip-batches {passes}."
            )
        totals = self.totals()
        values |= {"learning rate": self.trained[0].schedule.get_last_lr()[0], "data wait": self.waited / elapsed}
        values |= {"unreadable": totals["unreadable"], "filtered": totals["filtered"], "epochs": totals["epochs"]}
        progress.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=True)
        self.accelerator.log(values, step=self.step)
        self.sums, self.started, self.waited = {}, time.perf_counter(), 0.0

    def totals(self) -> dict[str, Any]:
        """What all processes together have used and skipped, and the epochs that the furthest of them is in."""
        own = [{**self.skipped, "used": self.used, "epochs": self.epochs}]
        parts = gather_object(own) if self.accelerator.num_processes > 1 else own
        return {name: (max if name == "epochs" else sum)(part[name] for part in parts) for name in own[0]}

    def _lacks_sheet(self) -> bool:
        """Whether the run was stopped after it had saved and before it drew. The model card needs the last sheet."""
        if self.resumed is None or self.sharded:  # a sharded model cannot be called before its first step
            return False
        sheet = self.args.output_dir / "samples" / f"{self.step:08d}.png"
        last = self.step == self.args.max_steps
        return last or (self.step % self.args.sample_every == 0 and not sheet.exists())

    def _draw(self, draw):
        """Have `draw` make a sheet, with all processes if each has a shard of the model only."""
        if not (self.sharded or self.accelerator.is_main_process):
            return
        model = self.trained[0].model
        model.eval()
        with torch.random.fork_rng(), torch.no_grad(), self.averaged(), self._gathered(), self.accelerator.autocast():
            sheet = draw()
        model.train()
        if sheet is None or not self.accelerator.is_main_process:
            return
        folder = self.args.output_dir / "samples"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"{self.step:08d}.png")
        images = np.asarray(sheet.convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": images}, step=self.step, **options)

    @contextmanager
    def _gathered(self):
        """Within, every process has all of a sharded model, as sampling calls parts of it one by one."""
        model = self.trained[0].model
        shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
        for module in shards:
            module.set_reshard_after_forward(self.accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)
            module.reshard()

    # --------------------------------------------------------------------------------------------------------- the result

    @contextmanager
    def averaged(self):
        """The first model with its averaged weights, if there are any."""
        trained = self.trained[0]
        if trained.average is None:
            yield
            return
        trained.average.store(trained.parameters)
        trained.average.copy_to(trained.parameters)
        try:
            yield
        finally:
            trained.average.restore(trained.parameters)

    def finish(self) -> dict[str, torch.Tensor] | None:
        """
        End the run. The output folder stays locked until `release`, which `publish` calls.

        Returns:
            In the main process the first model's whole weights, or their averages if there are any; None in the others.
        """
        trained, main = self.trained[0], self.accelerator.is_main_process
        with self.averaged():
            weights = whole_weights(self.unwrapped(trained), trained.frozen, keep=main)
        totals = self.totals()
        if main and totals["unreadable"] > 0.01 * (totals["used"] + totals["unreadable"]):
            logger.warning(f"{totals['unreadable']} samples could not be read, beside {totals['used']} that were used.")
        self._end()
        return weights if main else None

    def unwrapped(self, trained: Trained) -> nn.Module:
        return self.accelerator.unwrap_model(trained.model)


def steps_of_epochs(args: argparse.Namespace, processes: int, rows: int, resumed: dict[str, Any] | None = None) -> int:
    """
    `--max-steps` for `--num-train-epochs`. In a resumed run, steps may have other numbers of images from there on.

    Args:
        rows (`int`): Number of samples in an epoch.
        resumed (`dict`, *optional*): What `read_state` returned.
    """
    epochs, done = args.num_train_epochs, 0
    if resumed is not None:
        before = resumed["settings"]
        if before.get("num_train_epochs") == epochs and not EPOCH_LENGTH & resumed["changed"].keys():
            return before["max_steps"]
        epochs, done = max(0, epochs - resumed["totals"]["epochs"]), resumed["step"]
    steps = epochs * rows / (args.batch_size * args.gradient_accumulation_steps * processes)
    return done + math.ceil(round(steps, 6))  # a rounding error is no step


def _leave_process_group(worker: int):
    """A signal to the trainer's whole group must not end its data readers: it needs them until it has saved."""
    if sys.platform == "win32":  # which has no such groups and signals
        return
    os.setsid()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
