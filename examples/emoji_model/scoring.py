"""What the model can do, in figures: the table that the script prints last, and `benchmarks/emoji_quality.py --table`."""

import hashlib
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from paella_diffusers import PaellaPipeline
from paella_diffusers.loaders.atomic import atomic_file

from .captions import BENCHMARK, Captions
from .data import STYLES, Icons, distances, is_nearest
from .vqgan import psnr as reconstruction_psnr


def draw_tokens(pipe: PaellaPipeline, prompts: list[str], condition_image: list | None = None, **kwargs) -> torch.LongTensor:
    """The tokens of one picture a prompt, each from its own seed."""
    parts = []
    for i in range(0, len(prompts), 50):
        generators = [torch.Generator().manual_seed(seed) for seed in range(i, min(i + 50, len(prompts)))]
        rows = None if condition_image is None else [[image] for image in condition_image[i : i + 50]]
        call = {name: value[i : i + 50] if torch.is_tensor(value) else value for name, value in kwargs.items()}
        call |= {"generator": generators, "condition_image": rows, "output_type": "latent"}
        parts.append(pipe(None if "prompt_embeds" in call else prompts[i : i + 50], **call).images)
    return torch.cat(parts)


@torch.no_grad()
def decode(pipe: PaellaPipeline, tokens: torch.LongTensor) -> torch.Tensor:
    """Pictures in [0, 1]."""
    return torch.cat([pipe.vqgan.decode_indices(part).sample.clamp(0, 1) for part in tokens.split(50)])


def draw(pipe: PaellaPipeline, prompts: list[str], condition_image: list | None = None, **kwargs) -> torch.Tensor:
    """One picture a prompt, each from its own seed: `(n, 3, height, width)` in [0, 1]."""
    return decode(pipe, draw_tokens(pipe, prompts, condition_image, **kwargs))


def nearest(pictures: torch.Tensor, images: torch.Tensor) -> list[int]:
    """For each picture the index of the nearest image, by squared differences of pixels."""
    return torch.cdist(pictures.flatten(1), images.flatten(1)).argmin(1).tolist()


def share(right: torch.Tensor | list[bool]) -> float:
    return torch.as_tensor(right).float().mean().item()


def percent(value: float) -> str:
    return f"{value:.1%}"


@dataclass
class Scorer:
    """
    Measures a pipeline.

    Args:
        pipe ([`PaellaPipeline`]): The model.
        icons ([`Icons`]): All pictures.
        captions ([`Captions`]): For the style phrases and keywords.
        cells (`torch.BoolTensor` of shape `(3, num_objects)`): Which pictures it was trained on.
        limit (`int`, *optional*): At most so many pictures in each measurement.
    """

    pipe: PaellaPipeline
    icons: Icons
    captions: Captions
    cells: torch.BoolTensor
    limit: int | None = None

    def __post_init__(self):
        self.pipe.set_progress_bar_config(disable=True)
        self.flat = self.icons.images(0)
        rows = self.cells[0].nonzero().flatten().tolist()
        self.known = rows[: self.limit]  # objects whose flat picture was trained on
        self.some = random.Random(0).sample(rows, min(200, self.limit or 200, len(rows)))
        self.names = [self.icons.names[row] for row in self.some]

    # -------------------------------------------------------------------------------------------------- the measurements

    def measurements(self) -> dict[str, Callable[[], dict]]:
        return {
            "vqgan": self.vqgan,
            "names": lambda: self.crispness(12),
            "names, 4 steps": lambda: self.crispness(4),
            "held out": self.held_out,
            "sentences": self.sentences,
            "alone": self.alone,
            "transfer": self.transfer,
            "canvases": self.canvases,
            "guidance": self.guidance,
            "negative": self.negative,
        }

    def is_object(self, pictures: torch.Tensor, rows: list[int], images: torch.Tensor) -> torch.BoolTensor:
        """Whether the nearest of the images is that of the object `rows[i]`, or looks like it."""
        return is_nearest(distances(pictures, images), [[row] for row in rows])

    def right(self, **call) -> float:
        """The share of the 200 names that are drawn."""
        prompts = [""] * len(self.names) if "condition_image" in call else self.names
        return share(self.is_object(draw(self.pipe, prompts, **call), self.some, self.flat))

    def vqgan(self) -> dict:
        rows = slice(self.limit)
        return {style: reconstruction_psnr(self.pipe.vqgan, self.icons.images(i, rows)) for i, style in enumerate(STYLES)}

    @torch.no_grad()
    def crispness(self, steps: int) -> dict:
        """All flat icons that were trained on, by their names."""
        tokens = draw_tokens(self.pipe, [self.icons.names[row] for row in self.known], num_inference_steps=steps)
        images, pictures = self.flat[self.known], decode(self.pipe, tokens)
        expected = torch.cat([self.pipe.vqgan.encode(part).indices for part in images.split(64)])
        errors = (pictures - images).square().mean((1, 2, 3)).clamp(min=1e-10)
        return {
            "psnr": -10 * errors.log10().mean().item(),
            "tokens": share(tokens == expected),
            "right": share(self.is_object(pictures, self.known, self.flat)),
            "count": len(self.known),
        }

    def held_out(self) -> dict:
        """Objects in the style in which they were never seen; by style, and with what copying another style would reach."""
        classify, result = self.style_classifier(), {}
        for index, style in enumerate(STYLES):
            rows = (~self.cells[index]).nonzero().flatten().tolist()[: self.limit]
            if not rows:
                continue
            prompts = [self.captions.named(self.icons.names[row], index) for row in rows]
            pictures, images = draw(self.pipe, prompts), self.icons.images(index)
            copied = self.icons.images(1 if index == 0 else 0, rows)
            result[style] = {
                "style": share(classify(pictures) == index),
                "style, real": share(classify(images[rows]) == index),
                "object": share(self.is_object(pictures, rows, images)),
                "object, copied": share(self.is_object(copied, rows, images)),
                "object, VQGAN": share(self.is_object(self.through_vqgan(images[rows]), rows, images)),
                "count": len(rows),
            }
        return result

    @torch.no_grad()
    def through_vqgan(self, images: torch.Tensor) -> torch.Tensor:
        return decode(self.pipe, torch.cat([self.pipe.vqgan.encode(part).indices for part in images.split(64)]))

    def style_classifier(self, steps: int = 300) -> Callable[[torch.Tensor], torch.Tensor]:
        """A network that tells the style, trained on pictures of the training cells, as they are and through the VQGAN."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pixels = self.icons.pixels
            cells = self.cells.nonzero()[torch.randperm(int(self.cells.sum()))[: 10 * (self.limit or 120)]]
            images = pixels[cells[:, 0], cells[:, 1]].float() / 255
            images, targets = torch.cat([images, self.through_vqgan(images)]), cells[:, 0].repeat(2)
            layers, channels = [], 3
            for out in (24, 48, 64):
                layers += [nn.Conv2d(channels, out, 4, stride=2, padding=1), nn.BatchNorm2d(out), nn.GELU()]
                channels = out
            network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, len(STYLES)))
            optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
            for _ in range(min(steps, 3 * (self.limit or steps))):
                rows = torch.randint(len(images), (64,))
                loss = F.cross_entropy(network(images[rows]), targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        network.eval().requires_grad_(False)
        return lambda pictures: network(pictures).argmax(1)

    def sentences(self) -> dict:
        """The 80 benchmark sentences, with and without the prior."""
        sentences = dict(list(json.loads(BENCHMARK.read_text()).items())[: self.limit])
        result = {}
        for prior in (False, True):
            found = nearest(draw(self.pipe, list(sentences), use_prior=prior), self.flat)
            right = [self.icons.names[row] in expected for row, expected in zip(found, sentences.values())]
            result["with the" if prior else "without the"] = share(right)
        return result

    @torch.no_grad()
    def alone(self) -> dict:
        """Names by each conditioning alone, and with the prior."""
        empty = self.pipe.encode_prompt([""] * len(self.names), do_classifier_free_guidance=False)[0]
        clip_text = self.pipe.encode_prompt(self.names, do_classifier_free_guidance=False)[4]
        pictures = self.pipe.image_processor.postprocess(self.flat[self.some], do_denormalize=[False] * len(self.some))
        byt5 = Scorer(self.without_clip_text(), self.icons, self.captions, self.cells, self.limit)
        return {
            "default": self.right(),
            "ByT5": byt5.right(),
            "CLIP text": self.right(prompt_embeds=empty, clip_text_embeds=clip_text),
            "image": self.right(condition_image=pictures),
            "prior": self.right(use_prior=True),
            "without the prior": self.right(use_prior=False),
        }

    def without_clip_text(self) -> PaellaPipeline:
        components = self.pipe.components | {"text_encoder_2": None, "tokenizer_2": None, "prior": None}
        return PaellaPipeline(**components, use_prior=False)

    def transfer(self) -> dict:
        """A name, with the picture of another object in another style."""
        classify, result = self.style_classifier(), {}
        for index in (1, 2):
            rows = [row for row in self.some if self.cells[index, row]][:60]
            others = rows[1:] + rows[:1]
            pictures = self.pipe.image_processor.postprocess(
                self.icons.images(index, others), do_denormalize=[False] * len(rows)
            )
            drawn = draw(self.pipe, [self.icons.names[row] for row in rows], pictures)
            right = self.is_object(drawn, rows, self.icons.images(index))
            result[STYLES[index]] = {"style": share(classify(drawn) == index), "object": share(right)}
        return result

    def canvases(self) -> dict:
        """Two icons side by side on 128 × 64 pixels, and one in the middle of 96 × 96 and 128 × 128."""
        rows = self.some[:60]
        pairs = list(zip(rows, rows[1:] + rows[:1]))
        drawn = draw(self.pipe, [f"{self.icons.names[a]} and {self.icons.names[b]}" for a, b in pairs], width=128, height=64)
        both = [
            share(self.is_object(part, [pair[side] for pair in pairs], self.flat))
            for side, part in enumerate(drawn.split(64, dim=3))
        ]
        result = {"two, 128 × 64": statistics.mean(both)}
        for size in (96, 128):
            drawn = draw(self.pipe, [self.icons.names[row] for row in rows], width=size, height=size)
            edge = (size - 64) // 2
            right = self.is_object(drawn[..., edge : edge + 64, edge : edge + 64], rows, self.flat)
            result[f"one, {size} × {size}"] = share(right)
        return result

    def guidance(self) -> dict:
        return {f"{scale:g}": self.right(guidance_scale=scale) for scale in (1.0, 2.0, 5.0, 8.0, 15.0)}

    def negative(self) -> dict:
        """
        Prompts are keywords of two to six objects. The name of the object that is drawn becomes the negative prompt of a
        second picture, which is to be of another object of this keyword.
        """
        objects = defaultdict(set)
        for row, words in enumerate(self.captions.keywords):
            for word in words:
                objects[word].add(row)
        words = sorted(word for word, rows in objects.items() if 2 <= len(rows) <= 6)
        words = random.Random(0).sample(words, min(100, self.limit or 100, len(words)))
        before = nearest(draw(self.pipe, words), self.flat)
        after = nearest(draw(self.pipe, words, negative_prompt=[self.icons.names[row] for row in before]), self.flat)
        return {
            "an object of the keyword": share([row in objects[word] for row, word in zip(before, words)]),
            "another object with the name of the first as negative prompt": share(
                [one != other for one, other in zip(before, after)]
            ),
            "an object of the keyword with the negative prompt": share(
                [row in objects[word] for row, word in zip(after, words)]
            ),
        }


def score(scorer: Scorer, cache: Path | None = None, say: Callable[[str], None] = print) -> dict:
    """
    All measurements, by name. Each is kept in the file `cache` as soon as it is done, and read from there if the model and
    the limit are still the same.
    """
    measured = {"model": digest(scorer.pipe), "limit": scorer.limit} if cache is not None else None
    kept = json.loads(cache.read_text()) if cache is not None and cache.exists() else {}
    results = kept["results"] if kept and kept.get("measured") == measured else {}
    for name, measure in scorer.measurements().items():
        if name in results:
            continue
        results[name] = measure()
        say(f"{name}: {results[name]}")
        if cache is not None:
            with atomic_file(cache) as unfinished:
                unfinished.write_text(json.dumps({"measured": measured, "results": results}, indent=1) + "\n")
    return results


def digest(pipe: PaellaPipeline) -> str:
    """SHA-256 of a pipeline's weights, and of the configurations of its scheduler and guidance."""
    sha = hashlib.sha256()
    for part in (pipe.scheduler, pipe.guider):
        sha.update(part.to_json_string().encode() if part is not None else b"")
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module):
            for key, weight in part.state_dict().items():
                sha.update(f"{name}.{key} {weight.dtype}".encode())
                sha.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def table(results: dict, folder: Path) -> str:
    """The results beside what was aimed at, as Markdown, with the size of the model's folder."""
    rows = []
    for name, aim in (("names", "25.5 dB, 96 % of tokens, 97 % right"), ("names, 4 steps", "24.5 dB")):
        one = results[name]
        measured = f"{one['psnr']:.1f} dB, {percent(one['tokens'])} of tokens, {percent(one['right'])} right"
        rows.append((f"{one['count']} flat icons by their {name}", measured, aim))
    for style, one in results["held out"].items():
        aim = f"style 85 %, object {55 if style == 'high contrast' else 80} %"
        rows.append((f"{one['count']} objects in a style that is new for them: {style}", both(one), aim))
        rows.append(("… the real pictures", f"style {percent(one['style, real'])}", ""))
        rows.append(("… through the VQGAN", f"object {percent(one['object, VQGAN'])}", ""))
        rows.append(("… copied from another style", f"object {percent(one['object, copied'])}", ""))
    for name, value in results["sentences"].items():
        rows.append((f"80 sentences, {name} prior", percent(value), "65 %"))
    for name, value in results["alone"].items():
        rows.append((f"names, {name}", percent(value), "97 %" if name == "default" else "85 %"))
    for style, one in results["transfer"].items():
        rows.append((f"a name with another object's picture: {style}", both(one), "can be seen"))
    rows += [(f"icons on a canvas: {name}", percent(value), "") for name, value in results["canvases"].items()]
    rows += [(f"names, guidance scale {scale}", percent(value), "90 %") for scale, value in results["guidance"].items()]
    rows += [(f"keywords: {name}", percent(value), "") for name, value in results["negative"].items()]
    aims = {"flat": "29 dB", "3d": "27.5 dB", "high contrast": "25 dB"}
    rows += [(f"VQGAN, {style}", f"{value:.1f} dB", aims[style]) for style, value in results["vqgan"].items()]
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    rows.append(("all files", f"{size / 1e6:.1f} MB", "32 MB"))
    return "\n".join(["| | measured | aim |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def both(one: dict) -> str:
    return f"style {percent(one['style'])}, object {percent(one['object'])}"
