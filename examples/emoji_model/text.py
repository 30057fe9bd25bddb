"""
Stage 2: the two text encoders, a ByT5 and a CLIP in small. Both learn to tell, from a caption, the object among all objects
and the style among three. Each object in each style has one vector, its target, which is learned with them. In the second
half all captions of it are drawn to it, in CLIP's embedding and in ByT5's state of every byte. What the U-Net
gets for one picture is so the more alike, which it learns the sooner. From the start this would keep ByT5 from learning.

The last `STYLE_CHANNELS` of a target are about the style, the others about the object, and so the same in every style: a
style that was learned from some objects can be asked of others. The targets of objects that look alike begin alike, which is
what an image encoder can learn.
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

CLIP_DIM, STYLE_CHANNELS = 128, 32  # ByT5 has as many channels, since its states have the same targets
SMALL = 16  # pixels a side
DISTANCE_WEIGHT = 4.0  # of the squared distance to the target, at last
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
    The text encoders, and what they are trained to say.

    Args:
        objects (`torch.Tensor` of shape `(num_objects, 96)`): What the vectors of the objects begin as.
        clip_tokenizer ([`CLIPTokenizer`]): Of the CLIP text encoder; ByT5's has the bytes.
    """

    def __init__(self, objects: torch.Tensor, clip_tokenizer: CLIPTokenizer):
        super().__init__()
        self.byt5_tokenizer, self.clip_tokenizer = ByT5Tokenizer(extra_ids=0), clip_tokenizer
        byt5 = T5Config(
            vocab_size=384, d_model=CLIP_DIM, d_kv=16, d_ff=512, num_layers=2, num_heads=8, feed_forward_proj="relu",
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False, is_decoder=False, use_cache=False,
        )  # fmt: skip
        clip = CLIPTextConfig(
            vocab_size=len(clip_tokenizer), hidden_size=160, intermediate_size=640, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=CLIP_DIM,
            pad_token_id=clip_tokenizer.pad_token_id, bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
        )  # fmt: skip
        self.byt5 = T5EncoderModel(byt5)
        self.byt5.shared.weight.data *= 0.1  # else a byte's state tells little but the byte itself
        bias = self.byt5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data
        for head, bucket in enumerate((1, 2, 3, 17, 18)):  # one to three bytes before, one and two after
            bias[bucket, head] = 5.0
        # for such short sequences plain attention has the faster backward pass
        self.clip = CLIPTextModelWithProjection._from_config(clip, attn_implementation="eager")
        self.objects = nn.Parameter(objects)
        self.styles = nn.Parameter(torch.randn(len(STYLES), STYLE_CHANNELS))

    def byt5_states(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """ByT5 sequences `(n, length, 128)` and their mask `(n, length)`."""
        inputs = self.byt5_tokenizer(captions, **TOKENIZE)
        return self.byt5(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state, inputs.attention_mask

    def clip_embeds(self, captions: list[str]) -> torch.Tensor:
        """CLIP text embeddings `(n, 128)`."""
        return self.clip(self.clip_tokenizer(captions, **TOKENIZE).input_ids).text_embeds

    def byt5_picks(self, captions: list[str]) -> torch.Tensor:
        """ByT5's states of `BYTES` random bytes of each caption, `(n * BYTES, 128)`."""
        states, mask = self.byt5_states(captions)
        # every byte's output shall carry the whole caption, so that attention to any of them serves the U-Net
        positions = (torch.rand(len(captions), BYTES) * mask.sum(1, keepdim=True)).long()
        return states[torch.arange(len(captions))[:, None], positions].flatten(0, 1)

    def targets(self) -> torch.Tensor:
        """What all captions and pictures of an object in a style shall have as their embedding: `(3, num_objects, 128)`."""
        objects, styles = (F.normalize(part, dim=1) * part.shape[1] ** 0.5 for part in (self.objects, self.styles))
        return torch.cat([objects.expand(len(styles), -1, -1), styles[:, None].expand(-1, len(objects), -1)], dim=2)


def similarities(embeds: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled cosine similarities of embeddings `(n, 128)` to all objects and to all styles of `(3, num_objects, 128)`."""
    about = embeds.float().split([CLIP_DIM - STYLE_CHANNELS, STYLE_CHANNELS], dim=1)
    pairs = zip(about, (targets[0, :, :-STYLE_CHANNELS], targets[:, 0, -STYLE_CHANNELS:]))
    return tuple(24 * F.normalize(part, dim=1) @ F.normalize(vectors, dim=1).T for part, vectors in pairs)


def loss_to_targets(
    embeds: torch.Tensor, targets: torch.Tensor, styles: torch.Tensor, objects: torch.Tensor, distance_weight: float
) -> torch.Tensor:
    """Embeddings shall be nearer to the targets of their styles and objects than to others, and like these."""
    of_objects, of_styles = similarities(embeds, targets)
    distance = F.mse_loss(embeds.float(), targets[styles, objects].detach())
    return F.cross_entropy(of_objects, objects) + F.cross_entropy(of_styles, styles) + distance_weight * distance


def looks(icons: Icons, cells: torch.BoolTensor) -> torch.Tensor:
    """
    A vector of unit length for each object, `(num_objects, 96)`: the whitened principal components of its small pictures
    in all styles that are trained on, and some noise to tell twins apart.
    """
    small = F.avg_pool2d(icons.pixels.flatten(0, 1).float() / 255, SIZE // SMALL)
    small = small.unflatten(0, icons.pixels.shape[:2]).flatten(2)
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

    def loss(step: int, rng: random.Random) -> torch.Tensor:
        styles, rows = draw_cells(cells, batch_size)
        begun = step / steps
        name_share = 0.8 if begun < 0.5 else 0.3
        drawn = [(captions.draw([row], style, rng, name_share), style, row) for style, row in zip(styles, rows)]
        texts, styles, rows = zip(*sorted(drawn, key=lambda caption: len(caption[0])))
        short = batch_size * 3 // 4 if begun < 0.5 else batch_size  # for ByT5 is slow, and the slower the longer they are
        with autocast():
            embeds = encoders.clip_embeds(texts), encoders.byt5_picks(texts[:short])
        targets, weight = encoders.targets(), DISTANCE_WEIGHT * min(1, max(0, 5 * (begun - 0.5)))
        styles, rows = torch.tensor(styles), torch.tensor(rows)
        picked = (part[:short].repeat_interleave(BYTES) for part in (styles, rows))
        return loss_to_targets(embeds[0], targets, styles, rows, weight) + loss_to_targets(
            embeds[1], targets, *picked, weight
        )

    @torch.no_grad()
    def report() -> str:
        found = []
        for style in range(len(STYLES)):
            texts = [captions.named(name, style) for name in captions.names]
            encode = encoders.clip_embeds, encoders.byt5_picks
            parts = (torch.cat([one(texts[i : i + 256]) for i in range(0, len(texts), 256)]) for one in encode)
            shares = []
            for embeds, copies in zip(parts, (1, BYTES)):
                objects, styles = (part.argmax(1) for part in similarities(embeds, encoders.targets()))
                right = (objects == torch.arange(len(texts)).repeat_interleave(copies)) & (styles == style)
                shares.append(f"{right.float().mean():.1%}")
            found.append(f"{STYLES[style]} {' and '.join(shares)}")
        return f"names whose object and style CLIP and ByT5 tell: {', '.join(found)}"

    fit("text", encoders, adamw(encoders, 2e-3), loss, steps, work_dir, 100, None, None, report)
    return encoders
