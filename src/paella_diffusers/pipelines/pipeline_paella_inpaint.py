"""Inpainting and outpainting with Paella."""

from collections.abc import Callable
from numbers import Integral

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import replace_example_docstring

from ..checks import suggest_arguments
from .inputs import MODEL_DEFAULT, CallInputs
from .pipeline_base import PaellaPipelineBase, PaellaPipelineOutput
from .source_image import SourceImage, feather, read_image, read_mask

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
        image=None,
        mask_image=None,
        padding: tuple[int, int, int, int] | None = None,
        strength: float = 1.0,
        keep_original_pixels: bool = True,
        feather_radius: int = 2,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 12,
        guidance_scale: float | tuple[float, float] | None = MODEL_DEFAULT,
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
    ) -> PaellaPipelineOutput | tuple:
        r"""
        Fill in parts of images, or continue them beyond their edges.

        Args:
            prompt (`str` or `list[str]`, *optional*): What the whole result shall show; or pass `prompt_embeds`.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list):
                One image, or one for each prompt: PIL, arrays `(height, width, 3)` or tensors `(3, height, width)` in
                [0, 1], batches of them, or a token grid `(height / 4, width / 4)`, int64.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list, *optional*):
                White (1) where to generate: as large as the image, one channel. A pixel counts from 0.5 on, and a token is
                generated if any of its 4×4 pixels counts. For a token grid, a mask of the same grid.
            padding (`tuple[int, int, int, int]`, *optional*):
                Outpainting: so many new pixels at the left, top, right and bottom.
            strength (`float`, defaults to 1.0):
                The first noise level, in (0, 1]: below 1, what is under the mask is edited rather than made anew.
            keep_original_pixels (`bool`, defaults to `True`):
                Whether the image's own pixels are put back outside the mask, rather than what the VQGAN makes of it.
            feather_radius (`int`, defaults to 2):
                They blend into the new ones over `2 * feather_radius` pixels beyond the mask.
            height, width (`int`, *optional*): Outpainting: the size of the canvas, on which the image is centred.
            negative_prompt, num_inference_steps, ..., callback_on_step_end_tensor_inputs:
                The other arguments are those of [`PaellaPipeline.__call__`].

        Examples:

        Returns:
            [`PaellaPipelineOutput`] or `tuple`: The images, or int64 tokens `(num_images, height / 4, width / 4)`.

        Raises:
            ValueError: If an argument is out of range, or needs a component that is not there.
        """
        inputs = CallInputs.collect(locals())
        image = self.check_image(read_image(image))
        padding = self._check_padding(image, padding, height, width)
        if mask_image is None and not any(padding):
            raise ValueError("Nothing to generate: pass `mask_image`, `padding`, or a canvas larger than the image.")
        if not isinstance(feather_radius, Integral) or feather_radius < 0:
            raise ValueError(f"`feather_radius` must be an integer of at least 0, got {feather_radius!r}.")

        unit = 1 if image.is_floating_point() else self.vae_scale_factor  # pixels for each element of image and mask
        padding = [side // unit for side in padding]
        left, top, right, bottom = padding
        size = image.shape[-2:]
        mask = torch.zeros(1, 1, *size) if mask_image is None else read_mask(mask_image, tuple(size))
        mask = F.pad((mask >= 0.5).float(), (left, right, top, bottom), value=1.0)
        images = max(len(image), len(mask))
        if not {len(image), len(mask)} <= {1, images}:
            raise ValueError(f"`mask_image` has {len(mask)} masks for {len(image)} images: pass one, or one each.")
        image, mask = image.expand(images, *image.shape[1:]), mask.expand(images, -1, -1, -1)

        if image.is_floating_point():
            image = F.pad(image, (left, right, top, bottom), mode="replicate")
            blend = feather(mask, feather_radius) if keep_original_pixels else None
            height, width = self.size_of(image)
            self.check_size(height, width)
            margins = tuple(side // self.vae_scale_factor for side in padding)
            source = SourceImage(image, F.max_pool2d(mask, self.vae_scale_factor)[:, 0].bool(), blend, margins)
        else:
            source = SourceImage(F.pad(image, (left, right, top, bottom)), mask[:, 0].bool())
            height, width = self.size_of(source.image)
        return self.generate(inputs, height, width, region_masks, source)

    def _check_padding(self, image, padding, height, width) -> tuple[int, int, int, int]:
        """New pixels at the left, top, right and bottom, from the padding or the canvas."""
        own_height, own_width = self.size_of(image)
        for side, value in {"height": height, "width": width}.items():
            if value is not None and not isinstance(value, Integral):
                raise ValueError(f"`{side}` must be a number of pixels, got {value!r}.")
        if padding is not None:
            if height is not None or width is not None:
                raise ValueError("Pass either `padding` or a canvas of `height` and `width`, not both.")
            if (
                not isinstance(padding, tuple | list)
                or len(padding) != 4
                or not all(isinstance(side, Integral) and side >= 0 for side in padding)
            ):
                raise ValueError(f"`padding` must be (left, top, right, bottom) in pixels, at least 0, got {padding}.")
        else:
            height, width = height or own_height, width or own_width
            if height < own_height or width < own_width:
                raise ValueError(
                    f"The canvas of `height` {height} and `width` {width} is smaller than the image, "
                    f"{own_height}×{own_width}: resize the image first."
                )
            left, top = (width - own_width) // 2, (height - own_height) // 2
            padding = (left, top, width - own_width - left, height - own_height - top)
        if not image.is_floating_point() and any(side % self.vae_scale_factor for side in padding):
            raise ValueError(f"Around a token grid, `padding` must be multiples of {self.vae_scale_factor}, got {padding}.")
        return tuple(padding)
