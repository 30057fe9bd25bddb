"""Editing of real images with Paella, by discrete inversion."""

from collections.abc import Callable
from numbers import Real

import torch
import torch.nn.functional as F
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import replace_example_docstring

from ..schedulers.categorical import check_logits, rand_tensor
from .pipeline_utils import PaellaPipelineBase
from .source_image import SourceImage, read_image

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> from PIL import Image
        >>> from paella_diffusers import EMOJI_MODEL, PaellaInversionPipeline

        >>> pipe = PaellaInversionPipeline.from_pretrained(EMOJI_MODEL)  # or "dome272/Paella"
        >>> image = Image.open("red-heart.png")
        >>> result = pipe("blue heart", image=image, source_prompt="red heart", guidance_scale=2.0)
        >>> result.images[0].save("blue-heart.png")
        ```
"""


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
    def __call__(
        self,
        prompt: str | list[str],
        image=None,
        source_prompt: str | list[str] = "",
        residual_scale: float = 0.9,
        strength: float = 0.75,
        smoothing: float = 0.1,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 32,
        guidance_scale: float | tuple[float, float] | None = 8.0,
        guidance_steps: int | tuple[int, int] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        max_sequence_length: int = 768,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        r"""
        Edit images.

        Args:
            prompt (`str` or `list[str]`): What the result shall show.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list):
                One image, or one for each prompt: PIL, arrays `(height, width, 3)` or tensors `(3, height, width)` in
                [0, 1], batches of them, or a token grid `(height / 4, width / 4)`, int64.
            source_prompt (`str` or `list[str]`, defaults to `""`): What the image shows.
            residual_scale (`float`, defaults to 0.9): λ, at least 0: how much of the image's own is put back.
            strength (`float`, defaults to 0.75): The first noise level, in (0, 1].
            smoothing (`float`, defaults to 0.1):
                The probability, in (0, 1), that smoothing gives to all tokens alike.
            negative_prompt (`str` or `list[str]`, *optional*): What guidance moves away from in both runs.
            height, width (`int`, *optional*): Resize the image to so many pixels first.
            num_inference_steps (`int`, defaults to 32): Sampling steps.
            callback_on_step_end (`Callable`, *optional*):
                As in [`PaellaPipeline`], but the tokens are those of both runs: first all with the source prompt.
            guidance_scale, guidance_steps, num_images_per_prompt, generator, max_sequence_length, output_type, return_dict:
                As in [`PaellaPipeline`].

        Examples:

        Returns:
            `ImagePipelineOutput` or `tuple`: The images, or int64 tokens `(num_images, height / 4, width / 4)`.

        Raises:
            ValueError: If an argument is out of range, or needs a component that is not there.
        """
        for name, value in {"prompt": prompt, "source_prompt": source_prompt}.items():
            if not isinstance(value, str | list) or value == []:
                raise ValueError(f"`{name}` must be a string or a list of at least one, got {value!r}.")
        if not isinstance(residual_scale, Real) or residual_scale < 0:
            raise ValueError(f"`residual_scale` must be a number of at least 0, got {residual_scale!r}.")
        if not isinstance(smoothing, Real) or not 0 < smoothing < 1:
            raise ValueError(f"`smoothing` must be a number in (0, 1), got {smoothing!r}.")
        self.check_output_type(output_type)
        targets = [prompt] if isinstance(prompt, str) else prompt
        sources = [source_prompt] * len(targets) if isinstance(source_prompt, str) else source_prompt
        image = self.check_image(read_image(image, height, width))
        height, width = self.size_of(image)
        self.check_size(height, width)
        for name, count in {"source_prompt": len(sources), "image": len(image)}.items():
            if count not in (1, len(targets)):
                raise ValueError(f"`{name}` has {count} entries for {len(targets)} prompts: pass one, or one each.")
        sources = sources * len(targets) if len(sources) == 1 else sources
        negatives = negative_prompt  # for the rows of both runs
        if isinstance(negative_prompt, list) and len(negative_prompt) > 1:
            negatives = negative_prompt * 2
        num_images = len(targets) * num_images_per_prompt
        one_each = generator if isinstance(generator, list) else [] if generator is None else [generator]
        if not all(isinstance(one, torch.Generator) for one in one_each):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(f"`generator` is a list of {len(generator)}, but {num_images} images are made: pass one each.")

        # both runs in one batch, first that with the source prompts; they draw the same numbers
        if not isinstance(generator, list):
            device = None if generator is None else generator.device
            seeds = torch.randint(2**62, (num_images,), generator=generator, device=device).tolist()
            generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        generators = [*generator, *(g.clone_state() for g in generator)]
        tokens = self.encode_source(SourceImage(image), len(image), self._execution_device)
        clean = tokens.repeat_interleave(num_images // len(tokens), dim=0)

        def step(logits, timestep, latents, noise, mask, codebook, generator):
            check_logits(logits)
            probs = logits.float().softmax(1).movedim(1, -1)
            smooth = lambda p: (p * (1 - smoothing) + smoothing / probs.shape[-1]).log()
            source_run, target_run = smooth(probs).chunk(2)
            certain = smooth(F.one_hot(clean, probs.shape[-1]))
            edited = (target_run + residual_scale * (certain - source_run)).argmax(-1)
            sampled = torch.cat([clean, edited])
            index = self._timesteps.tolist().index(timestep)
            if index + 1 < len(self._levels):  # the last step does not re-noise
                renoise = rand_tensor(sampled.shape, generator, sampled.device) <= self._levels[index + 1]
                return torch.where(renoise, noise, sampled), sampled
            return sampled, sampled

        both = self.generate(
            prompt=[*sources, *targets],
            negative_prompt=negatives,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_steps=guidance_steps,
            num_images_per_prompt=num_images_per_prompt,
            generator=generators,
            max_sequence_length=max_sequence_length,
            output_type="latent",
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            source=SourceImage(torch.cat([tokens, tokens]) if len(tokens) > 1 else tokens),
            strength=strength,
            step=step,
        ).images
        self.steps_taken = self.steps_taken[num_images:]
        images = self.decode(both[num_images:], output_type)
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)
