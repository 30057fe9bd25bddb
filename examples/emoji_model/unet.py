"""
Stage 5: the U-Net, with the published loss. Each row of a batch has some of the three conditionings, so that each alone
works; one step in seven is on larger canvases with one to three icons.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F

from paella_diffusers import PaellaUNet, VQModel
from paella_diffusers.training import corrupt, paella_loss

from .captions import Captions
from .data import SIZE, STYLES, Icons
from .fit import adamw, autocast, fit, seed
from .text import CLIP_DIM, TextEncoders, draw_cells

TOKENS = SIZE // 4  # a side
TEXT_LENGTH = 16  # ByT5 states that a row is trained with
CLIP_LENGTH = 4  # conditioning tokens of a CLIP embedding
STYLE_SHARES = (0.4, 0.3, 0.3)
CANVAS_SHARE = 0.15  # of the steps
# height, width, icons
CANVASES = [(24, 24, 1), (16, 32, 1), (16, 32, 2), (16, 32, 2), (32, 32, 1), (32, 32, 2), (16, 48, 3)]

# which conditionings a row has, and how often; "transfer": a text without a style, and another object's picture in the style
KINDS = {"none": 0.1, "both": 0.33, "all": 0.2, "byt5": 0.12, "clip": 0.1, "image": 0.1, "transfer": 0.05}
WITH_BYT5, WITH_CLIP = {"both", "all", "byt5", "transfer"}, {"both", "all", "clip", "transfer"}
WITH_IMAGE = {"all", "image", "transfer"}


def make_unet(codes: int) -> PaellaUNet:
    return PaellaUNet(
        sample_size=TOKENS,
        num_vq_embeddings=codes,
        token_embed_dim=128,
        text_embed_dim=128,
        clip_embed_dim=CLIP_DIM,
        clip_seq_len=CLIP_LENGTH,
        cross_attention_dim=256,
        block_out_channels=(256, 352),
        layers_per_block=(1, 2),
        block_types=("CTA", "CTA"),
        num_attention_heads=(4, 4),
        dropout=0.0,
        self_attention=False,  # all attention goes to the prompt, which is so learned sooner
    )


@torch.no_grad()
def encode(vqgan: VQModel, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([vqgan.encode(part).indices for part in images.split(64)])


class Conditioner:
    """Draws captions and image embeddings for rows, and makes of them what the U-Net takes."""

    def __init__(self, captions: Captions, encoders: TextEncoders, embeds: torch.Tensor, cells: torch.BoolTensor):
        self.captions, self.encoders, self.embeds, self.cells = captions, encoders, embeds, cells

    @torch.no_grad()
    def __call__(self, styles: list[int], rows: list[list[int]], rng: random.Random) -> dict[str, torch.Tensor]:
        """
        For pictures of one or several objects each. Names and sentences are as frequent; a row with a picture may leave the
        style to it.
        """
        kinds = rng.choices(list(KINDS), KINDS.values(), k=len(rows))
        kinds = [kind if len(row) == 1 or kind not in WITH_IMAGE else "both" for kind, row in zip(kinds, rows)]
        texts, images = [], torch.zeros(len(rows), CLIP_DIM)
        for i, (style, row, kind) in enumerate(zip(styles, rows, kinds)):
            styled = False if kind == "transfer" or (kind == "all" and rng.random() < 0.5) else None
            texts.append(self.captions.draw(row, style, rng, name_share=0.5, styled=styled))
            if kind in WITH_IMAGE:
                others = self.cells[style].nonzero().flatten()
                index = others[rng.randrange(len(others))] if kind == "transfer" else row[0]
                images[i] = self.embeds[style, index]
        images += 0.2 * torch.rand(len(rows), 1) * torch.randn_like(images)  # those of the prior are not exact, either

        with autocast():
            states, mask = self.encoders.byt5_states([t if k in WITH_BYT5 else "" for t, k in zip(texts, kinds)])
            clip = self.encoders.clip_embeds([t if k in WITH_CLIP else "" for t, k in zip(texts, kinds)])
        # some bytes picked at random are cheaper, and as good, since every byte knows the whole caption
        pick = (torch.rand(mask.shape) - mask).argsort(1)[:, :TEXT_LENGTH]
        states, mask = states.gather(1, pick[..., None].expand(-1, -1, states.shape[2])), mask.gather(1, pick)
        missing = TEXT_LENGTH - pick.shape[1]
        with_clip = torch.tensor([kind in WITH_CLIP or rng.random() < 0.6 for kind in kinds])  # else no "" in its place
        with_image = torch.tensor([kind in WITH_IMAGE for kind in kinds])
        clip_masks = [present[:, None].expand(-1, CLIP_LENGTH) for present in (with_clip, with_image)]
        return {
            "encoder_hidden_states": F.pad(states, (0, 0, 0, missing)).float(),
            "clip_text_embeds": clip.float(),
            "clip_image_embeds": images,
            "encoder_attention_mask": torch.cat([F.pad(mask, (0, missing)).bool(), *clip_masks], dim=1),
        }


def draw_timesteps(count: int) -> torch.Tensor:
    """Noise levels in [0.001, 1], half of them above 0.8, where everything depends on the prompt."""
    high = torch.rand(count) < 0.5
    return torch.where(high, 0.8 + 0.2 * torch.rand(count), 0.001 + 0.799 * torch.rand(count))


def paste(images: torch.Tensor, height: int, width: int, offset: tuple[int, int] | None = None) -> torch.Tensor:
    """
    Icons `(n, k, 3, 64, 64)`, k of them side by side in the middle of a white canvas of `height` × `width` tokens, or with
    their upper left corner at `offset`, in tokens: `(n, 3, 4 height, 4 width)`.
    """
    count = images.shape[1]
    top, left = offset or ((height - TOKENS) // 2, (width - count * TOKENS) // 2)
    canvas = images.new_ones(len(images), 3, 4 * height, 4 * width)
    strip = images.permute(0, 2, 3, 1, 4).flatten(3)
    canvas[..., 4 * top : 4 * top + SIZE, 4 * left : 4 * left + strip.shape[-1]] = strip
    return canvas


def draw_canvas(
    icons: Icons, vqgan: VQModel, cells: torch.BoolTensor, short: torch.BoolTensor, batch_size: int, rng: random.Random
):
    """
    A batch on a larger canvas, with as many tokens in all as one of `batch_size` icons; objects of which several are on a
    canvas have `short` names.

    Returns:
        Styles, lists of objects, tokens `(n, height, width)`, and `(height, width)` booleans: what is known, as in
        outpainting, and so is never noise. One icon on a canvas may lie anywhere if it is known.
    """
    height, width, count = rng.choice(CANVASES)
    size = max(1, batch_size * TOKENS**2 // (height * width))
    cells = cells if count == 1 else cells & short
    styles, first = draw_cells(cells, size, STYLE_SHARES)
    rows = [[row, *rng.choices(cells[style].nonzero().flatten().tolist(), k=count - 1)] for style, row in zip(styles, first)]
    images = torch.stack([icons.images(style, torch.tensor(row)) for style, row in zip(styles, rows)])
    known, offset = torch.zeros(height, width, dtype=torch.bool), None
    if rng.random() < 0.3:
        if count == 1:
            offset = tuple(4 * rng.randint(0, (side - TOKENS) // 4) for side in (height, width))
            known[offset[0] : offset[0] + TOKENS, offset[1] : offset[1] + TOKENS] = True
        else:
            known[:, : 4 * rng.randint(1, width // 4 - 1)] = True
            known = known.flip(1) if rng.random() < 0.5 else known
    return styles, rows, encode(vqgan, paste(images, height, width, offset)), known


def train(
    icons: Icons, vqgan: VQModel, conditioner: Conditioner, cells: torch.BoolTensor, steps: int, work_dir: Path,
    batch_size: int = 64, compiled: bool = False,
) -> PaellaUNet:  # fmt: skip
    seed("unet")
    unet = make_unet(vqgan.config.num_vq_embeddings)
    # a CLIP text embedding and that of its picture are alike but for the scale: so both begin with the same projection
    scale = conditioner.encoders.clip_embeds(conditioner.captions.names[:256]).std()
    unet.clip_image_proj.load_state_dict(unet.clip_text_proj.state_dict())
    unet.clip_image_proj.weight.data *= scale
    tokens = torch.stack([encode(vqgan, icons.images(style)) for style in range(len(STYLES))])
    forward = torch.compile(unet) if compiled else unet

    def loss(step: int, rng: random.Random) -> torch.Tensor:
        known = None
        if rng.random() < CANVAS_SHARE:
            styles, rows, clean, known = draw_canvas(icons, vqgan, cells, conditioner.captions.short, batch_size, rng)
        else:
            styles, rows = draw_cells(cells, batch_size, STYLE_SHARES)
            clean, rows = tokens[styles, rows], [[row] for row in rows]
        timestep = draw_timesteps(len(clean))
        noised, mask = corrupt(clean, timestep, unet.config.num_vq_embeddings)
        if known is not None:
            noised, mask = torch.where(known, clean, noised), mask * ~known
        conditioning = conditioner(styles, rows, rng)
        with autocast():
            logits = forward(noised, timestep, **conditioning).sample
        return paella_loss(logits, clean, mask, timestep, label_smoothing=0.0)

    fit("unet", unet, adamw(unet, 1e-3), loss, steps, work_dir, 200, average=0.999)
    return unet
