"""Stage 1: the VQGAN, on the pictures of all styles."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F

from paella_diffusers import VQModel

from .data import SIZE, STYLES, Icons
from .fit import adamw, autocast, fit, seed
from .text import draw_cells

CODES = 1024
SHARES, FLAT_SHARES = (0.5, 0.3, 0.2), (0.8, 0.14, 0.06)  # of the styles


def latents_of(vqgan: VQModel, images: torch.Tensor) -> torch.Tensor:
    """All latents of the images before quantization, `(n, channels)`."""
    with torch.no_grad():
        latents = torch.cat([vqgan.encode(part).latents for part in images.split(64)])
    return latents.permute(0, 2, 3, 1).flatten(0, 2) * vqgan.config.scale_factor


def farthest_points(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Rows that cover the others evenly, however dense they lie: each is the farthest from those before (Gonzalez, 1985)."""
    chosen, distance = [rows[0]], (rows - rows[0]).square().sum(1)
    while len(chosen) < count:
        chosen.append(rows[distance.argmax()])
        distance = torch.minimum(distance, (rows - chosen[-1]).square().sum(1))
    return torch.stack(chosen)


def k_means(rows: torch.Tensor, centers: torch.Tensor, rounds: int) -> torch.Tensor:
    """Lloyd's algorithm; a center that is nearest to nothing stays where it is."""
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, centers).argmin(1) for part in rows.split(8192)])
        count = torch.bincount(nearest, minlength=len(centers))[:, None]
        mean = torch.zeros_like(centers).index_add_(0, nearest, rows) / count.clamp(min=1)
        centers = torch.where(count > 0, mean, centers)
    return centers


@torch.no_grad()
def psnr(vqgan: VQModel, images: torch.Tensor) -> float:
    """Mean PSNR of the reconstructions, in dB."""
    errors = [
        (vqgan.decode_indices(vqgan.encode(part).indices).sample.clamp(0, 1) - part).square().mean((1, 2, 3))
        for part in images.split(64)
    ]
    return -10 * torch.cat(errors).log10().mean().item()


def train(icons: Icons, cells: torch.BoolTensor, steps: int, work_dir: Path, batch_size: int = 16) -> VQModel:
    """
    The codes come from latents of an encoder that was trained without quantization, and, at 0.4 and 0.7 of the steps, again
    from its latents of then. They cover the latents evenly: k-means alone spends hundreds on flat white, most of every icon,
    and a U-Net cannot tell which of these comes where.

    Then, for 0.6 times as many further steps, most pictures are flat, the style that is asked for most, and the codes are
    fitted to the latents more closely.
    """
    seed("vqgan")
    pixels = icons.pixels[cells]
    vqgan = VQModel(bottleneck_blocks=6, embed_dim=128, num_vq_embeddings=CODES, scale_factor=1.0)
    vqgan.out_block[0].bias.data.fill_(0.85)  # the icons' mean brightness
    free_steps = min(200, steps // 3)  # without quantization, which at first would only disturb
    recode = {free_steps - 1, int(0.4 * steps), int(0.7 * steps)}

    def reconstruction_loss(images: torch.Tensor, quantize: bool = True) -> torch.Tensor:
        with autocast():
            output = vqgan(images, quantize=quantize)
        commit = 0.1 * output.commit_loss.float() if quantize else 0.0
        return F.mse_loss(output.sample.float(), images) + commit

    def loss(step: int, rng: random.Random) -> torch.Tensor:
        images = icons.pixels[draw_cells(cells, batch_size, SHARES)].float() / 255
        return reconstruction_loss(images, quantize=step >= free_steps)

    def flat_loss(step: int, rng: random.Random) -> torch.Tensor:
        return reconstruction_loss(icons.pixels[draw_cells(cells, batch_size, FLAT_SHARES)].float() / 255)

    @torch.no_grad()
    def fit_codes(images: torch.Tensor, rounds: int):
        latents = latents_of(vqgan.eval(), images.float() / 255)
        latents = latents[torch.randperm(len(latents))[:60_000]]
        vqgan.vquantizer.embedding.weight.copy_(k_means(latents, farthest_points(latents, CODES), rounds))
        vqgan.train()

    def place_codes(step: int):
        if step in recode:
            fit_codes(pixels[torch.randperm(len(pixels))[:400]], rounds=3)

    def report() -> str:
        some = torch.arange(0, len(icons.names), max(1, len(icons.names) // 200))
        values = (f"{style} {psnr(vqgan, icons.images(i, some)):.2f} dB" for i, style in enumerate(STYLES))
        return f"reconstructions of {len(some)} objects of {SIZE} pixels: {', '.join(values)}"

    def train_stage(name: str, loss, steps: int, lr: float, after_step=None):
        # the blocks' gains start at zero and have far to go
        optimizer = adamw(vqgan.requires_grad_(True), lr, weight_decay=0.0, fast="gammas")
        fit(name, vqgan, optimizer, loss, steps, work_dir, 50, None, after_step, report)

    train_stage("vqgan", loss, steps, 2e-3, place_codes)
    seed("vqgan, flat")
    fit_codes(icons.pixels[draw_cells(cells, 400, FLAT_SHARES)], rounds=30)
    train_stage("vqgan_flat", flat_loss, round(0.6 * steps), 8e-4)
    return vqgan
