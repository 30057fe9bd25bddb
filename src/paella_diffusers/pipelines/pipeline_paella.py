"""Text to image with Paella."""

from collections.abc import Callable

import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import replace_example_docstring

from .pipeline_utils import PaellaPipelineBase

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> from paella_diffusers import EMOJI_MODEL, PaellaPipeline

        >>> pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)  # or "dome272/Paella"
        >>> pipe("red heart").images[0].save("heart.png")
        ```
"""


class PaellaPipeline(PaellaPipelineBase):
    r"""
    Text to image by renoising discrete tokens (Paella, https://huggingface.co/papers/2211.07292), with optional conditioning
    on CLIP image embeddings, given or sampled by a prior. [`PaellaPipelineBase`] documents the components.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 12,
        guidance_scale: float | tuple[float, float] | None = 8.0,
        guidance_steps: int | None = None,
        temperature: float | tuple[float, float] | None = None,
        renoise_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.LongTensor | None = None,
        condition_image: PIL.Image.Image | list | None = None,
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
        cross_attention_kwargs: dict | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate images.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to draw; or pass `prompt_embeds`.
            negative_prompt (`str` or `list[str]`, *optional*): What guidance moves away from; "" unless given.
            height, width (`int`, *optional*): Size in pixels, multiples of 32 in the released model; its default is 256.
            num_inference_steps (`int`, defaults to 12): Sampling steps.
            guidance_scale (`float` or `tuple[float, float]`, defaults to 8.0):
                w in `w · conditional + (1 - w) · unconditional` logits, or (first, last) for a linear ramp over the steps.
                With 1 or less, or None, there is no second pass.
            guidance_steps (`int`, *optional*): Only the first so many steps are guided; all unless given.
            temperature (`float` or `tuple[float, float]`, *optional*): The scheduler's, for this call: (first, last).
            renoise_steps (`int`, *optional*): The scheduler's, for this call.
            num_images_per_prompt (`int`, defaults to 1): Images for each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                The source of randomness; a list has one for each image, which then does not depend on its batch.
            latents (`torch.LongTensor` of shape `(num_images, height / 4, width / 4)`, *optional*):
                Tokens to start from in place of random ones, int64 in `[0, num_vq_embeddings)`.
            condition_image (`PIL.Image.Image` or list, *optional*):
                Condition on the CLIP embedding of an image, or of several in a list; a nested list has one list a prompt.
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
            cross_attention_kwargs (`dict`, *optional*): `{"scale": s}` scales LoRA adapters.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the token grid.
            return_dict (`bool`, defaults to `True`): Whether to return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step with `(pipeline, step, timestep, tensors)`; may return replaced `latents`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                What it is given: `latents`, the re-noised tokens, and `pred_original_sample`, those before re-noising.

        Examples:

        Returns:
            `ImagePipelineOutput` or `tuple`: The images, or int64 tokens `(num_images, height / 4, width / 4)`.

        Raises:
            ValueError: If an argument is out of range, or needs a component that is not there.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        height = self.unet.config.sample_size * self.vae_scale_factor if height is None else height
        width = self.unet.config.sample_size * self.vae_scale_factor if width is None else width

        # 1. check inputs
        batch_size = self.check_inputs(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_steps=guidance_steps,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            condition_image=condition_image,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            clip_text_embeds=clip_text_embeds,
            negative_clip_text_embeds=negative_clip_text_embeds,
            clip_image_embeds=clip_image_embeds,
            conditioning_weights=conditioning_weights,
            use_prior=use_prior,
            prior_num_inference_steps=prior_num_inference_steps,
            max_sequence_length=max_sequence_length,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._guidance_steps = guidance_steps
        self._interrupt = False
        device = self._execution_device

        # 2. prepare the schedule: cheap, and it may refuse its arguments
        self.set_timesteps(num_inference_steps, device, temperature, renoise_steps)

        # 3. encode prompts and images
        conditioning, negative_conditioning = self.prepare_conditioning(
            batch_size,
            num_images_per_prompt,
            generator,
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            clip_text_embeds=clip_text_embeds,
            negative_clip_text_embeds=negative_clip_text_embeds,
            max_sequence_length=max_sequence_length,
            condition_image=condition_image,
            clip_image_embeds=clip_image_embeds,
            conditioning_weights=conditioning_weights,
            use_prior=use_prior,
            prior_num_inference_steps=prior_num_inference_steps,
            prior_guidance_scale=prior_guidance_scale,
        )

        # 4. start from noise
        latents = self.prepare_latents(batch_size * num_images_per_prompt, height, width, device, generator, latents)

        # 5. denoise
        latents = self.denoise(
            latents,
            conditioning,
            negative_conditioning,
            noise=latents,
            generator=generator,
            cross_attention_kwargs=cross_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 6. decode
        images = self.decode(latents, output_type)
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)
