"""Inpainting and outpainting with Paella."""

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
        >>> from paella_diffusers import EMOJI_MODEL, PaellaInpaintPipeline

        >>> pipe = PaellaInpaintPipeline.from_pretrained(EMOJI_MODEL)  # or "dome272/Paella"
        >>> image, mask = Image.open("face.png"), Image.open("mouth.png")
        >>> pipe("crying face", image=image, mask_image=mask).images[0].save("crying.png")
        >>> pipe("crying face", image=image, padding=(32, 0, 32, 0)).images[0].save("wide.png")
        ```
"""


class PaellaInpaintPipeline(PaellaPipelineBase):
    r"""
    Inpainting and outpainting: the tokens under the mask, or around the image, are generated, and known ones put back after
    every sampling. [`PaellaPipelineBase`] documents the components.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    @suggest_arguments
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        padding: tuple[int, int, int, int] | None = None,
        strength: float = 1.0,
        keep_original_pixels: bool = True,
        feather_radius: int = 0,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "default",
        padding_mask_crop: int | None = None,
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
        Fill in parts of images, or continue them beyond their edges.

        Args:
            prompt (`str` or `list[str]`, *optional*): What the whole result shall show; or pass `prompt_embeds`.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list):
                One image, or one for each prompt, of any size: PIL of any mode, arrays `(height, width, 3)` or tensors
                `(3, height, width)` in [0, 1], batches of them; or a token grid `(height / 4, width / 4)`, int64. Results
                have its size; [`SizeRule`] says at which size they are generated.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list, *optional*):
                White (1) where to generate, one channel, of any size: it is resized to the image. A pixel counts from 0.5
                on, and a token is generated if any pixel that counts lies on it. For a token grid, a mask of the same grid.
            padding (`tuple[int, int, int, int]`, *optional*):
                Outpainting: numbers of new pixels, of the image's own, at the left, top, right and bottom.
            strength (`float`, defaults to 1.0):
                The first noise level, in (0, 1]: below 1, what is under the mask is edited rather than made anew.
            keep_original_pixels (`bool`, defaults to `True`):
                Whether the image's own pixels are put back outside the mask, rather than what the VQGAN makes of it.
            feather_radius (`int`, defaults to 0):
                They blend into the new ones over `2 * feather_radius` pixels beyond the mask. With 0, all pixels beyond it
                are the image's own, to the last bit.
            height, width (`int`, *optional*):
                Generate at this size, which results then have, too: multiples of 32 in the released model. One of them alone
                gives the other by the image's proportions.
            resize_mode (`str`, defaults to `"default"`):
                How the image gets the proportions at which it is generated: `"default"` stretches it, `"fill"` repeats its
                edges around it, and `"crop"` takes its middle, which results then show.
            padding_mask_crop (`int`, *optional*):
                Generate only the part of the image around the mask, with a margin of this many pixels, and put it back: more
                detail for a small mask. `height` and `width` are then the size of that part, not of results.
            negative_prompt, num_inference_steps, ..., callback_on_step_end_tensor_inputs:
                The other arguments are those of [`PaellaPipeline.__call__`].

        Examples:

        Returns:
            [`PaellaPipelineOutput`] or `tuple`: The images, or int64 tokens `(num_images, height / 4, width / 4)`.

        Raises:
            ValueError: If an argument is out of range, or needs a component that is not there.
        """
        inputs = CallInputs.collect(locals())
        source = self.prepare_source(
            image,
            height,
            width,
            mask_image=mask_image,
            padding=padding,
            resize_mode=resize_mode,
            padding_mask_crop=padding_mask_crop,
            keep_original_pixels=keep_original_pixels,
            feather_radius=feather_radius,
        )
        if source.mask is None:
            raise ValueError("Nothing to generate: pass `mask_image` or `padding`.")
        return self.generate(inputs, *self.size_of(source), region_masks, source)
