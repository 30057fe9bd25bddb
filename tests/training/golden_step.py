"""One golden training step by accelerate: each process has its part of the batch, in as many passes as are asked for."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import load_file

from paella_diffusers import PaellaUNet
from paella_diffusers.training import paella_loss


def golden_step(folder: Path, passes: int = 1) -> tuple[float, float]:
    """The batch's loss, and the norm of its gradient, which is clipped."""
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=passes,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    io = load_file(folder / "paella_io.safetensors")
    unet = PaellaUNet.from_single_file(folder / "paella.pt", json.loads((folder / "config.json").read_text())["paella"])
    model = accelerator.prepare(unet.eval().requires_grad_(True))
    index, count, losses = accelerator.process_index, accelerator.num_processes * passes, []
    for number in range(passes):
        rows = slice(index + number * accelerator.num_processes, None, count)
        with accelerator.accumulate(model):
            inputs = (io[name][rows] for name in ("train_noised", "t", "byt5", "clip_text", "clip_image"))
            loss = paella_loss(model(*inputs).sample, *(io[name][rows] for name in ("tokens", "train_mask", "t")))
            accelerator.backward(loss)
        losses.append(loss.detach())
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    loss = accelerator.reduce(torch.stack(losses).mean(), "mean")
    assert torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])) < 1.0001
    return loss.item(), norm.item()


# to be launched as a trainer


def parse_args(options: list[str]) -> Path:
    return Path(options[0])


def main(folder: Path):
    result = golden_step(folder)
    if Accelerator(cpu=True).is_main_process:
        print("golden", *result, flush=True)
