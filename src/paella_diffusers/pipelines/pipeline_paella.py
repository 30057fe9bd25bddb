"""Text to image with Paella."""

import inspect
from collections.abc import Callable
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import replace_example_docstring

from ..checks import check_arguments, check_integer, suggest_arguments
from ..sampling.steering import SteeringMethod
from .conditioning import PromptEmbeds
from .encoding import num_image_rows
from .inputs import MODEL_DEFAULT, CallInputs, check_prompts
from .pipeline_base import PaellaPipelineBase, PaellaPipelineOutput, seeded_generator

EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> from paella_diffusers import EMOJI_MODEL, PaellaPipeline

        >>> pipe = PaellaPipeline.from_pretrained(EMOJI_MODEL)  # or "dome272/Paella"
        >>> pipe("red heart").images[0].save("heart.png")
        ```
"""

# arguments of a call that an interpolation makes itself
INTERPOLATED = {
    "prompt",
    "prompt_embeds",
    "prompt_attention_mask",
    "clip_text_embeds",
    "clip_image_embeds",
    "condition_image",
    "condition_image_weights",
}


class PaellaPipeline(PaellaPipelineBase):
    r"""
    Text to image by renoising discrete tokens (Paella, https://huggingface.co/papers/2211.07292), with optional conditioning
    on CLIP image embeddings, given or sampled by a prior. [`PaellaPipelineBase`] documents the components.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    @suggest_arguments
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
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
        Generate images.

        Args:
            prompt (`str` or `list[str]`, *optional*): What the images shall show; or pass `prompt_embeds`.
            negative_prompt (`str` or `list[str]`, *optional*): What guidance moves away from; "" unless given.
            height, width (`int`, *optional*): Size in pixels, multiples of 32 in the released model; its default is 256.
            num_inference_steps (`int`, *optional*): Sampling steps; what the scheduler's configuration says, mostly 12.
            guidance_scale (`float` or `tuple[float, float]`, *optional*):
                How strictly to follow the prompt: w of the pipeline's `guider`, or (first, last) for a linear ramp over the
                steps. Left out, it is what the model's folder says, 8 for the published model. With 1 or less, or None,
                there is no second pass.
            guidance_steps (`int` or `tuple[int, int]`, *optional*):
                The number of steps, from the first, that are guided; or (first, end), the interval of steps; all
                unless given.
            temperature (`float` or `tuple[float, float]`, *optional*): The scheduler's, for this call: (first, last).
            renoise_steps (`int`, *optional*): The scheduler's, for this call.
            num_images_per_prompt (`int`, defaults to 1): Images for each prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                The source of randomness. A list has one for each image, which then does not depend on its batch: in float32
                up to the rounding of kernels, which a token seldom shows. In bfloat16 rounding is coarser, and about a
                fifteenth of the tokens differ between a batch and the image alone (`docs/reliability.md`).
            latents (`torch.LongTensor` of shape `(num_images, height / 4, width / 4)`, *optional*):
                Tokens to start from in place of random ones, int64 in `[0, num_vq_embeddings)`.
            condition_image (`PIL.Image.Image` or list, *optional*):
                Condition on the CLIP embedding of an image, or of several in a list; a nested list has one list a prompt.
                Then `prompt` may be left out, for variations.
            condition_image_weights (`list` or `torch.Tensor`, *optional*):
                A factor on the attention paid to each of these images, `(num_images,)` or `(batch_size, num_images)`:
                `conditioning_weights` for all of its tokens. 0 leaves an image out.
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
                Whether the prior samples an image embedding. If None, what the model's folder says; without that, when the
                prior is loaded and no image embedding is given.
            prior_num_inference_steps (`int`, defaults to 60): Steps of the prior.
            prior_guidance_scale (`float`, defaults to 3.0): Guidance of the prior.
            max_sequence_length (`int`, defaults to 768): The number of bytes to which prompts are cut.
            region_masks (`list` or `torch.Tensor`, *optional*):
                One mask a prompt, all for one image: where it is 1 the prompt governs, and between them logits are blended.
                PIL, arrays or tensors `(height, width)` in [0, 1], or over the token grid, `(height / 4, width / 4)`; masks
                need not sum to 1 but must cover every token.
            editing_prompt (`str` or `list[str]`, *optional*):
                Move towards these as well, as semantic guidance does: all edits are for all images.
            reverse_editing_direction, edit_guidance_scale, ..., edit_weights:
                How; as of [`PaellaSemanticGuidance`], and its defaults or those of the pipeline's `guider`.
            reward (`Callable`, *optional*):
                Steer towards pictures with a high value of this function of pictures `(n, 3, height, width)` in [0, 1] and a
                list of their n prompts, None if the call has none: [`ClipReward`], [`LayoutReward`], [`ClassifierReward`],
                [`RewardSum`], or your own. The output's `rewards` and `log_weights` have those of all particles.
            num_particles (`int`, *optional*): With a reward, so many for each image, 8 unless given: evaluations multiply.
            particle_batch_size (`int`, *optional*):
                With a reward, the U-Net and the VQGAN are given so many particles at a time, to save memory; all unless
                given.
            steering_method ([`SequentialMonteCarlo`], [`IterativeRefinement`] or [`BestOfN`], *optional*):
                What is done with the particles: `SequentialMonteCarlo()` unless given.
            confidence_threshold (`float`, *optional*):
                Stop early on images whose prediction is sure and stable: the mean entropy of their tokens is below this
                threshold, in nats, such as 0.1. They become their most likely tokens; the output's `steps_taken` has how
                many of `num_inference_steps` each image took.
            stability_threshold (`float`, defaults to 1.0):
                The share in (0, 1] of an image's most likely tokens that must be those of the step before to be stable.
            deep_feature_interval (`int`, defaults to 1):
                An approximation, DeepCache (https://huggingface.co/papers/2312.00858): the U-Net's levels below the first
                are computed once in this many steps; in between, the last result is used again.
            cross_attention_kwargs (`dict`, *optional*): `{"scale": s}` scales LoRA adapters.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the token grid.
            return_dict (`bool`, defaults to `True`): Whether to return a [`PaellaPipelineOutput`] rather than a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step with `(pipeline, step, timestep, tensors)`; may return a dictionary in which `latents`
                and conditioning tensors are replaced. It may set `pipeline._interrupt` and `pipeline._guidance_scale`.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                What it is given, by the names in `_callback_tensor_inputs`: `latents`, the re-noised tokens;
                `pred_original_sample`, the tokens before re-noising; and the conditioning, such as `prompt_embeds`.

        Examples:

        Returns:
            [`PaellaPipelineOutput`] or `tuple`: The images, or int64 tokens `(num_images, height / 4, width / 4)`.

        Raises:
            ValueError: If an argument is out of range, or needs a component that is not there.
        """
        return self.generate(**self._read_arguments(locals()))

    def _read_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments as those of `generate`, with defaults that depend on the model and on each other."""
        inputs = CallInputs.collect(arguments)
        condition_image = arguments["condition_image"]
        if inputs.prompts.prompt is None and inputs.prompts.prompt_embeds is None and condition_image is not None:
            inputs.prompts.prompt = [""] * num_image_rows(condition_image)  # variations
        sides = {name: self.default_size if arguments[name] is None else arguments[name] for name in ("height", "width")}
        return sides | {"inputs": inputs, "region_masks": arguments["region_masks"]}

    @torch.no_grad()
    def interpolate(
        self,
        a: str | PIL.Image.Image,
        b: str | PIL.Image.Image,
        num_images: int = 8,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> PaellaPipelineOutput | tuple[Any, ...]:
        r"""
        Images on the way from `a` to `b`: their embeddings are interpolated spherically, token by token and the CLIP ones
        whole, and every image begins with the same noise and draws the same random numbers.

        Args:
            a, b (`str` or `PIL.Image.Image`):
                Prompts, or images to condition on. Between a prompt and an image, the prompt takes part with the image
                embedding that the prior gives it, or, where no prior is used, with its CLIP text embedding, of the same
                space.
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
            if isinstance(end, str):
                check_prompts(name, end)
        check_integer("num_images", num_images, 2)
        given = sorted(kwargs.keys() & INTERPOLATED)
        if given:
            raise ValueError(f"`interpolate` makes {given} from `a` and `b`: leave them out.")
        if not isinstance(generator, torch.Generator | None):
            raise ValueError(f"`generator` must be one torch.Generator, got {type(generator).__name__}.")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("`interpolate` needs the components `text_encoder` and `tokenizer`.")
        with_images = any(isinstance(end, PIL.Image.Image) for end in ends)
        if with_images and (self.image_encoder is None or self.feature_extractor is None):
            raise ValueError("Interpolating images needs the components `image_encoder` and `feature_extractor`.")
        if with_images and self.text_encoder_2 is None:
            raise ValueError("Interpolating images needs the component `text_encoder_2`.")
        generator = generator or seeded_generator()
        call = {"generator": [generator.clone_state() for _ in range(num_images)]} | kwargs
        prompts = [end if isinstance(end, str) else "" for end in ends]
        images = torch.zeros(num_images, self.unet.config.clip_embed_dim) if with_images else None
        self._check_call(
            prompt=[max(prompts, key=lambda text: len(text.encode()))] * num_images, clip_image_embeds=images, **call
        )

        with self._exclusive_if_needed():  # as the call below
            length = {name: kwargs[name] for name in ("max_sequence_length",) if name in kwargs}
            encoded = PromptEmbeds(*self.encode_prompt(prompts, do_classifier_free_guidance=False, **length))
            clip_image = None
            if with_images:
                rows = zip(ends, encoded.clip_text_embeds.split(1))
                clip_image = torch.cat([self._image_embeds(end, row, generator, kwargs) for end, row in rows])
        embeds, mask, clip_text = encoded.prompt_embeds, encoded.prompt_attention_mask, encoded.clip_text_embeds
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        share = torch.linspace(0, 1, num_images, device=embeds.device)
        attended = (mask[0].bool() & (share < 1)[:, None]) | (mask[1].bool() & (share > 0)[:, None])
        return self(
            prompt_embeds=slerp(*embeds * mask[..., None].to(embeds), share=share),
            prompt_attention_mask=None if attended.all() else attended,
            clip_text_embeds=None if clip_text is None else slerp(*clip_text, share=share),
            clip_image_embeds=None if clip_image is None else slerp(*clip_image, share=share),
            **call,
        )

    def _check_call(self, **kwargs):
        """Refuse what a call with these arguments would refuse, before any model runs."""
        check_arguments(type(self).__call__, kwargs)
        arguments = inspect.signature(self.__call__).bind(**kwargs)
        arguments.apply_defaults()
        self.prepare(**self._read_arguments(arguments.arguments))

    def _image_embeds(
        self, end: str | PIL.Image.Image, clip_text: torch.Tensor, generator: torch.Generator, call: dict[str, Any]
    ) -> torch.Tensor:
        """The image embedding `(1, clip_embed_dim)` of one end of an interpolation."""
        if isinstance(end, PIL.Image.Image):
            return self.encode_image(end, batch_size=1)[:, 0]
        use_prior = call.get("use_prior")
        use_prior = self.config.get("use_prior") if use_prior is None else use_prior
        if use_prior is False or self.prior is None or self.prior_scheduler is None:
            return clip_text
        names = {"num_inference_steps": "prior_num_inference_steps", "guidance_scale": "prior_guidance_scale"}
        options = {name: call[given] for name, given in names.items() if given in call}
        return self.sample_prior(clip_text, generator=generator.clone_state(), **options)


def slerp(first: torch.Tensor, last: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation of vectors `(..., channels)` at every share in [0, 1]: `(len(share), ..., channels)`."""
    angle = F.cosine_similarity(first.float(), last.float(), dim=-1)[..., None].clamp(-1, 1).acos()
    share = share.view(-1, *[1] * first.ndim)
    along = angle.sin() > 1e-4  # else they are parallel, and a straight line is as good
    sine = torch.where(along, angle.sin(), 1.0)
    weight_first = torch.where(along, ((1 - share) * angle).sin() / sine, 1 - share)
    weight_last = torch.where(along, (share * angle).sin() / sine, share)
    return (weight_first * first + weight_last * last).to(first.dtype)
