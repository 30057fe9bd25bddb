"""Textual inversion (https://huggingface.co/papers/2208.01618): new tokens for text encoders, through diffusers' mixin."""

import copy
import itertools
from collections.abc import Container, Iterator
from typing import Any, cast

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .offloading import runs_without_offloading

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
# what a training writes for each text encoder, in the layout of diffusers: the token's name and its vectors
WEIGHT_NAMES = {"text_encoder": "learned_embeds.safetensors", "text_encoder_2": "learned_embeds_2.safetensors"}


class PaellaTextualInversionMixin(TextualInversionLoaderMixin):
    """New tokens for ByT5 (`text_encoder`) and for CLIP (`text_encoder_2`)."""

    @runs_without_offloading
    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: str | dict[str, torch.Tensor] | torch.Tensor | list,
        token: str | list[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Add tokens and their vectors to a text encoder and its tokenizer, as diffusers' pipelines do.

            pipe.load_textual_inversion("my-horse")  # ByT5's
            pipe.load_textual_inversion(
                "my-horse", weight_name="learned_embeds_2.safetensors", text_encoder=pipe.text_encoder_2
            )
            pipe("a photo of <horse>")

        Args:
            pretrained_model_name_or_path (`str`, `dict`, `torch.Tensor` or a list of them):
                A Hub id, a folder, a file, or tensors: from a token to its vector `(dim,)` or vectors `(n, dim)`.
            token (`str` or `list[str]`, *optional*): The token's name, in place of the stored one.
            tokenizer, text_encoder (*optional*): ByT5's unless given. The tokenizer follows from the text encoder.
            kwargs: `weight_name`, `subfolder`, `revision` and others of diffusers' method.

        Raises:
            ValueError: If the pipeline has no such encoder, its weights are on disk (`low_memory`), it has the token
                already, or the vectors are another encoder's.
        """
        text_encoder = self.text_encoder if text_encoder is None else text_encoder
        name = self._encoder_name(text_encoder)
        if hasattr(text_encoder, "weights_on_disk"):
            raise ValueError(f"`{name}` has its weights on disk: load the pipeline without `low_memory` to add tokens.")
        tokenizer = getattr(self, TOKENIZERS[name]) if tokenizer is None else tokenizer
        before = copy.deepcopy(tokenizer), text_encoder.get_input_embeddings().num_embeddings
        width = text_encoder.get_input_embeddings().embedding_dim
        try:
            source, encoder = cast(Any, pretrained_model_name_or_path), cast(Any, text_encoder)
            super().load_textual_inversion(source, token, cast(Any, tokenizer), encoder, **kwargs)
        except ValueError as error:
            if "incorrect shape" not in str(error):
                raise
            raise ValueError(
                f"{pretrained_model_name_or_path} has no vectors of `{name}`, which have {width} entries: give the "
                "`text_encoder` that they are for."
            ) from error
        self.__dict__.setdefault("_before_inversion", {}).setdefault(name, before)
        if self._prompt_cache is not None:
            self._prompt_cache.clear()  # a token's number may have stood for another

    @runs_without_offloading
    def unload_textual_inversion(
        self,
        tokens: str | list[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | None = None,
    ) -> None:
        """
        Remove the tokens that were loaded, from both text encoders or from the given one.

        Args:
            tokens (`str` or `list[str]`, *optional*): Remove these only.
            tokenizer, text_encoder (*optional*): Of the encoder to remove them from. One of them is enough.

        Raises:
            ValueError: If `tokens` names one that was not loaded.
        """
        loaded = self.__dict__.get("_before_inversion", {})
        wanted = [
            name
            for name in loaded
            if (text_encoder is None or text_encoder is getattr(self, name))
            and (tokenizer is None or tokenizer is getattr(self, TOKENIZERS[name]))
        ]
        present = {name: self._loaded_vectors(name) for name in wanted}
        all_tokens = {token for vectors in present.values() for token in vectors}
        removed = all_tokens if tokens is None else {tokens} if isinstance(tokens, str) else set(tokens)
        if not removed <= all_tokens:
            raise ValueError(f"`tokens` has {sorted(removed - all_tokens)}, but loaded are {sorted(all_tokens)}.")
        removed |= {further for token in removed for further in _further_vectors(token, all_tokens)}
        for name in wanted:
            original, rows = loaded.pop(name)
            self.register_modules(**{TOKENIZERS[name]: original})
            getattr(self, name).resize_token_embeddings(rows)
            for token, vector in present[name].items():
                if token not in removed:
                    self.load_textual_inversion({token: vector}, text_encoder=getattr(self, name))

    def _loaded_vectors(self, name: str) -> dict:
        """The loaded tokens of a text encoder, with their vectors."""
        before, now = self._before_inversion[name][0].get_added_vocab(), getattr(self, TOKENIZERS[name]).get_added_vocab()
        weight = getattr(self, name).get_input_embeddings().weight
        return {token: weight[index].detach().clone() for token, index in now.items() if token not in before}

    def _encoder_name(self, text_encoder) -> str:
        for name in TOKENIZERS:
            if text_encoder is not None and getattr(self, name) is text_encoder:
                return name
        raise ValueError("`text_encoder` must be the pipeline's `text_encoder` or `text_encoder_2`; load it with one.")


def _further_vectors(token: str, all_tokens: Container[str]) -> Iterator[str]:
    """The names of a token's second and further vectors, as diffusers numbers them."""
    names = (f"{token}_{number}" for number in itertools.count(1))
    return itertools.takewhile(lambda name: name in all_tokens, names)
