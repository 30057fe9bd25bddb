"""Calls of every pipeline over all arguments: good ones, whose results are checked, and ones with a bad argument."""

import copy
import functools
import inspect
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from conftest import TINY_UNET, tiny_pipeline
from diffusers import DiscreteDDIMScheduler, EntropyBoundScheduler
from hypothesis import strategies as st
from PIL import Image

import paella_diffusers
from paella_diffusers import PaellaImg2ImgPipeline, PaellaInpaintPipeline, PaellaInversionPipeline, PaellaPipeline

from .outcomes import Outcome, attempt, expect

NUM_TOKENS, TEXT_DIM, CLIP_DIM = (TINY_UNET[name] for name in ("num_vq_embeddings", "text_embed_dim", "clip_embed_dim"))
TASKS = {
    "text to image": PaellaPipeline,
    "image to image": PaellaImg2ImgPipeline,
    "inpainting": PaellaInpaintPipeline,
    "inversion": PaellaInversionPipeline,
    "interpolation": PaellaPipeline,
}
OWN = {name: getattr(paella_diffusers, name) for name in paella_diffusers.__all__ if name.startswith("Paella")}
SCHEDULERS = {name: partial(cls, num_vq_embeddings=NUM_TOKENS) for name, cls in OWN.items() if name.endswith("Scheduler")}
SCHEDULERS |= {"DiscreteDDIMScheduler": DiscreteDDIMScheduler, "EntropyBoundScheduler": EntropyBoundScheduler}
GUIDERS = {"no guider": lambda: None} | {name: cls for name, cls in OWN.items() if name.endswith("Guidance")}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@functools.cache
def pipeline(task: str, dtype: str, scheduler: str, guider: str = "no guider"):
    pipe = _components(dtype)
    if type(pipe) is not TASKS[task]:
        pipe = TASKS[task].from_pipe(pipe)
    pipe = copy.copy(pipe)
    pipe.scheduler, pipe.guider = SCHEDULERS[scheduler](), GUIDERS[guider]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def _components(dtype: str):
    return tiny_pipeline().to(DTYPES[dtype])


@dataclass
class Call:
    """
    A call's keyword arguments. A pair in `arguments` is made by a function of a seed, so that no two calls share tensors.

    Args:
        bad (`dict`): Arguments that take the place of good ones and must be refused, by name; empty for a good call.
        late (`bool`): Whether they can only be refused while models run: what callbacks return.
    """

    task: str
    dtype: str
    scheduler: str
    num_images: int
    arguments: dict[str, Any]
    guider: str = "no guider"
    bad: dict[str, Any] = field(default_factory=dict)
    late: bool = False

    def __repr__(self):
        shown = {name: _short(value) for name, value in (self.bad or self.arguments).items()}
        return f"{self.task}, {self.dtype}, {self.scheduler}, {self.guider}: {shown}"


def _short(value):
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{type(value).__name__} {value.dtype} {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return type(value)(map(_short, value))
    if isinstance(value, torch.Generator | Image.Image) or callable(value):
        return type(value).__name__
    return value


# ---------------------------------------------------------------------------------------------------------- good calls

prompts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
seeds = st.integers(0, 2**32 - 1)
ramps = lambda numbers: numbers | st.tuples(numbers, numbers)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(NUM_TOKENS, shape, generator=seeded(seed))


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def good_calls(draw, task: str) -> Call:
    scheduler = draw(st.sampled_from(sorted(SCHEDULERS)))
    batch_size, per_prompt = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    with_regions = task == "text to image" and draw(st.booleans())
    num_images = per_prompt * (1 if with_regions else batch_size)
    call = {
        "num_inference_steps": draw(st.integers(1, 4)),
        "num_images_per_prompt": per_prompt,
        "prior_num_inference_steps": draw(st.integers(1, 3)),
        "output_type": draw(st.sampled_from(["pil", "np", "pt", "latent"])),
    }
    optional = {
        "guidance_scale": st.none() | ramps(st.floats(-10, 30)),
        "guidance_steps": st.integers(0, 5) | st.tuples(st.integers(0, 3), st.integers(0, 5)),
        "use_prior": st.sampled_from([None, False, True]),
        "prior_guidance_scale": st.floats(-2, 10),
        "max_sequence_length": st.integers(1, 800),
        "confidence_threshold": st.floats(1e-3, 5),
        "stability_threshold": st.floats(0.1, 1),
        "deep_feature_interval": st.integers(1, 3),
        "cross_attention_kwargs": st.sampled_from([None, {}, {"scale": 1.0}]),
        "conditioning_weights": st.lists(st.floats(0, 3), min_size=1, max_size=1),
        "callback_on_step_end": st.sampled_from([None, lambda pipe, i, t, tensors: {}, lambda pipe, i, t, tensors: tensors]),
        "callback_on_step_end_tensor_inputs": st.lists(
            st.sampled_from(["latents", "pred_original_sample", "prompt_embeds"])
        ),
    }
    if task != "inversion" and scheduler != "EntropyBoundScheduler":
        optional["temperature"] = ramps(st.floats(1e-6, 1e3))
    if scheduler in ("PaellaScheduler", "PaellaConfidenceScheduler"):
        optional["renoise_steps"] = st.integers(0, 5)
    for name in draw(st.lists(st.sampled_from(sorted(optional)), unique=True, max_size=4)):
        call[name] = draw(optional[name])
    if task == "interpolation":
        return _interpolation(draw, scheduler, call)
    call["generator"] = _generator(draw, num_images)
    size = draw(st.sampled_from([(16, 16), (16, 32), (32, 32), (48, 16)]))
    _add_prompts(draw, call, batch_size)
    if task == "text to image":
        call |= dict(zip(("height", "width"), size))
    else:
        _add_source(draw, call, task, size, batch_size)
    if with_regions:
        masks = [draw(st.sampled_from([1.0, 0.5])) * torch.ones(size) for _ in range(batch_size)]
        call["region_masks"] = masks
    if "image" not in call and draw(st.booleans()):
        call["latents"] = tokens(draw(seeds), num_images, size[0] // 4, size[1] // 4)
    guider = draw(st.sampled_from(sorted(GUIDERS)) | st.just("no guider"))
    if (
        guider in ("no guider", "PaellaSemanticGuidance")
        and call.get("guidance_scale", 1) is not None
        and draw(st.booleans())
    ):
        call |= draw(EDITING)
    return Call(task, draw(st.sampled_from(sorted(DTYPES))), scheduler, num_images, call, guider)


EDITING = st.fixed_dictionaries(
    {"editing_prompt": prompts.filter(bool)},
    optional={
        "reverse_editing_direction": st.booleans(),
        "edit_guidance_scale": st.floats(-5, 20),
        "edit_warmup_steps": st.integers(0, 5),
        "edit_cooldown_steps": st.integers(0, 5),
        "edit_threshold": st.floats(0, 0.99),
        "edit_momentum_scale": st.floats(0, 1),
        "edit_mom_beta": st.floats(0, 0.9),
    },
)


def _generator(draw, num_images: int):
    seed = draw(seeds)
    return [seeded(seed + i) for i in range(num_images)] if draw(st.booleans()) else seeded(seed)


def _add_prompts(draw, call, batch_size: int):
    if draw(st.booleans()):
        call["prompt"] = (
            draw(prompts) if batch_size == 1 else draw(st.lists(prompts, min_size=batch_size, max_size=batch_size))
        )
        if draw(st.booleans()):
            call["negative_prompt"] = draw(prompts)
    else:
        rows, length = draw(st.sampled_from([1, batch_size])), draw(st.integers(1, 4))
        call["prompt_embeds"] = normal(draw(seeds), batch_size, length, TEXT_DIM)
        if draw(st.booleans()):
            call["prompt_attention_mask"] = torch.ones(batch_size, length, dtype=torch.int64)
        if draw(st.booleans()):
            call["negative_prompt_embeds"] = normal(draw(seeds), rows, 2, TEXT_DIM)
        if draw(st.booleans()) or call.get("use_prior"):
            call["clip_text_embeds"] = normal(draw(seeds), rows, CLIP_DIM)
    if not call.get("use_prior") and draw(st.booleans()):
        if draw(st.booleans()):
            call["condition_image"] = [picture(draw(seeds), 20, 16) for _ in range(draw(st.integers(1, 2)))]
        else:
            call["clip_image_embeds"] = normal(draw(seeds), batch_size, CLIP_DIM)


def _add_source(draw, call, task: str, size: tuple[int, int], batch_size: int):
    height, width = draw(st.tuples(st.integers(8, 40), st.integers(8, 40))) if draw(st.booleans()) else size
    kind = draw(st.sampled_from(["pil", "array", "tensor", "tokens"]))
    if kind == "tokens":
        height, width = size
        call["image"] = tokens(draw(seeds), height // 4, width // 4)
    else:
        pil = picture(draw(seeds), width, height)
        pixels = np.asarray(pil, np.float32) / 255
        call["image"] = {"pil": pil, "array": pixels, "tensor": torch.from_numpy(pixels).movedim(-1, 0)}[kind]
        call["resize_mode"] = draw(st.sampled_from(["default", "crop", "fill"]))
    if draw(st.booleans()):
        call["strength"] = draw(st.floats(0.01, 1))
    if task == "inversion":
        call |= {"residual_scale": draw(st.floats(0, 2)), "smoothing": draw(st.floats(0.01, 0.99))}
        if draw(st.booleans()):
            call["source_prompt"] = draw(prompts)
    if task == "inpainting":
        grid = (height // 4, width // 4) if kind == "tokens" else (height, width)
        mask = torch.rand(grid, generator=seeded(draw(seeds))) < draw(st.floats(0, 1))
        call["mask_image"] = mask.float()
        if draw(st.booleans()) and call.get("resize_mode", "default") == "default":
            call["padding"] = draw(st.sampled_from([(16, 0, 0, 0), (0, 16, 16, 0), (16, 16, 16, 16)]))
        if kind != "tokens":
            call |= {"keep_original_pixels": draw(st.booleans()), "feather_radius": draw(st.integers(0, 3))}


def _interpolation(draw, scheduler, call) -> Call:
    for name in ("conditioning_weights", "callback_on_step_end_tensor_inputs", "use_prior"):
        call.pop(name, None)
    call["num_images_per_prompt"] = 1
    end = prompts | seeds.map(lambda seed: picture(seed, 20, 16))
    num_images = draw(st.integers(2, 4))
    call |= {"a": draw(end), "b": draw(end), "num_images": num_images, "height": 16, "width": 16}
    call["generator"] = seeded(draw(seeds))
    return Call("interpolation", draw(st.sampled_from(sorted(DTYPES))), scheduler, num_images, call)


# ----------------------------------------------------------------------------------------------------------- bad calls

NO_INTEGERS = [math.nan, math.inf, -math.inf, "hot", b"1", [], {}, 1j, True, np.ones(3), object(), 1.5, np.float32(2.5), -1]
NO_NUMBERS = [*NO_INTEGERS[:-3], 10**400]
POSITIVE_INTEGERS = [*NO_INTEGERS, 0, None]
NO_BOOLEANS = ["no", 5, math.nan, [], np.ones(2)]
NO_RAMPS = [*NO_NUMBERS, (1.0,), (1.0, 2.0, 3.0), (math.inf, math.inf), (math.nan, 1.0), ("a", "b"), (True, False)]
NO_TENSORS = [5, "x", [1.0], object(), math.nan]
NO_PROMPTS = [5, b"red", [], ["a", 5], [None], "\ud800", ["a", "b\udfff"], object()]
NO_IMAGES = [
    5,
    "x",
    b"x",
    [],
    [5],
    object(),
    np.ones((4, 4)),
    torch.ones(3),
    np.full((16, 16, 3), 2.0),
    torch.zeros(3, 0, 4),
]
NO_IMAGES += [np.full((16, 16, 3), math.nan), np.ones((16, 16, 5)), np.array(["x"]), torch.full((4, 4), NUM_TOKENS)]
NO_IMAGES += [torch.full((4, 4), -1), torch.zeros(0, 4, dtype=torch.int64), torch.zeros(5, 5, dtype=torch.int64)]
NO_MASKS = [
    5,
    "x",
    [],
    object(),
    torch.ones(3),
    np.full((16, 16), 2.0),
    np.full((16, 16), math.nan),
    torch.zeros(3, 16, 16, 2),
]
NO_MASKS += [[torch.ones(16, 16), 5]]


def no_embeddings(*shape: int) -> list:
    """What is taken for no embeddings of this shape."""
    wide = torch.zeros(*shape[:-1], shape[-1] + 1)
    damaged = [normal(0, *shape).fill_(value) for value in (math.nan, math.inf)]
    return [*NO_TENSORS, wide, torch.zeros(0, *shape[1:]), torch.zeros(shape, dtype=torch.int64), torch.zeros(()), *damaged]


BAD = {
    "prompt": NO_PROMPTS,
    "negative_prompt": [*NO_PROMPTS, ["a"] * 9],
    "height": [*POSITIVE_INTEGERS[:-1], 17, 10**400, 16 * 10**6],
    "width": [*POSITIVE_INTEGERS[:-1], 17, 10**400, 16 * 10**6],
    "num_inference_steps": [*POSITIVE_INTEGERS, 10**9, 10**400],
    "guidance_scale": NO_RAMPS,
    "guidance_steps": [*NO_INTEGERS, (1,), (1, 2, 3), (-1, 2), (1.5, 2)],
    "temperature": [*NO_RAMPS, -1.0, (0.5, -1.0)],
    "renoise_steps": NO_INTEGERS,
    "num_images_per_prompt": [*POSITIVE_INTEGERS, 10**9, 10**400],
    "generator": [5, "x", object(), [5], [None], [seeded(0)] * 9],
    "latents": [
        *NO_TENSORS,
        tokens(0, 1, 3, 3),
        torch.zeros(1, 4, 4),
        torch.full((1, 4, 4), NUM_TOKENS),
        tokens(0, 0, 4, 4),
    ],
    "condition_image": [5, "x", [], [[]], [5], np.ones((4, 4, 3)), [[picture(0, 8, 8)]] * 9, [picture(0, 8, 8), [5]]],
    "condition_image_weights": [5, "x", [math.nan], [-1.0], [1.0] * 9, [], object()],
    "prompt_embeds": no_embeddings(1, 3, TEXT_DIM),
    "negative_prompt_embeds": no_embeddings(1, 3, TEXT_DIM),
    "prompt_attention_mask": [*NO_TENSORS, np.ones((9, 9)), torch.ones(2)],
    "negative_prompt_attention_mask": [*NO_TENSORS, np.ones((9, 9)), torch.ones(2)],
    "clip_text_embeds": no_embeddings(1, CLIP_DIM),
    "negative_clip_text_embeds": no_embeddings(1, CLIP_DIM),
    "clip_image_embeds": no_embeddings(1, CLIP_DIM),
    "conditioning_weights": [
        "x",
        object(),
        [math.nan],
        [math.inf],
        [-1.0],
        [],
        np.ones((9, 2)),
        [[1.0], [1.0, 2.0]],
        {},
        [1.0] * 999,
    ],
    "use_prior": NO_BOOLEANS,
    "prior_num_inference_steps": [*POSITIVE_INTEGERS, 10**9],
    "prior_guidance_scale": [*NO_NUMBERS, None],
    "max_sequence_length": [*POSITIVE_INTEGERS, 10**400],
    "region_masks": [5, "x", [], [5], [torch.ones(3, 3)], [torch.zeros(16, 16)], object()],
    "confidence_threshold": [*NO_NUMBERS, 0, -1.0],
    "stability_threshold": [*NO_NUMBERS, 0, 1.5, None],
    "deep_feature_interval": POSITIVE_INTEGERS,
    "cross_attention_kwargs": ["x", 5, [], {"foo": 1}, {"scale": math.nan}, {"scale": "x"}, {5: 1}],
    "output_type": ["jpg", 5, None, []],
    "return_dict": NO_BOOLEANS,
    "callback_on_step_end": [5, "x"],
    "callback_on_step_end_tensor_inputs": [0.5, "latents", ["foo"], [5], [[]], [None]],
    "editing_prompt": [*NO_PROMPTS[:2], *NO_PROMPTS[3:], "", [""]],
    "reverse_editing_direction": [*NO_BOOLEANS, [True] * 9],
    "edit_guidance_scale": [*NO_NUMBERS[:5], *NO_NUMBERS[6:], [1.0] * 9],
    "edit_warmup_steps": NO_INTEGERS[:5],
    "edit_cooldown_steps": NO_INTEGERS[:5],
    "edit_threshold": [*NO_NUMBERS[:5], 1.0, -0.5],
    "edit_momentum_scale": [*NO_NUMBERS, -1.0],
    "edit_mom_beta": [*NO_NUMBERS, 1.0, -1.0],
    "edit_weights": [*NO_NUMBERS[:5], [-1.0], [math.nan], [1.0] * 9],
    "reward": [5, "x", [], {}, lambda: 0, lambda images: images],
    "num_particles": [*NO_INTEGERS, 0, 10**9],
    "particle_batch_size": [*NO_INTEGERS, 0],
    "steering_method": ["smc", 5, [], {}, object()],
    "image": NO_IMAGES,
    "mask_image": NO_MASKS,
    "strength": [*NO_NUMBERS, 0, -1.0, 1.5, None],
    "padding": [5, "x", (1, 2), (-4, 0, 0, 0), (math.nan, 0, 0, 0), (10**9, 0, 0, 0), (1.5, 0, 0, 0)],
    "keep_original_pixels": NO_BOOLEANS,
    "feather_radius": [*NO_INTEGERS, None],
    "resize_mode": ["stretch", 5, None, []],
    "padding_mask_crop": NO_INTEGERS,
    "source_prompt": [*NO_PROMPTS, ["a"] * 9],
    "source_prompt_embeds": no_embeddings(1, 3, TEXT_DIM),
    "source_prompt_attention_mask": [*NO_TENSORS, torch.ones(9, 9)],
    "source_clip_text_embeds": no_embeddings(1, CLIP_DIM),
    "residual_scale": [*NO_NUMBERS, -1.0, None],
    "smoothing": [*NO_NUMBERS, 0, 1, -1.0, None, 1 - 1e-16, 1e-45],
    "promt": ["a"],
    "a": [5, b"x", None, ["a"], "\ud800"],
    "b": [5, b"x", None, ["a"], "\ud800"],
    "num_images": [*POSITIVE_INTEGERS, 1],
}
MADE_BY_INTERPOLATION = {"prompt", "prompt_embeds", "prompt_attention_mask", "condition_image_weights"}
MADE_BY_INTERPOLATION |= {"clip_text_embeds", "clip_image_embeds", "condition_image"}
CALLBACKS = [lambda *_: 5, lambda *_: "x", lambda *_: {"latents": 5}, lambda *_: {"latents": torch.zeros(9, 9)}]
CALLBACKS += [lambda *_: {"latents": torch.full((1, 4, 4), -1)}, lambda *_: {"prompt_embeds": torch.zeros(3)}]
TOGETHER = {  # arguments that are refused with another
    "prompt_embeds": {"prompt": "a", "prompt_embeds": normal(0, 1, 3, TEXT_DIM)},
    "negative_prompt_embeds": {"negative_prompt": "a", "negative_prompt_embeds": normal(0, 1, 3, TEXT_DIM)},
    "clip_image_embeds": {"clip_image_embeds": normal(0, 1, CLIP_DIM), "condition_image": picture(0, 8, 8)},
    "prompt": {"prompt": None, "prompt_embeds": None, "condition_image": None},
}


@st.composite
def bad_calls(draw, task: str) -> Call:
    call = draw(good_calls(task))
    known = inspect.signature(TASKS[task].__call__).parameters
    names = [name for name in BAD if name in known or name == "promt"]
    if task == "interpolation":
        names = [name for name in [*names, "a", "b", "num_images"] if name not in MADE_BY_INTERPOLATION]
    kind = draw(st.sampled_from(["one"] * 20 + ["together", "callback"])) if task != "interpolation" else "one"
    if kind == "callback":
        call.bad, call.late = {"callback_on_step_end": draw(st.sampled_from(CALLBACKS))}, True
    elif kind == "together":
        call.bad = dict(draw(st.sampled_from(sorted(TOGETHER.items())))[1])
    else:
        name = draw(st.sampled_from(names))
        call.bad = {name: draw(st.sampled_from(BAD[name]))}
        if name.startswith(("edit_", "reverse_")):
            call.bad["editing_prompt"] = "a"
        if name in ("num_particles", "particle_batch_size", "steering_method"):
            call.bad["reward"] = lambda images, prompts: images.mean((1, 2, 3))
        if name == "temperature" and call.task == "inversion":
            call.bad = {name: 0.5}
    return call


# -------------------------------------------------------------------------------------------------------------- oracle


def attempt_call(call: Call) -> tuple[Outcome, str]:
    pipe = pipeline(call.task, call.dtype, call.scheduler, call.guider)
    function = pipe.interpolate if call.task == "interpolation" else pipe
    arguments = {name: _own_copy(value) for name, value in (call.arguments | call.bad).items() if _takes(pipe, name)}
    before = _probe(call.task, call.dtype, call.scheduler, call.guider) if call.bad else None
    return attempt(
        lambda: function(**arguments),
        judge=lambda result: _judge(call, result),
        must_be_refused=", ".join(f"{name}={_short(value)!r:.40}" for name, value in call.bad.items()),
        models_may_run=call.late,
        afterwards=lambda: _check_usable(call, before),
    )


def _takes(pipe, name: str) -> bool:
    """Whether this version of the package has the argument; all go through, misspelt ones too, where it has `**kwargs`."""
    known = inspect.signature(type(pipe).__call__).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return open_ended or name in known or name in ("promt", "a", "b", "num_images")


def _own_copy(value):
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, torch.Tensor | np.ndarray | Image.Image):
        return copy.copy(value) if isinstance(value, Image.Image) else value + 0 if _is_numeric(value) else value
    return [_own_copy(one) for one in value] if isinstance(value, list) else value


def _is_numeric(value) -> bool:
    return isinstance(value, torch.Tensor) or value.dtype.kind in "fiu"


def _judge(call: Call, result):
    arguments = call.arguments
    kind, images = arguments["output_type"], result[0] if isinstance(result, tuple) else result.images
    expect(len(images) == call.num_images, f"{len(images)} images instead of {call.num_images}")
    if kind == "pil":
        expect(all(isinstance(one, Image.Image) and one.mode == "RGB" for one in images), "no PIL images in RGB")
        sizes = {(one.height, one.width) for one in images}
    else:
        images = torch.as_tensor(images)
        sizes = {tuple(images.shape[1:3] if kind in ("np", "latent") else images.shape[-2:])}
        expect(images.isfinite().all(), "images that are not finite")
        limit = NUM_TOKENS - 1 if kind == "latent" else 1
        expect(images.min() >= 0 and images.max() <= limit, "values out of range")
        expect(kind != "latent" or images.dtype == torch.int64, "tokens that are not int64")
    size = _expected_size(arguments, kind)
    expect(size is None or sizes == {size}, f"images of {sizes} instead of {size}")
    taken = getattr(result, "steps_taken", None)
    if taken is not None:
        steps = arguments["num_inference_steps"]
        expect(len(taken) == call.num_images and all(1 <= one <= steps for one in taken), f"steps_taken is {taken}")
    if "mask_image" in arguments:
        _judge_outside_the_mask(arguments, kind, images)


def _expected_size(arguments, kind: str) -> tuple[int, int] | None:
    """Height and width of results, in tokens or pixels; None where the model chooses it."""
    image = arguments.get("image")
    unit = 4 if kind == "latent" else 1
    left, top, right, bottom = arguments.get("padding", (0, 0, 0, 0))
    if image is None:
        return arguments["height"] // unit, arguments["width"] // unit
    if isinstance(image, torch.Tensor) and image.dtype == torch.int64:
        height, width = (4 * side for side in image.shape)
        return (height + top + bottom) // unit, (width + left + right) // unit
    if kind == "latent" or arguments["resize_mode"] == "crop":
        return None
    width, height = image.size if isinstance(image, Image.Image) else _array(image).shape[1::-1]
    return height + top + bottom, width + left + right


def _array(image) -> np.ndarray:
    """Pixels `(height, width, 3)` in [0, 1]."""
    if isinstance(image, Image.Image):
        return np.asarray(image, np.float32) / 255
    return image.movedim(0, -1).numpy() if isinstance(image, torch.Tensor) else image


def _judge_outside_the_mask(arguments, kind: str, images):
    """Known tokens and pixels are kept."""
    image, mask = arguments["image"], arguments["mask_image"] >= 0.5
    left, top, _, _ = arguments.get("padding", (0, 0, 0, 0))
    is_grid = isinstance(image, torch.Tensor) and image.dtype == torch.int64
    if is_grid and kind == "latent":
        inside = images[:, top // 4 :, left // 4 :][:, : image.shape[0], : image.shape[1]]
        expect((inside == image)[:, ~mask].all(), "known tokens are not kept")
    elif not is_grid and kind in ("pt", "np") and arguments["keep_original_pixels"] and arguments["resize_mode"] != "crop":
        results = images if kind == "np" else images.movedim(1, -1)
        inside = results[:, top : top + mask.shape[0], left : left + mask.shape[1]].float()
        radius = 2 * arguments["feather_radius"]
        reach = torch.nn.functional.max_pool2d(mask[None, None].float(), 2 * radius + 1, 1, radius)[0, 0] > 0
        if any(arguments.get("padding", ())) and radius:
            return  # blending also begins at the image's own edges
        expect(
            (inside - torch.from_numpy(_array(image).copy())).abs()[:, ~reach].le(1e-6).all(), "known pixels are not kept"
        )


# ------------------------------------------------------------------------------------------------- usable afterwards


def _run_probe(pipe, task: str):
    call = {"num_inference_steps": 1, "use_prior": False, "output_type": "latent", "generator": seeded(0)}
    call |= {"prompt_embeds": normal(0, 1, 2, TEXT_DIM), "negative_prompt_embeds": normal(1, 1, 2, TEXT_DIM)}
    if task in ("text to image", "interpolation"):
        call |= {"height": 16, "width": 16}
    else:
        call["image"] = tokens(0, 4, 4)
    if task == "inpainting":
        call["mask_image"] = torch.ones(4, 4)
    return pipe(**{name: value for name, value in call.items() if _takes(pipe, name)}).images


@functools.cache
def _probe(task: str, dtype: str, scheduler: str, guider: str):
    return _run_probe(pipeline(task, dtype, scheduler, guider), task)


def _check_usable(call: Call, before):
    if before is not None:
        again = _run_probe(pipeline(call.task, call.dtype, call.scheduler, call.guider), call.task)
        expect(again.shape == before.shape, "the pipeline draws another picture after the refusal")
        differing = (again != before).float().mean().item()
        expect(differing <= (0 if call.dtype == "float64" else 0.2), "the pipeline draws another picture after the refusal")
