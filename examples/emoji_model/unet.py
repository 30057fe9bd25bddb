"""
Stage 5: the U-Net, with the published loss. For two thirds of the steps, pictures of one object have their names alone: what
they look like is so learned sooner. Then each row of a batch has some of the three conditionings, so that each alone works.
One step in seven is on larger canvases with one to three icons.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from torch import nn

from paella_diffusers import PaellaUNet, VQModel
from paella_diffusers.training import corrupt, paella_loss

from .captions import Captions
from .data import SIZE, STYLES, Icons
from .fit import adamw, autocast, fit, seed
from .text import CLIP_DIM, TextEncoders, draw_cells

TOKENS = SIZE // 4  # a side
TEXT_LENGTH = 6  # ByT5 states that a row is trained with
CLIP_LENGTH = 1  # conditioning token of a CLIP embedding
STYLE_SHARES = (0.4, 0.3, 0.3)
CANVAS_SHARE = 0.15  # of the steps
# height, width, icons
CANVASES = [(24, 24, 1), (16, 32, 1), (16, 32, 2), (16, 32, 2), (32, 32, 1), (32, 32, 2), (16, 48, 3)]

# which conditionings a row has, and how often; "transfer": a text without a style, and another object's picture in the style
KINDS = {"none": 0.1, "both": 0.33, "all": 0.2, "byt5": 0.12, "clip": 0.1, "image": 0.1, "transfer": 0.05}
WITH_BYT5, WITH_CLIP = {"both", "all", "byt5", "transfer"}, {"both", "all", "clip", "transfer"}
WITH_IMAGE = {"all", "image", "transfer"}


def make_unet(codes: int) -> PaellaUNet:
    unet = PaellaUNet(
        sample_size=TOKENS,
        num_vq_embeddings=codes,
        token_embed_dim=128,
        patch_size=4,  # so every position is near an edge, and knows by it where it is when all tokens are noise
        text_embed_dim=CLIP_DIM,
        clip_embed_dim=CLIP_DIM,
        clip_seq_len=CLIP_LENGTH,
        cross_attention_dim=192,
        block_out_channels=(320, 416),
        layers_per_block=(1, 1),
        block_types=("CTA", "CTA"),
        num_attention_heads=(4, 4),
        dropout=0.0,
        self_attention=False,  # all attention goes to the prompt, which is so learned sooner
    )
    # the published start, for a million steps, has tiny logits: enlarging them takes several hundred steps
    unet.head.weight.data *= 8
    # and at first, beside a constant, noise tokens count little
    nn.init.normal_(unet.proj_in.bias, std=0.05)
    return unet


@torch.no_grad()
def encode(vqgan: VQModel, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([vqgan.encode(part).indices for part in images.split(64)])


class Conditioner:
    """
    Draws captions and image embeddings for rows, and makes of them what the U-Net takes. Captions of one object are drawn
    and encoded once, `count` of each object in each style and without one: else they would take a quarter of each step.
    The first of them is its plain name.
    """

    def __init__(
        self, captions: Captions, encoders: TextEncoders, embeds: torch.Tensor, cells: torch.BoolTensor, count: int = 12
    ):
        self.captions, self.encoders, self.embeds, self.cells, self.count = captions, encoders, embeds, cells, count
        seed("captions")
        rng, objects = random.Random("captions"), range(len(captions.names))
        styles = [(style, None) for style in range(len(STYLES))] + [(0, False)]
        texts = [text for style in styles for row in objects for text in self.captions_of(row, *style, rng)]
        parts = zip(*(self.encode(texts[i : i + 256]) for i in range(0, len(texts), 256)))
        self.encoded = [torch.cat(part).unflatten(0, (len(styles), len(objects), count)) for part in parts]
        self.empty = self.encode([""])

    def captions_of(self, row: int, style: int, styled: bool | None, rng: random.Random) -> list[str]:
        first = self.captions.named(self.captions.names[row], style)
        return [first, *(self.draw([row], style, styled, rng) for _ in range(self.count - 1))]

    def draw(self, row: list[int], style: int, styled: bool | None, rng: random.Random) -> str:
        """Names and sentences are as frequent."""
        return self.captions.draw(row, style, rng, name_share=0.5, styled=styled)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> list[torch.Tensor]:
        """`TEXT_LENGTH` ByT5 states of each text, float16; their mask; CLIP text embeddings."""
        with autocast():
            states, mask = self.encoders.byt5_states(texts)
            clip = self.encoders.clip_embeds(texts)
        # some bytes picked at random are cheaper, and as good, since every byte knows the whole caption
        pick = (torch.rand(mask.shape) - mask).argsort(1)[:, :TEXT_LENGTH]
        states, mask = states.gather(1, pick[..., None].expand(-1, -1, states.shape[2])), mask.gather(1, pick)
        missing = TEXT_LENGTH - pick.shape[1]
        return [F.pad(states, (0, 0, 0, missing)).half(), F.pad(mask, (0, missing)).bool(), clip.float()]

    def __call__(
        self, styles: list[int], rows: list[list[int]], rng: random.Random, plain: bool = False
    ) -> dict[str, torch.Tensor]:
        """
        For pictures of one object each, or of several each. A row with a picture may leave the style to it. With `plain`,
        all rows of one object have its name alone.
        """
        single = len(rows[0]) == 1
        plain = plain and single
        kinds = ["both"] * len(rows) if plain else rng.choices(list(KINDS), KINDS.values(), k=len(rows))
        kinds = kinds if single else ["both" if kind in WITH_IMAGE else kind for kind in kinds]
        images, first = torch.zeros(len(rows), CLIP_DIM), [row[0] for row in rows]
        for i, (style, kind) in enumerate(zip(styles, kinds)):
            if kind in WITH_IMAGE:
                others = self.cells[style].nonzero().flatten()
                index = others[rng.randrange(len(others))] if kind == "transfer" else first[i]
                images[i] = self.embeds[style, index]
        images += 0.2 * torch.rand(len(rows), 1) * torch.randn_like(images)  # those of the prior are not exact, either
        if single:
            unstyled = [kind == "transfer" or (kind == "all" and rng.random() < 0.5) for kind in kinds]
            sets = [len(STYLES) if without else style for style, without in zip(styles, unstyled)]
            which = torch.randint(1 if plain else self.count, (len(rows),))
            states, mask, clip = (part[sets, first, which] for part in self.encoded)
        else:
            states, mask, clip = self.encode([self.draw(row, style, None, rng) for row, style in zip(rows, styles)])
        with_byt5, with_clip, with_image = (
            torch.tensor([kind in those for kind in kinds]) for those in (WITH_BYT5, WITH_CLIP, WITH_IMAGE)
        )
        states, mask, clip = (
            torch.where(present.view(-1, *[1] * (part.ndim - 1)), part, empty)
            for present, part, empty in zip((with_byt5, with_byt5, with_clip), (states, mask, clip), self.empty)
        )
        with_clip |= torch.rand(len(rows)) < 0.6  # else no "" in its place
        clip_masks = [present[:, None].expand(-1, CLIP_LENGTH) for present in (with_clip, with_image)]
        return {
            "encoder_hidden_states": states.float(),
            "clip_text_embeds": clip,
            "clip_image_embeds": images,
            "encoder_attention_mask": torch.cat([mask, *clip_masks], dim=1),
        }


def draw_timesteps(count: int) -> torch.Tensor:
    """Noise levels in [0.001, 1], most of them above 0.8, where everything depends on the prompt."""
    high = torch.rand(count) < 0.7
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
    icons: Icons, vqgan: VQModel, cells: torch.BoolTensor, captions: Captions, batch_size: int, rng: random.Random
):
    """
    A batch on a larger canvas, with as many tokens in all as one of `batch_size` icons; objects of which several are on a
    canvas have short names, which a caption may have together.

    Returns:
        Styles, lists of objects, tokens `(n, height, width)`, and `(height, width)` booleans: what is known, as in
        outpainting, and so is never noise. One icon on a canvas may lie anywhere if it is known.
    """
    height, width, count = rng.choice(CANVASES)
    size = max(1, batch_size * TOKENS**2 // (height * width))
    cells = cells if count == 1 else cells & captions.short
    styles, first = draw_cells(cells, size, STYLE_SHARES)
    others = [part.nonzero().flatten().tolist() for part in cells]
    rows = []
    for style, row in zip(styles, first):
        rows.append([row, *rng.choices(others[style], k=count - 1)])
        while count > 1 and not captions.together(rows[-1]):
            rows[-1] = rng.choices(others[style], k=count)
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
    batch_size: int = 48, compiled: bool = False,
) -> PaellaUNet:  # fmt: skip
    seed("unet")
    unet = make_unet(vqgan.config.num_vq_embeddings)
    # all conditionings of a picture have the same target: so they begin with the same projection
    for projection in (unet.text_proj, unet.clip_image_proj):
        projection.load_state_dict(unet.clip_text_proj.state_dict())
    tokens = torch.stack([encode(vqgan, icons.images(style)) for style in range(len(STYLES))])
    forward = torch.compile(unet) if compiled else unet

    def loss(step: int, rng: random.Random) -> torch.Tensor:
        known = None
        if rng.random() < CANVAS_SHARE:
            styles, rows, clean, known = draw_canvas(icons, vqgan, cells, conditioner.captions, batch_size, rng)
        else:
            styles, rows = draw_cells(cells, batch_size, STYLE_SHARES)
            clean, rows = tokens[styles, rows], [[row] for row in rows]
        timestep = draw_timesteps(len(clean))
        noised, mask = corrupt(clean, timestep, unet.config.num_vq_embeddings)
        if known is not None:
            noised, mask = torch.where(known, clean, noised), mask * ~known
        conditioning = conditioner(styles, rows, rng, plain=step < steps * 2 // 3)
        with autocast(), attention_backend("_native_math"):  # of so few keys, a third less time in a step
            logits = forward(noised, timestep, **conditioning).sample
        return paella_loss(logits, clean, mask, timestep, label_smoothing=0.0)

    fit("unet", unet, adamw(unet, 1e-3), loss, steps, work_dir, 200, average=0.999)
    return unet
