"""
Makes the golden data again with a clone of the published code (https://github.com/dome272/Paella), and compares.

    python tests/golden/audit.py CLONE

It runs the published U-Net, VQGAN and `sample` on the weights and inputs in this folder. Nothing of this package is used.
Tokens must be equal, values within 1e-5. The published VQGAN imports a quantizer from torchtools, which is not needed here:
the one below stands in for it. Not compared: the prior, which is another repository's, and the settings of the authors'
notebook that are in no Python file (argmax, quantized, fresh noise, inpainting, typical filtering).
"""

import argparse
import ast
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

HERE = Path(__file__).parent
SAMPLING = {  # trace: arguments of the published `sample`
    "default": {},
    "cfg_ramp_partial_guidance": {
        "steps": 8,
        "temperature": (1.0, 0.5),
        "cfg": (3, 8),
        "sampling_conditional_steps": 5,
    },
    "no_guidance": {"steps": 6, "sampling_conditional_steps": 0},
}


class VectorQuantize(nn.Module):
    """The nearest code, with the gradient of the input."""

    def __init__(self, embedding_size: int, k: int):
        super().__init__()
        self.codebook = nn.Embedding(k, embedding_size)

    def forward(self, x: torch.Tensor, dim: int):
        x = x.movedim(dim, -1)
        indices = torch.cdist(x.flatten(0, -2), self.codebook.weight).argmin(-1).view(x.shape[:-1])
        codes = self.codebook(indices)
        losses = (codes - x.detach()).square().mean(), (codes.detach() - x).square().mean()
        return (x + (codes - x).detach()).movedim(-1, dim), losses, indices

    def idx2vq(self, indices: torch.Tensor, dim: int) -> torch.Tensor:
        return self.codebook(indices).movedim(-1, dim)


def load_module(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_function(path: Path, name: str):
    """One function of a file whose imports are not installed."""
    tree = ast.parse(path.read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    names = {"torch": torch}
    exec(compile(ast.Module([function], []), str(path), "exec"), names)
    return names[name]


class Audit:
    """Compares and counts."""

    def __init__(self):
        self.failed = self.passed = 0

    def __call__(self, name: str, made: torch.Tensor, stored: torch.Tensor):
        if stored.dtype == torch.int64:
            difference = (made != stored).sum().item()
            right, said = difference == 0, f"{difference} tokens of {stored.numel()} differ"
        else:
            difference = (made - stored).abs().max().item()
            right, said = difference <= 1e-5, f"at most {difference:.1e} apart"
        self.passed, self.failed = self.passed + right, self.failed + (not right)
        print(f"{'ok  ' if right else 'FAIL'} {name}: {said}")


def audit_unet(check: Audit, clone: Path, folder: Path, config: dict):
    """The U-Net's logits, and the sampler's tokens."""
    module = load_module(clone / "utils" / "modules.py")
    sample = load_function(clone / "src_distributed" / "utils.py", "sample")
    io, traces = load_file(folder / "paella_io.safetensors"), load_file(folder / "sampler_traces.safetensors")
    unet = module.Paella(**config["paella"]).eval().requires_grad_(False)
    unet.load_state_dict(torch.load(folder / "paella.pt", weights_only=True))
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
        check(f"{folder.name}, logits, {name}", unet(io["tokens"], io["t"], **inputs), io[f"logits_{name}"])
    check(f"{folder.name}, time embedding", unet.gen_r_embedding(io["t"]), io["time_embedding"])

    shape = io["tokens"].shape
    for name, arguments in SAMPLING.items():
        torch.manual_seed(config["seeds"][name])
        check(f"{folder.name}, sampler, {name}", sample(unet, text, empty, shape, **arguments), traces[f"{name}.final"])
    torch.manual_seed(config["seeds"]["img2img"])
    noised = unet.add_noise(traces["img2img.init_tokens"], torch.full((len(io["tokens"]),), 0.6))[0]
    check(f"{folder.name}, noise", noised, traces["img2img.noised_tokens"])
    tokens = sample(unet, text, empty, shape, init_x=noised, steps=8, t_start=0.6)
    check(f"{folder.name}, sampler, img2img", tokens, traces["img2img.final"])
    torch.manual_seed(11)
    first, first_empty = ({name: value[:1] for name, value in inputs.items()} for inputs in (text, empty))
    tokens = sample(unet, first, first_empty, (1, *shape[1:]))
    check(f"{folder.name}, sampler, one image", tokens, load_file(folder / "one_image.safetensors")["final"])

    load_module(clone / "utils" / "alter_attention.py").replace_attention_layers(unet)
    weighted = text | image | {"attn_weights": io["attn_weights"]}
    logits = unet(io["tokens"], io["t"], **weighted)
    check(f"{folder.name}, logits, attention weights", logits, io["logits_attn_weights"])
    torch.manual_seed(config["seeds"]["notebook"])
    tokens = sample(unet, weighted, empty, shape, steps=32, temperature=(1.2, 0.2), renoise_steps=26)
    check(f"{folder.name}, sampler, notebook", tokens, traces["notebook.final"])


def audit_vqgan(check: Audit, clone: Path, folder: Path, config: dict):
    """Pixels to tokens, and back."""
    torchtools = types.ModuleType("torchtools.nn")
    torchtools.VectorQuantize = VectorQuantize
    sys.modules |= {"torchtools": types.ModuleType("torchtools"), "torchtools.nn": torchtools}
    module, io = load_module(clone / "src_distributed" / "vqgan.py"), load_file(folder / "vqgan_io.safetensors")
    vqgan = module.VQModel(**config["vqgan"]).eval().requires_grad_(False)
    vqgan.load_state_dict(torch.load(folder / "vqgan.pt", weights_only=True))
    quantized, latents, indices, loss = vqgan.encode(io["image"])
    for name, made in {
        "quantized": quantized,
        "latents": latents,
        "indices": indices,
        "loss": loss,
        "decode_quantized": vqgan.decode(io["quantized"]),
        "decode_latents": vqgan.decode(io["latents"]),
        "decode_indices": vqgan.decode_indices(io["indices"]),
    }.items():
        check(f"{folder.name}, VQGAN, {name}", made, io[name])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="a folder with the published code")
    clone = parser.parse_args().clone
    check = Audit()
    for folder in (HERE / "a", HERE / "b"):
        config = json.loads((folder / "config.json").read_text())
        audit_unet(check, clone, folder, config)
        audit_vqgan(check, clone, folder, config)
    print(f"{check.passed} are the same, {check.failed} differ")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
