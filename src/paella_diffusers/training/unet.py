"""What training all of the U-Net and training a LoRA adapter of it have in common."""

import argparse
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors import safe_open

from ..pipelines.pipeline_paella import PaellaPipeline
from .conditioning import Encoder, drop_conditioning
from .losses import corrupt, draw_timesteps, paella_loss
from .run import TrainingRun


def add_unet_arguments(parser: argparse.ArgumentParser):
    """The arguments of the functions below."""
    add = parser.add_argument_group("Paella").add_argument
    add("--pretrained", required=True, help="a Paella: a folder or Hub id")
    add("--label-smoothing", type=float, default=0.1)
    add("--clean-weight", type=float, default=0.3, help="loss weight of tokens without noise, at t = 0")
    add("--text-dropout", type=float, default=0.05, help="share of batches without the ByT5 prompt")
    add("--clip-text-dropout", type=float, default=0.9, help="share of batches without the CLIP text")
    add("--clip-image-dropout", type=float, default=0.9, help="share of batches without the CLIP image")
    add("--prompts", nargs="+", default=[], help="what to draw on sample sheets")
    add("--guidance-scale", type=float, default=8.0, help="of sample sheets")


class PaellaTraining:
    """
    A pretrained pipeline with its U-Net in training and the other parts frozen.

    Args:
        run ([`TrainingRun`]): With the arguments above. If its data are what `examples/precompute.py` wrote, the encoders
            that they stand in for are not kept.
    """

    def __init__(self, run: TrainingRun):
        self.run, args, device = run, run.args, run.accelerator.device
        if args.prompts and run.sharded:
            raise ValueError("--prompts draws in one process, but FSDP has a share of the U-Net in each: leave one out.")
        empty, spare = computed_embeddings(args.data)
        without = dict.fromkeys(spare) if not args.prompts else {}
        self.pipe = PaellaPipeline.from_pretrained(args.pretrained, prior=None, prior_scheduler=None, **without)
        multiple = self.pipe.vqgan.patch_size * self.pipe.unet.sample_multiple
        if empty is None and args.resolution % multiple:
            raise ValueError(f"--resolution must be divisible by {multiple}, for VQGAN and U-Net, got {args.resolution}.")
        self.pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            encoded = self.pipe.encode_prompt(args.prompts) if args.prompts else ()
        names = ("prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask")
        names += ("clip_text_embeds", "negative_clip_text_embeds")
        self.prompts = {name: None if part is None else part.to(device) for name, part in zip(names, encoded)}
        self.pipe.register_modules(**dict.fromkeys(spare))
        self.encoder = Encoder(self.pipe, empty).to(device, half=run.accelerator.mixed_precision != "no")

    def loss(self, model, batch: dict) -> torch.Tensor:
        """The published training step (section 3.2): noise some of the tokens, predict all, compare; logs it, too."""
        run, args = self.run, self.run.args
        generator = run.generator()
        dropped = drop_conditioning(generator, args.text_dropout, args.clip_text_dropout, args.clip_image_dropout)
        tokens, conditioning = self.encoder.tokens(batch), self.encoder.conditioning(batch, dropped)
        timestep = draw_timesteps(len(tokens), generator, run.part).to(tokens.device)
        noised, mask = corrupt(tokens, timestep, self.pipe.unet.config.num_vq_embeddings, generator, run.part)
        with run.accelerator.autocast():
            logits = model(noised, timestep, **conditioning).sample
        loss = paella_loss(logits, tokens, mask, timestep, args.label_smoothing, args.clean_weight)
        run.log(loss=loss, accuracy=(logits.movedim(1, -1).argmax(-1) == tokens).float().mean())
        return loss

    def draw(self) -> Image.Image:
        """A row of pictures, one for each of `--prompts`."""
        args = self.run.args
        generator = [torch.Generator().manual_seed(args.seed) for _ in args.prompts]
        images = self.pipe(**self.prompts, guidance_scale=args.guidance_scale, generator=generator).images
        return make_image_grid(images, rows=1, cols=len(images))


def computed_embeddings(data: str) -> tuple[dict[str, torch.Tensor] | None, list[str]]:
    """The embeddings of "" that `examples/precompute.py` left beside its shards, and the components not needed for them."""
    path = Path(data) / "empty.safetensors"
    if not path.is_file():
        return None, []
    with safe_open(path, "pt") as file:
        computed = file.metadata()["computed"].split()
        empty = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    parts = {"prompt_embeds": "text_encoder", "clip_text_embeds": "text_encoder_2", "clip_image_embeds": "image_encoder"}
    spare = [component for name, component in parts.items() if name in computed]
    return {"clip_text_embeds": None} | empty, spare
