"""Pictures as an attacker or a broken camera writes them."""

import functools
import io
import zlib
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from paella_diffusers.pipelines.image_reading import load_image

from .calls import _run_probe, picture, pipeline
from .files import FILE_ERRORS, Damage, damages
from .outcomes import Outcome, attempt, expect

SIZE = (24, 16)
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000"]
MODES = [
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "La",
    "I;16",
    "I;16B",
]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(true) run\nshowpage\n"


def _bomb() -> bytes:
    """A small PNG of 40,000 × 40,000 pixels."""
    chunk = lambda kind, data: len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    header = (40_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


@functools.cache
def _saved(file_format: str) -> bytes:
    buffer = io.BytesIO()
    picture(0, *SIZE).save(buffer, file_format)
    return buffer.getvalue()


OTHERS = {
    "EPS": EPS,
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "nothing": b"",
    "text": b"hello",
    "a bomb": _bomb(),
}
OTHERS |= {"PDF": b"%PDF-1.4\n", "a zip": b"PK\x05\x06" + bytes(18)}


@dataclass
class Picture:
    """A damaged file, one of another kind, or an image in memory: of a PIL mode, with values as they come."""

    damage: Damage | None = None
    other: str = ""
    mode: str = ""
    seed: int = 0


@st.composite
def pictures(draw) -> Picture:
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return Picture(other=draw(st.sampled_from(sorted(OTHERS))))
    if kind == 1:
        return Picture(mode=draw(st.sampled_from(MODES)), seed=draw(st.integers(0, 1000)))
    return Picture(damage=draw(damages(FORMATS)))


def attempt_picture(case: Picture) -> tuple[Outcome, str]:
    if case.mode:
        return _attempt_mode(case)
    data = OTHERS[case.other] if case.other else case.damage(_saved(case.damage.file))
    found = attempt(
        lambda: load_image(io.BytesIO(data), "the picture"),
        judge=lambda image: expect(isinstance(image, Image.Image) and image.mode == "RGB", "no picture in RGB"),
        must_be_refused=case.other,
        may_be_refused=True,
        errors=FILE_ERRORS,
    )
    if not case.other and found[0] in (Outcome.RESULT, Outcome.REFUSED):
        found = _attempt_opened(data)
    return found[0], found[1] and f"{case.other or case.damage.file}: {found[1]}"


def _attempt_opened(data: bytes) -> tuple[Outcome, str]:
    """As users open pictures: what is damaged shows only when a pipeline reads the pixels."""
    try:
        image = Image.open(io.BytesIO(data))
    except Exception:
        return Outcome.REFUSED, ""
    return _attempt_call(image, may_be_refused=True)


def _attempt_mode(case: Picture) -> tuple[Outcome, str]:
    values = np.random.default_rng(case.seed)
    if case.mode in ("I", "F"):
        scale = [1, 255, 65535, 1e9, -1][case.seed % 5]
        array = (values.random(SIZE[::-1]) * scale).astype(np.int32 if case.mode == "I" else np.float32)
        image = Image.fromarray(array)
        if case.mode == "F" and case.seed % 7 == 0:
            image.putpixel((3, 3), float("nan"))
    else:
        image = Image.frombytes(case.mode, SIZE, values.bytes(len(Image.new(case.mode, SIZE).tobytes())))
    found = _attempt_call(image, may_be_refused=case.mode in ("I", "F"))
    return found[0], found[1] and f"mode {case.mode}: {found[1]}"


def _attempt_call(image: Image.Image, may_be_refused: bool) -> tuple[Outcome, str]:
    pipe = pipeline("image to image", "float32", "PaellaScheduler")
    call = {"num_inference_steps": 1, "use_prior": False, "guidance_scale": None, "output_type": "pil"}
    return attempt(
        lambda: pipe("a", image=image, **call).images[0],
        judge=lambda result: expect(result.mode == "RGB", "no picture in RGB"),
        may_be_refused=may_be_refused,
        errors=FILE_ERRORS,
        afterwards=lambda: _run_probe(pipe, "image to image"),
    )
