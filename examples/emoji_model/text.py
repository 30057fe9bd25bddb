"""
Stage 2: the two text encoders, a ByT5 and a CLIP in small. Both learn to tell, from a caption, the object among all objects
and the style among three. The last `STYLE_CHANNELS` of an embedding are about the style, the others about the object, and so
the same in every style: a style that was learned from some objects can be asked of others. Objects that look alike have
embeddings that are alike, which is what an image encoder can learn: a linear layer is to tell the small picture from them.
It is a great help to the U-Net, too, which else has to learn by heart what each embedding means.
"""

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from paella_diffusers.loaders.atomic import atomic_folder

from .captions import Captions
from .data import SIZE, STYLES, Icons
from .fit import adamw, autocast, fit, seed

CLIP_DIM, STYLE_CHANNELS = 256, 32
SMALL = 16  # pixels a side
BYTES = 6  # of a caption whose ByT5 states are trained in a step: ByT5 learns slowly, and these cost next to nothing
MAX_TOKENS = 96  # of ByT5 with the end of text, and of CLIP with the start, too
TOKENIZE = {"padding": "longest", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Captions, folder: Path, size: int = 2048, count: int = 20_000) -> CLIPTokenizer:
    """CLIP's kind of tokenizer, byte pairs of lower-case words, learned from captions once and kept in `folder`."""
    if folder.exists():
        return CLIPTokenizer.from_pretrained(folder)
    rng, like = random.Random(0), CLIPTokenizer().backend_tokenizer
    rows = (number % len(captions.names) for number in range(count))
    texts = (captions.draw([row], rng.randrange(len(STYLES)), rng, name_share=0.3) for row in rows)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = like.normalizer, like.pre_tokenizer
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size - 514, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # all bytes, so that nothing is unknown
    entries = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
    with atomic_folder(folder) as unfinished:
        tokenizer.save_pretrained(unfinished)
    return tokenizer


class TextEncoders(nn.Module):
    """
    The text encoders, and what they are trained with: a vector for each object and each style.

    Args:
        objects (`torch.Tensor` of shape `(num_objects, 224)`): What the vectors of the objects begin as.
        clip_tokenizer ([`CLIPTokenizer`]): Of the CLIP text encoder; ByT5's has the bytes.
    """

    def __init__(self, objects: torch.Tensor, clip_tokenizer: CLIPTokenizer):
        super().__init__()
        self.byt5_tokenizer, self.clip_tokenizer = ByT5Tokenizer(extra_ids=0), clip_tokenizer
        byt5 = T5Config(
            vocab_size=384, d_model=128, d_kv=32, d_ff=384, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False, is_decoder=False, use_cache=False,
        )  # fmt: skip
        clip = CLIPTextConfig(
            vocab_size=len(clip_tokenizer), hidden_size=160, intermediate_size=640, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=CLIP_DIM,
            pad_token_id=clip_tokenizer.pad_token_id, bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
        )  # fmt: skip
        self.byt5 = T5EncoderModel(byt5)
        # for such short sequences plain attention has the faster backward pass
        self.clip = CLIPTextModelWithProjection._from_config(clip, attn_implementation="eager")
        self.byt5_head = nn.Linear(128, CLIP_DIM)
        self.objects = nn.Parameter(objects)
        self.styles = nn.Parameter(torch.randn(len(STYLES), STYLE_CHANNELS))
        self.picture = nn.Linear(CLIP_DIM, 3 * SMALL**2)

    def byt5_states(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """ByT5 sequences `(n, length, 128)` and their mask `(n, length)`."""
        inputs = self.byt5_tokenizer(captions, **TOKENIZE)
        return self.byt5(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state, inputs.attention_mask

    def clip_embeds(self, captions: list[str]) -> torch.Tensor:
        """CLIP text embeddings `(n, 256)`."""
        return self.clip(self.clip_tokenizer(captions, **TOKENIZE).input_ids).text_embeds

    def similarities(self, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled cosine similarities of embeddings `(n, 256)` to all objects and to all styles."""
        about = embeds.float().split([CLIP_DIM - STYLE_CHANNELS, STYLE_CHANNELS], dim=1)
        pairs = zip(about, (self.objects, self.styles))
        return tuple(24 * F.normalize(part, dim=1) @ F.normalize(vectors, dim=1).T for part, vectors in pairs)

    def forward(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of captions by CLIP, `(n, 256)`, and by ByT5's states of some bytes of each, `(n * BYTES, 256)`."""
        states, mask = self.byt5_states(captions)
        # every byte's output shall carry the whole caption, so that attention to any of them serves the U-Net
        positions = (torch.rand(len(captions), BYTES) * mask.sum(1, keepdim=True)).long()
        picked = states[torch.arange(len(captions))[:, None], positions]
        return self.clip_embeds(captions), self.byt5_head(picked.flatten(0, 1))


def small_pictures(icons: Icons) -> torch.Tensor:
    """All pictures of `SMALL` pixels a side, flat: `(3, num_objects, 3 · SMALL²)` in [0, 1]."""
    small = F.avg_pool2d(icons.pixels.flatten(0, 1).float() / 255, SIZE // SMALL)
    return small.unflatten(0, icons.pixels.shape[:2]).flatten(2)


def looks(icons: Icons, cells: torch.BoolTensor) -> torch.Tensor:
    """
    A vector of unit length for each object, `(num_objects, 224)`: the whitened principal components of its small pictures
    in all styles that are trained on, and some noise to tell twins apart.
    """
    small = small_pictures(icons)
    weights = cells[..., None].float()
    small = (small - (small * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)) * weights
    u, s, _ = torch.linalg.svd(torch.cat(list(small), dim=1), full_matrices=False)
    size = CLIP_DIM - STYLE_CHANNELS
    u, s = u[:, :size], s[:size]
    components = F.normalize(u * s / (s.square() + 0.1 * s.square().mean()).sqrt(), dim=1)
    components = F.pad(components, (0, size - components.shape[1]))  # there may be fewer objects than channels
    return F.normalize(components + 0.3 * F.normalize(torch.randn_like(components), dim=1), dim=1)


def draw_cells(cells: torch.BoolTensor, count: int, shares: tuple[float, ...] = (1, 1, 1)) -> tuple[list[int], list[int]]:
    """Random styles and objects, by torch's global generator, of the true entries of `cells`, styles by their shares."""
    weights = cells * torch.tensor(shares)[:, None] / cells.sum(1, keepdim=True)
    drawn = torch.multinomial(weights.flatten(), count, replacement=True)
    return (drawn // cells.shape[1]).tolist(), (drawn % cells.shape[1]).tolist()


def train(
    icons: Icons, captions: Captions, cells: torch.BoolTensor, steps: int, work_dir: Path, batch_size: int = 160
) -> TextEncoders:
    tokenizer = train_tokenizer(captions, work_dir / "tokenizer")
    seed("text")
    encoders = TextEncoders(looks(icons, cells), tokenizer)
    small = small_pictures(icons)
    small = (small - small[cells].mean(0)) / small[cells].std(0).square().mean().sqrt()

    def loss(step: int, rng: random.Random) -> torch.Tensor:
        styles, rows = draw_cells(cells, batch_size)
        name_share = 0.8 if step < steps // 2 else 0.3
        texts = [captions.draw([row], style, rng, name_share=name_share) for style, row in zip(styles, rows)]
        with autocast():
            embeds = encoders(texts)
        targets, total = (torch.tensor(rows), torch.tensor(styles)), 0.0
        for embed, copies in zip(embeds, (1, BYTES)):
            objects, own_styles = (target.repeat_interleave(copies) for target in targets)
            of_objects, of_styles = encoders.similarities(embed)
            total += F.cross_entropy(of_objects, objects) + F.cross_entropy(of_styles, own_styles)
            total += 5 * F.mse_loss(encoders.picture(embed.float()), small[own_styles, objects])
        return total / 2

    @torch.no_grad()
    def report() -> str:
        found = []
        for style in range(len(STYLES)):
            texts = [captions.named(name, style) for name in captions.names]
            parts = zip(*(encoders(texts[i : i + 256]) for i in range(0, len(texts), 256)))
            shares = []
            for embeds, copies in zip(map(torch.cat, parts), (1, BYTES)):
                objects, styles = (similarities.argmax(1) for similarities in encoders.similarities(embeds))
                right = (objects == torch.arange(len(texts)).repeat_interleave(copies)) & (styles == style)
                shares.append(f"{right.float().mean():.1%}")
            found.append(f"{STYLES[style]} {' and '.join(shares)}")
        return f"names whose object and style CLIP and ByT5 tell: {', '.join(found)}"

    fit("text", encoders, adamw(encoders, 2e-3), loss, steps, work_dir, 100, None, None, report)
    return encoders
