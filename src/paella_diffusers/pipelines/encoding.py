"""Prompts and pictures to embeddings: the text encoders, the image encoder and the prior."""

import copy
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, cast

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from ..checks import check_integer
from .conditioning import repeat_rows
from .image_reading import to_rgb

logger = logging.get_logger(__name__)

_TOKENIZING = threading.Lock()  # fast tokenizers set their padding on themselves
_CACHING = threading.Lock()


class EncodingMixin:
    """What a pipeline's encoders and its prior do."""

    _prompt_cache, _prompt_cache_size = None, 0

    def enable_prompt_cache(self, max_entries: int = 64) -> None:
        """
        Keep what the text encoders made of the prompts of recent calls, for calls with the same prompts: nothing is encoded
        twice. Prompts of one call are one entry for each encoder: about 10 kB a byte of text at the published sizes. Another
        encoder is noticed, and so are other weights, embeddings, adapters or adapters' scales in it, unless weights are set
        through `.data`.

        Args:
            max_entries (`int`, defaults to 64): Keep so many; the one that was used the longest ago goes first.

        Raises:
            ValueError: If `max_entries` is not an integer of at least 1.
        """
        check_integer("max_entries", max_entries, 1)
        self._prompt_cache, self._prompt_cache_size = {}, max_entries

    def disable_prompt_cache(self) -> None:
        """Encode the prompts of every call, as without `enable_prompt_cache`, and forget what was kept."""
        self._prompt_cache = None

    def _cached(self, encoder, encode: Callable, *inputs: torch.Tensor | None) -> torch.Tensor:
        """What `encode()` makes of the inputs, which are tokens and their mask, or made of them in an earlier call."""
        cache = self._prompt_cache
        if cache is None:
            return encode()
        tokens = tuple(None if part is None else (tuple(part.shape), part.cpu().numpy().tobytes()) for part in inputs)
        key = (weakref.ref(encoder), encoder.dtype, inputs[0].device, _state(encoder), tokens)
        with _CACHING:
            encoded = cache.pop(key, None)
        encoded = encode() if encoded is None else encoded
        with _CACHING:
            cache[key] = encoded
            while len(cache) > self._prompt_cache_size:
                del cache[next(iter(cache))]
        return encoded

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        clip_text_embeds: torch.Tensor | None = None,
        negative_clip_text_embeds: torch.Tensor | None = None,
        max_sequence_length: int = 768,
        device: torch.device | None = None,
        padded_length: int | None = None,
    ) -> tuple[Any, ...]:
        """
        Prompts to embeddings, each repeated `num_images_per_prompt` times. Embeddings that are passed in are kept.

        Args:
            prompt (`str` or `list[str]`, *optional*): What the images shall show.
            negative_prompt (`str` or `list[str]`, *optional*): What the guidance moves away from; "" unless given.
            num_images_per_prompt (`int`, defaults to 1): Images for each prompt.
            do_classifier_free_guidance (`bool`, defaults to `True`): Whether negative embeddings are wanted.
            prompt_embeds, negative_prompt_embeds, ..., negative_clip_text_embeds (`torch.Tensor`, *optional*):
                In place of what would be encoded: the names of [`PromptEmbeds`], with one row for each prompt.
            max_sequence_length (`int`, defaults to 768): The number of bytes to which prompts are cut.
            device (`torch.device`, *optional*): Where to compute; the pipeline's unless given.
            padded_length (`int`, *optional*):
                Pad all texts to this number of tokens, more than the longest has, and encode every row, equal ones too: then
                the shapes of all tensors, and what a row becomes, do not depend on the other prompts.

        Returns:
            `tuple`: The parts of [`PromptEmbeds`], in its order; `__call__` takes them by these names.
        """
        device = device or self._execution_device
        prompt = [prompt] if isinstance(prompt, str) else prompt
        batch_size = len(prompt) if prompt is not None else len(cast(torch.Tensor, prompt_embeds))
        negative = negative_prompt if negative_prompt is not None else ""
        negative = [negative] * batch_size if isinstance(negative, str) else list(negative)
        negative = negative * batch_size if len(negative) == 1 else negative

        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self._encode_byt5(
                cast(list[str], prompt), max_sequence_length, device, padded_length
            )
        if clip_text_embeds is None and prompt is not None and self.text_encoder_2 is not None:
            clip_text_embeds = self._encode_clip(prompt, device, padded_length is not None)
        if do_classifier_free_guidance:
            if negative_prompt_embeds is None:
                negative_prompt_embeds, negative_prompt_attention_mask = self._encode_byt5(
                    negative, max_sequence_length, device, padded_length
                )
            if clip_text_embeds is None:
                negative_clip_text_embeds = None  # both passes have the same parts
            elif negative_clip_text_embeds is None:
                negative_clip_text_embeds = self._encode_clip(negative, device, padded_length is not None)

        rows = lambda part: None if part is None else repeat_rows(part.to(device), batch_size, num_images_per_prompt)
        prompt_embeds, negative_prompt_embeds = rows(prompt_embeds), rows(negative_prompt_embeds)
        prompt_attention_mask = rows(prompt_attention_mask)
        negative_prompt_attention_mask = rows(negative_prompt_attention_mask)
        clip_text_embeds, negative_clip_text_embeds = rows(clip_text_embeds), rows(negative_clip_text_embeds)
        # diffusers' tests read these names, which `__call__` takes
        return (
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
            clip_text_embeds,
            negative_clip_text_embeds,
        )

    def _encode_byt5(self, prompts: list[str], max_length: int, device, padded_length: int | None = None):
        distinct, rows = _distinct(prompts) if padded_length is None else (prompts, slice(None))
        inputs = self._tokenize_byt5(distinct, max_length).to(device)
        if inputs.input_ids.shape[1] == max_length and any(len(p.encode()) >= max_length for p in distinct):
            logger.warning(f"Prompts were cut to `max_sequence_length`, {max_length} bytes.")
        ids, mask = inputs.input_ids, inputs.attention_mask
        if padded_length is not None:
            missing = padded_length - ids.shape[1]
            if missing < 1:
                raise ValueError(f"`padded_length` must be above {ids.shape[1]}, the longest text's, got {padded_length}.")
            ids, mask = F.pad(ids, (0, missing), value=self.tokenizer.pad_token_id), F.pad(mask, (0, missing))
        mask = None if mask.all() else mask  # no mask, no padding
        encode = lambda: self.text_encoder(ids, attention_mask=mask).last_hidden_state
        embeds = self._cached(self.text_encoder, encode, ids, mask)
        return embeds[rows], None if mask is None else mask[rows]

    def _tokenize_byt5(self, prompts: list[str], max_length: int):
        with _TOKENIZING:
            prompts = self.maybe_convert_prompt(prompts, self.tokenizer)  # a learned token may stand for several
            return self.tokenizer(prompts, padding="longest", max_length=max_length, truncation=True, return_tensors="pt")

    def _encode_clip(self, prompts: list[str], device, pad: bool = False) -> torch.Tensor:
        distinct, rows = (prompts, slice(None)) if pad else _distinct(prompts)
        max_length = min(self.tokenizer_2.model_max_length, self.text_encoder_2.config.max_position_embeddings)
        with _TOKENIZING:
            distinct = self.maybe_convert_prompt(distinct, self.tokenizer_2)
            inputs = self.tokenizer_2(
                distinct,
                padding="max_length" if pad else "longest",
                max_length=max_length,
                truncation=True,
                return_tensors="pt",
            ).to(device)
        # causal, and pooled at the end-of-text token: padding behind it changes nothing
        encode = lambda: self.text_encoder_2(inputs.input_ids).text_embeds
        return self._cached(self.text_encoder_2, encode, inputs.input_ids)[rows]

    @torch.no_grad()
    def encode_image(
        self,
        condition_image: PIL.Image.Image | list[Any],
        batch_size: int = 1,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """
        CLIP embeddings of images to condition on: resized to the encoder's size, bicubic, without cropping.

        Args:
            condition_image (`PIL.Image.Image`, a list of them, or a nested list):
                One image or several for every prompt, or, nested, as many for each prompt.
            batch_size (`int`, defaults to 1): Number of prompts.
            num_images_per_prompt (`int`, defaults to 1): Images for each prompt.
            device (`torch.device`, *optional*): Where to compute; the pipeline's unless given.

        Returns:
            `torch.Tensor` of shape `(batch_size * num_images_per_prompt, num_images, clip_embed_dim)`, not normalised.
        """
        device = device or self._execution_device
        images = nested_images(condition_image, batch_size)
        size = self.image_encoder.config.image_size
        pixels = self.feature_extractor(
            [to_rgb(image, "`condition_image`") for row in images for image in row],
            size={"height": size, "width": size},
            resample=PIL.Image.Resampling.BICUBIC,
            do_center_crop=False,
            return_tensors="pt",
        ).pixel_values
        embeds = self.image_encoder(pixels.to(device, self.image_encoder.dtype)).image_embeds
        return repeat_rows(embeds.view(len(images), len(images[0]), -1), batch_size, num_images_per_prompt)

    @torch.no_grad()
    def sample_prior(
        self,
        clip_text_embeds: torch.Tensor,
        num_inference_steps: int = 60,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """CLIP text embeddings `(batch_size, clip_embed_dim)` to sampled CLIP image embeddings of the same shape."""
        scheduler = copy.deepcopy(self.prior_scheduler)
        text = clip_text_embeds.to(self.prior.dtype)
        # t=1 is skipped: there the cosine schedule divides by nearly zero
        times = torch.linspace(1, 0, num_inference_steps + 2)[1:]
        scheduler.set_timesteps(timesteps=times.tolist(), device=text.device)
        sample = randn_tensor(text.shape, generator=generator, device=text.device, dtype=text.dtype)
        # In float32 two passes as published: errors grow along the steps, and one batch of both would round differently. In
        # half precision one batch, which reads the weights once.
        texts = [text, torch.zeros_like(text)]
        if text.dtype in (torch.bfloat16, torch.float16):
            texts = [torch.cat(texts)]
        for t in scheduler.timesteps[:-1]:
            passes = [self.prior(sample.repeat(len(rows) // len(sample), 1), t, rows).sample for rows in texts]
            conditional, unconditional = torch.cat(passes).chunk(2)
            noise = torch.lerp(unconditional, conditional, guidance_scale)
            sample = scheduler.step(noise, t.expand(len(sample)), sample, generator=generator).prev_sample
        return sample


def _state(encoder: torch.nn.Module) -> Hashable:
    """What differs after the encoder's weights or adapters were changed."""
    # Changes in place are counted by torch. Offloading puts new weights in the place of those on the meta device.
    weights = [weight for weight in encoder.parameters() if not weight.is_meta]
    versions = tuple((id(weight), 0 if weight.is_inference() else weight._version) for weight in weights)
    layers: list[Any] = [layer for layer in encoder.modules() if hasattr(layer, "set_scale")]  # as PEFT has them
    adapters = tuple(
        (
            layer.disable_adapters,
            tuple(layer.active_adapters),
            tuple(layer.merged_adapters),
            tuple(layer.scaling.items()),
        )
        for layer in layers
    )
    return versions, adapters


def num_image_rows(images: Any) -> int:
    """How many prompts images to condition on are for: nested lists are one a prompt."""
    nested = isinstance(images, list | tuple) and images and all(isinstance(row, list | tuple) for row in images)
    return len(images) if nested else 1


def nested_images(images: Any, batch_size: int) -> list[list[PIL.Image.Image]]:
    """
    One row of images for every prompt, or a row for each, all of one length.

    Raises:
        ValueError: If they are no PIL images, or not so nested.
    """
    images = images if isinstance(images, list | tuple) else [images]
    rows = images if images and all(isinstance(row, list | tuple) for row in images) else [images]
    flat = [image for row in rows for image in row]
    if not all(rows) or not all(isinstance(image, PIL.Image.Image) for image in flat):
        raise ValueError(
            "`condition_image` must be a PIL image, a list of them, or a list with such a list for each prompt."
        )
    if len(rows) not in (1, batch_size) or len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"`condition_image` nests {[len(row) for row in rows]} images for {batch_size} prompts: pass one list for each "
            "prompt, all of one length."
        )
    return [list(row) for row in rows]


def _distinct(prompts: list[str]) -> tuple[list[str], list[int]]:
    """The distinct prompts, and for each prompt its row among them: nothing is encoded twice."""
    distinct = list(dict.fromkeys(prompts))
    return distinct, [distinct.index(prompt) for prompt in prompts]
