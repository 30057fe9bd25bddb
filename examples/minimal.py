"""
Paella on one page: train a U-Net to draw coloured shapes from words, then draw with it.

    python examples/minimal.py

It takes two and a half minutes on two CPU cores and writes shapes.png. The idea is in two places, marked (1) and (2); the
paper is https://huggingface.co/papers/2211.07292. What turns pictures into tokens, and words into vectors, is ready-made:
the VQGAN and the text encoder of the small model inside the package.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from paella_diffusers import EMOJI_MODEL, PaellaPipeline, PaellaUNet

COLOURS = ["red", "orange", "gold", "green", "blue", "purple", "black", "deeppink"]
SHAPES = ["circle", "square", "triangle", "ring"]
NUM_TOKENS = 512  # different ones in the VQGAN's codebook; a picture of 64 × 64 pixels is 16 × 16 of them


def draw_shape(colour: str, shape: str, rng: random.Random) -> Image.Image:
    """A shape, somewhere on white."""
    picture = Image.new("RGB", (64, 64), "white")
    pen, size = ImageDraw.Draw(picture), rng.randint(24, 52)
    x, y = rng.randint(2, 62 - size), rng.randint(2, 62 - size)
    box = [x, y, x + size, y + size]
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([x, y + size, x + size, y + size, x + size / 2, y], fill=colour)
    else:
        pen.ellipse(box, outline=colour, width=8)
    return picture


@torch.no_grad()
def make_data(pipe: PaellaPipeline, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Tokens `(count, 16, 16)`; which caption each picture has; all captions' embeddings, "" last; and the captions."""
    rng = random.Random(0)
    captions = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    labels = [rng.randrange(len(captions)) for _ in range(count)]
    pictures = [np.asarray(draw_shape(*captions[label].split(), rng)) for label in labels]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    tokens = torch.cat([pipe.vqgan.encode(part).indices for part in pixels.split(128)])
    inputs = pipe.tokenizer([*captions, ""], padding="longest", return_tensors="pt")
    text = pipe.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
    return tokens, torch.tensor(labels), text * inputs.attention_mask[..., None], captions


def train(unet, tokens, labels, text, steps: int):
    """(1) Replace a random share t of the tokens by random ones, and train the U-Net to predict the original ones."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(len(tokens), (32,))
        clean, label = tokens[rows], labels[rows]
        label = torch.where(torch.rand(len(rows)) < 0.1, -1, label)  # sometimes without words, for guidance below

        t = torch.rand(len(rows))
        noised = torch.where(torch.rand(clean.shape) < t[:, None, None], torch.randint(NUM_TOKENS, clean.shape), clean)
        loss = F.cross_entropy(unet(noised, t, text[label]).sample, clean)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step}: loss {loss.item():.3f}")


@torch.no_grad()
def sample(unet, words, no_words, steps: int = 12, guidance: float = 3.0) -> torch.LongTensor:
    """(2) From random tokens: predict all of them, draw each, re-noise a shrinking share of them, and repeat."""
    noise = tokens = torch.randint(NUM_TOKENS, (len(words), 16, 16))
    for t in torch.linspace(1, 0, steps + 1)[:-1]:
        conditional, unconditional = unet(tokens, t, words).sample, unet(tokens, t, no_words).sample
        logits = unconditional + guidance * (conditional - unconditional)
        probabilities = (logits / 0.7).softmax(1).movedim(1, -1)
        tokens = probabilities.flatten(0, -2).multinomial(1).view(tokens.shape)
        tokens = torch.where(torch.rand(tokens.shape) < t - 1 / steps, noise, tokens)
    return tokens


def main(count: int = 4000, steps: int = 600, path: str = "shapes.png"):
    torch.manual_seed(0)
    pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)
    tokens, labels, text, captions = make_data(pipe, count)
    unet = PaellaUNet(
        num_vq_embeddings=NUM_TOKENS,
        token_embed_dim=64,
        text_embed_dim=text.shape[-1],
        cross_attention_dim=128,
        block_out_channels=(128, 128),
        layers_per_block=(1, 1),
        block_types=("CTA", "CTA"),
        num_attention_heads=(4, 4),
    )
    train(unet.train(), tokens, labels, text, steps)
    drawn = sample(unet.eval(), text[:-1], text[-1:].expand(len(captions), -1, -1))
    with torch.no_grad():
        pixels = pipe.vqgan.decode_indices(drawn).sample.clamp(0, 1)
    rows = pixels.view(len(COLOURS), len(SHAPES), 3, 64, 64).permute(1, 3, 0, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray((rows * 255).round().byte().numpy()).save(path)
    print(f"{path} has a column for each colour, {', '.join(COLOURS)}, and a row for each shape, {', '.join(SHAPES)}.")


if __name__ == "__main__":
    main()
