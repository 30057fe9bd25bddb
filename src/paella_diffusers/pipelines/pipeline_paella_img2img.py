"""Image to image with Paella."""

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import replace_example_docstring

from .pipeline_utils import PaellaPipelineBase, with_shared_arguments
from .source_image import SourceImage, read_image

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> from PIL import Image
        >>> from paella_diffusers import EMOJI_MODEL, PaellaImg2ImgPipeline

        >>> pipe = PaellaImg2ImgPipeline.from_pretrained(EMOJI_MODEL)  # or "dome272/Paella"
        >>> image = Image.open("heart.png")
        >>> pipe("blue heart", image=image, strength=0.7, guidance_scale=2.0).images[0].save("blue-heart.png")
        ```
"""


class PaellaImg2ImgPipeline(PaellaPipelineBase):
    r"""
    Image to image, the published "structural editing": the image's tokens are made noise with probability `strength`, and
    denoised from there with the prompt. [`PaellaPipelineBase`] documents the components.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    @with_shared_arguments
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image=None,
        strength: float = 0.8,
        height: int | None = None,
        width: int | None = None,
        **kwargs,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Edit images.

        Args:
            prompt (`str` or `list[str]`, *optional*): What the result shall show; or pass `prompt_embeds`.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list):
                One image, or one for each prompt: PIL, arrays `(height, width, 3)` or tensors `(3, height, width)` in
                [0, 1], batches of them, or a token grid `(height / 4, width / 4)`, int64.
            strength (`float`, defaults to 0.8):
                The first noise level, in (0, 1]: the share of the image's tokens that are replaced. All steps run, whatever
                it is; 1 is text to image.
            height, width (`int`, *optional*): Resize the image to so many pixels first.
            {shared}

        Examples:

        Returns:
            `ImagePipelineOutput` or `tuple`: The images, or int64 tokens `(num_images, height / 4, width / 4)`.

        Raises:
            ValueError: If an argument is out of range, or needs a component that is not there.
        """
        source = SourceImage(self.check_image(read_image(image, height, width)))
        own_height, own_width = self.size_of(source.image)
        if (height or own_height, width or own_width) != (own_height, own_width):
            raise ValueError(
                f"`image` is a token grid of {own_height}×{own_width} pixels, which cannot be resized: leave `height` and "
                "`width` out."
            )
        height, width = own_height, own_width
        return self.generate(prompt=prompt, height=height, width=width, source=source, strength=strength, **kwargs)
