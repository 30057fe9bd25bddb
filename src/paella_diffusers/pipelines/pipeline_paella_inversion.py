"""Editing of real images with Paella, by discrete inversion."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import replace_example_docstring

from ..checks import check_number, suggest_arguments
from ..sampling.steering import SteeringMethod
from ..sampling.steppers import InversionStepper
from .inputs import MODEL_DEFAULT, CallInputs, PromptInputs
from .pipeline_base import PaellaPipelineBase, PaellaPipelineOutput, seeded_generator

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> from PIL import Image
        >>> from paella_diffusers import EMOJI_MODEL, PaellaInversionPipeline

        >>> pipe = PaellaInversionPipeline.from_pretrained(EMOJI_MODEL)  # or "dome272/Paella"
        >>> image = Image.open("red-heart.png")
        >>> result = pipe("blue heart", image=image, source_prompt="red heart")
        >>> result.images[0].save("blue-heart.png")
        ```
"""

MIN_SMOOTHING = 1e-6  # nearer to 0 or 1, float32 has no room for the other part


class PaellaInversionPipeline(PaellaPipelineBase):
    r"""
    Editing of real images by discrete inversion (DICE, https://huggingface.co/papers/2410.08207). The image's tokens x₀ are
    noised, at every level t with the same noise for two runs: with the source prompt, the run is told x₀, and what the model
    would have had to add to say so is kept,

        z = log δ(x₀) - log p(source prompt, xₜ)

    With the target prompt, that residual is put back with weight λ, and the most likely token taken:

        x̃₀ = argmax log p(target prompt, x̃ₜ) + λ z

    All three distributions are smoothed as labels are in training, so that what is impossible to both runs counts for
    nothing. With the source prompt as the target, and λ = 1, the result is x₀ again. [`PaellaPipelineBase`] documents the
    components.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    @suggest_arguments
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        source_prompt: str | list[str] | None = None,
        residual_scale: float = 0.9,
        strength: float = 0.75,
        smoothing: float = 0.1,
        source_prompt_embeds: torch.Tensor | None = None,
        source_prompt_attention_mask: torch.Tensor | None = None,
        source_clip_text_embeds: torch.Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "default",
        num_inference_steps: int = 32,
        guidance_scale: float | tuple[float, float] | None = MODEL_DEFAULT,
        guidance_steps: int | tuple[int, int] | None = None,
        temperature: float | tuple[float, float] | None = None,
        renoise_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        condition_image: PIL.Image.Image | list[Any] | None = None,
        condition_image_weights: list[Any] | torch.Tensor | None = None,
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
        region_masks: list[Any] | torch.Tensor | None = None,
        editing_prompt: str | list[str] | None = None,
        reverse_editing_direction: bool | list[bool] | None = None,
        edit_guidance_scale: float | list[float] | None = None,
        edit_warmup_steps: int | list[int] | None = None,
        edit_cooldown_steps: int | list[int] | None = None,
        edit_threshold: float | list[float] | None = None,
        edit_momentum_scale: float | None = None,
        edit_mom_beta: float | None = None,
        edit_weights: list[float] | None = None,
        reward: Callable | None = None,
        num_particles: int | None = None,
        particle_batch_size: int | None = None,
        steering_method: SteeringMethod | None = None,
        confidence_threshold: float | None = None,
        stability_threshold: float = 1.0,
        deep_feature_interval: int = 1,
        cross_attention_kwargs: dict | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> PaellaPipelineOutput | tuple[Any, ...]:
        r"""
        Edit images.

        Args:
            prompt (`str` or `list[str]`, *optional*): What the result shall show; or pass `prompt_embeds`.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list):
                One image, or one for each prompt, of any size: PIL of any mode, arrays `(height, width, 3)` or tensors
                `(3, height, width)` in [0, 1], batches of them; or a token grid `(height / 4, width / 4)`, int64. Results
                have its size; [`SizeRule`] says at which size they are generated.
            source_prompt (`str` or `list[str]`, *optional*): What the image shows; "" unless given.
            residual_scale (`float`, defaults to 0.9): λ, at least 0: how much of the image's own is put back.
            strength (`float`, defaults to 0.75): The first noise level, in (0, 1].
            smoothing (`float`, defaults to 0.1):
                The probability, from 1e-6 to 1 - 1e-6, that smoothing gives to all tokens alike.
            source_prompt_embeds, source_prompt_attention_mask, source_clip_text_embeds (`torch.Tensor`, *optional*):
                In place of `source_prompt`; as `prompt_embeds` and so on.
            height, width (`int`, *optional*):
                Generate at this size, which results then have, too: multiples of 32 in the released model. One of them alone
                gives the other by the image's proportions.
            resize_mode (`str`, defaults to `"default"`):
                How the image gets the proportions at which it is generated: `"default"` stretches it, `"fill"` repeats its
                edges around it, and `"crop"` takes its middle, which results then show.
            num_inference_steps (`int`, defaults to 32): Sampling steps.
            temperature: Not taken: the most likely tokens are.
            negative_prompt, guidance_scale, ..., callback_on_step_end_tensor_inputs:
                The other arguments are those of [`PaellaPipeline.__call__`]; images to condition on, and
                `conditioning_weights`, are the result's only.

        Examples:

        Returns:
            [`PaellaPipelineOutput`] or `tuple`: The images, or int64 tokens `(num_images, height / 4, width / 4)`.

        Raises:
            ValueError: If an argument is out of range, or needs a component that is not there.
        """
        inputs = CallInputs.collect(locals())
        check_number("residual_scale", residual_scale, at_least=0)
        check_number("smoothing", smoothing, at_least=MIN_SMOOTHING, at_most=1 - MIN_SMOOTHING)
        source = self.prepare_source(image, height, width, resize_mode=resize_mode)
        inputs.sampling.generator = generator or seeded_generator()  # both runs have the same noise
        return self.generate(
            inputs,
            *self.size_of(source),
            region_masks,
            source,
            InversionStepper(self.scheduler, residual_scale, smoothing),
            self.source_prompts(
                inputs.prompts, source_prompt, source_prompt_embeds, source_prompt_attention_mask, source_clip_text_embeds
            ),
        )

    def source_prompts(
        self,
        prompts: PromptInputs,
        source_prompt: str | list[str] | None,
        embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        clip_text_embeds: torch.Tensor | None,
    ) -> PromptInputs:
        """What the source run is conditioned on, beside the same negative prompts."""
        if source_prompt is None and embeds is None:
            source_prompt = ""
        has_clip_text = clip_text_embeds is not None or self.text_encoder_2 is not None
        return replace(
            prompts,
            prompt=source_prompt,
            prompt_embeds=embeds,
            prompt_attention_mask=attention_mask,
            clip_text_embeds=clip_text_embeds,
            negative_clip_text_embeds=prompts.negative_clip_text_embeds if has_clip_text else None,
        )
