"""OpenAI's requests for pictures, answers and errors: from what a client sends to rows, and from pictures back to it."""

import base64
import difflib
import io
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..pipelines.image_reading import open_image, to_rgb
from ..pipelines.pipeline_base import PaellaPipelineBase
from .rows import MAX_SEED, Drawn, Row

MAX_PROMPT = 32_000  # characters; this and the next are OpenAI's
MAX_PARTIAL_IMAGES = 3


class APIError(Exception):
    """
    An error as OpenAI's clients read it.

    Args:
        status (`int`): HTTP status.
        message (`str`): What is wrong, and what to do.
        param (`str`, *optional*): The parameter concerned.
        code (`str`, defaults to `"invalid_value"`): A word for programs.
        headers (`dict[str, str]`, *optional*): Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str = "invalid_value",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = headers
        kind = "server_error" if status >= 500 or status == 429 else "invalid_request_error"
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Limits:
    """
    What a request may ask for.

    Args:
        pictures (`int`): The most pictures of a request, its `n`.
        side (`int`): The most pixels a side, of pictures that are asked for and of those that are uploaded.
        steps (`int`): The most sampling steps.
        body_bytes (`int`): The most bytes of a request.
        seconds (`float`): The most seconds from a request to its last picture.
    """

    pictures: int = 10
    side: int = 1024
    steps: int = 100
    body_bytes: int = 16 * 2**20
    seconds: float = 300.0


class ImageRequest(BaseModel):
    """What every request may have: OpenAI's parameters, ours, and those of OpenAI's that change nothing here."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str = Field("", max_length=MAX_PROMPT)
    n: int = Field(1, ge=1)
    size: str = Field("auto", pattern=r"^(auto|[1-9]\d{0,5}x[1-9]\d{0,5})$", description="auto, or WIDTHxHEIGHT in pixels")
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100)
    stream: Literal[False] = False

    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    negative_prompt: str = Field("", max_length=MAX_PROMPT)
    scheduler: str | None = None

    background: Literal["auto", "opaque"] = "auto"
    quality: str = "auto"
    style: str | None = None
    moderation: str | None = None
    user: str | None = None
    safety_identifier: str | None = None

    def rows(self, pipe: PaellaPipelineBase, limits: Limits, pictures: Mapping[str, Image.Image]) -> list[Row]:
        """What to draw. The first picture has the seed that is asked for, or any; each further one has the next."""
        for name, most in {"n": limits.pictures, "steps": limits.steps}.items():
            if (getattr(self, name) or 1) > most:
                raise APIError(400, f"'{name}' is at most {most} on this server, got {getattr(self, name)}.", name)
        if self.stream and self.n > 1:
            raise APIError(400, f"'n' must be 1 with 'stream', whose events have no number, got {self.n}.", "n")
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        if seed + self.n - 1 > MAX_SEED:
            raise APIError(400, f"'seed' is at most {MAX_SEED - self.n + 1} for {self.n} pictures, got {seed}.", "seed")
        given = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt or None,
        }
        arguments = {name: value for name, value in given.items() if value is not None}
        arguments |= self.of_task(pipe, pictures)
        if self.size != "auto":
            arguments |= self._sides(pipe, limits)
        return [Row(str(index), self.prompt, seed + index, arguments) for index in range(self.n)]

    def of_task(self, pipe: PaellaPipelineBase, pictures: Mapping[str, Image.Image]) -> dict[str, Any]:
        """Arguments of the pipeline's call that the kind of request brings, with the size that it has of itself."""
        return {"height": pipe.default_size, "width": pipe.default_size}

    def _sides(self, pipe: PaellaPipelineBase, limits: Limits) -> dict[str, int]:
        width, height = map(int, self.size.split("x"))
        if max(width, height) > limits.side:
            raise APIError(400, f"'size' is at most {limits.side} pixels a side on this server, got {self.size}.", "size")
        rule = pipe.size_rule
        if not rule.allows(height, width):
            message = (
                f"'size' takes multiples of {rule.multiple} with this model, got {self.size}: the nearest is "
                f"{rule.nearest(width)}x{rule.nearest(height)}."
            )
            raise APIError(400, message, "size")
        return {"height": height, "width": width}


class GenerationRequest(ImageRequest):
    """`POST /v1/images/generations`."""

    event: ClassVar[str] = "image_generation"

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=MAX_PARTIAL_IMAGES)


class EditRequest(GenerationRequest):
    """`POST /v1/images/edits`: what the mask shows is made anew; without a mask, the whole picture is changed."""

    event: ClassVar[str] = "image_edit"

    strength: float | None = Field(None, gt=0, le=1)
    input_fidelity: str | None = None

    def of_task(self, pipe: PaellaPipelineBase, pictures: Mapping[str, Image.Image]) -> dict[str, Any]:
        return dict(pictures) | ({} if self.strength is None else {"strength": self.strength})


class VariationRequest(ImageRequest):
    """`POST /v1/images/variations`."""

    def of_task(self, pipe: PaellaPipelineBase, pictures: Mapping[str, Image.Image]) -> dict[str, Any]:
        return super().of_task(pipe, pictures) | {"condition_image": [pictures["image"]]}


def read_request(kind: type[ImageRequest], values: Mapping[str, Any]) -> ImageRequest:
    """A request, checked; what is null counts as left out."""
    try:
        return kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        raise _refused(kind, error.errors(include_url=False, include_context=False)[0]) from None


def _refused(kind: type[ImageRequest], error: Mapping[str, Any]) -> APIError:
    """One of pydantic's errors in OpenAI's words."""
    name = f"{error['loc'][0]:.80}"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, kind.model_fields, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(kind.model_fields)}."
        return APIError(400, f"Unknown parameter: '{name}'. {hint}", name, "unknown_parameter")
    if error["type"] == "missing":
        return APIError(400, f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
    expected = error["msg"]
    if error["type"] == "string_pattern_mismatch":
        expected = f"It is {kind.model_fields[name].description}"
    return APIError(400, f"Invalid value for '{name}': {expected}, got {error['input']!r:.80}.", name)


# ---------------------------------------------------------------------------------------------------------------- uploads


def read_pictures(kind: type[ImageRequest], uploads: list[tuple[str, bytes]], limits: Limits) -> dict[str, Image.Image]:
    """
    The uploaded pictures, decoded: `image`, and perhaps `mask_image`, which is white where to generate.

    Args:
        kind (`type`): Of the request; only an [`EditRequest`] may have a mask.
        uploads (`list[tuple[str, bytes]]`): The names of form fields, and their files.
        limits ([`Limits`]): Of the server.
    """
    images = [data for name, data in uploads if name in ("image", "image[]")]
    masks = [data for name, data in uploads if name == "mask" and kind is EditRequest]
    unknown = [name for name, _ in uploads if name not in ("image", "image[]") and not (name == "mask" and masks)]
    if unknown:
        raise APIError(400, f"'{unknown[0]:.80}' is no file of this request.", unknown[0], "unknown_parameter")
    if len(images) != 1:
        raise APIError(400, f"One picture is needed as 'image', got {len(images)}.", "image")
    if len(masks) > 1:
        raise APIError(400, f"At most one picture is taken as 'mask', got {len(masks)}.", "mask")
    pictures = {"image": _read_picture("image", images[0], limits)[0]}
    if masks:
        picture, transparent = _read_picture("mask", masks[0], limits)
        mask = picture.convert("L") if transparent is None else transparent
        if mask.size != pictures["image"].size:
            sizes = ["{}x{}".format(*one.size) for one in (mask, pictures["image"])]
            raise APIError(400, f"'mask' must be as large as 'image': it has {' and not '.join(sizes)} pixels.", "mask")
        if not any(mask.histogram()[128:]):
            raise APIError(400, "'mask' leaves nothing to edit: make it transparent, or white, where to edit.", "mask")
        pictures["mask_image"] = mask
    return pictures


def _read_picture(name: str, data: bytes, limits: Limits) -> tuple[Image.Image, Image.Image | None]:
    """A picture as RGB, and, if any pixel is fully transparent, these in white."""
    try:
        with open_image(io.BytesIO(data), f"'{name}'") as image:
            if max(image.size) > limits.side:
                size = "{}x{}".format(*image.size)
                raise APIError(400, f"'{name}' has at most {limits.side} pixels a side on this server, got {size}.", name)
            picture, transparent = to_rgb(image, f"'{name}'"), None
            if image.has_transparency_data:
                alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
                transparent = alpha.point(lambda value: 255 * (value == 0))
    except (OSError, ValueError) as error:
        raise APIError(400, str(error), name, "invalid_image") from None
    return picture, transparent if transparent is not None and transparent.getextrema()[1] else None


# ---------------------------------------------------------------------------------------------------------------- answers


def answer(wanted: ImageRequest, rows: list[Row], drawn: list[Drawn]) -> dict[str, Any]:
    """OpenAI's `ImagesResponse`; each picture also says its seed. With "url", a picture is in its address."""
    data = []
    for row, one in zip(rows, drawn):
        encoded = encode(one.image, wanted)
        if wanted.response_format == "url":
            data.append({"url": f"data:image/{wanted.output_format};base64,{encoded}", "seed": row.seed})
        else:
            data.append({"b64_json": encoded, "seed": row.seed})
    about = _about(wanted, drawn[0].image)
    return {"created": about.pop("created_at"), "data": data, **about, "usage": usage(rows, drawn)}


def partial_event(wanted: GenerationRequest, index: int, image: Image.Image) -> dict[str, Any]:
    """OpenAI's event of a preview."""
    picture = {"b64_json": encode(image, wanted), "partial_image_index": index}
    return {"type": f"{wanted.event}.partial_image", **picture, **_about(wanted, image)}


def completed_event(wanted: GenerationRequest, row: Row, drawn: Drawn) -> dict[str, Any]:
    """OpenAI's event of the finished picture, which also says its seed."""
    picture = {"b64_json": encode(drawn.image, wanted), "seed": row.seed, "usage": usage([row], [drawn])}
    return {"type": f"{wanted.event}.completed", **picture, **_about(wanted, drawn.image)}


def usage(rows: list[Row], drawn: list[Drawn]) -> dict[str, Any]:
    """Tokens that were read, a byte of text each, and drawn."""
    image_tokens = [one.initial_noise.numel() for one in drawn]
    text = sum(len(row.prompt.encode()) for row in rows)
    read = sum(tokens for row, tokens in zip(rows, image_tokens) if "image" in row.arguments)
    written = sum(image_tokens)
    return {
        "input_tokens": text + read,
        "input_tokens_details": {"text_tokens": text, "image_tokens": read},
        "output_tokens": written,
        "total_tokens": text + read + written,
    }


def encode(image: Image.Image, wanted: ImageRequest) -> str:
    """The picture's file, in base64."""
    file = io.BytesIO()
    options = {} if wanted.output_format == "png" else {"quality": wanted.output_compression}
    image.save(file, wanted.output_format.upper(), **options)
    return base64.b64encode(file.getvalue()).decode()


def _about(wanted: ImageRequest, image: Image.Image) -> dict[str, Any]:
    return {
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": wanted.output_format,
        "quality": "high",
        "size": f"{image.width}x{image.height}",
    }
