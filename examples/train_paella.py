"""
Train Paella's U-Net, from scratch or onwards (https://huggingface.co/papers/2211.07292, section 3.2; the released recipe).

    accelerate launch examples/train_paella.py --pretrained dome272/Paella --data pictures --output-dir my-paella

`--pretrained` gives the VQGAN, the encoders and, without `--from-scratch`, the U-Net to begin with. `--data` may be what
`precompute.py` has written: then the encoders that it stands in for are not loaded.
"""

import json
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from safetensors.torch import load_file

from paella_diffusers import PaellaPipeline, PaellaUNet
from paella_diffusers.training import corrupt, draw_timesteps, paella_loss
from paella_diffusers.training.conditioning import Encoder, drop_conditioning
from paella_diffusers.training.run import TrainingRun, training_arguments


def parse_args(args=None):
    parser = training_arguments(__doc__)
    add = parser.add_argument_group("Paella").add_argument
    add("--pretrained", required=True, help="a Paella: a folder or Hub id")
    add("--from-scratch", action="store_true", help="begin with a new U-Net, of the same sizes")
    add("--unet-config", type=json.loads, default={}, help="sizes of the new U-Net that shall differ, as JSON")
    add("--label-smoothing", type=float, default=0.1)
    add("--clean-weight", type=float, default=0.3, help="loss weight of tokens without noise, at t = 0")
    add("--text-dropout", type=float, default=0.05, help="share of batches without the ByT5 prompt")
    add("--clip-text-dropout", type=float, default=0.9, help="share of batches without the CLIP text")
    add("--clip-image-dropout", type=float, default=0.9, help="share of batches without the CLIP image")
    add("--prompts", nargs="+", default=[], help="what to draw on sample sheets; their guidance is --guidance-scale")
    add("--guidance-scale", type=float, default=8.0)
    return parser.parse_args(args)


def load_pipeline(run: TrainingRun) -> tuple[PaellaPipeline, Encoder]:
    """The pretrained pipeline, and its frozen parts at work, as far as the data do not have what they would compute."""
    args, parts = run.args, {}
    computed = Path(args.data) / "empty.safetensors"  # written by precompute.py
    empty = None
    if computed.is_file():
        empty = load_file(computed)
        parts = {"text_encoder": None} if "prompt_embeds" in empty else {}
        parts |= {"text_encoder_2": None} if "clip_text_embeds" in empty else {}
        empty = {"clip_text_embeds": None} | empty
    pipe = PaellaPipeline.from_pretrained(args.pretrained, **parts)
    pipe.set_progress_bar_config(disable=True)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(run.accelerator.mixed_precision)
    return pipe, Encoder(pipe, empty).to(run.accelerator.device, half)


def main(args):
    run = TrainingRun(args)
    pipe, encoder = load_pipeline(run)
    if args.from_scratch:
        torch.manual_seed(args.seed)  # the same in every process
        pipe.unet = PaellaUNet.from_config({**pipe.unet.config, **args.unet_config})
    unet = pipe.unet.requires_grad_(True)
    model = run.prepare(unet)
    run.load_data()

    def draw():
        generator = [torch.Generator().manual_seed(args.seed) for _ in args.prompts]
        images = pipe(args.prompts, guidance_scale=args.guidance_scale, generator=generator).images
        return make_image_grid(images, rows=1, cols=len(images))

    for batch in run.batches(draw if args.prompts else None):
        generator = run.generator()
        dropped = drop_conditioning(generator, args.text_dropout, args.clip_text_dropout, args.clip_image_dropout)
        tokens, conditioning = encoder.tokens(batch), encoder.conditioning(batch, dropped)
        timestep = draw_timesteps(len(tokens), generator, run.part).to(tokens.device)
        noised, mask = corrupt(tokens, timestep, unet.config.num_vq_embeddings, generator, run.part)
        with run.accelerator.autocast():
            logits = model(noised, timestep, **conditioning).sample
        loss = paella_loss(logits.float(), tokens, mask, timestep, args.label_smoothing, args.clean_weight)
        run.update(model, loss)
        run.log(loss=loss, accuracy=(logits.argmax(1) == tokens).float().mean())

    weights = run.weights(model)
    if weights is not None:
        pipe.unet = PaellaUNet.from_config(unet.config)
        pipe.unet.load_state_dict(weights)
        run.publish(pipe)


if __name__ == "__main__":
    main(parse_args())
