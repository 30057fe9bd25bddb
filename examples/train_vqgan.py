"""
Train the VQGAN that turns pictures into tokens, from scratch or from a trained one (https://huggingface.co/papers/2211.07292,
section 3.1; the losses are those of https://huggingface.co/papers/2012.09841).

    accelerate launch examples/train_vqgan.py --data pictures --output-dir my-vqgan --perceptual-model microsoft/resnet-50

With `--decoder-only` the tokens of a picture do not change, so U-Nets that were trained on these tokens still fit.
"""

import json

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from torch import nn
from torch.func import functional_call
from transformers import AutoImageProcessor, AutoModel

from paella_diffusers import VQModel
from paella_diffusers.training.arguments import add_pretrained, pretrained_options, training_arguments
from paella_diffusers.training.card import publish
from paella_diffusers.training.run import Trained, TrainingRun


def make_discriminator(channels: int = 64, layers: int = 3) -> nn.Sequential:
    """Says of every patch whether it is real (PatchGAN, https://huggingface.co/papers/1611.07004)."""
    widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
    blocks = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for layer in range(1, layers + 1):
        stride = 2 if layer < layers else 1
        blocks.append(nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=False))
        blocks += [nn.BatchNorm2d(widths[layer]), nn.LeakyReLU(0.2)]
    return nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))


class PerceptualLoss(nn.Module):
    """Distance of two batches of images in the feature maps of an image classifier, each position's of length one."""

    def __init__(self, name: str):
        super().__init__()
        self.classifier = AutoModel.from_pretrained(name).eval().requires_grad_(False)
        processor = AutoImageProcessor.from_pretrained(name)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(getattr(processor, f"image_{key}")).view(3, 1, 1))

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        pixels = (torch.cat([images, targets]) - self.mean) / self.std
        features = self.classifier(pixels, output_hidden_states=True).hidden_states
        pairs = [F.normalize(feature, dim=1).chunk(2) for feature in features]
        return sum((first - second).square().sum(1).mean() for first, second in pairs) / len(pairs)


class CodebookRestarts:
    """Moves codes that nothing was nearest to since the last time to latents of the batch."""

    def __init__(self, vqgan: VQModel, every: int):
        self.vqgan, self.every = vqgan, every
        self.used = torch.zeros(vqgan.config.num_vq_embeddings, dtype=torch.long)

    @torch.no_grad()
    def __call__(self, run: TrainingRun, pixels: torch.Tensor, indices: torch.LongTensor):
        self.used += torch.bincount(indices.flatten(), minlength=len(self.used)).cpu()
        if (run.step + 1) % self.every or not run.accelerator.sync_gradients:
            return
        used = run.accelerator.reduce(self.used.to(indices.device))
        latents = self.vqgan.encode(pixels).latents * self.vqgan.config.scale_factor
        rows, codebook = latents.movedim(1, -1).flatten(0, -2), self.vqgan.vquantizer.embedding.weight
        chosen = torch.randint(len(rows), (len(used),), generator=run.generator()).to(rows.device)
        codebook.copy_(torch.where(used[:, None] > 0, codebook, broadcast(rows[chosen].to(codebook))))
        self.used.zero_()

    def state_dict(self) -> dict:
        return {"used": self.used}

    def load_state_dict(self, state: dict):
        self.used = state["used"]


def adversarial_weight(loss: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """The factor that gives both losses gradients of one length at the last layer (equation 7)."""
    norms = [torch.autograd.grad(part, last_layer, retain_graph=True)[0].norm() for part in (loss, adversarial)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()


def parse_args(args=None):
    parser = training_arguments(__doc__, default_steps=600_000, text_column=None)
    add_pretrained(parser, "a VQGAN to begin with, in diffusers' layout: a folder or Hub id", required=False)
    add = parser.add_argument_group("VQGAN").add_argument
    add("--subfolder", help="the VQGAN's folder in --pretrained; vqgan, if that is a pipeline")
    add("--config", type=json.loads, default={}, help="sizes of a new one that shall differ from the released, as JSON")
    add("--decoder-only", action="store_true", help="do not train encoder and codebook")
    add("--codebook-weight", type=float, default=1.0)
    add("--restart-every", type=int, default=1000, help="steps after which unused codes are replaced")
    add("--restart-until", type=int, default=100_000, help="the step after which none are replaced")
    add(
        "--perceptual-model",
        help="a convolutional classifier of transformers whose features are compared, such as microsoft/resnet-50",
    )
    add("--perceptual-weight", type=float, default=1.0)
    add("--adversarial-start", type=int, default=50_000, help="the step from which a discriminator takes part")
    add("--adversarial-weight", type=float, default=0.8, help="of the discriminator's loss; 0 for no discriminator")
    args = parser.parse_args(args)
    if args.pretrained and args.config:
        parser.error("--config is a new VQGAN's, but --pretrained has its own: leave one out")
    if args.decoder_only and not args.pretrained:
        parser.error("--decoder-only needs --pretrained")
    return args


def optimise(run: TrainingRun, trained: Trained, loss: torch.Tensor) -> torch.Tensor | None:
    """Backward, and at a step's last pass: clip, step, average. The gradient norm, then."""
    norm, accelerator = None, run.accelerator
    accelerator.backward(loss)
    if accelerator.sync_gradients:
        accelerator.unscale_gradients(trained.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters, run.args.max_grad_norm)
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    if accelerator.sync_gradients:
        trained.schedule.step()
        if trained.average is not None:
            trained.average.step(trained.parameters)
    return norm


def train_vqgan(run: TrainingRun, vqgan: Trained, discriminator: Trained | None, perceptual, restarts: CodebookRestarts):
    """Rebuild pictures through the codebook; later, also fool a discriminator that learns to tell them from real ones."""
    args, accelerator, own, shown = run.args, run.accelerator, run.unwrapped(vqgan), None

    def draw():
        if shown is None:  # before the first batch
            return None
        pixels = torch.cat([shown, own(shown).sample.clamp(0, 1)])
        images = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels))
        return make_image_grid(images, rows=2, cols=len(shown))

    for batch in run.batches(draw):
        if "pixels" not in batch:
            raise ValueError(f"--data {args.data} has computed tokens in place of pictures: a VQGAN learns from pictures.")
        pixels = batch["pixels"]
        shown = pixels[:8]
        if args.decoder_only:
            own.eval()  # the norm of the latents, too, stays as it is
        with accelerator.autocast():
            output = vqgan.model(pixels)
        rebuilt = output.sample.float()
        error = F.mse_loss(rebuilt, pixels)
        loss = error
        if perceptual is not None:
            loss = loss + args.perceptual_weight * perceptual(rebuilt, pixels)

        adversarial = discriminator is not None and run.step >= args.adversarial_start
        if adversarial:
            judge = run.unwrapped(discriminator)
            broadcast(list(judge.buffers()))  # each process has updated its own since the last pass
            fixed = {name: value.detach() for name, value in judge.state_dict().items()}
            fooled = -functional_call(judge.eval(), fixed, rebuilt).mean()
            judge.train()
            weight = args.adversarial_weight * adversarial_weight(loss, fooled, own.out_block[0].weight)
            loss = loss + weight * fooled
        loss = loss + args.codebook_weight * output.commit_loss.float()
        norm = optimise(run, vqgan, loss)
        if norm is not None:
            run.log(gradient_norm=norm)

        if adversarial:
            real, fake = discriminator.model(torch.cat([pixels, rebuilt.detach()])).chunk(2)
            optimise(run, discriminator, (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2)  # hinge loss
            run.log(discriminator_real=real.mean(), discriminator_fake=fake.mean())
        if not args.decoder_only and run.step < args.restart_until:
            restarts(run, pixels, output.indices)
        decibels = -10 * (rebuilt.clamp(0, 1) - pixels).square().mean((1, 2, 3)).log10().mean()
        run.log(loss=loss, error=error, decibels=decibels)


def main(args):
    run = TrainingRun(args)
    run.load_data()
    with run.accelerator.local_main_process_first():
        options = pretrained_options(args) | {"subfolder": args.subfolder}
        vqgan = VQModel.from_pretrained(args.pretrained, **options) if args.pretrained else VQModel(**args.config)
    vqgan.requires_grad_(True)
    restarts = CodebookRestarts(vqgan, args.restart_every)
    if args.decoder_only:
        for part in (vqgan.in_block, vqgan.down_blocks, vqgan.vquantizer):
            part.requires_grad_(False)
    else:
        run.kept["restarts"] = restarts
    # both are small, and their parts are used one by one: under FSDP, too, each process has all of them
    trained = run.prepare("vqgan", vqgan, shard=False)
    perceptual = PerceptualLoss(args.perceptual_model).to(run.accelerator.device) if args.perceptual_model else None
    discriminator = run.prepare("discriminator", make_discriminator(), shard=False) if args.adversarial_weight else None

    train_vqgan(run, trained, discriminator, perceptual, restarts)

    weights = run.finish()
    if weights is not None:
        result = VQModel.from_config(vqgan.config)
        result.load_state_dict(weights)
        publish(run, result)


if __name__ == "__main__":
    main(parse_args())
