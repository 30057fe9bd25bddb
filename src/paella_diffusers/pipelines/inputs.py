"""
The arguments of a call by subject, and the checks of each: bad input is refused by name before any model runs.

Each task's `__call__` gives all of its arguments, `locals()`, to [`CallInputs.collect`].
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..checks import (
    check_boolean,
    check_choice,
    check_integer,
    check_number,
    check_ramp,
    check_unicode,
    is_boolean,
    is_integer,
)
from ..sampling.plan import Plan
from ..sampling.rewards import Reward
from ..sampling.steering import SequentialMonteCarlo, SteeringMethod
from ..sampling.steppers import Stepper
from .conditioning import repeat_rows
from .encoding import nested_images
from .image_reading import to_rgb

if TYPE_CHECKING:
    from .pipeline_base import PaellaPipelineBase

MAX_STEPS = 10_000
MAX_IMAGES_PER_PROMPT = 2**20
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_LENGTH = 2**24  # of prompts, in bytes
MODEL_DEFAULT: Any = ...  # a guidance scale that was left out: the model's own


@dataclass
class PromptInputs:
    """Prompts, or what stands in their place."""

    prompt: Any = None
    negative_prompt: Any = None
    prompt_embeds: Any = None
    negative_prompt_embeds: Any = None
    prompt_attention_mask: Any = None
    negative_prompt_attention_mask: Any = None
    clip_text_embeds: Any = None
    negative_clip_text_embeds: Any = None
    max_sequence_length: int = 768

    def check(self, pipe: "PaellaPipelineBase", is_guided: bool, prefix: str = "", batch_size: int | None = None) -> int:
        """
        Refuse what does not fit together or the pipeline; the number of prompts otherwise, of which `batch_size` are
        expected if given: one may stand for all. Names of arguments have the `prefix`, such as "source_".
        """
        prompt_name, embeds_name = f"{prefix}prompt", f"{prefix}prompt_embeds"
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise ValueError(f"Pass either `{prompt_name}` or `{embeds_name}`: exactly one of them.")
        for name, value in ((prompt_name, self.prompt), ("negative_prompt", self.negative_prompt)):
            check_prompts(name, value)
        check_integer("max_sequence_length", self.max_sequence_length, 1, MAX_LENGTH)
        text_dim, clip_dim = pipe.unet.config.text_embed_dim, pipe.unet.config.clip_embed_dim
        self.prompt_embeds = embeddings(embeds_name, self.prompt_embeds, (3,), text_dim)
        if self.prompt is None:
            count = len(self.prompt_embeds)
        else:
            count = 1 if isinstance(self.prompt, str) else len(self.prompt)
            if pipe.text_encoder is None or pipe.tokenizer is None:
                raise ValueError(
                    f"`{prompt_name}` needs the components `text_encoder` and `tokenizer`: without them, pass "
                    f"`{embeds_name}`."
                )
        if batch_size is not None and count not in (1, batch_size):
            raise ValueError(f"`{prompt_name}` has {count} entries for {batch_size} prompts: pass one, or one each.")
        batch_size = batch_size or count
        table = {"negative_prompt_embeds": ((3,), text_dim), "clip_text_embeds": ((2,), clip_dim)}
        table["negative_clip_text_embeds"] = table["clip_text_embeds"]
        for name, (dims, width) in table.items():
            shown = name if name.startswith("negative_") else f"{prefix}{name}"
            setattr(self, name, embeddings(shown, getattr(self, name), dims, width, batch_size))
        for name, shown in (("prompt", prompt_name), ("negative_prompt", "negative_prompt")):
            embeds, mask = getattr(self, f"{name}_embeds"), getattr(self, f"{name}_attention_mask")
            mask = attention_mask(f"{shown}_attention_mask", mask, f"{shown}_embeds", embeds)
            setattr(self, f"{name}_attention_mask", mask)
        self._check_negative(pipe, is_guided, batch_size)
        return batch_size

    def text_length(self, pipe: "PaellaPipelineBase") -> int:
        """How many tokens the longest prompt has."""
        if self.prompt_embeds is not None:
            return self.prompt_embeds.shape[1]
        prompts = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        return pipe._tokenize_byt5(prompts, self.max_sequence_length).input_ids.shape[1]

    def has_clip_text(self, pipe: "PaellaPipelineBase") -> bool:
        """Whether there are CLIP text embeddings."""
        return self.clip_text_embeds is not None or (pipe.text_encoder_2 is not None and self.prompt is not None)

    def _check_negative(self, pipe, is_guided: bool, batch_size: int):
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise ValueError("Pass either `negative_prompt` or `negative_prompt_embeds`, not both.")
        if isinstance(self.negative_prompt, list | tuple) and len(self.negative_prompt) not in (1, batch_size):
            raise ValueError(
                f"`negative_prompt` has {len(self.negative_prompt)} entries for {batch_size} prompts: pass one, or one each."
            )
        if is_guided and self.negative_prompt_embeds is None and (pipe.text_encoder is None or pipe.tokenizer is None):
            raise ValueError(
                "Guidance needs `negative_prompt_embeds` beside `prompt_embeds` when there is no `text_encoder`; or turn it "
                "off with `guidance_scale=None`."
            )
        if pipe.text_encoder_2 is None:
            has_clip_text, has_negative = self.clip_text_embeds is not None, self.negative_clip_text_embeds is not None
            if is_guided and has_clip_text and not has_negative:
                raise ValueError(
                    "Guidance needs `negative_clip_text_embeds` beside `clip_text_embeds` when there is no `text_encoder_2`."
                )
            if has_negative and not has_clip_text:
                raise ValueError("`negative_clip_text_embeds` needs `clip_text_embeds` beside it.")

    def expand(self, batch_size: int) -> None:
        """Let a single prompt stand for all."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if prompts is not None:
            self.prompt = list(prompts) * (batch_size // len(prompts))
        else:
            self.prompt_embeds = repeat_rows(self.prompt_embeds, batch_size)


@dataclass
class ImageConditionInputs:
    """Images to condition on, and the prior that samples their embeddings."""

    condition_image: Any = None
    condition_image_weights: Any = None
    clip_image_embeds: Any = None
    conditioning_weights: Any = None
    use_prior: bool | None = None
    prior_num_inference_steps: int = 60
    prior_guidance_scale: float = 3.0

    def check(self, pipe: "PaellaPipelineBase", prompts: PromptInputs, batch_size: int) -> None:
        """Refuse what does not fit together or the pipeline, and say in `use_prior` whether the prior is used."""
        clip_dim = pipe.unet.config.clip_embed_dim
        self.clip_image_embeds = embeddings("clip_image_embeds", self.clip_image_embeds, (2, 3), clip_dim, batch_size)
        if self.condition_image is not None:
            if self.clip_image_embeds is not None:
                raise ValueError("Pass either `condition_image` or `clip_image_embeds`, not both.")
            if pipe.image_encoder is None or pipe.feature_extractor is None:
                raise ValueError("`condition_image` needs the components `image_encoder` and `feature_extractor`.")
            rows = nested_images(self.condition_image, batch_size)
            self.condition_image = [[to_rgb(image, "`condition_image`") for image in row] for row in rows]
            shapes = ((len(rows[0]),), (batch_size, len(rows[0])))
            self.condition_image_weights = weights("condition_image_weights", self.condition_image_weights, shapes)
        elif self.condition_image_weights is not None:
            raise ValueError("`condition_image_weights` goes with `condition_image`: pass it too.")
        if self.condition_image_weights is not None and self.conditioning_weights is not None:
            raise ValueError("Pass either `condition_image_weights` or `conditioning_weights`, not both.")
        self.conditioning_weights = weights("conditioning_weights", self.conditioning_weights, ((-1,), (batch_size, -1)))
        check_integer("prior_num_inference_steps", self.prior_num_inference_steps, 1, MAX_STEPS)
        check_number("prior_guidance_scale", self.prior_guidance_scale)
        self._check_prior(pipe, prompts)
        if self.conditioning_weights is not None:
            self._check_number_of_weights(pipe, prompts)

    def _check_number_of_weights(self, pipe, prompts: PromptInputs):
        """Refuse more weights than the conditional pass has conditioning tokens."""
        num_images = 1 if self.use_prior else 0
        if self.condition_image is not None:
            num_images = len(self.condition_image[0])
        elif self.clip_image_embeds is not None:
            num_images = 1 if self.clip_image_embeds.ndim == 2 else self.clip_image_embeds.shape[1]
        num_embeddings = prompts.has_clip_text(pipe) + num_images
        length = prompts.text_length(pipe) + pipe.unet.config.clip_seq_len * num_embeddings
        if self.conditioning_weights.shape[-1] > length:
            raise ValueError(
                f"`conditioning_weights` has {self.conditioning_weights.shape[-1]} entries, but there are only {length} "
                "conditioning tokens."
            )

    def _check_prior(self, pipe, prompts: PromptInputs):
        if not (self.use_prior is None or is_boolean(self.use_prior)):
            raise ValueError(f"`use_prior` must be True, False or None for the model's default, got {self.use_prior!r}.")
        has_prior = pipe.prior is not None and pipe.prior_scheduler is not None
        has_image = self.condition_image is not None or self.clip_image_embeds is not None
        has_clip_text = prompts.has_clip_text(pipe)
        if self.use_prior:
            if not has_prior:
                raise ValueError("`use_prior=True` needs the components `prior` and `prior_scheduler`.")
            if has_image:
                raise ValueError("`use_prior=True` samples an image embedding, but one is given: leave one of them out.")
            if not has_clip_text:
                raise ValueError(
                    "`use_prior=True` needs CLIP text embeddings: the component `text_encoder_2`, or `clip_text_embeds`."
                )
        elif self.use_prior is None:
            self.use_prior = has_prior and not has_image and has_clip_text and pipe.config.get("use_prior") is not False


@dataclass
class SamplingInputs:
    """How the loop runs."""

    num_inference_steps: int | None = None
    guidance_scale: Any = MODEL_DEFAULT
    guidance_steps: Any = None
    temperature: Any = None
    renoise_steps: int | None = None
    num_images_per_prompt: int = 1
    generator: Any = None
    latents: Any = None
    strength: float = 1.0
    confidence_threshold: float | None = None
    stability_threshold: float = 1.0
    deep_feature_interval: int = 1
    cross_attention_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuse what is out of range."""
        if self.num_inference_steps is not None:
            check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        check_integer("num_images_per_prompt", self.num_images_per_prompt, 1, MAX_IMAGES_PER_PROMPT)
        check_integer("deep_feature_interval", self.deep_feature_interval, 1)
        if self.guidance_scale is not None:
            check_ramp("guidance_scale", self.guidance_scale, remedy="None turns guidance off.")
        if self.guidance_steps is not None:
            steps = self.guidance_steps if isinstance(self.guidance_steps, tuple | list) else (0, self.guidance_steps)
            if len(steps) != 2 or not all(is_integer(step) and step >= 0 for step in steps):
                raise ValueError(
                    "`guidance_steps` must be a number of steps or (first, end), integers of at least 0, got "
                    f"{self.guidance_steps!r}."
                )
        if self.temperature is not None:
            check_ramp("temperature", self.temperature, at_least=0)  # 0 is greedy for diffusers' schedulers
        if self.renoise_steps is not None:
            check_integer("renoise_steps", self.renoise_steps, 0)
        check_number("strength", self.strength, above=0, at_most=1, remedy="1 keeps nothing of the image.")
        if self.confidence_threshold is not None:
            remedy = "It is in nats; None runs all steps."
            check_number("confidence_threshold", self.confidence_threshold, above=0, remedy=remedy)
        check_number("stability_threshold", self.stability_threshold, above=0, at_most=1)
        check_cross_attention_kwargs(self.cross_attention_kwargs)

    def check_generator(self, num_images: int) -> None:
        """Refuse what is neither a generator nor a list with one for each image."""
        generator = self.generator
        given = generator if isinstance(generator, list) else [] if generator is None else [generator]
        if not all(isinstance(one, torch.Generator) for one in given):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(f"`generator` is a list of {len(generator)}, but {num_images} images are made: pass one each.")

    @property
    def guided_steps(self) -> tuple[int, int]:
        """The first guided step, and the one after the last."""
        if self.guidance_steps is None:
            return 0, sys.maxsize
        return tuple(self.guidance_steps) if isinstance(self.guidance_steps, tuple | list) else (0, self.guidance_steps)


@dataclass
class EditingInputs:
    """Semantic guidance: arguments of [`PaellaSemanticGuidance`], which checks them; None leaves each to the guider."""

    editing_prompt: Any = None
    reverse_editing_direction: Any = None
    edit_guidance_scale: Any = None
    edit_warmup_steps: Any = None
    edit_cooldown_steps: Any = None
    edit_threshold: Any = None
    edit_momentum_scale: Any = None
    edit_mom_beta: Any = None
    edit_weights: Any = None

    def given(self) -> dict[str, Any]:
        """What was not left out."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class SteeringInputs:
    """Steering by a reward: several particles for each image."""

    reward: Any = None
    num_particles: Any = None
    particle_batch_size: int | None = None
    steering_method: Any = None

    def check(self, prompts: PromptInputs, sampling: SamplingInputs, stepper: Stepper, plan: Plan) -> None:
        """Refuse what does not fit together, or cannot be steered; give `num_particles` and the method their defaults."""
        if self.reward is None:
            for name, value in vars(self).items():
                if value is not None:
                    raise ValueError(f"`{name}` goes with `reward`: pass it too.")
            return
        self._check_reward()
        if isinstance(self.reward, Reward):
            self.reward.check(has_prompts=prompts.prompt is not None)
        self.num_particles = 8 if self.num_particles is None else self.num_particles
        check_integer("num_particles", self.num_particles, 1, MAX_IMAGES_PER_PROMPT)
        if self.particle_batch_size is not None:
            check_integer("particle_batch_size", self.particle_batch_size, 1)
        self.steering_method = SequentialMonteCarlo() if self.steering_method is None else self.steering_method
        if not isinstance(self.steering_method, SteeringMethod):
            raise ValueError(
                "`steering_method` must be a SequentialMonteCarlo, IterativeRefinement or BestOfN, got "
                f"{self.steering_method!r}."
            )
        self.steering_method.check(stepper)
        if sampling.confidence_threshold is not None:
            raise ValueError("`confidence_threshold` ends images one by one, but `reward` compares them: leave out one.")
        reason = stepper.why_no_draw(plan)
        if reason is not None:
            name = type(stepper.scheduler).__name__
            raise ValueError(
                f"`reward` steers by what the sampler draws, but `scheduler`, a {name}, draws nothing: {reason}."
            )

    def _check_reward(self):
        wanted = "`reward` must be a function of pictures (n, 3, height, width) and a list of n prompts"
        if not callable(self.reward):
            raise ValueError(f"{wanted}, got {self.reward!r}.")
        try:
            inspect.signature(self.reward).bind(None, None)
        except TypeError as error:
            raise ValueError(f"{wanted}: it does not take these two arguments, {error}.") from error

    @property
    def particles(self) -> int:
        """Of each image; without a reward, an image has one."""
        return 1 if self.reward is None else self.num_particles


@dataclass
class OutputInputs:
    """What is returned, and what is called on the way."""

    output_type: str = "pil"
    return_dict: bool = True
    callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None
    callback_on_step_end_tensor_inputs: Any = ("latents",)

    def check(self, pipe: "PaellaPipelineBase") -> None:
        """Refuse what is unknown."""
        check_choice("output_type", self.output_type, OUTPUT_TYPES)
        check_boolean("return_dict", self.return_dict)
        if isinstance(self.callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            self.callback_on_step_end_tensor_inputs = self.callback_on_step_end.tensor_inputs
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` must be a function, got {self.callback_on_step_end!r}.")
        names = self.callback_on_step_end_tensor_inputs
        known = pipe._callback_tensor_inputs
        if not isinstance(names, list | tuple | set | None) or not all(name in known for name in names or ()):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` must be a list, of names in {known}, got {names!r}.")
        self.callback_on_step_end_tensor_inputs = list(names or ())


@dataclass
class CallInputs:
    """All arguments of a call, by subject."""

    prompts: PromptInputs = field(default_factory=PromptInputs)
    images: ImageConditionInputs = field(default_factory=ImageConditionInputs)
    sampling: SamplingInputs = field(default_factory=SamplingInputs)
    editing: EditingInputs = field(default_factory=EditingInputs)
    steering: SteeringInputs = field(default_factory=SteeringInputs)
    output: OutputInputs = field(default_factory=OutputInputs)

    @classmethod
    def collect(cls, arguments: Mapping[str, Any]) -> "CallInputs":
        """From a call's arguments by name; those of no subject here are left to the task."""
        subjects: dict[str, Any] = {subject.name: subject.type for subject in fields(cls)}
        return cls(**{
            name: subject(**{f.name: arguments[f.name] for f in fields(subject) if f.name in arguments})
            for name, subject in subjects.items()
        })  # fmt: skip


def check_prompts(name: str, value: Any) -> None:
    """Refuse what is neither a string nor a list of strings, and what cannot be encoded."""
    texts = value if isinstance(value, list | tuple) else [value]
    if value is not None and not (texts and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"`{name}` must be a string or a list of at least one, got {value!r}; '' is fine.")
    for text in texts if value is not None else ():
        check_unicode(name, text)


def check_cross_attention_kwargs(value: Any) -> None:
    """Refuse all but `{"scale": s}`."""
    if value is not None and (not isinstance(value, dict) or set(value) - {"scale"}):
        raise ValueError(f'`cross_attention_kwargs` must be {{"scale": s}}, which scales LoRA adapters, got {value!r}.')
    if value:
        check_number('cross_attention_kwargs["scale"]', value["scale"])


def tensor_of(name: str, value: object) -> torch.Tensor:
    """A tensor, from one or from an array of NumPy."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor, got {type(value).__name__}.")
    return value


def embeddings(
    name: str, value: object, dims: tuple[int, ...], width: int, batch_size: int | None = None
) -> torch.Tensor | None:
    """Embeddings of a width, as a tensor; refused with other dimensions, other rows, or values that are not finite."""
    if value is None:
        return None
    value = tensor_of(name, value)
    if value.ndim not in dims or value.shape[-1] != width or 0 in value.shape:
        shape = f"(batch_size, length, {width})" if dims == (3,) else f"(batch_size, {width})"
        raise ValueError(f"`{name}` must have shape {shape} for this U-Net, got {tuple(value.shape)}.")
    if not value.is_floating_point():
        raise ValueError(f"`{name}` must be floating-point numbers, got {value.dtype}.")
    if batch_size is not None and len(value) not in (1, batch_size):
        raise ValueError(f"`{name}` has {len(value)} rows for {batch_size} prompts: pass one, or one each.")
    if not value.isfinite().all():
        raise ValueError(f"`{name}` must be finite, but has NaN or infinite values.")
    return value


def attention_mask(name: str, mask: object, embeds_name: str, embeds: torch.Tensor | None) -> torch.Tensor | None:
    """A mask of embeddings, as a tensor; refused without them or in another shape."""
    if mask is None:
        return None
    mask = tensor_of(name, mask)
    if embeds is None or mask.shape != embeds.shape[:2]:
        expected = None if embeds is None else tuple(embeds.shape[:2])
        raise ValueError(f"`{name}` goes with `{embeds_name}` and must have shape {expected}, got {tuple(mask.shape)}.")
    return mask


def weights(name: str, value: Any, shapes: tuple[tuple[int, ...], ...]) -> torch.Tensor | None:
    """Weights as a float32 tensor, of one of the shapes, where -1 is any length; refused if not finite or below 0."""
    if value is None:
        return None
    try:
        value = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}` must be a list of numbers, an array or a tensor, got {value!r}.") from error
    fits = any(
        value.ndim == len(shape) and all(want in (-1, side) for want, side in zip(shape, value.shape)) for shape in shapes
    )
    if not fits or not value.numel():
        wanted = " or ".join(str(shape).replace("-1", "n") for shape in shapes)
        raise ValueError(f"`{name}` must be numbers of shape {wanted}, got {tuple(value.shape)}.")
    if not (value.isfinite().all() and value.min() >= 0):
        raise ValueError(f"`{name}` must be finite and at least 0, got {value.tolist()}.")
    return value


def check_tokens(name: str, tokens: torch.Tensor, shape: tuple[int, ...], num_tokens: int) -> None:
    """Refuse what is not a token grid of this shape."""
    if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.int64:
        kind = f"{tokens.dtype}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise ValueError(f"`{name}` must be a token grid, an int64 tensor, got {kind}.")
    if tokens.shape != shape:
        raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tokens.shape)}.")
    if not tokens.numel():
        raise ValueError(f"`{name}` must have at least one token, got shape {tuple(tokens.shape)}.")
    if tokens.min() < 0 or tokens.max() >= num_tokens:
        raise ValueError(f"`{name}` must be in [0, {num_tokens}), got {tokens.min().item()} to {tokens.max().item()}.")
