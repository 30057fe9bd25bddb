"""
How much memory does a picture take at full size, stage by stage, and how long does loading last?

    python benchmarks/memory.py --work-dir /tmp/memory [--modes plain low_memory embeddings single_file]

Random weights of the published sizes in bfloat16 (ByT5-XL's encoder, CLIP-H's text encoder, prior, U-Net, VQGAN), made once
in the work folder: about 15 GB. Each mode runs in a process of its own, 256 × 256 pixels; memory is its peak resident size
(VmHWM), pages of mapped files included.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights

from paella_diffusers import PaellaPipeline, PaellaPrior, PaellaScheduler, PaellaUNet, VQModel

MODES = {
    "plain": "`from_pretrained`, everything in memory",
    "low_memory": "`low_memory=True`",
    "embeddings": "`low_memory=True`, U-Net and VQGAN alone, embeddings given",
    "single_file": "`PaellaUNet.from_single_file`, float32 to bfloat16",
}
GIB = 2**30


def published_models() -> dict[str, torch.nn.Module]:
    """The models of a picture at the published sizes, as components of the pipeline: without weights."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    byt5 = T5Config(
        vocab_size=384, d_model=2560, d_kv=64, d_ff=6720, num_layers=36, num_heads=32, feed_forward_proj="gated-gelu"
    )
    clip = CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, projection_dim=1024,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with init_empty_weights():
        return {
            "text_encoder": T5EncoderModel(byt5),
            "text_encoder_2": CLIPTextModelWithProjection(clip),
            "prior": PaellaPrior(),
            "unet": PaellaUNet(),
            "vqgan": VQModel(),
        }


def random_weights(model: torch.nn.Module, dtype: torch.dtype, distinct_layers: int = 0) -> torch.nn.Module:
    """
    Give a model that has none its weights. With `distinct_layers`, equal layers take turns with the weights of so many.
    """
    noise = torch.randn(1_000_003).mul(0.02).to(dtype)  # repeated: a thousand million would take half a minute
    weights = {}
    for name, parameter in list(model.named_parameters()):
        key = name
        if distinct_layers:
            key = re.sub(r"\b(blocks?)\.(\d+)", lambda part: f"{part[1]}.{int(part[2]) % distinct_layers}", name)
        if key not in weights:
            count = parameter.numel()
            values = noise.expand(count // len(noise) + 1, -1).reshape(-1)[:count].clone()
            weights[key] = torch.nn.Parameter(values.view(parameter.shape), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, weights[key])
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.to(dtype).eval()


def save_pipeline(folder: Path, dtype: torch.dtype):
    """A pipeline's folder with random weights; only one model's at a time are in memory."""
    from diffusers import DDPMWuerstchenScheduler
    from transformers import ByT5Tokenizer

    models = published_models()
    pipe = PaellaPipeline(
        **models,
        scheduler=PaellaScheduler(),
        tokenizer=ByT5Tokenizer(),
        tokenizer_2=ByT5Tokenizer(),  # any: its tokens are in the vocabulary
        prior_scheduler=DDPMWuerstchenScheduler(),
    )
    for name, component in pipe.components.items():
        if name in models:
            random_weights(component, dtype).save_pretrained(folder / name)
            component.to("meta")
        elif hasattr(component, "save_pretrained"):
            component.save_pretrained(folder / name)
    pipe.save_config(folder)


def make(folder: Path):
    """The converted folder and the published U-Net."""
    if (folder / "done").exists():
        return
    save_pipeline(folder / "pipeline", torch.bfloat16)
    with init_empty_weights():
        unet = PaellaUNet()
    torch.save(random_weights(unet, torch.float32).to_original_state_dict(), folder / "paella_v3.pt")
    (folder / "done").touch()


def peak() -> float:
    """The peak in bytes since the last call; not a number on other systems than Linux."""
    if sys.platform != "linux":
        return float("nan")
    lines = Path("/proc/self/status").read_text().splitlines()
    value = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    Path("/proc/self/clear_refs").write_text("5")
    return value


def run(mode: str, folder: Path, steps: int) -> dict:
    """In this process: peaks by stage, and seconds to load and to draw."""
    peaks, start = {"imports": peak()}, time.perf_counter()
    if mode == "single_file":
        PaellaUNet.from_single_file(folder / "paella_v3.pt", dtype=torch.bfloat16)
        return {"peaks": peaks | {"load": peak()}, "load": time.perf_counter() - start, "draw": float("nan")}
    leave_out = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "prior", "prior_scheduler")
    pipe = PaellaPipeline.from_pretrained(
        folder / "pipeline",
        dtype=torch.bfloat16,
        low_memory=mode != "plain",
        **dict.fromkeys(leave_out) if mode == "embeddings" else {},
    )
    peaks["load"], loaded = peak(), time.perf_counter()

    def with_peak(stage, method, before=None):
        def call(*args, **kwargs):
            if before is not None:
                peaks[before] = peak()
            result = method(*args, **kwargs)
            peaks[stage] = peak()
            return result

        return call

    pipe.encode_prompt, pipe.sample_prior = with_peak("text", pipe.encode_prompt), with_peak("prior", pipe.sample_prior)
    pipe.decode = with_peak("decode", pipe.decode, before="denoise")
    call = {"num_inference_steps": steps, "prior_num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)}
    if mode == "embeddings":
        text, clip = torch.randn(1, 32, 2560), torch.randn(1, 1024)
        call |= {"prompt_embeds": text, "negative_prompt_embeds": text[:, :1], "clip_text_embeds": clip}
        call |= {"negative_clip_text_embeds": clip, "clip_image_embeds": clip}
    else:
        call["prompt"] = "an astronaut riding a horse"
    pipe(**call)
    return {"peaks": peaks, "load": loaded - start, "draw": time.perf_counter() - loaded}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("memory"))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--child", choices=list(MODES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run(args.child, args.work_dir, args.steps)))
        return
    command = [sys.executable, __file__, "--work-dir", str(args.work_dir), "--steps", str(args.steps)]
    subprocess.run([sys.executable, "-c", MAKE, str(Path(__file__).parent), str(args.work_dir)], check=True)
    stages = ["imports", "load", "text", "prior", "denoise", "decode"]
    print(f"| mode | {' | '.join(stages)} | peak | loading | picture, {args.steps} steps |")
    print("|---" * (len(stages) + 4) + "|")
    for mode in args.modes:
        output = subprocess.run([*command, "--child", mode], check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        peaks = result["peaks"]
        figures = " | ".join(f"{peaks[stage] / GIB:.2f}" if stage in peaks else "" for stage in stages)
        drawn = "" if result["draw"] != result["draw"] else f"{result['draw']:.0f} s"
        print(
            f"| {MODES[mode]} | {figures} | {max(peaks.values()) / GIB:.2f} GiB | {result['load']:.1f} s | {drawn} |",
            flush=True,
        )


MAKE = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import memory; memory.make(Path(sys.argv[2]))"

if __name__ == "__main__":
    main()
