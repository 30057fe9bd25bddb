"""Text to image with Paella."""

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import replace_example_docstring

from .pipeline_utils import PaellaPipelineBase, with_shared_arguments

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> from paella_diffusers import EMOJI_MODEL, PaellaPipeline

        >>> pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)  # or "dome272/Paella"
        >>> pipe("red heart", guidance_scale=2.0).images[0].save("heart.png")
        ```
"""


class PaellaPipeline(PaellaPipelineBase):
    r"""
    Text to image by renoising discrete tokens (Paella, https://huggingface.co/papers/2211.07292), with optional conditioning
    on CLIP image embeddings, given or sampled by a prior. [`PaellaPipelineBase`] documents the components.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    @with_shared_arguments
    def __call__(self, **kwargs) -> ImagePipelineOutput | tuple:
        r"""
        Generate images.

        Args:
            {shared}

        Examples:

        Returns:
            `ImagePipelineOutput` or `tuple`: The images, or int64 tokens `(num_images, height / 4, width / 4)`.

        Raises:
            ValueError: If an argument is out of range, or needs a component that is not there.
        """
        return self.generate(**kwargs)

    @torch.no_grad()
    def interpolate(
        self,
        a: str | PIL.Image.Image,
        b: str | PIL.Image.Image,
        num_images: int = 8,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Images on the way from `a` to `b`: their embeddings are interpolated spherically, token by token and the CLIP ones
        whole, and every image begins with the same noise and draws the same random numbers.

        Args:
            a, b (`str` or `PIL.Image.Image`):
                Prompts, or images to condition on. Between a prompt and an image, the prompt takes part with the image
                embedding that the prior gives it, or, without a prior, with its CLIP text embedding, of the same space.
            num_images (`int`, defaults to 8): Including both ends, at least 2.
            generator (`torch.Generator`, *optional*): The source of randomness.
            kwargs: Of `__call__`, but what describes the prompt.

        Returns:
            As `__call__`, from `a` to `b`.

        Raises:
            ValueError: If an argument is out of range, or needs a component that is not there.
        """
        ends = (a, b)
        for name, end in zip("ab", ends):
            if not isinstance(end, str | PIL.Image.Image):
                raise ValueError(f"`{name}` must be a prompt or a PIL image, got {type(end).__name__}.")
        if not isinstance(num_images, int) or num_images < 2:
            raise ValueError(f"`num_images` must be an integer of at least 2, got {num_images!r}.")
        if not isinstance(generator, torch.Generator | None):
            raise ValueError(f"`generator` must be one torch.Generator, got {type(generator).__name__}.")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("`interpolate` needs the components `text_encoder` and `tokenizer`.")
        with_images = any(isinstance(end, PIL.Image.Image) for end in ends)
        if with_images and (self.image_encoder is None or self.feature_extractor is None):
            raise ValueError("Interpolating images needs the components `image_encoder` and `feature_extractor`.")
        if with_images and self.text_encoder_2 is None:
            raise ValueError("Interpolating images needs the component `text_encoder_2`.")
        if generator is None:
            generator = torch.Generator()
            generator.seed()

        prompts = [end if isinstance(end, str) else "" for end in ends]
        embeds, _, mask, _, clip_text, _ = self.encode_prompt(prompts, do_classifier_free_guidance=False)
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        share = torch.linspace(0, 1, num_images, device=embeds.device)
        attended = (mask[0].bool() & (share < 1)[:, None]) | (mask[1].bool() & (share > 0)[:, None])
        clip_image = None
        if with_images:
            clip_image = torch.cat([self._image_embeds(end, row, generator) for end, row in zip(ends, clip_text.split(1))])
        return self(
            prompt_embeds=slerp(*embeds * mask[..., None].to(embeds), share),
            prompt_attention_mask=None if attended.all() else attended,
            clip_text_embeds=None if clip_text is None else slerp(*clip_text, share),
            clip_image_embeds=None if clip_image is None else slerp(*clip_image, share),
            generator=[generator.clone_state() for _ in range(num_images)],
            **kwargs,
        )

    def _image_embeds(self, end: str | PIL.Image.Image, clip_text: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The image embedding `(1, clip_embed_dim)` of one end of an interpolation."""
        if isinstance(end, PIL.Image.Image):
            return self.encode_image(end, batch_size=1)[:, 0]
        if self.prior is None or self.prior_scheduler is None:
            return clip_text
        return self.sample_prior(clip_text, generator=generator.clone_state())


def slerp(first: torch.Tensor, last: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation of vectors `(..., channels)` at every share in [0, 1]: `(len(share), ..., channels)`."""
    angle = F.cosine_similarity(first.float(), last.float(), dim=-1)[..., None].clamp(-1, 1).acos()
    share = share.view(-1, *[1] * first.ndim)
    along = angle.sin() > 1e-4  # else they are parallel, and a straight line is as good
    sine = torch.where(along, angle.sin(), 1.0)
    weight_first = torch.where(along, ((1 - share) * angle).sin() / sine, 1 - share)
    weight_last = torch.where(along, (share * angle).sin() / sine, share)
    return (weight_first * first + weight_last * last).to(first.dtype)
