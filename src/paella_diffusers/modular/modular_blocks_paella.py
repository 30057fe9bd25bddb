"""Blocks for diffusers' modular pipelines: each wraps steps of the plain pipelines."""

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

import PIL.Image
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.modular_pipelines import (
    AutoPipelineBlocks,
    BlockState,
    ComponentSpec,
    ConfigSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
    SequentialPipelineBlocks,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from ..checks import check_choice
from ..models.prior_paella import PaellaPrior
from ..models.unet_paella import PaellaUNet
from ..models.vq_model import PaellaVQModel
from ..pipelines.conditioning import PromptEmbeds
from ..pipelines.encoding import num_image_rows
from ..pipelines.inputs import OUTPUT_TYPES, CallInputs, EditingInputs, ImageConditionInputs, PromptInputs, SamplingInputs
from ..pipelines.source_image import SourceImage
from ..sampling.guidance.classifier_free_guidance import PaellaClassifierFreeGuidance
from ..schedulers.scheduling_paella import PaellaScheduler

if TYPE_CHECKING:
    from ..pipelines.pipeline_paella import PaellaPipeline
    from .modular_pipeline_paella import PaellaModularPipeline

# The parts of a pipeline; a folder's own classes, as its index names them, take the place of these.
COMPONENTS: dict[str, type] = {
    "vqgan": PaellaVQModel,
    "unet": PaellaUNet,
    "scheduler": PaellaScheduler,
    "text_encoder": T5EncoderModel,
    "tokenizer": PreTrainedTokenizerBase,
    "text_encoder_2": CLIPTextModelWithProjection,
    "tokenizer_2": PreTrainedTokenizerBase,
    "image_encoder": CLIPVisionModelWithProjection,
    "feature_extractor": CLIPImageProcessor,
    "prior": PaellaPrior,
    "prior_scheduler": DDPMWuerstchenScheduler,
}


class PaellaBlock(ModularPipelineBlocks):
    """What the blocks below share."""

    model_name = "paella"
    uses: tuple[str, ...] = ()  # names of components

    @property
    def expected_components(self) -> list[ComponentSpec]:
        guider = ComponentSpec("guider", PaellaClassifierFreeGuidance, default_creation_method="from_config")
        return [guider if name == "guider" else ComponentSpec(name, COMPONENTS[name]) for name in self.uses]

    @torch.no_grad()
    def __call__(
        self, components: "PaellaModularPipeline", state: PipelineState
    ) -> tuple["PaellaModularPipeline", PipelineState]:
        block_state = cast(BlockState, self.get_block_state(state))
        self.run(components.as_pipeline(), block_state)
        self.set_block_state(state, block_state)
        return components, state

    def run(self, pipe: "PaellaPipeline", block_state: BlockState) -> None:
        """The block's work, by the plain pipeline `pipe` of the same components."""
        raise NotImplementedError


class PaellaTextEncoderStep(PaellaBlock):
    uses = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "unet", "guider")

    @property
    def description(self) -> str:
        return "Prompts and negative prompts to embeddings; embeddings that are given are kept."

    @property
    def inputs(self) -> list[InputParam]:
        guidance = [*_inputs(SamplingInputs, "guidance_scale"), *_inputs(EditingInputs)]
        return [*_inputs(PromptInputs), InputParam("condition_image"), *guidance]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(name, type_hint=torch.Tensor) for name in PromptEmbeds._fields]

    def run(self, pipe: "PaellaPipeline", block_state: BlockState) -> None:
        inputs = CallInputs.collect(block_state.as_dict())
        prompts = inputs.prompts
        if prompts.prompt is None and prompts.prompt_embeds is None and block_state.condition_image is not None:
            prompts.prompt = [""] * num_image_rows(block_state.condition_image)  # variations
        is_guided = pipe.prepare_state(inputs).is_guided
        prompts.check(pipe, is_guided)
        embeds = pipe.encode_prompt(**vars(prompts), do_classifier_free_guidance=is_guided)
        for name, value in zip(PromptEmbeds._fields, embeds):
            block_state[name] = value


class PaellaImageEncoderStep(PaellaBlock):
    """Of image to image; inpainting has more inputs."""

    uses = ("vqgan", "unet")
    strength: float = 0.8
    options: dict[str, Any] = {"resize_mode": "default"}

    @property
    def description(self) -> str:
        return "The image to begin with, at the size at which results are generated, to tokens."

    @property
    def inputs(self) -> list[InputParam]:
        options = [InputParam(name, default=default) for name, default in self.options.items()]
        sizes = [InputParam(name, type_hint=int) for name in ("height", "width")]
        return [
            InputParam("image", type_hint=PIL.Image.Image, required=True),
            *sizes,
            *options,
            InputParam("strength", type_hint=float, default=self.strength),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("source", type_hint=SourceImage, description="The image, and the way back to its size."),
            OutputParam("source_tokens", type_hint=SourceImage, description="The same as tokens."),
        ]

    def run(self, pipe: "PaellaPipeline", block_state: BlockState) -> None:
        options = {name: block_state[name] for name in self.options}
        source = pipe.prepare_source(block_state.image, block_state.height, block_state.width, **options)
        tokens = pipe.encode_source(source, len(source.image), pipe._execution_device)
        block_state.source, block_state.source_tokens = source, replace(source, image=tokens)


class PaellaInpaintEncoderStep(PaellaImageEncoderStep):
    strength: float = 1.0
    options: dict[str, Any] = {
        "mask_image": None,
        "padding": None,
        "resize_mode": "default",
        "padding_mask_crop": None,
        "keep_original_pixels": True,
        "feather_radius": 0,
    }


class PaellaAutoImageEncoderStep(AutoPipelineBlocks):
    block_classes: list[type] = [PaellaInpaintEncoderStep, PaellaInpaintEncoderStep, PaellaImageEncoderStep]
    block_names: list[str] = ["inpaint", "outpaint", "image2image"]
    block_trigger_inputs: list[str | None] = ["mask_image", "padding", "image"]

    @property
    def description(self) -> str:
        return "Inpainting with `mask_image`, outpainting with `padding`, image to image with `image`; else it is skipped."


class PaellaDenoiseStep(PaellaBlock):
    uses = ("unet", "scheduler", "guider", "image_encoder", "feature_extractor", "prior", "prior_scheduler", "vqgan")

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("use_prior", None, "Whether calls use the prior unless told otherwise.")]

    @property
    def description(self) -> str:
        return "From noise, or the image's tokens with some, to clean tokens."

    @property
    def inputs(self) -> list[InputParam]:
        embeds = [InputParam(name, type_hint=torch.Tensor) for name in PromptEmbeds._fields]
        others = [InputParam(name) for name in ("height", "width", "region_masks", "source_tokens")]
        subjects = (ImageConditionInputs, SamplingInputs, EditingInputs)
        return [*embeds, *others, *(param for subject in subjects for param in _inputs(subject))]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("latents", type_hint=torch.Tensor, description="Token grids `(num_images, height / 4, width / 4)`."),
            OutputParam("steps_taken", type_hint=list[int], description="Evaluations of the U-Net for each image."),
        ]

    def run(self, pipe: "PaellaPipeline", block_state: BlockState) -> None:
        inputs = CallInputs.collect(block_state.as_dict() | {"output_type": "latent"})
        size = [pipe.default_size if side is None else side for side in (block_state.height, block_state.width)]
        if block_state.source_tokens is not None:
            size = pipe.size_of(block_state.source_tokens)
        output = pipe.generate(inputs, *size, region_masks=block_state.region_masks, source=block_state.source_tokens)
        block_state.latents, block_state.steps_taken = output.images, output.steps_taken


class PaellaDecodeStep(PaellaBlock):
    uses = ("vqgan",)

    @property
    def description(self) -> str:
        return "Tokens to images, of the size of the image that they began with."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", type_hint=torch.Tensor, required=True),
            InputParam("source", type_hint=SourceImage),
            InputParam("output_type", type_hint=str, default="pil", description='"pil", "np", "pt" or "latent".'),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("images", type_hint=list[PIL.Image.Image])]

    def run(self, pipe: "PaellaPipeline", block_state: BlockState) -> None:
        check_choice("output_type", block_state.output_type, OUTPUT_TYPES)
        block_state.images = pipe.decode(block_state.latents, block_state.output_type, block_state.source)


class PaellaAutoBlocks(SequentialPipelineBlocks):
    """Text to image, image to image with `image`, inpainting with `mask_image` and outpainting with `padding`."""

    @property
    def model_name(self) -> str:
        return "paella"

    block_classes: list[type] = [PaellaTextEncoderStep, PaellaAutoImageEncoderStep, PaellaDenoiseStep, PaellaDecodeStep]
    block_names: list[str] = ["text_encoder", "vae_encoder", "denoise", "decode"]
    _workflow_map = {
        "text2image": {"prompt": True},
        "image2image": {"image": True, "prompt": True},
        "inpainting": {"image": True, "mask_image": True, "prompt": True},
    }

    @property
    def description(self) -> str:
        return "Text to image, image to image and inpainting with Paella."

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam("images", type_hint=list[PIL.Image.Image])]


def _inputs(subject: type, *names: str) -> list[InputParam]:
    """Arguments of the plain pipelines' calls, by their subject: all, or some."""
    return [
        InputParam(field.name, type_hint=field.type, default=field.default)
        for field in fields(subject)
        if not names or field.name in names
    ]
