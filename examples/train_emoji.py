"""
Train the text-to-image Paella that ships inside the package, from nothing to the folder in `pretrained/emoji`.

    pip install ".[emoji,train]"
    python examples/train_emoji.py --work-dir emoji-training --output-dir my-emoji

It fetches two npm packages (`npm` must be installed): Microsoft's Fluent Emoji icons and a set of emoji keywords, both MIT.
Then it trains for several hours on two CPU cores: (1) a VQGAN; (2) the two text encoders, contrastively against a small
image network, which is thrown away; (3) the U-Net, with the published loss; (4) CLIP's image encoder; and with the trainers
beside this script (5) the VQGAN's decoder, (6) the U-Net again and (7) the prior. Each stage saves to the work folder every
few minutes; run the same command again to resume. Sample sheets are drawn there.
"""

import argparse
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import resvg_py
import torch
import torch.nn.functional as F
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from paella_diffusers import PaellaClassifierFreeGuidance, PaellaPipeline, PaellaScheduler, PaellaUNet, VQModel
from paella_diffusers.training import corrupt, paella_loss

ICONS, KEYWORDS = "@iconify-json/fluent-emoji-flat@1.2.6", "emojilib@4.0.3"
SIZE = 64  # pixels, 16 × 16 tokens
SHEET = ["red heart", "pizza", "dog face", "rocket", "sunflower", "green apple", "grinning face", "soccer ball", "guitar"]

# --------------------------------------------------------------------------------------------------------------- data


def npm_file(package: str, member: str, folder: Path) -> Path:
    """A file of an npm package, fetched once."""
    path = folder / Path(member).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True, text=True)
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            path.write_bytes(archive.extractfile(f"package/{member}").read())
    return path


def load_icons(work_dir: Path) -> tuple[list[str], torch.Tensor, list[list[str]]]:
    """Names, images `(N, 3, 64, 64)` in [0, 1] on white, and keywords of all icons without a skin tone."""
    icons = json.loads(npm_file(ICONS, "icons.json", work_dir).read_text())
    codepoints = json.loads(npm_file(ICONS, "chars.json", work_dir).read_text())
    keywords = json.loads(npm_file(KEYWORDS, "dist/emoji-en-US.json", work_dir).read_text())
    keywords = {emoji.replace("\ufe0f", ""): words for emoji, words in keywords.items()}
    emoji_of = {}
    for codes, slug in codepoints.items():
        emoji = "".join(chr(int(code, 16)) for code in codes.split("-")).replace("\ufe0f", "")
        if emoji in keywords:
            emoji_of.setdefault(slug, emoji)

    tone = re.compile("-(light|medium-light|medium|medium-dark|dark)$")
    slugs = sorted(s for s in icons["icons"] if not (tone.search(s) and tone.sub("", s) in icons["icons"]))
    names, images, words = [], [], []
    for slug in slugs:
        svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">' + icons["icons"][slug]["body"] + "</svg>"
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="white"))
        images.append(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))
        names.append(slug.replace("-", " "))
        found = {word.replace("_", " ").lower() for word in keywords.get(emoji_of.get(slug), [])}
        words.append(sorted(word for word in found if re.fullmatch("[a-z0-9' -]{2,}", word)))
    return names, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255, words


PALETTE = {
    "red": (215, 50, 60), "orange": (255, 135, 40), "yellow": (255, 210, 70), "green": (60, 150, 60), "blue": (40, 130, 230),
    "purple": (135, 80, 190), "pink": (245, 145, 190), "brown": (125, 85, 60), "grey": (150, 150, 155),
    "black": (45, 45, 50), "white": (255, 255, 255),
}  # fmt: skip


def colours_of(images: torch.Tensor) -> list[list[str]]:
    """The colours that make up at least a quarter of each icon, white left out: it is the background."""
    palette = torch.tensor(list(PALETTE.values())) / 255
    nearest = torch.cdist(images.flatten(2).transpose(1, 2), palette.expand(len(images), -1, -1)).argmin(2)
    count = F.one_hot(nearest, len(PALETTE)).sum(1)[:, :-1].float()
    return [[c for c, s in zip(PALETTE, share) if s >= 0.25] for share in count / count.sum(1, keepdim=True).clamp(min=1)]


class Captions:
    """Random captions of icons: names, keywords, and both in ordinary words; never one of `held_out`."""

    openings = "a|a|a|the|the|an|one|my|some|this is a|an emoji of a|an icon of|a picture of a|a drawing of the|a pair of"
    openings += "|a bunch of|a piece of|a cup of|a bag of|two|someone with a|a person with a|the face of a|a symbol of"
    adjectives = (
        "cute|nice|little|big|small|old|young|new|pretty|happy|lovely|shiny|bright|sweet|fresh|funny|simple|cool|real"
    )
    adjectives += "|tall|round|fluffy|beautiful|colorful|wild|busy|slow|fast|single|open|soft|hot|cold|tiny|classic|modern"
    endings = (
        "emoji|icon|symbol|picture|thing|in the sky|at night|on a table|with a smile|in winter|for children|in the garden"
    )
    endings += (
        "|by the sea|with lights|in the city|to eat|on the road|for you|at home|in the rain|with two legs|on a sunny day"
    )

    def __init__(self, names: list[str], keywords: list[list[str]], images: torch.Tensor, held_out: set[str]):
        self.names, self.colours, self.held_out = names, colours_of(images), held_out
        count = Counter(word for words in keywords for word in words)
        taken = set(names)  # a keyword that is another icon's name would be a wrong caption
        keywords = [[word for word in words if word not in taken] for words in keywords]
        self.keywords = [[word for word in words if count[word] <= 12] for words in keywords]
        self.weights = [[1 / count[word] for word in words] for words in self.keywords]  # rare words say more
        self.categories = [[word for word in words if count[word] > 12] for words in keywords]  # too common to stand alone

    def draw(self, index: int, rng: random.Random, plain: float) -> str:
        """A caption of icon `index`: with probability `plain` its name, else a sentence that may have a keyword instead."""
        while True:
            caption = self.names[index] if rng.random() < plain else self.sentence(index, rng)
            if caption not in self.held_out and len(caption) < 56:
                return caption

    def sentence(self, index: int, rng: random.Random) -> str:
        name, words, weights = self.names[index], self.keywords[index], self.weights[index]
        keyword = lambda: rng.choices(words, weights)[0] if words else name
        kind = rng.random()
        if kind < 0.45:
            parts = [name]
        elif kind < 0.75:
            parts = [keyword()]
        else:
            parts = rng.sample([keyword(), rng.choice([keyword(), rng.choice(name.split())])], 2)
        if self.categories[index] and rng.random() < 0.2:
            parts.append(rng.choice(self.categories[index]))
        if self.colours[index] and rng.random() < 0.25:
            parts.insert(0, rng.choice(self.colours[index]))
        for _ in range(rng.choice([0, 0, 1, 1, 2])):  # half of them words that it does not know and must learn to pass over
            known = rng.random() < 0.5
            parts.insert(0, rng.choice(self.adjectives.split("|")) if known else self.nonsense(rng))
        if rng.random() < 0.7:
            parts.insert(0, rng.choice(self.openings.split("|")))
        if rng.random() < 0.4:
            ending = rng.choice([keyword(), self.nonsense(rng)])
            ending = f"{rng.choice(['with a', 'with', 'and', 'of', 'in the', 'on a', 'for'])} {ending}"
            parts.append(rng.choice([ending, rng.choice(self.endings.split("|"))]))
        return " ".join(parts)

    @staticmethod
    def nonsense(rng: random.Random) -> str:
        word = "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiouy") for _ in range(rng.randint(1, 3)))
        return word + rng.choice(["", "n", "r", "s", "t", "ng", "ed", "ly", "y"])


# ----------------------------------------------------------------------------------------------------------- training


def write(path: Path, content):
    """`torch.save`, whole or not at all."""
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def batch(step: int, batch_size: int, length: int) -> torch.Tensor:
    """Indices of a step's batch: every epoch is a permutation, and a resumed run goes on with the same batches."""
    epochs = [i // length for i in range(step * batch_size, (step + 1) * batch_size)]
    order = {e: torch.randperm(length, generator=torch.Generator().manual_seed(e)) for e in set(epochs)}
    return torch.stack([order[e][i % length] for e, i in zip(epochs, range(step * batch_size, (step + 1) * batch_size))])


def adam(groups, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)


def muon_and_adam(module: nn.Module, keep_adam: tuple[str, ...], lr: float = 1.0) -> list[torch.optim.Optimizer]:
    """
    Muon (Jordan et al., 2024) for the matrices, which learns in half the steps; AdamW for the rest and embeddings. `lr` is a
    factor on both learning rates.
    """
    matrices = {n: p for n, p in module.named_parameters() if p.ndim == 2 and not any(part in n for part in keep_adam)}
    others = [p for n, p in module.named_parameters() if n not in matrices]
    return [torch.optim.Muon(matrices.values(), lr=0.02 * lr, weight_decay=0.0), adam(others, lr=1.5e-3 * lr)]


def fit(name, module, optimizers, loss, steps, work_dir, warmup=100, after_step=None, report=None, save_every=300):
    """Train with a cosine schedule; resumes from, and every `save_every` seconds saves to, `work_dir/name.pt`."""
    path, start = work_dir / f"{name}.pt", 0
    warm = lambda step: min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, warm) for optimizer in optimizers]
    if path.exists():
        state = torch.load(path, weights_only=True)
        module.load_state_dict(state["module"])
        if state["step"] < steps:  # or it is finished
            for part, saved in zip([*optimizers, *schedules], state["optimizers"]):
                part.load_state_dict(saved)
            torch.set_rng_state(state["rng"])
        start = state["step"]
    module.train()
    saved, average = time.time(), None
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
    for step in progress:
        value = loss(step)
        module.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        if after_step is not None:
            after_step(step)
        average = value.item() if average is None else 0.99 * average + 0.01 * value.item()
        progress.set_postfix(loss=f"{average:.4f}", refresh=False)
        if step + 1 == steps or time.time() - saved > save_every:
            states = [part.state_dict() for part in (*optimizers, *schedules)]
            state = {"module": module.state_dict(), "optimizers": states}
            write(path, state | {"step": step + 1, "rng": torch.get_rng_state()})
            if report is not None:
                module.eval()
                report(step + 1)
                module.train()
            saved = time.time()
    module.eval().requires_grad_(False)


def latents_of(vqgan: VQModel, images: torch.Tensor) -> torch.Tensor:
    """All latents of the images, `(N, channels)`."""
    with torch.no_grad():
        latents = torch.cat([vqgan.encode(part).latents for part in images.split(128)])
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def k_means(rows: torch.Tensor, centers: torch.Tensor, rounds: int) -> torch.Tensor:
    """Lloyd's algorithm; a center that is nearest to nothing moves to a random row."""
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, centers).argmin(1) for part in rows.split(8192)])
        count = torch.bincount(nearest, minlength=len(centers))[:, None]
        mean = torch.zeros_like(centers).index_add_(0, nearest, rows) / count.clamp(min=1)
        centers = torch.where(count > 0, mean, rows[torch.randint(len(rows), (len(centers),))])
    return centers


def farthest_points(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Rows that cover the others evenly, however dense they lie: each is the farthest from those before (Gonzalez, 1985)."""
    chosen, distance = [rows[0]], (rows - rows[0]).square().sum(1)
    while len(chosen) < count:
        chosen.append(rows[distance.argmax()])
        distance = torch.minimum(distance, (rows - chosen[-1]).square().sum(1))
    return torch.stack(chosen)


def vqgan_loss(vqgan: VQModel, pixels: torch.Tensor, quantize: bool = True):
    """Reconstruction and codebook loss, and the tokens. Without quantization the codebook is left alone."""
    with torch.autocast("cpu", torch.bfloat16):
        output = vqgan(pixels, quantize=quantize)
    return F.mse_loss(output.sample.float(), pixels) + quantize * 0.1 * output.commit_loss.float(), output.indices


def vqgan_optimizers(vqgan: VQModel, lr: float) -> list[torch.optim.Optimizer]:
    """The blocks' gains start at zero and have far to go: ten times the learning rate."""
    gains = [p for name, p in vqgan.named_parameters() if name.endswith("gammas")]
    others = [p for name, p in vqgan.named_parameters() if not name.endswith("gammas")]
    return [adam([{"params": others}, {"params": gains, "lr": 10 * lr}], lr)]


def train_vqgan(images: torch.Tensor, steps: int, coarse_steps: int, work_dir: Path) -> VQModel:
    """
    First with 1024 codes, which come from k-means of the first latents, then with 512 that cover the latents evenly: k-means
    spends hundreds on flat white, most of every icon, and a U-Net cannot tell which of these comes where.
    """
    vqgan = VQModel(bottleneck_blocks=6, embed_dim=128, num_vq_embeddings=1024, scale_factor=1.0)
    vqgan.out_block[0].bias.data.fill_(0.85)  # the icons' mean brightness
    codebook, used = vqgan.vquantizer.embedding.weight, torch.zeros(1024, dtype=torch.long)
    free_steps = min(100, steps // 2)  # without quantization, which at first would only disturb

    def loss(step):
        value, indices = vqgan_loss(vqgan, images[batch(step, 16, len(images))], quantize=step >= free_steps)
        used.add_(torch.bincount(indices.flatten(), minlength=1024))
        return value

    @torch.no_grad()
    def move_unused_codes(step):
        if step == free_steps - 1:
            rows = latents_of(vqgan.eval(), images[torch.randperm(len(images))[:256]])
            codebook.copy_(k_means(rows, rows[torch.randperm(len(rows))[:1024]], rounds=15))
        elif step % 50 == 0 and free_steps < step < 0.7 * steps:
            rows = latents_of(vqgan.eval(), images[torch.randperm(len(images))[:16]])
            codebook[used == 0] = rows[torch.randint(len(rows), (int((used == 0).sum()),))]
        else:
            return
        vqgan.train()
        used.zero_()

    @torch.no_grad()
    def report(model, step):
        tokens = torch.cat([model.encode(part).indices for part in images.split(128)])
        error = [
            (model.decode_indices(index).sample.clamp(0, 1) - part).square().mean((1, 2, 3))
            for index, part in zip(tokens.split(128), images.split(128))
        ]
        share = torch.bincount(tokens.flatten(), minlength=1) / tokens.numel()
        decibels, entropy = -10 * torch.cat(error).log10().mean(), -torch.special.xlogy(share, share).sum()
        tqdm.write(f"VQGAN, step {step}: {decibels:.2f} dB, {entropy:.2f} nats a token")

    fit(
        "vqgan",
        vqgan,
        vqgan_optimizers(vqgan, 2e-3),
        loss,
        steps,
        work_dir,
        20,
        move_unused_codes,
        lambda s: report(vqgan, s),
    )

    rows = latents_of(vqgan, images)
    rows = rows[torch.randperm(len(rows))[:60000]]
    coarse = VQModel(bottleneck_blocks=6, embed_dim=128, num_vq_embeddings=512, scale_factor=1.0)
    state = vqgan.state_dict() | {"vquantizer.embedding.weight": k_means(rows, farthest_points(rows, 512), rounds=3)}
    coarse.load_state_dict(state)

    def coarse_loss(step):
        return vqgan_loss(coarse, images[batch(step, 16, len(images))])[0]

    optimizers = vqgan_optimizers(coarse, 5e-4)
    fit("vqgan-coarse", coarse, optimizers, coarse_loss, coarse_steps, work_dir, 20, report=lambda s: report(coarse, s))
    return coarse


class TextEncoders(nn.Module):
    """The ByT5-style and the CLIP text encoder, and the image network that they are trained against."""

    def __init__(self, width: int = 256):
        super().__init__()
        byt5 = T5Config(
            vocab_size=384, d_model=128, d_kv=32, d_ff=384, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False, is_decoder=False, use_cache=False,
        )  # fmt: skip
        clip = CLIPTextConfig(
            vocab_size=384, hidden_size=160, intermediate_size=640, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, projection_dim=width, pad_token_id=0, bos_token_id=2, eos_token_id=1,
        )  # fmt: skip
        self.byt5 = T5EncoderModel(byt5)
        # for such short sequences plain attention has the faster backward pass
        self.clip = CLIPTextModelWithProjection._from_config(clip, attn_implementation="eager")
        self.byt5_head = nn.Linear(128, width)
        layers, channels = [nn.AvgPool2d(2)], 3
        for out in (48, 96, 192):
            layers += [nn.Conv2d(channels, out, 4, stride=2, padding=1), nn.GroupNorm(8, out), nn.GELU()]
            channels = out
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(192 * 16, width))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.tokenizer = ByT5Tokenizer()

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ByT5 sequences, their mask, and CLIP text embeddings."""
        inputs = self.tokenizer(captions, padding="longest", max_length=64, truncation=True, return_tensors="pt")
        sequence = self.byt5(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        return sequence, inputs.attention_mask, self.clip(inputs.input_ids).text_embeds

    def forward(self, captions: list[str], image: torch.Tensor) -> list[torch.Tensor]:
        """Similarities of captions (rows) to images, embedded and normalised (columns): by CLIP, and by ByT5."""
        sequence, mask, clip = self.encode(captions)
        # every byte's output shall carry the whole caption, so that attention to any of them serves the U-Net
        position = (torch.rand(len(captions)) * mask.sum(1)).long()
        byt5 = self.byt5_head(sequence[torch.arange(len(captions)), position])
        return [self.log_scale.exp() * F.normalize(text.float(), dim=1) @ image.T for text in (clip, byt5)]

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.image(pixels).float(), dim=1)


def train_text(images: torch.Tensor, captions: Captions, steps: int, steps_all: int, work_dir: Path) -> TextEncoders:
    """
    First with the image network, each caption against the images of its batch (InfoNCE); then against all images, whose
    embeddings stay as they are: sentences come much nearer to the name that they paraphrase.
    """
    encoders = TextEncoders()
    keep_adam = ("embed", "shared", "relative", "image")

    @torch.no_grad()
    def report(step):
        image = torch.cat([encoders.embed(p) for p in images.split(256)])
        text = torch.cat([encoders.encode(captions.names[i : i + 256])[2] for i in range(0, len(images), 256)])
        right = (F.normalize(text, dim=1) @ image.T).argmax(1) == torch.arange(len(images))
        tqdm.write(f"text encoders, step {step}: {right.float().mean():.1%} of names find their icon")

    def loss(step):
        rows, rng, target = batch(step, 256, len(images)), random.Random(step), torch.arange(256)
        with torch.autocast("cpu", torch.bfloat16):
            drawn = [captions.draw(i, rng, plain=0.25) for i in rows.tolist()]
            similarities = encoders(drawn, encoders.embed(images[rows]))
        return sum(F.cross_entropy(s, target) + F.cross_entropy(s.T, target) for s in similarities) / 4

    optimizers = muon_and_adam(encoders, keep_adam)
    fit("text", encoders, optimizers, loss, steps, work_dir, warmup=40, report=report)

    with torch.no_grad():
        image = torch.cat([encoders.embed(p) for p in images.split(256)])
    encoders.requires_grad_(True)
    encoders.image.requires_grad_(False)
    encoders.log_scale.requires_grad_(False)

    def loss_all(step):
        rows, rng = batch(step, 256, len(images)), random.Random(f"all {step}")
        with torch.autocast("cpu", torch.bfloat16):
            similarities = encoders([captions.draw(i, rng, plain=0.15) for i in rows.tolist()], image)
        return sum(F.cross_entropy(s, rows) for s in similarities) / 2

    optimizers = muon_and_adam(encoders, keep_adam, lr=0.7)
    fit("text-all", encoders, optimizers, loss_all, steps_all, work_dir, warmup=40, report=report)
    return encoders


def add_image_encoder(pipe: PaellaPipeline, images: torch.Tensor, names: list[str], steps: int, work_dir: Path):
    """
    CLIP's other half, a small ViT, against the text encoder, which stays as it is ("locked tuning" the other way round,
    https://huggingface.co/papers/2111.07991): an icon's embedding shall be nearest to that of its name, and like it but for
    the scale, which is one as that of the prior's noise. So the U-Net, which has learnt from text, begins with reading both
    by the same projection. Icons are moved and resized a little.
    """
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE, patch_size=8,
        projection_dim=256,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(config)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    with torch.no_grad():
        inputs = pipe.tokenizer_2(names, padding="longest", return_tensors="pt")
        text = torch.cat([pipe.text_encoder_2(part).text_embeds.float() for part in inputs.input_ids.split(256)])
    scale = text.std()

    def embed(pixels):
        with torch.autocast("cpu", torch.bfloat16):
            return encoder((pixels - mean) / std).image_embeds.float()

    def cosines(image):
        return F.normalize(image, dim=1) @ F.normalize(text, dim=1).T

    def loss(step):
        rows, rng = batch(step, 128, len(images)), random.Random(f"image {step}")
        pixels = F.pad(images[rows], (8, 8, 8, 8), value=1.0)
        side, (left, top) = rng.randint(48, 80), (rng.random(), rng.random())
        left, top = (round(share * (80 - side)) for share in (left, top))
        pixels = F.interpolate(pixels[..., top : top + side, left : left + side], SIZE, mode="bilinear", antialias=True)
        image = embed(pixels)
        return F.cross_entropy(20 * cosines(image), rows) + 4 * F.mse_loss(image, text[rows] / scale)

    @torch.no_grad()
    def report(step):
        similarities = cosines(torch.cat([embed(part) for part in images.split(256)]))
        right = (similarities.argmax(0) == torch.arange(len(images))).float().mean()
        cosine = similarities.diag().mean()
        tqdm.write(f"image encoder, step {step}: {right:.1%} of names find their icon, mean cosine {cosine:.2f}")

    fit("image", encoder, muon_and_adam(encoder, keep_adam=("embed",)), loss, steps, work_dir, warmup=40, report=report)
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE)
    pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    pipe.unet.clip_image_proj.load_state_dict(pipe.unet.clip_text_proj.state_dict())
    with torch.no_grad():
        pipe.unet.clip_image_proj.weight *= scale


@torch.no_grad()
def encode_captions(encoders: TextEncoders, captions: list[str], length: int = 24):
    """
    ByT5 sequences, their mask and CLIP embeddings, as the U-Net gets them, but of ByT5 only `length` bytes, picked at
    random, which is cheaper and as good, since every byte knows the whole caption.
    """
    with torch.autocast("cpu", torch.bfloat16):
        sequence, mask, clip = encoders.encode(captions)
    pick = (torch.rand(mask.shape) - mask).argsort(1)[:, :length]  # bytes first, padding last
    sequence, mask = sequence.gather(1, pick[..., None].expand(-1, -1, sequence.shape[2])), mask.gather(1, pick)
    missing = length - pick.shape[1]
    return F.pad(sequence, (0, 0, 0, missing)).float(), F.pad(mask, (0, missing)), clip.float()


def train_unet(vqgan, encoders, images, captions, steps: int, work_dir: Path, compile: bool) -> PaellaPipeline:
    unet = PaellaUNet(
        sample_size=16,
        num_vq_embeddings=512,
        token_embed_dim=128,
        text_embed_dim=128,
        clip_embed_dim=256,
        cross_attention_dim=256,
        block_out_channels=(256, 256),
        layers_per_block=(1, 2),
        block_types=("CTA", "CTA"),
        num_attention_heads=(4, 4),
        dropout=0.0,
        self_attention=False,  # all attention goes to the prompt, which is so learned sooner
    )
    with torch.no_grad():
        tokens = torch.cat([vqgan.encode(p).indices for p in images.split(128)])
    scheduler = PaellaScheduler(num_vq_embeddings=512)
    tokenizer = encoders.tokenizer
    guider = PaellaClassifierFreeGuidance(guidance_scale=3.0, plausibility_threshold=0.2)
    parts = (vqgan, unet, scheduler, encoders.byt5, tokenizer, encoders.clip, tokenizer)
    pipe = PaellaPipeline(*parts, guider=guider, use_prior=False)
    pipe.set_progress_bar_config(disable=True)
    forward = torch.compile(unet) if compile else unet

    def loss(step):
        rows, rng = batch(step, 64, len(images)), random.Random(step)
        # one image in ten is trained without a prompt, for the unconditional pass of guidance; the others with a new caption
        texts = ["" if rng.random() < 0.1 else captions.draw(i, rng, plain=0.5) for i in rows.tolist()]
        sequence, mask, clip = encode_captions(encoders, texts)
        timestep = 1 - torch.rand(len(rows)).square()  # near 1 everything depends on the prompt: go there more often
        noised, noise_mask = corrupt(tokens[rows], timestep, unet.config.num_vq_embeddings)
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(noised, timestep, sequence, clip, encoder_attention_mask=mask).sample
        # the published label smoothing would hide what is still to be learned
        return paella_loss(logits, tokens[rows], noise_mask, timestep, label_smoothing=0.0)

    def report(step):
        sheet = pipe(SHEET, generator=torch.Generator().manual_seed(0)).images
        make_image_grid(sheet, 3, 3).save(work_dir / f"unet-{step:06d}.png")

    optimizers = muon_and_adam(unet, keep_adam=("token_embedding", "head", "text_proj", "clip_"))
    fit("unet", unet, optimizers, loss, steps, work_dir, report=report)
    return pipe


def write_dataset(folder: Path, names: list[str], images: torch.Tensor, captions: Captions, count: int = 200):
    """A folder of images with `metadata.jsonl`, as the trainers read it, with `count` captions an icon."""
    folder.mkdir(exist_ok=True)
    lines = []
    for index, (name, image) in enumerate(zip(names, images)):
        file_name, rng = f"{name.replace(' ', '-')}.png", random.Random(index)
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / file_name)
        texts = [captions.draw(index, rng, plain=0.5) for _ in range(count)]
        lines.append(json.dumps({"file_name": file_name, "text": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def trainer(script: str, output: Path, *options):
    """One of the scripts beside this one, unless it is done; started again, it goes on."""
    if any((output / name).exists() for name in ("model_index.json", "config.json", "empty.safetensors")):
        return
    if script != "precompute.py":
        options = (*options, "--resume", "latest", "--report-to", "none")
    command = [sys.executable, Path(__file__).parent / script, "--output-dir", output, "--resolution", SIZE, *options]
    subprocess.run([str(part) for part in command], check=True)


def refine(pipe: PaellaPipeline, icons: Path, work_dir: Path) -> PaellaPipeline:
    """Let the trainers do the rest: a better decoder for the same tokens, a U-Net that knows CLIP images, and a prior."""
    pipe.save_pretrained(work_dir / "first")
    smooth = ["--lr-scheduler", "cosine", "--weight-decay", "0", "--adam-beta2", "0.99"]
    bf16 = ["--mixed-precision", "bf16"]
    # fmt: off
    trainer(
        "train_vqgan.py", work_dir / "vqgan-decoder", "--data", icons, "--pretrained", work_dir / "first",
        "--subfolder", "vqgan", "--decoder-only", "--adversarial-weight", "0", "--learning-rate", "1e-3",
        "--warmup-steps", "50", "--max-steps", "4500", *smooth, *bf16, "--num-workers", "0",
    )
    pipe.vqgan = VQModel.from_pretrained(work_dir / "vqgan-decoder")
    pipe.save_pretrained(work_dir / "second")
    trainer(
        "train_paella.py", work_dir / "paella", "--data", icons, "--pretrained", work_dir / "second",
        "--label-smoothing", "0", "--text-dropout", "0.3", "--clip-text-dropout", "0.5", "--clip-image-dropout", "0.3",
        "--learning-rate", "3e-4", "--warmup-steps", "50", "--max-steps", "1900", "--batch-size", "64", *smooth, *bf16,
        "--prompts", *SHEET, "--guidance-scale", "1.5", "--sample-every", "250", "--save-every", "100", "--num-workers", "0",
    )
    trainer(
        "precompute.py", work_dir / "computed", "--data", icons, "--pretrained", work_dir / "paella", "--epochs", "20",
        "--parts", "clip_text_embeds", "clip_image_embeds", "--batch-size", "128", "--num-workers", "0",
    )
    trainer(
        "train_prior.py", work_dir / "prior", "--data", work_dir / "computed", "--pretrained", work_dir / "paella",
        "--from-scratch", "--prior-config", '{"embedding_dim": 256, "hidden_dim": 256, "num_layers": 2}',
        "--learning-rate", "2e-3", "--warmup-steps", "100", "--max-steps", "14000", "--batch-size", "128",
        "--ema-start", "1000", *smooth, "--num-workers", "1",
    )
    # fmt: on
    return PaellaPipeline.from_pretrained(work_dir / "prior")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("emoji-training"), help="downloads, checkpoints, samples")
    parser.add_argument("--output-dir", type=Path, default=Path("emoji-model"), help="the trained pipeline")
    parser.add_argument("--vqgan-steps", type=int, default=2800)
    parser.add_argument("--coarse-steps", type=int, default=600, help="of the VQGAN with half the codes")
    parser.add_argument("--text-steps", type=int, default=1000, help="with the image network")
    parser.add_argument("--text-all-steps", type=int, default=1800, help="against all images at once")
    parser.add_argument("--unet-steps", type=int, default=7500)
    parser.add_argument("--image-steps", type=int, default=2000, help="of the CLIP image encoder")
    parser.add_argument("--compile", action="store_true", help="the U-Net, with torch.compile; needs g++")
    args = parser.parse_args()

    torch.manual_seed(0)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    names, images, keywords = load_icons(args.work_dir)
    paraphrases = Path(__file__).parent.parent / "benchmarks" / "emoji_paraphrases.json"  # kept out of training
    captions = Captions(names, keywords, images, held_out=set(json.loads(paraphrases.read_text())))
    vqgan = train_vqgan(images, args.vqgan_steps, args.coarse_steps, args.work_dir)
    encoders = train_text(images, captions, args.text_steps, args.text_all_steps, args.work_dir)
    pipe = train_unet(vqgan, encoders, images, captions, args.unet_steps, args.work_dir, args.compile)
    add_image_encoder(pipe, images, names, args.image_steps, args.work_dir)
    write_dataset(args.work_dir / "icons", names, images, captions)
    pipe = refine(pipe, args.work_dir / "icons", args.work_dir)
    pipe.to(torch.float16, silence_dtype_warnings=True).save_pretrained(args.output_dir)
    print(f"The pipeline is in {args.output_dir}.")


if __name__ == "__main__":
    main()
