"""Rows: pictures to draw, each with its own prompt, seed and arguments, and one call of a pipeline for several of them."""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch

from ..checks import check_arguments, check_integer
from ..pipelines.conditioning import PromptEmbeds
from ..pipelines.inputs import CallInputs, check_prompts
from ..pipelines.pipeline_base import PaellaPipelineBase
from ..pipelines.pipeline_paella import PaellaPipeline
from ..pipelines.pipeline_paella_img2img import PaellaImg2ImgPipeline
from ..pipelines.pipeline_paella_inpaint import PaellaInpaintPipeline

MAX_SEED = 2**63 - 1
SHORTEST_TEXT = 64  # tokens that a text is padded to at least
# what may differ between the rows of one call; the pipelines take a list with an entry for each row
PER_ROW = ("negative_prompt", "condition_image", "image", "mask_image")
# what a call has for all of its rows, or what is about its output
NOT_FOR_ROWS = re.compile(
    "self|prompt|num_images_per_prompt|generator|latents|region_masks|output_type|return_dict|callback_on_step_end.*|"
    ".*_embeds|.*_attention_mask"
)


@dataclass(frozen=True)
class Row:
    """
    A picture to draw. Bad values are refused when it is made, as far as they are known without the model.

    Args:
        key (`str`): Names the row among others.
        prompt (`str`): What the picture shall show.
        seed (`int`): Seed of the row's own random numbers, in [0, 2**63).
        arguments (`dict`, *optional*):
            Any of a pipeline's call that are for one picture, such as `negative_prompt`, `height`, `width`,
            `num_inference_steps`, `guidance_scale` and `temperature`. `condition_image` is a list of PIL images, `image`
            and `mask_image` are PIL images.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If no pipeline takes an argument of a name.
    """

    key: str
    prompt: str
    seed: int
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = self.prompt if name == "prompt" else self.arguments.get(name, "")
            if not isinstance(text, str):
                raise ValueError(f"`{name}` must be a text, got {text!r}.")
            check_prompts(name, text)
        check_integer("seed", self.seed, 0, MAX_SEED)
        for name in self.arguments:
            if NOT_FOR_ROWS.fullmatch(name):
                raise ValueError(f"`{name}` is no argument of a row: leave it out.")
        check_arguments(pipeline_class(self.arguments).__call__, self.arguments)
        for name in ("image", "mask_image", "condition_image"):
            if name in self.arguments:
                _check_pictures(name, self.arguments[name])
        sampling = CallInputs.collect(self.arguments).sampling
        if "guidance_scale" not in self.arguments:
            sampling.guidance_scale = None
        sampling.check()
        for side in ("height", "width"):
            if self.arguments.get(side) is not None:
                check_integer(side, self.arguments[side], 1)


def _check_pictures(name: str, value):
    is_list = name == "condition_image"
    pictures = value if is_list else [value]
    if not isinstance(pictures, list | tuple) or not all(isinstance(one, PIL.Image.Image) for one in pictures):
        raise ValueError(f"`{name}` must be a {'list of PIL images' if is_list else 'PIL image'}, got {value!r:.80}.")


@dataclass(frozen=True)
class Drawn:
    """
    What a row got.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            Of the wanted type; for `output_type="latent"` int64 tokens `(height / 4, width / 4)`.
        initial_noise (`torch.LongTensor` of shape `(height / 4, width / 4)`): The tokens that sampling started from.
        steps_taken (`int`): Evaluations of the U-Net.
    """

    image: Any
    initial_noise: torch.Tensor
    steps_taken: int


def pipeline_class(arguments: Mapping[str, Any]) -> type[PaellaPipelineBase]:
    """The pipeline of the task that a row's arguments are for."""
    if "mask_image" in arguments:
        return PaellaInpaintPipeline
    return PaellaImg2ImgPipeline if "image" in arguments else PaellaPipeline


def batch_key(row: Row, pipe: PaellaPipelineBase | None = None) -> Hashable:
    """
    Rows with equal keys can be in one call of a pipeline. With `pipe`, that is for exact calls: they also need texts that
    are padded to one length, see [`text_length`].
    """
    shared = {name: _hashable(value) for name, value in row.arguments.items() if name not in PER_ROW}
    num_images = len(row.arguments.get("condition_image", ()))
    sizes = [(name, row.arguments[name].size) for name in ("image", "mask_image") if name in row.arguments]
    return frozenset(shared.items()), num_images, tuple(sizes), None if pipe is None else text_length(pipe, row)


def text_length(pipe: PaellaPipelineBase, row: Row) -> int:
    """The length, a power of two, that a row's texts are padded to in an exact call. It depends on the row alone."""
    texts = [row.prompt, row.arguments.get("negative_prompt", "")]
    max_length = row.arguments.get("max_sequence_length", 768)
    length = pipe._tokenize_byt5(texts, max_length).input_ids.shape[1]
    return max(SHORTEST_TEXT, 1 << length.bit_length())  # more than the length: there is padding, and a mask, in every call


def draw(
    pipe: PaellaPipelineBase,
    rows: Sequence[Row],
    batch_size: int | None = None,
    exact: bool = False,
    output_type: str = "pil",
    callback_on_step_end: Callable | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
) -> list[Drawn]:
    """
    Draw rows in one call of a pipeline, each with its own generator.

    An exact call has always `batch_size` rows, of which the last is repeated, and texts of one padded length. Then all
    tensors have shapes that depend on each row alone, and a picture's bits do not depend on the other rows, as long as
    the kernels of the device treat all rows of a batch alike.

    Args:
        pipe ([`PaellaPipelineBase`]): The pipeline. Rows with an `image` need the one for that task.
        rows (`list[Row]`): At least one; their [`batch_key`] must be equal.
        batch_size (`int`, *optional*): Rows of an exact call.
        exact (`bool`, defaults to `False`): Whether the bits of a picture must not depend on the other rows.
        output_type, callback_on_step_end, callback_on_step_end_tensor_inputs:
            Of the pipeline's call. The callback's tensors also have the repeated rows, last.

    Returns:
        `list[Drawn]`: What each row got, in their order.

    Raises:
        ValueError: If the rows cannot be in one call, or the pipeline refuses an argument.
    """
    if not rows:
        raise ValueError("`rows` is empty: pass at least one row.")
    if len({batch_key(row, pipe if exact else None) for row in rows}) > 1:
        raise ValueError("`rows` cannot be drawn in one call: their `batch_key` must be equal.")
    padded = list(rows)
    if exact:
        check_integer("batch_size", batch_size, len(rows))
        padded += [rows[-1]] * (batch_size - len(rows))
    output = pipe(
        **_arguments(pipe, padded, exact),
        generator=[torch.Generator().manual_seed(row.seed) for row in padded],
        output_type=output_type,
        callback_on_step_end=callback_on_step_end,
        callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
    )
    noise = output.initial_noise.cpu()
    return [Drawn(output.images[index], noise[index], output.steps_taken[index]) for index in range(len(rows))]


def _arguments(pipe, rows: list[Row], exact: bool) -> dict[str, Any]:
    """A call's arguments: the rows' shared ones, their lists, and prompts, or in exact calls embeddings of one length."""
    first = rows[0].arguments
    call = {name: value for name, value in first.items() if name not in PER_ROW}
    call |= {name: [row.arguments[name] for row in rows] for name in PER_ROW[1:] if name in first}
    prompts = [row.prompt for row in rows]
    negative = [row.arguments.get("negative_prompt", "") for row in rows]
    if not exact:
        return call | {"prompt": prompts, "negative_prompt": negative}
    embeds = pipe.encode_prompt(
        prompts,
        negative,
        max_sequence_length=call.get("max_sequence_length", 768),
        padded_length=text_length(pipe, rows[0]),
    )
    return call | PromptEmbeds(*embeds)._asdict()


def _hashable(value) -> Hashable:
    """Arguments as they come from JSON: lists and dictionaries become tuples."""
    if isinstance(value, dict):
        return tuple((name, _hashable(one)) for name, one in sorted(value.items()))
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
