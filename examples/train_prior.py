"""
Train the prior, which makes CLIP image embeddings from CLIP text embeddings: noise prediction on a cosine schedule, as for
the released model.

    accelerate launch examples/train_prior.py --pretrained dome272/Paella --data pictures --output-dir my-prior

`--pretrained` gives the CLIP encoders and, without `--from-scratch`, the prior to begin with. `--data` may be what
`precompute.py` wrote: then the encoders are not needed. With `--rank` an adapter is trained: load it with
`pipe.load_lora_weights`.
"""

import json

import torch
import torch.nn.functional as F

from paella_diffusers import DDIMWuerstchenScheduler, PaellaPipeline, PaellaPrior, PaellaUNet
from paella_diffusers.loaders.lora import WEIGHT_NAMES
from paella_diffusers.training.adapter import Adapter, add_lora_arguments
from paella_diffusers.training.arguments import add_pretrained, pretrained_options, training_arguments
from paella_diffusers.training.card import publish, publish_files
from paella_diffusers.training.conditioning import Encoder
from paella_diffusers.training.run import Trained, TrainingRun
from paella_diffusers.training.stored import StoredArrays
from paella_diffusers.training.unet import Computed, stored_config


def parse_args(args=None):
    defaults = dict(batch_size=512, learning_rate=3e-4, max_grad_norm=5.0, warmup_steps=0, ema_decay=0.999, ema_start=5000)
    parser = training_arguments(__doc__, **defaults)
    add_pretrained(parser, "a Paella: a folder or Hub id")
    add = parser.add_argument_group("prior").add_argument
    add("--from-scratch", action="store_true", help="begin with a new prior of the pretrained one's sizes")
    add("--prior-config", type=json.loads, default={}, help="with --from-scratch: sizes that shall differ, as JSON")
    add("--text-dropout", type=float, default=0.1, help="share of batches without the text, for guidance")
    add_lora_arguments(parser, help="train an adapter of this rank; the whole prior unless given")
    args = parser.parse_args(args)
    if args.from_scratch and args.rank:
        parser.error("--rank adapts a trained prior: leave out --from-scratch")
    if args.prior_config and not args.from_scratch:
        parser.error("--prior-config is a new prior's: add --from-scratch")
    return args


def load(run: TrainingRun) -> tuple[PaellaPipeline, Encoder]:
    """The pipeline with what a prior's training needs of it, and its encoders."""
    args = run.args
    computed = Computed.read(args.data)
    left_out = {*computed.spare, "text_encoder"}  # ByT5 is not asked
    with run.accelerator.local_main_process_first():
        new = {"prior": new_prior(args)} if args.from_scratch else {}
        pipe = PaellaPipeline.from_pretrained(args.pretrained, **pretrained_options(args), **dict.fromkeys(left_out), **new)
    for name, component in (("clip_text_embeds", "text_encoder_2"), ("clip_image_embeds", "image_encoder")):
        if component not in computed.spare and getattr(pipe, component) is None:
            raise ValueError(f"{args.pretrained} has no `{component}`, nor {args.data} `{name}`: a prior needs both.")
    if pipe.prior is None:
        raise ValueError(f"{args.pretrained} has no prior: add --from-scratch.")
    pipe.register_modules(vqgan=None, unet=None)
    shapes = dict.fromkeys(("clip_text_embeds", "clip_image_embeds"), (pipe.prior.config.embedding_dim,))
    run.stream.transform.arrays = StoredArrays(shapes, required=[name for name in computed.required if name in shapes])
    return pipe, Encoder(pipe, computed.empty).to(run.accelerator.device)


def new_prior(args) -> PaellaPrior:
    try:
        sizes = stored_config(PaellaPrior, "prior", args)
    except OSError:  # it has none
        sizes = {"embedding_dim": stored_config(PaellaUNet, "unet", args)["clip_embed_dim"]}
    prior = PaellaPrior.from_config({**sizes, **args.prior_config})
    hidden, channels = prior.config.hidden_dim, prior.config.embedding_dim
    if hidden < channels:
        raise ValueError(
            f"--prior-config has `hidden_dim` {hidden}, fewer than the {channels} channels of the noise to predict, "
            f"which does not fit through: samples would be noise. Make it {channels} or more."
        )
    return prior


def train_prior(run: TrainingRun, prior: Trained, encoder: Encoder, scheduler):
    """Noise prediction: add noise to image embeddings, and predict it from the noisy ones and the text embeddings."""
    args, accelerator = run.args, run.accelerator
    for batch in run.batches():
        image = encoder.clip_image_embeds(batch)
        batch.setdefault("prompt_embeds", torch.zeros(len(image), 1, 1))  # ByT5 need not work
        text = encoder.conditioning(batch, (False, False, True))["clip_text_embeds"]
        generator, (index, count) = run.generator(), run.part
        if torch.rand((), generator=generator) < args.text_dropout:
            text = torch.zeros_like(text)
        timestep = 1 - torch.rand(len(image) * count, generator=generator)[index::count].to(image.device)
        noise = torch.randn(len(image) * count, image.shape[1], generator=generator)[index::count].to(image.device)
        with accelerator.autocast():
            predicted = prior.model(scheduler.add_noise(image, noise, timestep), timestep, text).sample
        loss = F.mse_loss(predicted.float(), noise)

        accelerator.backward(loss)
        if accelerator.sync_gradients:  # this is the last of the step's --gradient-accumulation-steps passes
            accelerator.unscale_gradients(prior.optimizer)
            run.log(gradient_norm=torch.nn.utils.clip_grad_norm_(prior.parameters, args.max_grad_norm))
        prior.optimizer.step()
        prior.optimizer.zero_grad()
        if accelerator.sync_gradients:
            prior.schedule.step()
            if prior.average is not None:
                prior.average.step(prior.parameters)
        run.log(loss=loss)


def main(args):
    run = TrainingRun(args)
    run.load_data()
    pipe, encoder = load(run)
    config = pipe.prior.config
    scheduler = DDIMWuerstchenScheduler() if pipe.prior_scheduler is None else pipe.prior_scheduler
    if args.rank:
        adapter = Adapter({"prior": pipe.prior}, args)
        prior = run.prepare("prior_lora", pipe.prior, adapter.write, adapter.read, frozen=False)
    else:
        prior = run.prepare("prior", pipe.prior.requires_grad_(True))

    train_prior(run, prior, encoder, scheduler)

    weights = run.finish()
    if weights is not None and args.rank:
        adapter.write(weights, args.output_dir)
        publish_files(run, pipe, WEIGHT_NAMES[:1], is_lora=True)
    elif weights is not None:
        trained = PaellaPrior.from_config(config)
        trained.load_state_dict(weights)
        components = {"prior": trained, "prior_scheduler": scheduler}
        publish(run, PaellaPipeline.from_pretrained(args.pretrained, **components, **pretrained_options(args)))


if __name__ == "__main__":
    main(parse_args())
