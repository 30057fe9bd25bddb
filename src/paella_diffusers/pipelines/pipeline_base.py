"""What Paella's pipelines share: their components, and the steps of a call."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import (
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from ..loaders.lora import PaellaLoraLoaderMixin
from ..loaders.textual_inversion import PaellaTextualInversionMixin
from ..models.prior_paella import PaellaPrior
from ..models.unet_paella import PaellaUNet
from ..models.vq_model import PaellaVQModel
from ..optimize import optimize
from ..sampling.denoiser import Denoiser
from ..sampling.early_stop import EarlyStop
from ..sampling.guidance.base import GuidanceMixin
from ..sampling.guidance.classifier_free_guidance import PaellaClassifierFreeGuidance
from ..sampling.guidance.diffusers_guidance import DiffusersGuidance
from ..sampling.guidance.semantic_guidance import PaellaSemanticGuidance
from ..sampling.loop import sample
from ..sampling.steering import Steering, reward_of_pictures, spawn_generators
from ..sampling.steppers import Stepper, make_stepper
from ..schedulers.categorical import Generators, add_uniform_noise, random_tokens
from ..schedulers.scheduling_utils import PaellaSchedulerBase
from .call_state import CallState, CallStateMixin
from .conditioning import Conditioning, PromptEmbeds, repeat_rows
from .encoding import EncodingMixin
from .inputs import MODEL_DEFAULT, CallInputs, ImageConditionInputs, PromptInputs, check_tokens, tensor_of
from .loading import LoadingMixin
from .regions import read_region_masks
from .source_image import SizeRule, SourceImage, prepare_source
from .step_end import CONDITIONING_TENSORS, StepEnd


@dataclass
class PaellaPipelineOutput(ImagePipelineOutput):
    """
    Output of Paella's pipelines.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images, of the wanted type; for `output_type="latent"` int64 tokens `(num_images, height / 4, width / 4)`.
        steps_taken (`list[int]`): For every image, how many evaluations of the U-Net it took, with all of its particles.
        initial_noise (`torch.LongTensor` of shape `(num_images, height / 4, width / 4)`):
            The random tokens, or `latents`, that each image's re-noising returned to.
        rewards (`torch.Tensor` of shape `(num_images, num_particles)`, *optional*):
            With `reward`: of the final picture of every particle, float32.
        log_weights (`torch.Tensor` of the same shape, *optional*):
            The logarithms of the probabilities by which each image was drawn from its particles.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    steps_taken: list[int] | None = None
    initial_noise: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
    log_weights: torch.Tensor | None = None


class PaellaPipelineBase(
    LoadingMixin, EncodingMixin, CallStateMixin, DiffusionPipeline, PaellaTextualInversionMixin, PaellaLoraLoaderMixin
):
    r"""
    Components and steps of every Paella pipeline. One pipeline may be called by several threads at once.

    Args:
        vqgan ([`PaellaVQModel`]): Tokens to pixels and back.
        unet ([`PaellaUNet`]): The denoiser.
        scheduler ([`PaellaScheduler`] or another discrete scheduler): The sampler.
        text_encoder (`T5EncoderModel`, *optional*): ByT5 encoder; without it, pass `prompt_embeds`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer.
        text_encoder_2 (`CLIPTextModelWithProjection`, *optional*):
            CLIP text encoder; without it, CLIP text embeddings are left out of the conditioning unless passed in.
        tokenizer_2 (`PreTrainedTokenizerBase`, *optional*): Its tokenizer.
        image_encoder (`CLIPVisionModelWithProjection`, *optional*): CLIP image encoder, for `condition_image`.
        feature_extractor (`CLIPImageProcessor`, *optional*): Its image processor.
        prior ([`PaellaPrior`], *optional*): From CLIP text embeddings to CLIP image embeddings.
        prior_scheduler (`SchedulerMixin`, *optional*): The prior's sampler.
        guider ([`PaellaClassifierFreeGuidance`], another guidance method or one of `diffusers.guiders`, *optional*):
            The guidance method, with the settings that suit the model; as published unless given: linear, with scale 8.
        use_prior (`bool`, *optional*):
            Whether calls use the prior unless told otherwise; if it is loaded and no image embedding is given, unless False.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->prior->unet->vqgan"
    _optional_components = [
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "image_encoder",
        "feature_extractor",
        "prior",
        "prior_scheduler",
        "guider",
    ]
    __call__: Callable[..., Any]  # each task's
    progress_bar: Callable[..., Any]
    image_processor: VaeImageProcessor
    vae_scale_factor: int
    _callback_tensor_inputs = ["latents", "pred_original_sample", *CONDITIONING_TENSORS]

    def __init__(
        self,
        vqgan: PaellaVQModel,
        unet: PaellaUNet,
        scheduler: SchedulerMixin,
        text_encoder: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: BaseImageProcessor | None = None,
        prior: PaellaPrior | None = None,
        prior_scheduler: SchedulerMixin | None = None,
        guider: GuidanceMixin | BaseGuidance | None = None,
        use_prior: bool | None = None,
    ):
        super().__init__()
        self.register_modules(
            vqgan=vqgan,
            unet=unet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            prior=prior,
            prior_scheduler=prior_scheduler,
            guider=guider,
        )
        self.register_to_config(use_prior=use_prior)
        self._prepare_for_images()

    def _prepare_for_images(self):
        self.vae_scale_factor = self.vqgan.patch_size if getattr(self, "vqgan", None) else 4
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_normalize=False)

    def optimize(self, enable: bool = True) -> Self:
        """
        Make all later calls faster on this machine, whatever their size, batch size, prompts, guidance or adapters: the
        U-Net is compiled by `torch.compile`, once for each size, batch size and way of guidance. A U-Net that pipelines
        share is optimized in all of them; one that is assigned later, or a copy, is not. Without a C++ compiler nothing
        changes, and a warning says so.

        Args:
            enable (`bool`, defaults to `True`): False undoes it.

        Returns:
            The pipeline.

        Raises:
            ValueError: If `enable` is no boolean, or `unet` is wrapped by `torch.compile` already.
        """
        optimize(self.unet, enable)
        return self

    # ----------------------------------------------------------------------------------------------- the whole call

    def generate(
        self,
        inputs: CallInputs,
        height: int,
        width: int,
        region_masks: list[Any] | torch.Tensor | None = None,
        source: SourceImage | None = None,
        stepper: Stepper | None = None,
        source_prompts: PromptInputs | None = None,
    ) -> PaellaPipelineOutput | tuple[Any, ...]:
        """
        What every task's call does, with the arguments that all have in `inputs`.

        Args:
            inputs ([`CallInputs`]): Checked here, and completed by the model's defaults.
            height, width (`int`): In pixels.
            region_masks (`list` or `torch.Tensor`, *optional*): A mask for each prompt.
            source ([`SourceImage`], *optional*): The image to begin with.
            stepper (*optional*): Takes the scheduler's steps; see [`make_stepper`].
            source_prompts ([`PromptInputs`], *optional*): What the source shows, for [`InversionStepper`].
        """
        sampling, output = inputs.sampling, inputs.output
        device = self._execution_device

        # 1. check inputs, and plan the run
        state, stepper, num_images, regions = self.prepare(
            inputs, height, width, region_masks, source, stepper, source_prompts
        )

        with self.running(state):
            # 2. encode prompts and images
            if source_prompts is not None:
                stepper.source_denoiser = self.prepare_denoiser(state, inputs, source_prompts)
            denoiser = self.prepare_denoiser(state, inputs, inputs.prompts, regions)

            # 3. start from noise, or from an image with some
            num_rows, generator, generators = num_images * inputs.steering.particles, sampling.generator, None
            if inputs.steering.reward is not None:
                generators, generator = spawn_generators(
                    generator or seeded_generator(device), num_images, inputs.steering.particles
                )
            shape = (num_rows, height // self.vae_scale_factor, width // self.vae_scale_factor)
            known, mask = None, None
            if source is not None and (source.mask is not None or sampling.strength < 1 or source_prompts is not None):
                known = self.encode_source(source, num_rows, device)
            if source is not None and source.mask is not None:
                mask = source.mask.repeat_interleave(num_rows // len(source.mask), dim=0).to(device)
            latents, noise = self.prepare_latents(
                shape, device, generator, sampling.latents, known, mask, state.plan.start_level
            )
            stepper.clean = known
            if stepper.uses_codebook:
                stepper.codebook = self.vqgan.codebook(device)

            # 4. denoise
            stop, steer = None, None
            if generators is not None:
                steer = self.prepare_steering(inputs, generators, generator, denoiser, stepper, mask, source)
            if sampling.confidence_threshold is not None:
                is_inversion = source_prompts is not None
                stop = EarlyStop(sampling.confidence_threshold, sampling.stability_threshold, takes_clean=is_inversion)
            with self.progress_bar(total=state.plan.num_evaluations) as progress_bar:
                on_step = StepEnd(self, state, denoiser, progress_bar, output)
                latents = sample(denoiser, stepper, state.plan, latents, noise, mask, generator, stop, on_step, steer)
            rewards, log_weights, evaluations = None, None, on_step.evaluations
            if steer is not None:
                latents, noise, rewards, log_weights = steer.finish(latents)
                evaluations = (evaluations + steer.extra_evaluations) * steer.num_particles

            # 5. decode
            images = self.decode(latents, output.output_type, source)
        if not output.return_dict:
            return (images,)
        steps_taken = [evaluations] * num_images if stop is None else stop.evaluations.tolist()
        return PaellaPipelineOutput(images, steps_taken, noise, rewards, log_weights)

    def prepare(
        self,
        inputs: CallInputs,
        height: int,
        width: int,
        region_masks: list[Any] | torch.Tensor | None = None,
        source: SourceImage | None = None,
        stepper: Stepper | None = None,
        source_prompts: PromptInputs | None = None,
    ) -> tuple[CallState, Stepper, int, torch.Tensor | None]:
        """The state of a call, with its plan, its stepper, the number of images and the regions. Bad input is refused."""
        sampling = inputs.sampling
        state = self.prepare_state(inputs)
        stepper = stepper or make_stepper(self.scheduler)
        num_images, regions = self.check_inputs(inputs, state, height, width, region_masks, source, source_prompts)
        state.plan = stepper.plan(
            cast(int, sampling.num_inference_steps),
            self._execution_device,
            sampling.temperature,
            sampling.renoise_steps,
            sampling.strength,
        )
        inputs.steering.check(inputs.prompts, sampling, stepper, state.plan)
        return state, stepper, num_images, regions

    def prepare_state(self, inputs: CallInputs) -> CallState:
        """This call's copy of the guidance, and its scale. What the call leaves out, the guider and the scheduler say."""
        guider, editing = self.guider or PaellaClassifierFreeGuidance(), inputs.editing.given()
        if editing:
            guider = PaellaSemanticGuidance.from_guider(guider, **editing)
            if inputs.sampling.guidance_scale is None:
                raise ValueError("`editing_prompt` is guidance: with `guidance_scale=1` only it guides, with None nothing.")
        guidance = DiffusersGuidance(guider) if isinstance(guider, BaseGuidance) else copy.deepcopy(guider)
        if inputs.sampling.guidance_scale is MODEL_DEFAULT:
            inputs.sampling.guidance_scale = guidance.guidance_scale
        if inputs.sampling.num_inference_steps is None:
            inputs.sampling.num_inference_steps = self.default_num_inference_steps
        inputs.sampling.check()
        return CallState(guidance, inputs.sampling.guidance_scale, inputs.sampling.guided_steps)

    # ------------------------------------------------------------------------------------------------ input checks

    def check_inputs(
        self,
        inputs: CallInputs,
        state: CallState,
        height: int,
        width: int,
        region_masks: list[Any] | torch.Tensor | None,
        source: SourceImage | None,
        source_prompts: PromptInputs | None,
    ) -> tuple[int, torch.Tensor | None]:
        """
        Refuse bad input, naming the argument, the value and the remedy; the number of images, and the regions' shares of
        every token, otherwise.
        """
        sampling, is_guided = inputs.sampling, state.is_guided
        if sampling.guidance_scale is not None:
            state.guidance.check_model(self.unet)
            if state.guidance.extra_prompts and (self.text_encoder is None or self.tokenizer is None):
                raise ValueError(
                    f"`guider`, a {type(state.guidance).__name__}, has prompts of its own, which need the components "
                    "`text_encoder` and `tokenizer`."
                )
        self.check_size(height, width)
        inputs.output.check(self)
        batch_size = inputs.prompts.check(self, is_guided)
        inputs.images.check(self, inputs.prompts, batch_size)
        regions = None
        if region_masks is not None:
            regions = read_region_masks(region_masks, height, width, self.vae_scale_factor)
            if len(regions) != batch_size:
                raise ValueError(f"`region_masks` has {len(regions)} masks for {batch_size} prompts: pass one for each.")
            batch_size = 1  # all prompts are for one image
        if source_prompts is not None:
            source_prompts.check(self, is_guided, prefix="source_", batch_size=batch_size)
            source_prompts.expand(batch_size)
        if (source_prompts is not None or sampling.deep_feature_interval > 1) and self.unet.is_cache_enabled:
            use = "`deep_feature_interval`" if source_prompts is None else "inversion, which has two runs in one"
            raise ValueError(f"A cache of the U-Net cannot be used with {use}: call `unet.disable_cache()` before.")
        num_images = batch_size * sampling.num_images_per_prompt
        sampling.check_generator(num_images)
        if sampling.latents is not None:
            sampling.latents = tensor_of("latents", sampling.latents)
            shape = (num_images, height // self.vae_scale_factor, width // self.vae_scale_factor)
            check_tokens("latents", sampling.latents, shape, self.unet.config.num_vq_embeddings)
        if source is not None and len(source.image) not in (1, batch_size):
            raise ValueError(f"`image` has {len(source.image)} images for {batch_size} prompts: pass one, or one each.")
        return num_images, regions

    def check_size(self, height: int, width: int) -> None:
        """Refuse sizes in pixels that are no whole number of the U-Net's token patches."""
        self.size_rule.check(height, width)

    @property
    def default_size(self) -> int:
        """Height and width, in pixels, that the model draws unless told otherwise."""
        return self.unet.config.sample_size * self.vae_scale_factor

    @property
    def default_num_inference_steps(self) -> int:
        """Steps of a call that says nothing else: those of the scheduler's configuration, or 12 with diffusers' own."""
        return self.scheduler.config.num_inference_steps if isinstance(self.scheduler, PaellaSchedulerBase) else 12

    @property
    def size_rule(self) -> SizeRule:
        """Which sizes the model allows, and at which it generates a given image."""
        return SizeRule(self.default_size, self.vae_scale_factor * self.unet.sample_multiple, self.vae_scale_factor)

    # ------------------------------------------------------------------------------------------------ the steps

    def prepare_denoiser(
        self, state: CallState, inputs: CallInputs, prompts: PromptInputs, regions: torch.Tensor | None = None
    ) -> Denoiser:
        """The U-Net with all that it is conditioned on; other prompts than the call's are those of the source."""
        images, generator = inputs.images, inputs.sampling.generator
        guidance = copy.deepcopy(state.guidance)  # what it keeps along the run is as large as all logits, and goes with it
        if prompts is not inputs.prompts:
            images = replace(images, condition_image=None, clip_image_embeds=None, conditioning_weights=None)
            generator = _clones(generator)  # the prior gives the same prompt the same embedding
            guidance = state.guidance.for_source()
        num_images_per_prompt = inputs.sampling.num_images_per_prompt
        branches = self.prepare_conditioning(prompts, images, num_images_per_prompt, generator, state.is_guided)
        conditioning = dict(zip(("conditional", "unconditional"), branches))
        if state.guidance_scale is not None:
            for name, prompt in guidance.extra_prompts.items():
                conditioning[name] = self.prepare_extra_conditioning(prompt, branches[0], prompts.max_sequence_length)
        particles = inputs.steering.particles
        return Denoiser(
            self.unet,
            {name: rows.repeat(len(rows), particles) for name, rows in conditioning.items()},
            guidance,
            state.scale_at,
            regions,
            inputs.sampling.deep_feature_interval,
            inputs.sampling.cross_attention_kwargs,
            inputs.steering.particle_batch_size,
        )

    def prepare_steering(
        self,
        inputs: CallInputs,
        generators: list[torch.Generator],
        particle_generators: list[torch.Generator],
        denoiser: Denoiser,
        stepper: Stepper,
        mask: torch.Tensor | None,
        source: SourceImage | None,
    ) -> Steering:
        """What weighs the particles by the reward of the pictures that they would become."""
        steering, prompts = inputs.steering, inputs.prompts.prompt
        if prompts is not None:
            prompts = [prompts] if isinstance(prompts, str) else list(prompts)
            if denoiser.regions is not None:
                prompts = [", ".join(prompts)]
            copies = len(particle_generators) // len(prompts)
            prompts = [prompt for prompt in prompts for _ in range(copies)]
        size = steering.particle_batch_size or len(particle_generators)

        def reward(tokens: torch.Tensor) -> torch.Tensor:
            images = torch.cat([cast(torch.Tensor, self.decode(part, "pt")) for part in tokens.split(size)]).float()
            images = images if source is None else source.restore(images)
            parts = [slice(first, first + size) for first in range(0, len(images), size)]
            told = [None if prompts is None else prompts[part] for part in parts]
            return torch.cat([reward_of_pictures(steering.reward, images[part], say) for part, say in zip(parts, told)])

        return Steering(
            steering.steering_method,
            reward,
            steering.num_particles,
            generators,
            particle_generators,
            denoiser,
            stepper,
            mask,
        )

    def prepare_conditioning(
        self,
        prompts: PromptInputs,
        images: ImageConditionInputs,
        num_images_per_prompt: int,
        generator: Generators,
        is_guided: bool,
    ) -> list[Conditioning]:
        """What the conditional branch is conditioned on, and, with guidance, the unconditional one: a row an image."""
        device = self._execution_device
        options = {"do_classifier_free_guidance": is_guided, "device": device}
        embeds = PromptEmbeds(*self.encode_prompt(**vars(prompts), num_images_per_prompt=num_images_per_prompt, **options))
        batch_size = len(embeds.prompt_embeds) // num_images_per_prompt
        clip_image_embeds = images.clip_image_embeds
        if images.condition_image is not None:
            clip_image_embeds = self.encode_image(images.condition_image, batch_size, num_images_per_prompt, device)
        elif clip_image_embeds is not None:
            rows = clip_image_embeds[:, None] if clip_image_embeds.ndim == 2 else clip_image_embeds
            clip_image_embeds = repeat_rows(rows, batch_size, num_images_per_prompt)
        elif images.use_prior and embeds.clip_text_embeds is not None:
            if isinstance(generator, list):  # with regions, an image has several prompts
                generator = generator * (len(embeds.clip_text_embeds) // len(generator))
            clip_image_embeds = self.sample_prior(
                embeds.clip_text_embeds, images.prior_num_inference_steps, images.prior_guidance_scale, generator
            )[:, None]
        weights = images.conditioning_weights
        if weights is not None:
            weights = repeat_rows(weights[None] if weights.ndim == 1 else weights, batch_size, num_images_per_prompt)
        length = self.unet.config.clip_seq_len
        conditional = Conditioning(
            length,
            embeds.prompt_embeds,
            embeds.clip_text_embeds,
            clip_image_embeds,
            embeds.prompt_attention_mask,
            weights,
        )
        if images.condition_image_weights is not None and clip_image_embeds is not None:
            weights = images.condition_image_weights
            weights = repeat_rows(weights[None] if weights.ndim == 1 else weights, batch_size, num_images_per_prompt)
            conditional = conditional.weigh_images(weights)
        branches = [conditional]
        if is_guided:
            text, clip_text = cast(torch.Tensor, embeds.negative_prompt_embeds), embeds.negative_clip_text_embeds
            branches.append(
                Conditioning(length, text, clip_text, encoder_attention_mask=embeds.negative_prompt_attention_mask)
            )
        return [branch.to(device, self.unet.dtype) for branch in branches]

    def prepare_extra_conditioning(self, prompt: str, conditional: Conditioning, max_sequence_length: int) -> Conditioning:
        """What a branch with a prompt of the guidance's own is conditioned on: a row an image, as the conditional one."""
        embeds = self.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length)
        embeds = PromptEmbeds(*embeds)
        clip_text = None if conditional.clip_text_embeds is None else embeds.clip_text_embeds
        extra = Conditioning(
            conditional.clip_seq_len,
            embeds.prompt_embeds,
            clip_text,
            encoder_attention_mask=embeds.prompt_attention_mask,
        )
        return extra.to(self._execution_device, self.unet.dtype).repeat(len(conditional))

    def prepare_source(
        self, image: PipelineImageInput | None, height: int | None = None, width: int | None = None, **options: Any
    ) -> SourceImage:
        """The image to begin with, at the size at which results are generated; `options` are those of [`prepare_source`]."""
        source = prepare_source(image, self.size_rule, height=height, width=width, **options)
        if source.is_tokens:
            check_tokens("image", source.image, tuple(source.image.shape), self.unet.config.num_vq_embeddings)
        return source

    def size_of(self, source: SourceImage) -> tuple[int, int]:
        """Height and width, in pixels, at which results are generated."""
        unit = self.vae_scale_factor if source.is_tokens else 1
        return source.image.shape[-2] * unit, source.image.shape[-1] * unit

    def encode_source(self, source: SourceImage, num_images: int, device: torch.device) -> torch.Tensor:
        """The source's tokens, `(num_images, height / 4, width / 4)`."""
        tokens = source.image
        if not source.is_tokens:
            pixels = source.image.to(device, self.vqgan.dtype)
            tokens = self.vqgan.encode(pixels).indices
            if any(source.margins):  # the encoder sees far: what is around would change the picture's tokens
                left, top, right, bottom = source.margins
                inside = (..., slice(top, tokens.shape[1] - bottom), slice(left, tokens.shape[2] - right))
                scale = self.vae_scale_factor
                crop = tuple(slice(side.start * scale, side.stop * scale) for side in inside[1:])
                tokens[inside] = self.vqgan.encode(pixels[(..., *crop)]).indices
        return tokens.repeat_interleave(num_images // len(tokens), dim=0).to(device)

    def prepare_latents(
        self,
        shape: tuple[int, int, int],
        device: torch.device,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        noise_level: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The tokens to start from, and those that re-noising returns to: two grids of `shape`, `(num_images, height / 4,
        width / 4)`. Both are uniformly random, or `latents`, but for what comes from the `known` tokens: below noise level 1
        they take part in the start, and where `mask` is False they are both.
        """
        num_tokens = self.unet.config.num_vq_embeddings
        start = None
        if known is not None and noise_level < 1:
            start, _ = add_uniform_noise(known, noise_level, num_tokens, generator=generator)
        if latents is None:
            noise = random_tokens(num_tokens, shape, generator, device)
        else:
            noise = latents.to(device).repeat_interleave(shape[0] // len(latents), dim=0)
        start = noise if start is None else start
        if mask is None or known is None:
            return start, noise
        return torch.where(mask, start, known), torch.where(mask, noise, known)

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, output_type: str = "pil", source: SourceImage | None = None
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """
        Tokens to images.

        Args:
            latents (`torch.LongTensor` of shape `(num_images, height / 4, width / 4)`): Tokens.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, or `"latent"`, which returns the tokens.
            source ([`SourceImage`], *optional*): Whose size results have, and whose pixels where nothing was generated.
        """
        if output_type == "latent":
            return latents
        images = self.vqgan.decode_indices(latents.to(self._execution_device)).sample.clamp(0, 1)
        if source is not None:
            source.warn_if_enlarged(images)
            images = source.restore(images)
        return cast(Any, self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images)))


def seeded_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by torch's global one."""
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))


def _clones(generator: Generators) -> Generators:
    """Generators that will give the same numbers."""
    if isinstance(generator, list):
        return [one.clone_state() for one in generator]
    return None if generator is None else generator.clone_state()
