"""
Makes the golden data again with clones of the published code, and compares.

    python tests/golden/audit.py PAELLA ARROZ TORCHTOOLS

PAELLA is a clone of https://github.com/dome272/Paella with its history. ARROZ and TORCHTOOLS are clones of what it requires:
https://github.com/pabloppp/Arroz-Con-Cosas has the prior, https://github.com/pabloppp/pytorch-tools the quantizer.
Every stored value but INPUTS is compared: tokens and masks exactly, floats within 2e-4, relative to those above 1. The time
embedding is the sine of products of up to 10,000: where the last digit of a frequency differs, logits differ by up to 1e-4.

It runs the published models, both `sample` functions, `Diffuzz`, and the trainer's lines from the prediction to the loss.
Nothing of this package is used. Where it departs from the published code:
* Argmax and quantized sampling are published in a notebook only, which is not read. Here they replace `torch.multinomial` in
  the published `sample`.
* Fresh noise, inpainting and typical filtering are in the `sample` of EARLIER, from before version 3. It runs on the U-Net
  of version 3, and `torch.multinomial` replaces its Gumbel draw.
* The training step is in float32 and without dropout.
* Each step of the prior starts from the stored sample before it, as rounding errors grow along the steps.
"""

import argparse
import ast
import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

EARLIER = "b1f88ef"  # the last commit before version 3
INPUTS = {  # file: what is not made again
    "inpaint_trace": {"mask", "seed", "tokens"},
    "paella_io": {
        *("tokens", "t", "byt5", "byt5_uncond", "clip_text", "clip_text_uncond", "clip_image", "clip_image_2"),
        *("attn_weights", "train_mask", "train_random_tokens"),
    },
    "prior_io": {"x", "t", "c", "noise"},
    "sampler_traces": {"img2img.init_tokens"},
    "typical_filter": {"logits"},
    "vqgan_io": {"image"},
}
SAMPLING = {  # trace: arguments of the published `sample`
    "default": {},
    "cfg_ramp_partial_guidance": {
        "steps": 8,
        "temperature": (1.0, 0.5),
        "cfg": (3, 8),
        "sampling_conditional_steps": 5,
    },
    "no_guidance": {"steps": 6, "sampling_conditional_steps": 0},
    "argmax": {"steps": 6},
    "quant_tail": {"steps": 8},
}


class Golden:
    """One folder of golden data, which compares and counts."""

    def __init__(self, folder: Path):
        self.folder, self.passed, self.failed = folder, 0, 0
        self.config = json.loads((folder / "config.json").read_text())
        self.files = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
        self.left = {(file, name) for file, values in self.files.items() for name in values.keys() - INPUTS.get(file, set())}

    def load(self, model: nn.Module, name: str) -> nn.Module:
        model.load_state_dict(torch.load(self.folder / f"{name}.pt", weights_only=True))
        return model.eval().requires_grad_(False)

    def seed(self, name: str):
        torch.manual_seed(self.config["seeds"][name])

    def compare(self, file: str, name: str, made: torch.Tensor):
        stored = self.files[file][name]
        self.left.remove((file, name))
        if made.shape != stored.shape:
            right, said = False, f"{tuple(made.shape)} instead of {tuple(stored.shape)}"
        elif stored.is_floating_point():
            difference = ((made - stored).abs() / stored.abs().clamp(min=1)).max().item()
            right, said = difference <= 2e-4, f"at most {difference:.1e} apart"
        else:
            difference = (made != stored).sum().item()
            right, said = difference == 0, f"{difference} of {stored.numel()} differ"
        self.passed, self.failed = self.passed + right, self.failed + (not right)
        print(f"{'ok  ' if right else 'FAIL'} {self.folder.name}/{file} {name}: {said}")


class Recorded:
    """A U-Net that keeps the tokens which `sample` gives it, each grid once: those drawn, and those re-noised."""

    def __init__(self, unet: nn.Module):
        self.unet, self.num_labels, self.grids = unet, unet.num_labels, []

    def keep(self, tokens: torch.Tensor):
        if not self.grids or tokens is not self.grids[-1]:
            self.grids.append(tokens)

    def __call__(self, tokens: torch.Tensor, t: torch.Tensor, **inputs) -> torch.Tensor:
        self.keep(tokens)
        return self.unet(tokens, t, **inputs)

    def add_noise(self, tokens: torch.Tensor, t: torch.Tensor, random_x=None):
        self.keep(tokens)
        return self.unet.add_noise(tokens, t, random_x=random_x)


class RecordedEarlier(Recorded):
    """As the `sample` of EARLIER calls it: with 1 - t, and with zeros as the condition of the unconditional pass."""

    def __init__(self, unet: nn.Module, text: dict, empty: dict):
        super().__init__(unet)
        self.text, self.empty = text, empty

    def __call__(self, tokens: torch.Tensor, condition: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return super().__call__(tokens, 1 - r, **(self.text if condition.any() else self.empty))

    def add_noise(self, tokens: torch.Tensor, r: torch.Tensor, random_x=None):
        return super().add_noise(tokens, 1 - r, random_x)


def load_module(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_definition(code: str, name: str, **names):
    """One function or class of code whose imports are not installed; `names` has what it uses beside torch."""
    (definition,) = (node for node in ast.parse(code).body if getattr(node, "name", None) == name)
    names |= {"torch": torch, "nn": nn}
    exec(compile(ast.Module([definition], []), name, "exec"), names)
    return names[name]


def audit_vqgan(golden: Golden, paella: Path) -> nn.Module:
    """Pixels to tokens, and back."""
    io = golden.files["vqgan_io"]
    vqgan = golden.load(load_module(paella / "src_distributed" / "vqgan.py").VQModel(**golden.config["vqgan"]), "vqgan")
    for name, made in zip(("quantized", "latents", "indices", "loss"), vqgan.encode(io["image"])):
        golden.compare("vqgan_io", name, made)
    golden.compare("vqgan_io", "decode_quantized", vqgan.decode(io["quantized"]))
    golden.compare("vqgan_io", "decode_latents", vqgan.decode(io["latents"]))
    golden.compare("vqgan_io", "decode_indices", vqgan.decode_indices(io["indices"]))
    return vqgan


def audit_prior(golden: Golden, arroz: Path):
    """The predicted noise, and both samplers."""
    io, module = golden.files["prior_io"], load_module(arroz / "arroz" / "diffusion.py")
    diffuzz = module.Diffuzz()
    cls = load_definition((arroz / "arroz" / "modules.py").read_text(), "PriorModel", np=np, math=math)
    prior = golden.load(cls(**golden.config["prior"]), "prior")
    golden.compare("prior_io", "noised", diffuzz.diffuse(io["x"], io["t"], io["noise"])[0])
    golden.compare("prior_io", "pred_noise", prior(io["x"], io["t"], io["c"]))
    for name, sampler in module.sampler_dict.items():
        made, stored = [], iter(io[f"{name}_steps"])

        class FromStored(sampler):
            def step(self, *args, made=made, stored=stored):
                made.append(super().step(*args))
                return next(stored)

        golden.seed(f"prior_{name}")
        diffuzz.sample(prior, {"c": io["c"]}, io["x"].shape, timesteps=len(io[f"{name}_steps"]), sampler=FromStored)
        golden.compare("prior_io", f"{name}_steps", torch.stack(made))


def audit_training(golden: Golden, paella: Path, unet: nn.Module):
    """The loss of one batch, and its gradient's norm."""
    io, code = golden.files["paella_io"], (paella / "src_distributed" / "train.py").read_text()
    noised, _ = unet.add_noise(io["tokens"], io["t"], io["train_mask"], io["train_random_tokens"])
    weight = unet.get_loss_weight(io["t"], io["train_mask"])
    names = {"nn": nn, "model": unet.requires_grad_(True), "t": io["t"], "latents": io["tokens"], "noised_latents": noised}
    names |= {"byt_embeddings": io["byt5"], "clip_embeddings": io["clip_text"], "clip_image_embeddings": io["clip_image"]}
    criterion, lines = re.search(r"(criterion = .*?)\n.*?( +pred = .*?)\n *loss_adjusted", code, re.DOTALL).groups()
    exec(f"{criterion}\n{textwrap.dedent(lines)}", names | {"loss_weight": weight}, names)
    names["loss"].backward()
    golden.compare("paella_io", "train_noised", noised)
    golden.compare("paella_io", "train_weight", weight)
    golden.compare("paella_io", "train_loss", names["loss"].detach())
    golden.compare("paella_io", "train_grad_norm", nn.utils.clip_grad_norm_(unet.parameters(), 1.0))
    unet.requires_grad_(False)


def audit_unet(golden: Golden, paella: Path, vqgan: nn.Module):
    """The U-Net's logits, a training step, and the sampler's tokens."""
    io = golden.files["paella_io"]
    unet = golden.load(load_module(paella / "utils" / "modules.py").Paella(**golden.config["paella"]), "paella")
    text = {"byt5": io["byt5"], "clip": io["clip_text"]}
    empty = {"byt5": io["byt5_uncond"], "clip": io["clip_text_uncond"]}
    image = {"clip_image": io["clip_image"]}
    for name, inputs in {
        "byt5": {"byt5": io["byt5"]},
        "byt5_text": text,
        "byt5_text_image": text | image,
        "two_images": text | {"clip_image": [io["clip_image"], io["clip_image_2"]]},
        "image_only": {"byt5": io["byt5"]} | image,
    }.items():
        golden.compare("paella_io", f"logits_{name}", unet(io["tokens"], io["t"], **inputs))
    golden.compare("paella_io", "time_embedding", unet.gen_r_embedding(io["t"]))
    audit_training(golden, paella, unet)
    audit_earlier(golden, paella, unet, text, empty)

    sample = load_definition((paella / "src_distributed" / "utils.py").read_text(), "sample")
    traces, shape = golden.files["sampler_traces"], io["tokens"].shape

    def compare_trace(name: str, inputs: dict, **arguments):
        recorded = Recorded(unet)
        final = sample(recorded, inputs, empty, shape, **arguments)
        golden.compare("sampler_traces", f"{name}.steps", torch.stack([*recorded.grids[1:], final]))
        golden.compare("sampler_traces", f"{name}.final", final)

    def quantize(scores: torch.Tensor) -> torch.Tensor:
        return vqgan.vquantizer(scores @ vqgan.vquantizer.codebook.weight)[-1][:, None]

    multinomial, draws = torch.multinomial, itertools.count()
    rules = {
        "argmax": lambda scores, _: scores.argmax(1, keepdim=True),
        "quant_tail": lambda scores, _: multinomial(scores, 1) if next(draws) < 5 else quantize(scores),
    }
    for name, arguments in SAMPLING.items():
        golden.seed(name)
        with patch.object(torch, "multinomial", rules.get(name, multinomial)):
            compare_trace(name, text, **arguments)
    golden.seed("img2img")
    noised, _ = unet.add_noise(traces["img2img.init_tokens"], torch.full(shape[:1], 0.6))
    golden.compare("sampler_traces", "img2img.noised_tokens", noised)
    compare_trace("img2img", text, init_x=noised, steps=8, t_start=0.6)
    torch.manual_seed(11)
    first, first_empty = ({name: value[:1] for name, value in inputs.items()} for inputs in (text, empty))
    golden.compare("one_image", "final", sample(unet, first, first_empty, (1, *shape[1:])))

    load_module(paella / "utils" / "alter_attention.py").replace_attention_layers(unet)
    weighted = text | image | {"attn_weights": io["attn_weights"]}
    golden.compare("paella_io", "logits_attn_weights", unet(io["tokens"], io["t"], **weighted))
    golden.seed("notebook")
    compare_trace("notebook", weighted, steps=32, temperature=(1.2, 0.2), renoise_steps=26)


def audit_earlier(golden: Golden, paella: Path, unet: nn.Module, text: dict, empty: dict):
    """Fresh noise, inpainting and typical filtering."""
    command = ["git", "-C", paella, "show", f"{EARLIER}:utils.py"]
    code = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def draw(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(logits.div(temperature).softmax(-1), 1)[:, 0]

    sample = load_definition(code, "sample", gumbel_sample=draw)
    inpainting, shape = golden.files["inpaint_trace"], golden.files["paella_io"]["tokens"].shape
    known = {"x": inpainting["tokens"], "mask": inpainting["mask"]}
    for file, prefix, seed, arguments in (
        ("sampler_traces", "fresh_noise.", golden.config["seeds"]["fresh_noise"], {"renoise_mode": "rand"}),
        ("inpaint_trace", "", inpainting["seed"].item(), known),
    ):
        recorded, condition = RecordedEarlier(unet, text, empty), torch.ones(len(text["clip"]), 1)
        arguments |= {"T": 8, "size": shape[1:], "temp_range": (0.7, 0.3), "renoise_steps": 7, "classifier_free_scale": 8}
        torch.manual_seed(seed)
        final = sample(recorded, condition, typical_filtering=False, **arguments)
        golden.compare(file, f"{prefix}steps", torch.stack([*recorded.grids[1:], final]))
        golden.compare(file, f"{prefix}final", final)

    logits, removed = golden.files["typical_filter"]["logits"], []
    keep_removed = lambda logits, temperature: removed.append(logits.isinf()) or logits.argmax(1)
    sample = load_definition(code, "sample", gumbel_sample=keep_removed)
    grid = logits.T[None, :, :, None]
    for mass, min_tokens in ((0.2, 1), (0.5, 1), (0.9, 5)):
        sample(
            lambda *_: grid,
            torch.ones(1, 1),
            x=torch.zeros(1, len(logits), 1),
            T=1,
            renoise_steps=0,
            typical_mass=mass,
            typical_min_tokens=min_tokens,
        )
        golden.compare("typical_filter", f"removed_mass{mass}_min{min_tokens}", removed[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("paella", "arroz", "torchtools"):
        parser.add_argument(name, type=Path)
    clones = parser.parse_args()
    sys.path.insert(0, str(clones.torchtools))  # the published VQGAN imports it
    passed = failed = 0
    for name in ("a", "b"):
        golden = Golden(Path(__file__).parent / name)
        vqgan = audit_vqgan(golden, clones.paella)
        audit_unet(golden, clones.paella, vqgan)
        audit_prior(golden, clones.arroz)
        for file, value in sorted(golden.left):
            print(f"FAIL {name}/{file} {value}: not made")
        passed, failed = passed + golden.passed, failed + golden.failed + len(golden.left)
    print(f"{passed} are the same, {failed} differ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
