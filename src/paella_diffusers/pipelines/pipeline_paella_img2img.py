"""Image to image with Paella."""

from collections.abc import Callable
from typing import Any

import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import replace_example_docstring

from ..checks import suggest_arguments
from ..sampling.steering import SteeringMethod
from .inputs import MODEL_DEFAULT, CallInputs
from .pipeline_base import PaellaPipelineBase, PaellaPipelineOutput

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> from PIL import Image
        >>> from paella_diffusers import EMOJI_MODEL, PaellaImg2ImgPipeline

        >>> pipe = PaellaImg2ImgPipeline.from_pretrained(EMOJI_MODEL)  # or "dome272/Paella"
        >>> image = Image.open("heart.png")
        >>> pipe("blue heart", image=image, strength=0.7).images[0].save("blue-heart.png")
        ```
"""


class PaellaImg2ImgPipeline(PaellaPipelineBase):
    r"""
    Image to image, the published "structural editing": the image's tokens are made noise with probability `strength`, and
    denoised from there with the prompt. [`PaellaPipelineBase`] documents the components.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    @suggest_arguments
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.8,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "default",
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
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
            strength (`float`, defaults to 0.8):
                The first noise level, in (0, 1]: the share of the image's tokens that are replaced. All steps run, whatever
                it is; 1 is text to image.
            height, width (`int`, *optional*):
                Generate at this size, which results then have, too: multiples of 32 in the released model. One of them alone
                gives the other by the image's proportions.
            resize_mode (`str`, defaults to `"default"`):
                How the image gets the proportions at which it is generated: `"default"` stretches it, `"fill"` repeats its
                edges around it, and `"crop"` takes its middle, which results then show.
            negative_prompt, num_inference_steps, ..., callback_on_step_end_tensor_inputs:
                The other arguments are those of [`PaellaPipeline.__call__`].

        Examples:

        Returns:
            [`PaellaPipelineOutput`] or `tuple`: The images, or int64 tokens `(num_images, height / 4, width / 4)`.

        Raises:
            ValueError: If an argument is out of range, or needs a component that is not there.
        """
        inputs = CallInputs.collect(locals())
        source = self.prepare_source(image, height, width, resize_mode=resize_mode)
        return self.generate(inputs, *self.size_of(source), region_masks, source)
