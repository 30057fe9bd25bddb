"""Training the U-Net, all of it or an adapter: the loop, and the frozen parts around it."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging, make_image_grid
from PIL import Image
from safetensors import safe_open

from ..loaders.original_repo import has_original_layout
from ..models.unet_paella import PaellaUNet
from ..pipelines.pipeline_paella import PaellaPipeline
from .arguments import add_pretrained, pretrained_options
from .buckets import Buckets
from .card import publish
from .conditioning import Encoder, drop_conditioning
from .losses import corrupt, draw_timesteps, paella_loss
from .run import Trained, TrainingRun
from .stored import StoredArrays

logger = logging.get_logger(__name__)

# arguments of how pictures are cropped, and their defaults
OF_PICTURES: dict[str, Any] = {
    "resolution": 256,
    "center_crop": False,
    "random_flip": False,
    "image_interpolation_mode": "bicubic",
}


def train_unet(run: TrainingRun, unet: Trained, frozen: "FrozenParts", levels: Sequence[float] | None = None) -> None:
    """
    Paella's training (section 3.2): replace a random share of the tokens, predict all of the clean ones, compare. Batches
    with `noise` have its tokens as replacements. `levels` are the noise levels to train at, all unless given.
    """
    args, accelerator = run.args, run.accelerator
    num_tokens = frozen.pipe.unet.config.num_vq_embeddings
    for batch in run.batches(frozen.draw if args.prompts else None):
        generator = run.generator()  # of this pass, and the same in every process
        dropped = drop_conditioning(generator, args.text_dropout, args.clip_text_dropout, args.clip_image_dropout)
        tokens, conditioning = frozen.encoder.tokens(batch), frozen.encoder.conditioning(batch, dropped)
        timestep = draw_timesteps(len(tokens), generator, run.part, levels).to(tokens.device)
        noised, mask = corrupt(tokens, timestep, num_tokens, generator, run.part, batch.get("noise"))
        with accelerator.autocast():
            logits = unet.model(noised, timestep, **conditioning).sample
        smoothing, clean_weight, weights = args.label_smoothing, args.clean_weight, batch.get("weight")
        loss = paella_loss(logits, tokens, mask, timestep, smoothing, clean_weight, weights)

        accelerator.backward(loss)
        if accelerator.sync_gradients:  # this is the last of the step's --gradient-accumulation-steps passes
            accelerator.unscale_gradients(unet.optimizer)
            run.log(gradient_norm=torch.nn.utils.clip_grad_norm_(unet.parameters, args.max_grad_norm))
        unet.optimizer.step()
        unet.optimizer.zero_grad()
        if accelerator.sync_gradients:
            unet.schedule.step()
            if unet.average is not None:
                unet.average.step(unet.parameters)
        run.log(loss=loss, accuracy=(logits.movedim(1, -1).argmax(-1) == tokens).float().mean())


def trained_pipeline(args: argparse.Namespace, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> PaellaPipeline:
    """The pretrained pipeline with a U-Net of these sizes and weights."""
    unet = PaellaUNet.from_config(config)
    unet.load_state_dict(weights)
    return PaellaPipeline.from_pretrained(args.pretrained, unet=unet, **pretrained_options(args))


def publish_unet(run: TrainingRun, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Write the pretrained pipeline with a U-Net of these sizes and weights to the output folder."""
    publish(run, trained_pipeline(run.args, config, weights))


def add_unet_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the functions here."""
    add_pretrained(parser, "a Paella: a folder or Hub id")
    add = parser.add_argument_group("Paella").add_argument
    add("--aspect-ratio-buckets", action="store_true", help="crop to the nearest of several sizes, one size a batch")
    add("--label-smoothing", type=float, default=0.1, help="of the cross-entropy")
    add("--clean-weight", type=float, default=0.3, help="loss weight of tokens without noise, at t = 0")
    add("--text-dropout", type=float, default=0.05, help="share of batches without the ByT5 prompt")
    add("--clip-text-dropout", type=float, default=0.9, help="share of batches without the CLIP text")
    add("--clip-image-dropout", type=float, default=0.9, help="share of batches without the CLIP image")
    add("--prompts", "--validation-prompts", nargs="+", default=[], help="what to draw on sample sheets")
    add("--validation-prompt", dest="prompts", type=lambda prompt: [prompt], help="the same, with one prompt")
    add("--guidance-scale", type=float, help="of sample sheets; the model's own unless given")


class FrozenParts:
    """
    A pretrained pipeline around a U-Net in training: its encoders for batches, and all of it for sample sheets.

    Args:
        run ([`TrainingRun`]): With the arguments above. If its data are what `examples/precompute.py` wrote, the encoders
            that they stand in for are not kept.
        components: Of the pipeline, in place of the pretrained ones, which are then not loaded.
    """

    def __init__(self, run: TrainingRun, **components: Any):
        self.run = run
        args, device = run.args, run.accelerator.device
        computed = Computed.read(args.data)
        without = dict.fromkeys([*computed.spare, "prior", "prior_scheduler"]) if not args.prompts else {}
        with run.accelerator.local_main_process_first():  # which downloads for the node's others
            self.pipe = PaellaPipeline.from_pretrained(args.pretrained, **pretrained_options(args), **without | components)
        self.grid: tuple[int, int] = self._prepare_data(computed)
        self.pipe.set_progress_bar_config(disable=True)
        self.encode_prompts()
        self.pipe.register_modules(**dict.fromkeys(computed.spare))
        if self.pipe.prior is not None:
            self.pipe.prior.eval().requires_grad_(False).to(device)
        self.encoder = Encoder(self.pipe, computed.empty).to(device, half=run.accelerator.mixed_precision != "no")

    def _prepare_data(self, computed: "Computed") -> tuple[int, int]:
        """Tell the stream what this model takes. Height and width, in tokens, of sheets' pictures."""
        run, args, sizes = self.run, self.run.args, self.pipe.unet.config
        multiple = self.pipe.vqgan.patch_size * self.pipe.unet.sample_multiple
        if computed.parts:
            fits = computed.resolution
            ignored = [name for name, default in OF_PICTURES.items() if getattr(args, name) not in (default, fits)]
            if ignored and run.accelerator.is_main_process:
                names = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
                logger.warning(f"No effect of {names}: {args.data} has computed arrays instead of pictures.")
            args.resolution = fits or args.resolution  # for the model card, too
        resolution = args.resolution
        if resolution % multiple:
            raise ValueError(f"--resolution must be divisible by {multiple}, for VQGAN and U-Net, got {resolution}.")
        side = resolution // self.pipe.vqgan.patch_size
        shapes = {"tokens": (side, side), "prompt_embeds": (None, sizes.text_embed_dim)}
        shapes |= dict.fromkeys(("clip_text_embeds", "clip_image_embeds"), (sizes.clip_embed_dim,))
        run.stream.transform.arrays = StoredArrays(shapes, sizes.num_vq_embeddings, computed.required)
        if args.aspect_ratio_buckets and computed.parts:
            raise ValueError(f"--aspect-ratio-buckets needs pictures, but {args.data} has computed arrays of one size.")
        if args.aspect_ratio_buckets:
            run.stream.use_buckets(Buckets(resolution, multiple, args.batch_size))
        return side, side

    def encode_prompts(self) -> None:
        """Encode what is drawn on sample sheets."""
        prompts, device = self.run.args.prompts, self.run.accelerator.device
        encoded = self.pipe.encode_prompt(prompts) if prompts else ()
        names = ("prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask")
        names += ("clip_text_embeds", "negative_clip_text_embeds")
        self.prompts: dict[str, torch.Tensor | None] = {
            name: None if part is None else part.to(device) for name, part in zip(names, encoded)
        }

    def draw(self) -> Image.Image:
        """A row of pictures of the batches' size, with buckets the square one, one for each of `--prompts`."""
        args = self.run.args
        height, width = (side * self.pipe.vqgan.patch_size for side in self.grid)
        generator = [torch.Generator().manual_seed(args.seed) for _ in args.prompts]
        options = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
        images = self.pipe(**self.prompts, height=height, width=width, generator=generator, **options).images
        self.run.samples = [
            {"image": image, "prompt": prompt, "seed": args.seed} for image, prompt in zip(images, args.prompts)
        ]
        return make_image_grid(images, rows=1, cols=len(images))


def stored_config(model_class: type, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The sizes of a pretrained pipeline's component, without reading its weights; in the published layout the released."""
    options = {key: value for key, value in pretrained_options(args).items() if key != "variant"}
    if has_original_layout(args.pretrained, **options):
        return {}
    return model_class.load_config(args.pretrained, subfolder=name, **options)


@dataclass
class Computed:
    """What `examples/precompute.py` left beside its shards; of other data nothing is computed."""

    empty: dict[str, torch.Tensor | None] | None = None  # the embeddings of ""
    parts: list[str] = field(default_factory=list)  # the names of the arrays in the shards
    resolution: int | None = None  # of the pictures that the tokens are of

    @classmethod
    def read(cls, data: str) -> "Computed":
        path = (Path(data).parent if data.endswith(".tar") else Path(data)) / "empty.safetensors"
        if not path.is_file():
            return cls()
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            empty = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        resolution = int(metadata["resolution"]) if "resolution" in metadata else None
        return cls({"clip_text_embeds": None} | empty, metadata["computed"].split(), resolution)

    @property
    def spare(self) -> list[str]:
        """The pipeline's components that are not needed."""
        components = dict(prompt_embeds="text_encoder", clip_text_embeds="text_encoder_2", clip_image_embeds="image_encoder")
        return [component for name, component in components.items() if name in self.parts]

    @property
    def required(self) -> list[str]:
        """The arrays that every sample has. Without a resolution they are of a version that named those asked for."""
        return [] if self.resolution is None else self.parts
