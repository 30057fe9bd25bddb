"""
Stages 3 and 4: CLIP's image encoder, and the prior. The image encoder is trained against the text encoder, which stays as it
is ("locked tuning" the other way round, https://huggingface.co/papers/2111.07991): a picture's embedding is to be the target
of its object and style, as that of a caption is.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from paella_diffusers import PaellaPrior
from paella_diffusers.schedulers.scheduling_ddim_wuerstchen import DDIMWuerstchenScheduler

from .captions import Captions
from .data import SIZE, STYLES, Icons
from .fit import adamw, autocast, fit, seed
from .text import CLIP_DIM, DISTANCE_WEIGHT, TextEncoders, draw_cells, loss_to_targets, similarities


def processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] as CLIP takes them."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images - mean) / std


def embed(encoder: CLIPVisionModelWithProjection, images: torch.Tensor) -> torch.Tensor:
    """CLIP embeddings `(n, 128)`, float32, of images `(n, 3, 64, 64)` in [0, 1]."""
    with autocast():
        return encoder(normalise(images)).image_embeds.float()


def move(images: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Move and resize all images a little, alike; every second time not at all."""
    if rng.random() < 0.5:
        return images
    images, side = F.pad(images, (8, 8, 8, 8), value=1.0), rng.randint(54, 80)
    left, top = rng.randint(0, 80 - side), rng.randint(0, 80 - side)
    images = images[..., top : top + side, left : left + side]
    return F.interpolate(images, SIZE, mode="bilinear", antialias=True)


@torch.no_grad()
def whiten_patches(encoder: CLIPVisionModelWithProjection, images: torch.Tensor):
    """
    Let a new encoder begin with its patches' whitened principal components, places that differ, and a class token of zeros:
    from the usual weights it learns nearly nothing of so few pictures, since each patch is little but its mean colour and
    each picture's class token the same constant.
    """
    parts, config = encoder.vision_model.embeddings, encoder.config
    patches = F.unfold(normalise(images), config.patch_size, stride=config.patch_size).movedim(1, 2).flatten(0, 1)
    patches = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    values, vectors = values[-config.hidden_size :], vectors[:, -config.hidden_size :]
    rotation, _ = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size))
    weight = rotation @ (vectors / (values + 0.01 * values.mean()).sqrt()).T
    parts.patch_embedding.weight.copy_(weight.view_as(parts.patch_embedding.weight))
    parts.position_embedding.weight.normal_(0, 0.5)[0].zero_()
    parts.class_embedding.zero_()


def train_encoder(
    icons: Icons, encoders: TextEncoders, cells: torch.BoolTensor, steps: int, work_dir: Path, batch_size: int = 96
) -> CLIPVisionModelWithProjection:  # fmt: skip
    seed("image")
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE, patch_size=32,
        projection_dim=CLIP_DIM,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(config)
    whiten_patches(encoder, icons.pixels[cells][::3].float() / 255)
    targets = encoders.targets().detach()

    def loss(step: int, rng: random.Random) -> torch.Tensor:
        style, row = map(torch.tensor, draw_cells(cells, batch_size))
        return loss_to_targets(embed(encoder, move(icons.images(style, row), rng)), targets, style, row, DISTANCE_WEIGHT)

    @torch.no_grad()
    def report() -> str:
        found = []
        for style, images in enumerate(image_embeds(icons, encoder)):
            right = (similarities(images, targets)[0].argmax(1) == torch.arange(len(images))).float()
            held_out = right[~cells[style]].mean() if not cells[style].all() else torch.tensor(torch.nan)
            found.append(f"{STYLES[style]} {right[cells[style]].mean():.1%} (held out {held_out:.1%})")
        return f"pictures whose object is the nearest name: {', '.join(found)}"

    fit("image", encoder, adamw(encoder, 2e-3), loss, steps, work_dir, 100, None, None, report)
    return encoder


@torch.no_grad()
def image_embeds(icons: Icons, encoder: CLIPVisionModelWithProjection) -> torch.Tensor:
    """CLIP embeddings of all pictures, `(3, num_objects, 128)`."""
    rows = torch.arange(len(icons.names)).split(256)
    return torch.stack(
        [torch.cat([embed(encoder, icons.images(style, part)) for part in rows]) for style in range(len(STYLES))]
    )


def train_prior(
    captions: Captions, encoders: TextEncoders, embeds: torch.Tensor, cells: torch.BoolTensor, steps: int, work_dir: Path,
    batch_size: int = 128,
) -> PaellaPrior:  # fmt: skip
    """The prior: from the CLIP embedding of a caption to that of a picture. One row in ten is trained without the text."""
    seed("prior")
    prior = PaellaPrior(embedding_dim=CLIP_DIM, hidden_dim=2 * CLIP_DIM, num_layers=2)
    scheduler = DDIMWuerstchenScheduler()

    def loss(step: int, rng: random.Random) -> torch.Tensor:
        styles, rows = draw_cells(cells, batch_size)
        texts = [captions.draw([row], style, rng, name_share=0.5) for style, row in zip(styles, rows)]
        with torch.no_grad(), autocast():
            text = encoders.clip_embeds(texts).float()
        text = text * (torch.rand(batch_size, 1) >= 0.1)
        clean, noise = embeds[styles, rows], torch.randn(batch_size, CLIP_DIM)
        timestep = torch.rand(batch_size).clamp(1e-3, 1 - 1e-3)
        noised = scheduler.add_noise(clean, noise, timestep)
        with autocast():
            return F.mse_loss(prior(noised, timestep, text).sample.float(), noise)

    fit("prior", prior, adamw(prior, 2e-3, weight_decay=0.0), loss, steps, work_dir, 100, average=0.999)
    return prior
