"""
Train the prior, from CLIP text embeddings to CLIP image embeddings, by noise prediction on a cosine schedule, as released.

    accelerate launch examples/train_prior.py --pretrained dome272/Paella --data pictures --output-dir my-prior

`--pretrained` gives the CLIP encoders and, without `--from-scratch`, the prior to begin with. `--data` may be what
`precompute.py` wrote: then the encoders are not needed.
"""

import json

import torch
import torch.nn.functional as F

from paella_diffusers import DDIMWuerstchenScheduler, PaellaPipeline, PaellaPrior
from paella_diffusers.training.conditioning import Encoder
from paella_diffusers.training.run import TrainingRun, training_arguments
from paella_diffusers.training.unet import computed_embeddings


def parse_args(args=None):
    parser = training_arguments(
        __doc__, batch_size=512, learning_rate=3e-4, max_grad_norm=5.0, warmup_steps=0, ema_decay=0.999, ema_start=5000
    )
    add = parser.add_argument_group("prior").add_argument
    add("--pretrained", required=True, help="a Paella: a folder or Hub id")
    add("--from-scratch", action="store_true", help="begin with a new prior")
    add("--prior-config", type=json.loads, default={}, help="its sizes, as JSON")
    add("--text-dropout", type=float, default=0.1, help="share of batches without the text, for guidance")
    args = parser.parse_args(args)
    if args.prior_config and not args.from_scratch:
        parser.error("--prior-config is a new prior's: add --from-scratch")
    return args


def main(args):
    run = TrainingRun(args)
    run.load_data()
    device = run.accelerator.device
    empty, spare = computed_embeddings(args.data)
    pipe = PaellaPipeline.from_pretrained(args.pretrained, **dict.fromkeys({*spare, "text_encoder"}))  # ByT5 is not asked
    for name, component in (("clip_text_embeds", "text_encoder_2"), ("clip_image_embeds", "image_encoder")):
        if component not in spare and getattr(pipe, component) is None:
            raise ValueError(f"{args.pretrained} has no `{component}`, nor {args.data} `{name}`: a prior needs both.")
    if pipe.prior is None and not args.from_scratch:
        raise ValueError(f"{args.pretrained} has no prior: add --from-scratch.")
    prior = pipe.prior
    if args.from_scratch:
        prior = PaellaPrior(**{"embedding_dim": pipe.unet.config.clip_embed_dim} | args.prior_config)
        hidden, channels = prior.config.hidden_dim, prior.config.embedding_dim
        if hidden < channels:
            raise ValueError(
                f"--prior-config has `hidden_dim` {hidden}, fewer than the {channels} channels of the noise to predict, "
                f"which does not fit through: samples would be noise. Make it {channels} or more."
            )
    scheduler = DDIMWuerstchenScheduler() if pipe.prior_scheduler is None else pipe.prior_scheduler
    pipe.register_modules(vqgan=None, unet=None)
    encoder = Encoder(pipe, empty).to(device)
    model = run.prepare(prior.requires_grad_(True))

    for batch in run.batches():
        image = encoder.clip_image_embeds(batch)
        batch.setdefault("prompt_embeds", torch.zeros(len(image), 1, 1))  # ByT5 need not work
        text = encoder.conditioning(batch, (False, False, True))["clip_text_embeds"]
        generator, (index, count) = run.generator(), run.part
        if torch.rand((), generator=generator) < args.text_dropout:
            text = torch.zeros_like(text)
        timestep = 1 - torch.rand(len(image) * count, generator=generator)[index::count].to(device)
        noise = torch.randn(len(image) * count, image.shape[1], generator=generator)[index::count].to(device)
        with run.accelerator.autocast():
            predicted = model(scheduler.add_noise(image, noise, timestep), timestep, text).sample
        loss = F.mse_loss(predicted.float(), noise)
        run.update(model, loss)
        run.log(loss=loss)

    weights = run.finish(model)
    if weights is not None:
        trained = PaellaPrior.from_config(prior.config)
        trained.load_state_dict(weights)
        run.publish(PaellaPipeline.from_pretrained(args.pretrained, prior=trained, prior_scheduler=scheduler))


if __name__ == "__main__":
    main(parse_args())
