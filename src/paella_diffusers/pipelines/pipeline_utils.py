"""What Paella's pipelines share: components, prompt encoding, conditioning, the denoising loop and decoding."""

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from numbers import Integral, Real

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from transformers import (
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from ..loaders.lora import PaellaLoraLoaderMixin
from ..models.prior_paella import PaellaPrior
from ..models.unet_paella import PaellaUNet
from ..models.vq_model import PaellaVQModel
from ..schedulers.categorical import check_logits, rand_tensor, random_tokens
from ..schedulers.scheduling_utils import PaellaSchedulerBase
from .loading import LoadingMixin
from .source_image import SourceImage, read_mask

logger = logging.get_logger(__name__)


class PaellaPipelineBase(LoadingMixin, DiffusionPipeline, PaellaLoraLoaderMixin):
    r"""
    Components and steps of every Paella pipeline.

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
    ]
    _callback_tensor_inputs = ["latents", "pred_original_sample"]

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
        )
        self._prepare_for_images()

    def _prepare_for_images(self):
        self.vae_scale_factor = self.vqgan.patch_size if getattr(self, "vqgan", None) else 4
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_normalize=False)

    # ----------------------------------------------------------------------------------------------- the whole call

    def generate(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 12,
        guidance_scale: float | tuple[float, float] | None = 8.0,
        guidance_steps: int | tuple[int, int] | None = None,
        temperature: float | tuple[float, float] | None = None,
        renoise_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.LongTensor | None = None,
        condition_image: PIL.Image.Image | list | None = None,
        condition_image_weights: list | torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        clip_text_embeds: torch.Tensor | None = None,
        negative_clip_text_embeds: torch.Tensor | None = None,
        clip_image_embeds: torch.Tensor | None = None,
        conditioning_weights: torch.Tensor | None = None,
        use_prior: bool | None = None,
        prior_num_inference_steps: int = 60,
        prior_guidance_scale: float = 3.0,
        max_sequence_length: int = 768,
        region_masks: list | torch.Tensor | None = None,
        confidence_threshold: float | None = None,
        stability_threshold: float = 1.0,
        deep_feature_interval: int = 1,
        cross_attention_kwargs: dict | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        *,
        source: SourceImage | None = None,
        strength: float = 1.0,
        step: Callable | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        What the `__call__` of every task does, with `source` and `strength` for those that begin with an image.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to draw; or pass `prompt_embeds`.
            negative_prompt (`str` or `list[str]`, *optional*): What guidance moves away from; "" unless given.
            height, width (`int`, *optional*): Size in pixels, multiples of 32 in the released model; its default is 256.
            num_inference_steps (`int`, defaults to 12): Sampling steps.
            guidance_scale (`float` or `tuple[float, float]`, defaults to 8.0):
                w in `w · conditional + (1 - w) · unconditional` logits, or (first, last) for a linear ramp over the steps.
                With 1 or less, or None, there is no second pass.
            guidance_steps (`int` or `tuple[int, int]`, *optional*):
                Only the first so many steps are guided, or those from the first of two numbers to before the second; all
                unless given.
            temperature (`float` or `tuple[float, float]`, *optional*): The scheduler's, for this call: (first, last).
            renoise_steps (`int`, *optional*): The scheduler's, for this call.
            num_images_per_prompt (`int`, defaults to 1): Images for each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                The source of randomness; a list has one for each image, which then does not depend on its batch.
            latents (`torch.LongTensor` of shape `(num_images, height / 4, width / 4)`, *optional*):
                Tokens to start from in place of random ones, int64 in `[0, num_vq_embeddings)`.
            condition_image (`PIL.Image.Image` or list, *optional*):
                Condition on the CLIP embedding of an image, or of several in a list; a nested list has one list a prompt.
                Then `prompt` may be left out, for variations.
            condition_image_weights (`list` or `torch.Tensor`, *optional*):
                A factor on the attention paid to each of these images, `(num_images,)` or `(batch_size, num_images)`:
                `conditioning_weights` for all of its tokens.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(batch_size, length, text_embed_dim)`):
                Text encoder outputs, in place of prompts; their lengths may differ.
            prompt_attention_mask, negative_prompt_attention_mask (`torch.Tensor` of shape `(batch_size, length)`):
                0 where these are padding.
            clip_text_embeds, negative_clip_text_embeds (`torch.Tensor` of shape `(batch_size, clip_embed_dim)`, *optional*):
                CLIP text embeddings, not normalised.
            clip_image_embeds (`torch.Tensor` of shape `(batch_size, [num_images,] clip_embed_dim)`, *optional*):
                CLIP image embeddings, not normalised.
            conditioning_weights (`torch.Tensor` of shape `(n,)` or `(batch_size, n)`, *optional*):
                Factors on the attention paid to the last n conditioning tokens, in the conditional pass.
            use_prior (`bool`, *optional*):
                Whether the prior samples an image embedding; if None, when it is loaded and no image embedding is given.
            prior_num_inference_steps (`int`, defaults to 60): Steps of the prior.
            prior_guidance_scale (`float`, defaults to 3.0): Guidance of the prior.
            max_sequence_length (`int`, defaults to 768): Prompts are cut to so many bytes.
            region_masks (`list` or `torch.Tensor`, *optional*):
                One mask a prompt, all for one image: where it is 1 the prompt governs, and between them logits are blended.
                PIL, arrays or tensors `(height, width)` in [0, 1], or over the token grid, `(height / 4, width / 4)`; masks
                need not sum to 1 but must cover every token.
            confidence_threshold (`float`, *optional*):
                Stop early on images whose prediction is sure and stable: the mean entropy of their tokens is below so many
                nats, such as 0.1. They become their most likely tokens; `pipe.steps_taken` has how many of
                `num_inference_steps` each took.
            stability_threshold (`float`, defaults to 1.0):
                And so large a share of its tokens, in (0, 1], that were most likely in the step before must be so still.
            deep_feature_interval (`int`, defaults to 1):
                An approximation: only in every so many steps the U-Net's levels below the first are computed, and in between
                what came up from them is used again.
            cross_attention_kwargs (`dict`, *optional*): `{"scale": s}` scales LoRA adapters.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the token grid.
            return_dict (`bool`, defaults to `True`): Whether to return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step with `(pipeline, step, timestep, tensors)`; may return replaced `latents`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                What it is given: `latents`, the re-noised tokens, and `pred_original_sample`, those before re-noising.

            source ([`SourceImage`], *optional*): The image to begin with.
            strength (`float`, defaults to 1.0): The first noise level, in (0, 1].
            step (`Callable`, *optional*): Takes the place of `scheduler_step`.

        Returns:
            `ImagePipelineOutput` or `tuple`: The images, or int64 tokens `(num_images, height / 4, width / 4)`.

        Raises:
            ValueError: If an argument is out of range, or needs a component that is not there.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        height = self.unet.config.sample_size * self.vae_scale_factor if height is None else height
        width = self.unet.config.sample_size * self.vae_scale_factor if width is None else width
        if prompt is None and prompt_embeds is None and condition_image is not None:
            nested = isinstance(condition_image, list | tuple) and all(
                isinstance(row, list | tuple) for row in condition_image
            )
            prompt = [""] * max(1, len(condition_image)) if nested else ""
        prompts = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "clip_text_embeds": clip_text_embeds,
            "negative_clip_text_embeds": negative_clip_text_embeds,
            "max_sequence_length": max_sequence_length,
        }
        images = {
            "condition_image": condition_image,
            "condition_image_weights": condition_image_weights,
            "clip_image_embeds": clip_image_embeds,
            "conditioning_weights": conditioning_weights,
            "use_prior": use_prior,
            "prior_num_inference_steps": prior_num_inference_steps,
        }

        # 1. check inputs
        regions = None if region_masks is None else self.read_regions(region_masks, height, width)
        batch_size = self.check_inputs(
            **prompts,
            **images,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_steps=guidance_steps,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            source=source,
            strength=strength,
            regions=regions,
            confidence_threshold=confidence_threshold,
            stability_threshold=stability_threshold,
            deep_feature_interval=deep_feature_interval,
        )
        self._guidance_scale = guidance_scale
        self._guidance_steps = guidance_steps
        self._interrupt = False
        device = self._execution_device

        # 2. prepare the schedule: cheap, and it may refuse its arguments
        strength = self.set_timesteps(
            num_inference_steps, device, temperature, renoise_steps, strength, corrector=step is None
        )

        # 3. encode prompts and images
        conditioning, negative_conditioning = self.prepare_conditioning(
            batch_size,
            num_images_per_prompt,
            generator,
            prior_guidance_scale=prior_guidance_scale,
            **prompts,
            **images,
        )

        # 4. start from noise, or from an image with some
        num_images = (batch_size if regions is None else 1) * num_images_per_prompt
        shape = (num_images, height // self.vae_scale_factor, width // self.vae_scale_factor)
        latents, noise, mask = self.prepare_latents(shape, device, generator, latents, source, strength)

        # 5. denoise
        latents = self.denoise(
            latents,
            conditioning,
            negative_conditioning,
            noise=noise,
            mask=mask,
            regions=regions,
            step=step,
            stop=None if confidence_threshold is None else _EarlyStop(confidence_threshold, stability_threshold),
            deep_feature_interval=deep_feature_interval,
            generator=generator,
            cross_attention_kwargs=cross_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 6. decode
        images = self.decode(latents, output_type, source)
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    # ------------------------------------------------------------------------------------------------ input checks

    def check_inputs(
        self,
        prompt,
        negative_prompt,
        height,
        width,
        num_inference_steps,
        guidance_scale,
        guidance_steps,
        num_images_per_prompt,
        generator,
        latents,
        condition_image,
        condition_image_weights,
        prompt_embeds,
        negative_prompt_embeds,
        prompt_attention_mask,
        negative_prompt_attention_mask,
        clip_text_embeds,
        negative_clip_text_embeds,
        clip_image_embeds,
        conditioning_weights,
        use_prior,
        prior_num_inference_steps,
        max_sequence_length,
        output_type,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
        source,
        strength,
        regions,
        confidence_threshold,
        stability_threshold,
        deep_feature_interval,
    ) -> int:
        """Refuse bad input, naming the argument, the value and the remedy; the number of prompts otherwise."""
        self.check_size(height, width)
        for name, value, least in (
            ("num_inference_steps", num_inference_steps, 1),
            ("num_images_per_prompt", num_images_per_prompt, 1),
            *(("guidance_steps", value, 0) for value in _interval(guidance_steps)),
            ("deep_feature_interval", deep_feature_interval, 1),
            ("prior_num_inference_steps", prior_num_inference_steps, 1),
            ("max_sequence_length", max_sequence_length, 1),
        ):
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        if len(_interval(guidance_steps)) != 2:
            raise ValueError(f"`guidance_steps` must be a number of steps or (first, end), got {guidance_steps!r}.")
        scales = guidance_scale if isinstance(guidance_scale, tuple | list) else (guidance_scale or 0.0,) * 2
        if len(scales) != 2 or not all(isinstance(scale, Real) for scale in scales):
            raise ValueError(f"`guidance_scale` must be a number, (first, last) or None, got {guidance_scale}.")
        if not (isinstance(strength, Real) and 0 < strength <= 1):
            raise ValueError(f"`strength` must be a number in (0, 1], got {strength!r}: 1 keeps nothing of the image.")
        if confidence_threshold is not None and not (isinstance(confidence_threshold, Real) and confidence_threshold > 0):
            raise ValueError(
                "`confidence_threshold` must be a number of nats above 0, or None to run all steps, got "
                f"{confidence_threshold!r}."
            )
        if not (isinstance(stability_threshold, Real) and 0 < stability_threshold <= 1):
            raise ValueError(f"`stability_threshold` must be a share in (0, 1], got {stability_threshold!r}.")
        self.check_output_type(output_type)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` must be a function, got {callback_on_step_end!r}.")
        unknown = set(callback_on_step_end_tensor_inputs or ()) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be in {self._callback_tensor_inputs}, got {sorted(unknown)}."
            )

        # prompts, or embeddings in their place
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Pass either `prompt` or `prompt_embeds`: exactly one of them.")
        for name, value in {"prompt": prompt, "negative_prompt": negative_prompt}.items():
            values = value if isinstance(value, list | tuple) else [value]
            if value is not None and not (values and all(isinstance(text, str) for text in values)):
                raise ValueError(f"`{name}` must be a string or a list of at least one, got {value!r}; '' is fine.")
        if prompt is None:
            batch_size = len(prompt_embeds)
        else:
            batch_size = 1 if isinstance(prompt, str) else len(prompt)
            if self.text_encoder is None or self.tokenizer is None:
                raise ValueError(
                    "`prompt` needs the components `text_encoder` and `tokenizer`; without them, pass `prompt_embeds`."
                )
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Pass either `negative_prompt` or `negative_prompt_embeds`, not both.")
        if isinstance(negative_prompt, list | tuple) and len(negative_prompt) not in (1, batch_size):
            raise ValueError(
                f"`negative_prompt` has {len(negative_prompt)} entries for {batch_size} prompts: pass one, or one each."
            )
        guided = self._needs_guidance(guidance_scale)
        if guided and prompt is None and negative_prompt_embeds is None and self.text_encoder is None:
            raise ValueError(
                "Guidance needs `negative_prompt_embeds` beside `prompt_embeds` when there is no `text_encoder`; or turn it "
                "off with `guidance_scale=None`."
            )
        if guided and clip_text_embeds is not None and negative_clip_text_embeds is None and self.text_encoder_2 is None:
            raise ValueError(
                "Guidance needs `negative_clip_text_embeds` beside `clip_text_embeds` when there is no `text_encoder_2`."
            )

        if negative_clip_text_embeds is not None and clip_text_embeds is None and self.text_encoder_2 is None:
            raise ValueError("`negative_clip_text_embeds` needs `clip_text_embeds` beside it.")

        # embeddings: name, value, dimensions, width
        text_dim, clip_dim = self.unet.config.text_embed_dim, self.unet.config.clip_embed_dim
        for name, value, dims, width_expected in (
            ("prompt_embeds", prompt_embeds, (3,), text_dim),
            ("negative_prompt_embeds", negative_prompt_embeds, (3,), text_dim),
            ("clip_text_embeds", clip_text_embeds, (2,), clip_dim),
            ("negative_clip_text_embeds", negative_clip_text_embeds, (2,), clip_dim),
            ("clip_image_embeds", clip_image_embeds, (2, 3), clip_dim),
        ):
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"`{name}` must be a tensor, got {type(value).__name__}.")
            if value.ndim not in dims or value.shape[-1] != width_expected or 0 in value.shape:
                shape = "(batch_size, length, {})" if dims == (3,) else "(batch_size, {})"
                raise ValueError(
                    f"`{name}` must have shape {shape.format(width_expected)} for this U-Net, got {tuple(value.shape)}."
                )
            if len(value) not in (1, batch_size):
                raise ValueError(f"`{name}` has {len(value)} rows for {batch_size} prompts: pass one, or one each.")
        if conditioning_weights is not None:
            shape = tuple(getattr(conditioning_weights, "shape", ()))
            if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != batch_size):
                raise ValueError(f"`conditioning_weights` must be a tensor of shape (n,) or ({batch_size}, n), got {shape}.")
        for name, mask, embeds_name, embeds in (
            ("prompt_attention_mask", prompt_attention_mask, "prompt_embeds", prompt_embeds),
            (
                "negative_prompt_attention_mask",
                negative_prompt_attention_mask,
                "negative_prompt_embeds",
                negative_prompt_embeds,
            ),
        ):
            if mask is not None and (embeds is None or mask.shape != embeds.shape[:2]):
                expected = None if embeds is None else tuple(embeds.shape[:2])
                raise ValueError(
                    f"`{name}` goes with `{embeds_name}` and must have shape {expected}, got {tuple(mask.shape)}."
                )

        # images and the prior
        if condition_image is not None:
            if clip_image_embeds is not None:
                raise ValueError("Pass either `condition_image` or `clip_image_embeds`, not both.")
            if self.image_encoder is None or self.feature_extractor is None:
                raise ValueError("`condition_image` needs the components `image_encoder` and `feature_extractor`.")
            rows = _nested_images(condition_image, batch_size)
            if condition_image_weights is not None:
                if not isinstance(condition_image_weights, list | tuple | torch.Tensor):
                    raise ValueError(
                        f"`condition_image_weights` must be a list of numbers, got {condition_image_weights!r}."
                    )
                shape, count = tuple(torch.as_tensor(condition_image_weights).shape), len(rows[0])
                if shape not in ((count,), (batch_size, count)):
                    raise ValueError(
                        f"`condition_image_weights` must be numbers of shape ({count},) or ({batch_size}, {count}), got "
                        f"{shape}."
                    )
        if condition_image_weights is not None and (condition_image is None or conditioning_weights is not None):
            raise ValueError("`condition_image_weights` goes with `condition_image`, and not with `conditioning_weights`.")
        if use_prior:
            if self.prior is None or self.prior_scheduler is None:
                raise ValueError("`use_prior=True` needs the components `prior` and `prior_scheduler`.")
            if condition_image is not None or clip_image_embeds is not None:
                raise ValueError("`use_prior=True` samples an image embedding, but one is given: leave one of them out.")
            if clip_text_embeds is None and (self.text_encoder_2 is None or prompt is None):
                raise ValueError(
                    "`use_prior=True` needs CLIP text embeddings: the component `text_encoder_2`, or `clip_text_embeds`."
                )

        # randomness and start
        if regions is not None and len(regions) != batch_size:
            raise ValueError(f"`region_masks` has {len(regions)} masks for {batch_size} prompts: pass one for each.")
        batch_size_of_images = batch_size if regions is None else 1
        total = batch_size_of_images * num_images_per_prompt
        if not isinstance(generator, torch.Generator | list | None):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {type(generator).__name__}.")
        if isinstance(generator, list) and not all(isinstance(one, torch.Generator) for one in generator):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator}.")
        if isinstance(generator, list) and len(generator) != total:
            raise ValueError(f"`generator` is a list of {len(generator)}, but {total} images are made: pass one each.")
        if latents is not None:
            check_tokens(
                "latents",
                latents,
                (total, height // self.vae_scale_factor, width // self.vae_scale_factor),
                self.unet.config.num_vq_embeddings,
            )
        if source is not None and len(source.image) not in (1, batch_size_of_images):
            raise ValueError(
                f"`image` has {len(source.image)} images for {batch_size_of_images} prompts: pass one, or one each."
            )
        return batch_size

    def check_size(self, height, width):
        """Refuse sizes in pixels that are no whole number of the U-Net's token patches."""
        multiple = self.vae_scale_factor * self.unet.sample_multiple
        if not all(isinstance(side, Integral) and side > 0 and side % multiple == 0 for side in (height, width)):
            for name, side in {"height": height, "width": width}.items():
                if not isinstance(side, Integral):
                    raise ValueError(f"`{name}` must be an integer, of the multiples of {multiple}, got {side!r}.")
            nearest = [max(1, round(side / multiple)) * multiple for side in (height, width)]
            raise ValueError(
                f"`height` and `width` must be multiples of {multiple}, got {height} and {width}: the nearest are "
                f"{nearest[0]} and {nearest[1]}."
            )

    def check_output_type(self, output_type):
        """Refuse unknown kinds of results."""
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")

    def check_image(self, image: torch.Tensor) -> torch.Tensor:
        """Refuse tokens that this VQGAN does not have."""
        if not image.is_floating_point():
            check_tokens("image", image, tuple(image.shape), self.unet.config.num_vq_embeddings)
        return image

    def size_of(self, image: torch.Tensor) -> tuple[int, int]:
        """Height and width in pixels of pixels or tokens."""
        unit = 1 if image.is_floating_point() else self.vae_scale_factor
        return image.shape[-2] * unit, image.shape[-1] * unit

    # ------------------------------------------------------------------------------------------------ conditioning

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        clip_text_embeds: torch.Tensor | None = None,
        negative_clip_text_embeds: torch.Tensor | None = None,
        max_sequence_length: int = 768,
        device: torch.device | None = None,
    ):
        """
        Prompts to embeddings, each repeated `num_images_per_prompt` times. Embeddings that are passed in are kept.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to draw.
            negative_prompt (`str` or `list[str]`, *optional*): What the guidance moves away from; "" unless given.
            num_images_per_prompt (`int`, defaults to 1): Images for each prompt.
            do_classifier_free_guidance (`bool`, defaults to `True`): Whether negative embeddings are wanted.
            max_sequence_length (`int`, defaults to 768): Prompts are cut to so many bytes.
            device (`torch.device`, *optional*): Where to compute; the pipeline's unless given.

        Returns:
            `prompt_embeds` and `negative_prompt_embeds`, `(batch_size, length, text_embed_dim)`; their masks,
            `(batch_size, length)`, None where nothing is padded; `clip_text_embeds` and `negative_clip_text_embeds`,
            `(batch_size, clip_embed_dim)`, None without CLIP. The names are those that `__call__` takes.
        """
        device = device or self._execution_device
        prompt = [prompt] if isinstance(prompt, str) else prompt
        batch_size = len(prompt) if prompt is not None else len(prompt_embeds)
        negative = negative_prompt if negative_prompt is not None else ""
        negative = [negative] * batch_size if isinstance(negative, str) else list(negative)
        negative = negative * batch_size if len(negative) == 1 else negative

        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self._encode_byt5(prompt, max_sequence_length, device)
        if clip_text_embeds is None and prompt is not None and self.text_encoder_2 is not None:
            clip_text_embeds = self._encode_clip(prompt, device)
        if do_classifier_free_guidance:
            if negative_prompt_embeds is None:
                negative_prompt_embeds, negative_prompt_attention_mask = self._encode_byt5(
                    negative, max_sequence_length, device
                )
            if clip_text_embeds is None:
                negative_clip_text_embeds = None  # both passes have the same parts
            elif negative_clip_text_embeds is None:
                negative_clip_text_embeds = self._encode_clip(negative, device)

        sizes = (batch_size, num_images_per_prompt, device)
        prompt_embeds = _repeat(prompt_embeds, *sizes)
        negative_prompt_embeds = _repeat(negative_prompt_embeds, *sizes)
        prompt_attention_mask = _repeat(prompt_attention_mask, *sizes)
        negative_prompt_attention_mask = _repeat(negative_prompt_attention_mask, *sizes)
        clip_text_embeds = _repeat(clip_text_embeds, *sizes)
        negative_clip_text_embeds = _repeat(negative_clip_text_embeds, *sizes)
        return (
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            clip_text_embeds,
            negative_clip_text_embeds,
        )

    def _encode_byt5(self, prompts: list[str], max_length: int, device):
        distinct, rows = _distinct(prompts)
        inputs = self.tokenizer(distinct, padding="longest", max_length=max_length, truncation=True, return_tensors="pt").to(
            device
        )
        if inputs.input_ids.shape[1] == max_length and any(len(p.encode()) >= max_length for p in distinct):
            logger.warning(f"Prompts were cut to `max_sequence_length`, {max_length} bytes.")
        mask = None if inputs.attention_mask.all() else inputs.attention_mask  # no mask, no padding
        embeds = self.text_encoder(inputs.input_ids, attention_mask=mask).last_hidden_state
        return embeds[rows], None if mask is None else mask[rows]

    def _encode_clip(self, prompts: list[str], device) -> torch.Tensor:
        distinct, rows = _distinct(prompts)
        max_length = min(self.tokenizer_2.model_max_length, self.text_encoder_2.config.max_position_embeddings)
        inputs = self.tokenizer_2(
            distinct, padding="longest", max_length=max_length, truncation=True, return_tensors="pt"
        ).to(device)
        # causal, and pooled at the end-of-text token: padding behind it changes nothing
        return self.text_encoder_2(inputs.input_ids).text_embeds[rows]

    def encode_image(self, condition_image, batch_size: int, num_images_per_prompt: int = 1, device=None) -> torch.Tensor:
        """
        CLIP embeddings of images to condition on: resized to the encoder's size, bicubic, without cropping.

        Args:
            condition_image (`PIL.Image.Image`, a list of them, or a nested list):
                One image or several for every prompt, or, nested, as many for each prompt.
            batch_size (`int`): Number of prompts.

        Returns:
            `torch.Tensor` of shape `(batch_size * num_images_per_prompt, num_images, clip_embed_dim)`, not normalised.
        """
        device = device or self._execution_device
        images = _nested_images(condition_image, batch_size)
        size = self.image_encoder.config.image_size
        pixels = self.feature_extractor(
            [image.convert("RGB") for row in images for image in row],
            size={"height": size, "width": size},
            resample=PIL.Image.Resampling.BICUBIC,
            do_center_crop=False,
            return_tensors="pt",
        ).pixel_values
        embeds = self.image_encoder(pixels.to(device, self.image_encoder.dtype)).image_embeds
        return _repeat(embeds.view(len(images), len(images[0]), -1), batch_size, num_images_per_prompt, device)

    def sample_prior(
        self,
        clip_text_embeds: torch.Tensor,
        num_inference_steps: int = 60,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """CLIP text embeddings `(batch_size, clip_embed_dim)` to sampled CLIP image embeddings of the same shape."""
        text = clip_text_embeds.to(self.prior.dtype)
        # t=1 is skipped: there the cosine schedule divides by nearly zero
        times = torch.linspace(1, 0, num_inference_steps + 2)[1:]
        self.prior_scheduler.set_timesteps(timesteps=times.tolist(), device=text.device)
        sample = randn_tensor(text.shape, generator=generator, device=text.device, dtype=text.dtype)
        for t in self.prior_scheduler.timesteps[:-1]:
            # two passes as published: errors grow along the steps, and one batch of both would round differently
            conditional = self.prior(sample, t, text).sample
            unconditional = self.prior(sample, t, torch.zeros_like(text)).sample
            noise = torch.lerp(unconditional, conditional, guidance_scale)
            sample = self.prior_scheduler.step(noise, t.expand(len(sample)), sample, generator=generator).prev_sample
        return sample

    def prepare_conditioning(
        self,
        batch_size: int,
        num_images_per_prompt: int,
        generator,
        condition_image=None,
        condition_image_weights=None,
        clip_image_embeds=None,
        conditioning_weights=None,
        use_prior=None,
        prior_num_inference_steps=60,
        prior_guidance_scale=3.0,
        **prompt_kwargs,
    ) -> tuple[dict, dict | None]:
        """The U-Net's conditioning arguments for the conditional pass, and, with guidance, for the unconditional one."""
        device = self._execution_device
        guided = self._needs_guidance(self._guidance_scale)
        text, negative_text, mask, negative_mask, clip_text, negative_clip_text = self.encode_prompt(
            num_images_per_prompt=num_images_per_prompt, do_classifier_free_guidance=guided, device=device, **prompt_kwargs
        )
        if condition_image is not None:
            clip_image_embeds = self.encode_image(condition_image, batch_size, num_images_per_prompt, device)
        elif clip_image_embeds is not None:
            images = clip_image_embeds[:, None] if clip_image_embeds.ndim == 2 else clip_image_embeds
            clip_image_embeds = _repeat(images, batch_size, num_images_per_prompt, device)
        else:
            needed = (self.prior, self.prior_scheduler, clip_text)
            if use_prior or (use_prior is None and all(part is not None for part in needed)):
                rows = generator
                if isinstance(generator, list):  # with regions, an image has several prompts
                    rows = generator * (len(clip_text) // len(generator))
                embeds = self.sample_prior(clip_text, prior_num_inference_steps, prior_guidance_scale, rows)
                clip_image_embeds = embeds[:, None]
        if condition_image_weights is not None:
            weights = torch.as_tensor(condition_image_weights, dtype=torch.float32)
            conditioning_weights = weights.repeat_interleave(self.unet.config.clip_seq_len, dim=-1)
        if conditioning_weights is not None:
            weights = conditioning_weights[None] if conditioning_weights.ndim == 1 else conditioning_weights
            conditioning_weights = _repeat(weights, batch_size, num_images_per_prompt, device)
        conditioning = {
            "encoder_hidden_states": text,
            "clip_text_embeds": clip_text,
            "clip_image_embeds": clip_image_embeds,
            "encoder_attention_mask": mask,
            "conditioning_weights": conditioning_weights,
        }
        negative_conditioning = {
            "encoder_hidden_states": negative_text,
            "clip_text_embeds": negative_clip_text,
            "clip_image_embeds": None,
            "encoder_attention_mask": negative_mask,
            "conditioning_weights": None,
        }
        for branch in (conditioning, negative_conditioning):
            for name in ("encoder_hidden_states", "clip_text_embeds", "clip_image_embeds", "conditioning_weights"):
                branch[name] = None if branch[name] is None else branch[name].to(self.unet.dtype)
        return conditioning, negative_conditioning if guided else None

    # -------------------------------------------------------------------------------------------------- denoising

    @property
    def guidance_scale(self):
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @staticmethod
    def _needs_guidance(scale) -> bool:
        scales = scale if isinstance(scale, tuple | list) else [scale]
        return any(s is not None and s > 1 for s in scales)

    def _guidance_at(self, step: int) -> float | None:
        """This step's guidance scale, None for no second pass; read anew at every step, as callbacks may change it."""
        scale = self._guidance_scale
        if isinstance(scale, tuple | list):
            first, last = scale
            scale = torch.linspace(first, last, self._num_timesteps)[step].item()
        first, end = _interval(self._guidance_steps)
        if not first <= step < end:
            return None
        return scale if self._needs_guidance(scale) else None

    def set_timesteps(
        self,
        num_inference_steps: int,
        device,
        temperature=None,
        renoise_steps=None,
        strength: float = 1.0,
        corrector: bool = True,
    ) -> float:
        """
        Prepare the scheduler to descend from noise level `strength` in `num_inference_steps` evaluations of the U-Net, those
        for its corrector included; and the level it does begin with. An override that neither its `set_timesteps` nor its
        `step` takes is refused.
        """
        overrides = {"temperature": temperature, "renoise_steps": renoise_steps}
        overrides = {name: value for name, value in overrides.items() if value is not None}
        here, in_step = (inspect.signature(f).parameters for f in (self.scheduler.set_timesteps, self.scheduler.step))
        unknown = overrides.keys() - here.keys() - in_step.keys()
        if unknown:
            raise ValueError(f"{type(self.scheduler).__name__} takes no {sorted(unknown)}: leave it out.")
        now = {name: overrides.pop(name) for name in here if name in overrides}
        if temperature is None and "temperature" in in_step and "temperature" in self.scheduler.config:
            overrides["temperature"] = self.scheduler.config.temperature  # left there by the scheduler it was swapped for
        # a corrector's sweeps are part of the budget: as many of the first steps as it allows are corrected
        corrector = corrector and hasattr(self.scheduler, "step_correct")
        sweeps = self.scheduler.config.get("corrector_steps", 0) if corrector else 0
        corrected = (num_inference_steps - 1) // (1 + sweeps) if sweeps else 0
        num_inference_steps -= corrected * sweeps
        self._sweeps = [sweeps] * corrected + [0] * (num_inference_steps - corrected)
        total = num_inference_steps
        if strength < 1 and "t_start" in here:
            now["t_start"] = strength
        elif strength < 1:  # the last steps of a longer run
            total = max(num_inference_steps + 1, round(num_inference_steps / strength))
        self.scheduler.set_timesteps(total, device=device, **now)
        self._timesteps = self.scheduler.timesteps[-num_inference_steps:]
        # diffusers' discrete schedulers count steps upwards, ours give the level
        counts = not self._timesteps.is_floating_point()
        self._levels = 1 - self._timesteps / total if counts else self._timesteps
        self._num_timesteps = len(self._timesteps)
        ramp = overrides.pop("temperature", None)  # for `step`
        ramp = ramp if isinstance(ramp, tuple | list) else (ramp, ramp)
        self._step_temperatures = None if None in ramp else torch.linspace(*ramp, num_inference_steps).tolist()
        return float(self._levels[0]) if counts else strength

    def prepare_latents(
        self,
        shape: tuple[int, int, int],
        device,
        generator=None,
        latents: torch.LongTensor | None = None,
        source: SourceImage | None = None,
        strength: float = 1.0,
    ) -> tuple[torch.LongTensor, torch.LongTensor, torch.BoolTensor | None]:
        """
        The tokens to start from, those that re-noising returns to, and where tokens are generated (None: everywhere): three
        grids of `shape`, `(num_images, height / 4, width / 4)`. Both grids are uniformly random, or `latents`, but for what
        comes from the source.
        """
        num_tokens = self.unet.config.num_vq_embeddings
        if source is None or (source.mask is None and strength == 1):
            noise = random_tokens(num_tokens, shape, generator, device) if latents is None else latents.to(device)
            return noise, noise, None
        tokens = self.encode_source(source, shape[0], device)
        if strength < 1:
            noised = rand_tensor(shape, generator, device) <= strength
            start = torch.where(noised, random_tokens(num_tokens, shape, generator, device), tokens)
        noise = random_tokens(num_tokens, shape, generator, device) if latents is None else latents.to(device)
        if strength == 1:
            start = noise
        if source.mask is None:
            return start, noise, None
        mask = _repeat_to(source.mask, shape[0]).to(device)
        return torch.where(mask, start, tokens), torch.where(mask, noise, tokens), mask

    def read_regions(self, region_masks, height: int, width: int) -> torch.Tensor:
        """Masks as a share for every prompt at every token, `(num_prompts, height / 4, width / 4)`, summing to 1."""
        self.check_size(height, width)
        if not isinstance(region_masks, Iterable):
            raise ValueError(
                f"`region_masks` must be a list with a mask for each prompt, got {type(region_masks).__name__}."
            )
        grid = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        shapes = {tuple(mask.shape[-2:]) for mask in region_masks if isinstance(mask, torch.Tensor | np.ndarray)}
        masks = read_mask(region_masks, grid if shapes == {grid} else (height, width), name="region_masks")
        masks = F.adaptive_avg_pool2d(masks, grid)[:, 0]
        total = masks.sum(0)
        if (total == 0).any():
            row, column = (total == 0).nonzero()[0].tolist()
            raise ValueError(
                f"`region_masks` leave the token in row {row} and column {column} without a prompt: let one cover it."
            )
        return masks / total

    def encode_source(self, source: SourceImage, num_images: int, device) -> torch.LongTensor:
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
        return _repeat_to(tokens, num_images).to(device)

    def denoise(
        self,
        latents: torch.LongTensor,
        conditioning: dict[str, torch.Tensor | None],
        negative_conditioning: dict[str, torch.Tensor | None] | None,
        noise: torch.LongTensor,
        mask: torch.Tensor | None = None,
        regions: torch.Tensor | None = None,
        step: Callable | None = None,
        stop: Callable | None = None,
        deep_feature_interval: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        cross_attention_kwargs: dict | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> torch.LongTensor:
        """The sampling loop: logits, guidance, and a step of the scheduler, until the tokens are clean."""
        step = step or self.scheduler_step
        lora = {"cross_attention_kwargs": cross_attention_kwargs}

        @functools.cache
        def encoded(guided: bool) -> dict:
            """The U-Net's conditioning arguments for one branch or both, in one batch."""
            arguments = conditioning
            if guided:
                arguments = join_conditioning(conditioning, negative_conditioning, self.unet.config.clip_seq_len)
            if is_offloaded(self.unet):  # its parts work only when they are called in turn
                return arguments
            return {"encoder_hidden_states": self.unet.encode_conditioning(**arguments, **lora)}

        takes_codebook = "codebook" in inspect.signature(self.scheduler.step).parameters
        codebook = self.vqgan.codebook(latents.device) if takes_codebook else None

        def predict(latents, level, scale, deep_features=None):
            if negative_conditioning is None:  # a callback cannot turn on what was not encoded
                scale = None
            passes = (1 if scale is None else 2) * (1 if regions is None else len(regions))
            sample = latents.repeat(passes, 1, 1)
            if deep_features and len(deep_features[0]) != len(sample):  # guidance began or ended
                deep_features.clear()
            extra = {"guidance_scale": scale, "deep_features": deep_features} | lora
            logits = self.unet(sample, level, **encoded(scale is not None), **extra).sample
            if regions is not None:  # rows are prompts, then images
                logits = (regions.to(logits)[:, None, None] * logits.unflatten(0, (len(regions), -1))).sum(0)
            return logits

        finished = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
        evaluations = torch.zeros_like(finished, dtype=torch.long)
        with self.progress_bar(total=self._num_timesteps + sum(self._sweeps)) as progress_bar:
            for i, (t, level) in enumerate(zip(self._timesteps, self._levels)):
                if self.interrupt:
                    break
                evaluations += ~finished
                if i % deep_feature_interval == 0:
                    deep_features = None if deep_feature_interval == 1 else []
                logits = predict(latents, level, self._guidance_at(i), deep_features)
                latents, pred_original_sample = step(logits, t, latents, noise, mask, codebook, generator)
                for _ in range(self._sweeps[i]):
                    corrected = predict(latents, self._levels[i + 1], self._guidance_at(i))
                    latents = self.corrector_step(corrected, t, latents, mask, generator)
                    evaluations += ~finished
                    progress_bar.update()
                if stop is not None:
                    latents, pred_original_sample, finished = stop(logits, latents, pred_original_sample, mask)
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "pred_original_sample": pred_original_sample}
                    wanted = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, i, t, wanted).pop("latents", latents)
                progress_bar.update()
                if stop is not None and finished.all():
                    break
        self.steps_taken = evaluations.tolist()
        return latents

    def scheduler_step(
        self, logits, timestep, latents, noise, mask=None, codebook=None, generator=None
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """
        One step of any discrete scheduler, which is given the arguments that it takes: the next token grid, and the
        predicted clean one. With a list of generators, image by image.
        """
        if isinstance(generator, list):
            masks = [None] * len(generator) if mask is None else mask.split(1)
            images = zip(logits.split(1), latents.split(1), noise.split(1), masks, generator)
            steps = [self.scheduler_step(row, timestep, x, n, m, codebook, g) for row, x, n, m, g in images]
            return tuple(torch.cat(part) for part in zip(*steps))
        accepted = inspect.signature(self.scheduler.step).parameters
        arguments = {"noise": noise, "mask": mask, "codebook": codebook, "generator": generator}
        if self._step_temperatures is not None:
            arguments["temperature"] = self._step_temperatures[self._timesteps.tolist().index(timestep)]
        sample = latents
        if not isinstance(self.scheduler, PaellaSchedulerBase):  # but made for sequences, as text models have
            logits, arguments["generator"] = self.for_others(logits, latents, mask, generator)
            logits = logits.flatten(2).transpose(1, 2)  # channels-last: no copy
            sample, arguments["noise"] = sample.flatten(1), noise.flatten(1)
            arguments["mask"] = None if mask is None else mask.flatten(1)
        arguments = {name: value for name, value in arguments.items() if name in accepted}
        output = self.scheduler.step(logits, timestep, sample, **arguments)
        tokens = output.prev_sample.view_as(latents), output.sampled_tokens.view_as(latents)
        if hasattr(output, "accepted_index") and timestep == self._timesteps[-1]:  # no more to come: nothing stays noise
            tokens = tokens[1], tokens[1]
        if mask is not None and "mask" not in accepted:
            tokens = tuple(torch.where(mask, grid, latents) for grid in tokens)
        return tokens

    def for_others(self, logits, latents, mask, generator) -> tuple[torch.Tensor, torch.Generator | None]:
        """
        What schedulers that are not ours should get: logits that are finite, and certain of known tokens, which they would
        otherwise spend their choice on; and a generator on the same device.
        """
        check_logits(logits)
        if mask is not None:
            certain = F.one_hot(latents, logits.shape[1]).movedim(-1, 1) * 50.0
            logits = torch.where(mask[:, None], logits, certain.to(logits))
        if generator is not None and generator.device != logits.device:
            seed = torch.randint(2**62, (1,), generator=generator, device=generator.device).item()
            generator = torch.Generator(logits.device).manual_seed(seed)
        return logits, generator

    def corrector_step(self, logits, timestep, latents, mask=None, generator=None) -> torch.LongTensor:
        """A sweep of the scheduler's corrector, after the step at `timestep`: the corrected token grid."""
        if isinstance(generator, list):
            masks = [None] * len(generator) if mask is None else mask.split(1)
            images = zip(logits.split(1), latents.split(1), masks, generator)
            return torch.cat([self.corrector_step(row, timestep, x, m, g) for row, x, m, g in images])
        logits, generator = self.for_others(logits, latents, mask, generator)
        logits = logits.flatten(2).transpose(1, 2)
        output = self.scheduler.step_correct(logits, timestep, latents.flatten(1), generator=generator)
        corrected = output.prev_sample.view_as(latents)
        return corrected if mask is None else torch.where(mask, corrected, latents)

    def decode(self, latents: torch.LongTensor, output_type: str, source: SourceImage | None = None):
        """Tokens to images of the wanted type, with what the source keeps of its pixels; `"latent"` returns the tokens."""
        if output_type == "latent":
            return latents
        images = self.vqgan.decode_indices(latents).sample.clamp(0, 1)
        if source is not None and source.blend is not None:
            kept, blend = (_repeat_to(part, len(images)).to(images.device) for part in (source.image, source.blend))
            images = torch.lerp(kept, images.float(), blend)
        return self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))


class _EarlyStop:
    """
    Freezes images whose prediction has converged: of the most likely tokens, where any are generated, a share of `stability`
    is that of the step before, and the mean entropy is below `confidence` nats. (Text in `DiffusionGemmaPipeline` stops
    likewise, but by whole predictions, of which it keeps several.)
    """

    def __init__(self, confidence: float, stability: float):
        self.confidence, self.stability = confidence, stability
        self.prediction = None

    def __call__(self, logits, latents, pred_original_sample, mask):
        """Both token grids, where finished images have their most likely tokens, and which images are finished."""
        likely = logits.argmax(1)
        if mask is not None:
            likely = torch.where(mask, likely, latents)
        if self.prediction is None:
            self.prediction = torch.full_like(likely, -1)
            self.finished = torch.zeros(len(likely), dtype=torch.bool, device=likely.device)
        log_probs = logits.float().log_softmax(1)
        weight = torch.ones_like(likely) if mask is None else mask.expand_as(likely)
        mean = lambda values: (values * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)
        entropy = mean(-(log_probs.exp() * log_probs).sum(1))
        stable = mean((likely == self.prediction).float()) >= self.stability
        self.prediction = torch.where(self.finished[:, None, None], self.prediction, likely)
        self.finished = self.finished | (stable & (entropy < self.confidence))
        frozen = self.finished[:, None, None]
        return *(torch.where(frozen, self.prediction, x) for x in (latents, pred_original_sample)), self.finished


def with_shared_arguments(call: Callable) -> Callable:
    """
    For a task's `__call__(self, its_own, **kwargs)`: it gets the arguments of [`PaellaPipelineBase.generate`] after its own,
    in the signature and, at "{shared}", in the docstring.
    """
    own = inspect.signature(call)
    parameters = {name: p for name, p in own.parameters.items() if p.kind is not p.VAR_KEYWORD}
    for name, parameter in inspect.signature(PaellaPipelineBase.generate).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            parameters.setdefault(name, parameter)
    signature = own.replace(parameters=parameters.values())

    @functools.wraps(call)
    def wrapper(self, *args, **kwargs):
        return call(**signature.bind(self, *args, **kwargs).arguments)

    wrapper.__signature__ = signature
    shared = PaellaPipelineBase.generate.__doc__.partition("Args:\n")[2].partition("            source (")[0]
    entries = re.split(r"\n(?=            \w)", "\n" + shared.rstrip())[1:]
    names = [set(re.match(r"\s*([\w, ]+)", entry)[1].strip().split(", ")) for entry in entries]
    entries = [entry for entry, documented in zip(entries, names) if not documented & own.parameters.keys()]
    wrapper.__doc__ = call.__doc__.replace("            {shared}", "\n".join(entries))
    return wrapper


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether hooks move the parts of a model about, or change them, when they are called."""
    return any(
        module is not model and (hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook"))
        for module in model.modules()
    )


def join_conditioning(positive: dict, negative: dict, clip_seq_len: int) -> dict:
    """
    The U-Net's conditioning arguments for both branches, conditional and unconditional, in one batch. A branch that has
    shorter text, or no image embeddings, is padded and the padding masked; without padding there is no mask.
    """
    length = max(branch["encoder_hidden_states"].shape[1] for branch in (positive, negative))
    images = positive["clip_image_embeds"]
    text, masks = [], []
    for branch in (positive, negative):
        embeds, mask = branch["encoder_hidden_states"], branch["encoder_attention_mask"]
        missing = length - embeds.shape[1]
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        text.append(F.pad(embeds, (0, 0, 0, missing)))
        mask = F.pad(mask.bool(), (0, missing))
        if branch["clip_text_embeds"] is not None:
            mask = F.pad(mask, (0, clip_seq_len), value=True)
        if images is not None:
            mask = F.pad(mask, (0, clip_seq_len * images.shape[1]), value=branch is positive)
        masks.append(mask)
    mask = torch.cat(masks)
    weights = positive["conditioning_weights"]
    clip_text = positive["clip_text_embeds"]
    return {
        "encoder_hidden_states": torch.cat(text),
        "clip_text_embeds": None if clip_text is None else torch.cat([clip_text, negative["clip_text_embeds"]]),
        "clip_image_embeds": None if images is None else torch.cat([images, torch.zeros_like(images)]),
        "encoder_attention_mask": None if mask.all() else mask,
        "conditioning_weights": None if weights is None else torch.cat([weights, torch.ones_like(weights)]),
    }


def check_tokens(name: str, tokens: torch.Tensor, shape: tuple[int, ...], num_tokens: int):
    """Refuse what is not a token grid of this shape."""
    if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.int64:
        kind = f"{tokens.dtype}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise ValueError(f"`{name}` must be a token grid, an int64 tensor, got {kind}.")
    if tokens.shape != shape:
        raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tokens.shape)}.")
    if tokens.min() < 0 or tokens.max() >= num_tokens:
        raise ValueError(f"`{name}` must be in [0, {num_tokens}), got {tokens.min().item()} to {tokens.max().item()}.")


def _interval(guidance_steps: int | tuple[int, int] | None) -> tuple[int, int]:
    """The first guided step, and the one after the last."""
    if isinstance(guidance_steps, tuple | list):
        return tuple(guidance_steps)
    return 0, sys.maxsize if guidance_steps is None else guidance_steps


def _nested_images(images, batch_size: int) -> list[list[PIL.Image.Image]]:
    """One row of images for every prompt, or a row for each, all of one length."""
    images = images if isinstance(images, list | tuple) else [images]
    rows = images if images and all(isinstance(row, list | tuple) for row in images) else [images]
    flat = [image for row in rows for image in row]
    if not all(rows) or not all(isinstance(image, PIL.Image.Image) for image in flat):
        raise ValueError(
            "`condition_image` must be a PIL image, a list of them, or a list with such a list for each prompt."
        )
    if len(rows) not in (1, batch_size) or len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"`condition_image` nests {[len(row) for row in rows]} images for {batch_size} prompts: pass one list for each "
            "prompt, all of one length."
        )
    return [list(row) for row in rows]


def _repeat(tensor: torch.Tensor | None, batch_size: int, num_images_per_prompt: int, device) -> torch.Tensor | None:
    """A row for every image, from a row for every prompt, or from one for all."""
    if tensor is None:
        return None
    rows = tensor.expand(batch_size, *tensor.shape[1:]) if len(tensor) == 1 else tensor
    return rows.to(device).repeat_interleave(num_images_per_prompt, dim=0)


def _repeat_to(rows: torch.Tensor, num_images: int) -> torch.Tensor:
    """A row for every image, from one for all or one for each prompt."""
    return rows.repeat_interleave(num_images // len(rows), dim=0)


def _distinct(prompts: list[str]) -> tuple[list[str], list[int]]:
    """The distinct prompts, and for each prompt its row among them: nothing is encoded twice."""
    distinct = list(dict.fromkeys(prompts))
    return distinct, [distinct.index(prompt) for prompt in prompts]
