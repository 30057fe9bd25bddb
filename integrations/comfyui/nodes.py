"""
ComfyUI nodes for Paella. Each passes its inputs to a function of `paella_diffusers`, under the names of that function's
arguments: its errors then name the node's input.

Types of their own: PAELLA_MODEL, a pipeline and its adapters; PAELLA_CONDITIONING, encoded prompts and pictures;
PAELLA_GUIDANCE, a guider; PAELLA_TOKENS, token grids `(batch_size, height / 4, width / 4)`. Pictures are ComfyUI's IMAGE,
float `(batch_size, height, width, 3)` in [0, 1], and MASK, float `(batch_size, height, width)`, 1 where it is white.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import diffusers
import torch

import paella_diffusers
from paella_diffusers import (
    EMOJI_MODEL,
    PaellaImg2ImgPipeline,
    PaellaInpaintPipeline,
    PaellaPipeline,
    PaellaScheduler,
)
from paella_diffusers.pipelines.conditioning import PromptEmbeds
from paella_diffusers.registration import COMPONENTS

EMBEDDED = "embedded"
MODELS_OWN = "the model's own"
SCHEDULERS = [MODELS_OWN, *PaellaScheduler._compatibles]
GUIDERS = [name for name in COMPONENTS if name.endswith("Guidance") and name != "PaellaSemanticGuidance"]

MODEL, CONDITIONING = ("PAELLA_MODEL",), ("PAELLA_CONDITIONING",)
TEXT = ("STRING", {"multiline": True, "default": ""})
SIZE = ("INT", {"default": 0, "min": 0, "max": 4096, "tooltip": "in pixels; 0 is the input picture's size, or the model's"})
SAMPLING = {
    "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True}),
    "num_inference_steps": ("INT", {"default": 12, "min": 1, "max": 1000}),
    "scheduler": (SCHEDULERS,),
}
GUIDANCE = {"guidance": ("PAELLA_GUIDANCE", {"tooltip": "the model's own if nothing is connected"})}


@dataclass(frozen=True)
class Model:
    """
    What PAELLA_MODEL is.

    Args:
        pipe (`PaellaPipeline`): Its models are shared by all nodes.
        adapters (`tuple[tuple[str, float], ...]`): The adapters to use, with their scales.
        loaded (`dict[str, str]`): All adapters of the pipeline, by what they were loaded from; shared like the models.
    """

    pipe: PaellaPipeline
    adapters: tuple[tuple[str, float], ...] = ()
    loaded: dict[str, str] = field(default_factory=dict, compare=False)

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """While it lasts, this model's adapters are active, and no others; after it none is."""
        if self.adapters:
            self.pipe.enable_lora()
            self.pipe.set_adapters(*map(list, zip(*self.adapters)))
        elif self.loaded:
            self.pipe.disable_lora()
        try:
            yield
        finally:
            if self.adapters:
                self.pipe.disable_lora()

    def __call__(self, task: type, conditioning: dict, scheduler: str, guidance=None, height=0, width=0, seed=0, **options):
        """The images of a call of the task, with a preview after each step."""
        pipe = task.from_pipe(self.pipe)
        if scheduler != MODELS_OWN:
            kind = getattr(paella_diffusers, scheduler, None) or getattr(diffusers, scheduler)
            pipe.scheduler = kind.from_config(pipe.scheduler.config)
        if guidance is not None:
            pipe.guider = guidance
        pipe.set_progress_bar_config(disable=True)
        if importlib.util.find_spec("comfy") is not None:
            options |= {
                "callback_on_step_end": show_step,
                "callback_on_step_end_tensor_inputs": ["pred_original_sample"],
            }
        generator = torch.Generator().manual_seed(seed)
        with self.adapted():
            return pipe(height=height or None, width=width or None, generator=generator, **conditioning, **options).images


def show_step(pipe, step: int, timestep, tensors: dict) -> dict:
    """After each step: stop if ComfyUI's user cancelled, otherwise show progress and the first picture as predicted."""
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar

    throw_exception_if_processing_interrupted()
    preview = pipe.decode(tensors["pred_original_sample"][:1], "pil")[0]
    ProgressBar(pipe.num_timesteps).update_absolute(step + 1, preview=("JPEG", preview, 512))
    return {}


def to_image(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures `(batch_size, 3, height, width)` as IMAGE."""
    return pixels.movedim(1, -1).float().cpu()


def to_pixels(image: torch.Tensor) -> torch.Tensor:
    """IMAGE as pictures `(batch_size, 3, height, width)`; what is beyond three channels, transparency, is left out."""
    return image[..., :3].movedim(-1, 1)


class Node:
    """What ComfyUI asks of every node: `run` takes `INPUTS`, and `OPTIONAL` if they are connected."""

    CATEGORY = "Paella"
    FUNCTION = "run"
    INPUTS, OPTIONAL = {}, {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": cls.INPUTS, "optional": cls.OPTIONAL}


class PaellaLoad(Node):
    TITLE = "Paella: load model"
    DESCRIPTION = "A model in diffusers' or the published layout: a folder or a Hub id. `embedded` is the package's own."
    RETURN_TYPES = ("PAELLA_MODEL",)
    RETURN_NAMES = ("model",)
    INPUTS = {
        "model": ("STRING", {"default": EMBEDDED}),
        "dtype": (["float32", "bfloat16", "float16"],),
        "low_memory": ("BOOLEAN", {"default": False, "tooltip": "keep only the running model's weights in memory"}),
    }

    def run(self, model: str, dtype: str, low_memory: bool):
        source = EMOJI_MODEL if model == EMBEDDED else model
        try:
            pipe = PaellaPipeline.from_pretrained(source, dtype=getattr(torch, dtype), low_memory=low_memory)
        except (OSError, ValueError) as error:
            raise ValueError(f"`model` is {model!r}: {error}") from error
        if torch.cuda.is_available():
            pipe.to("cuda")
        return (Model(pipe),)


class PaellaLora(Node):
    TITLE = "Paella: load LoRA"
    DESCRIPTION = "Adds an adapter to a model. Several of these nodes in a row mix adapters."
    RETURN_TYPES = ("PAELLA_MODEL",)
    RETURN_NAMES = ("model",)
    INPUTS = {
        "model": MODEL,
        "lora": ("STRING", {"default": "", "tooltip": "a file, a folder or a Hub id"}),
        "scale": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
    }

    def run(self, model: Model, lora: str, scale: float):
        if lora not in model.loaded:
            name = f"lora_{len(model.loaded)}"
            try:
                model.pipe.load_lora_weights(lora, adapter_name=name)
            except (OSError, ValueError) as error:
                raise ValueError(f"`lora` is {lora!r}: {error}") from error
            model.loaded[lora] = name
        return (replace(model, adapters=(*model.adapters, (model.loaded[lora], scale))),)


class PaellaEncode(Node):
    TITLE = "Paella: encode prompt"
    DESCRIPTION = "Encodes what the picture shall show, and what it shall not show."
    RETURN_TYPES = ("PAELLA_CONDITIONING",)
    RETURN_NAMES = ("conditioning",)
    INPUTS = {"model": MODEL, "prompt": TEXT, "negative_prompt": TEXT}

    def run(self, model: Model, prompt: str, negative_prompt: str):
        with model.adapted():
            embeds = PromptEmbeds(*model.pipe.encode_prompt(prompt, negative_prompt))
        return (embeds._asdict(),)


class PaellaEncodeImage(Node):
    TITLE = "Paella: encode pictures for variations"
    DESCRIPTION = "Adds the CLIP embeddings of pictures to a prompt's encoding; several pictures are mixed."
    RETURN_TYPES = ("PAELLA_CONDITIONING",)
    RETURN_NAMES = ("conditioning",)
    INPUTS = {"model": MODEL, "conditioning": CONDITIONING, "condition_image": ("IMAGE",)}

    def run(self, model: Model, conditioning: dict, condition_image: torch.Tensor):
        images = model.pipe.image_processor.numpy_to_pil(condition_image[..., :3].numpy())
        return (conditioning | {"clip_image_embeds": model.pipe.encode_image(images)},)


class PaellaGuidance(Node):
    TITLE = "Paella: guidance"
    DESCRIPTION = "How the prompt guides sampling. Methods are described in docs/guidance.md."
    RETURN_TYPES = ("PAELLA_GUIDANCE",)
    RETURN_NAMES = ("guidance",)
    INPUTS = {
        "method": (GUIDERS,),
        "guidance_scale": ("FLOAT", {"default": 3.0, "min": 0.0, "max": 50.0, "step": 0.1}),
    }

    def run(self, method: str, guidance_scale: float):
        return (getattr(paella_diffusers, method)(guidance_scale=guidance_scale),)


class PaellaSample(Node):
    TITLE = "Paella: sample"
    DESCRIPTION = "Text to image, or variations: samples token grids, which the decode node turns into pictures."
    RETURN_TYPES = ("PAELLA_TOKENS",)
    RETURN_NAMES = ("tokens",)
    INPUTS = {
        "model": MODEL,
        "conditioning": CONDITIONING,
        "height": SIZE,
        "width": SIZE,
        "num_images_per_prompt": ("INT", {"default": 1, "min": 1, "max": 64}),
        **SAMPLING,
    }
    OPTIONAL = GUIDANCE

    def run(self, model: Model, conditioning: dict, **options):
        return (model(PaellaPipeline, conditioning, output_type="latent", **options),)


class PaellaDecode(Node):
    TITLE = "Paella: decode tokens"
    DESCRIPTION = "Token grids to pictures."
    RETURN_TYPES = ("IMAGE",)
    INPUTS = {"model": MODEL, "tokens": ("PAELLA_TOKENS",)}

    def run(self, model: Model, tokens: torch.Tensor):
        return (to_image(model.pipe.decode(tokens, "pt")),)


class PaellaImageToImage(Node):
    TITLE = "Paella: image to image"
    DESCRIPTION = "Changes a picture to match a prompt. The result has the picture's size unless height and width are given."
    RETURN_TYPES = ("IMAGE",)
    INPUTS = {
        "model": MODEL,
        "conditioning": CONDITIONING,
        "image": ("IMAGE",),
        "strength": ("FLOAT", {"default": 0.75, "min": 0.01, "max": 1.0, "step": 0.01}),
        "height": SIZE,
        "width": SIZE,
        **SAMPLING,
    }
    OPTIONAL = GUIDANCE

    def run(self, model: Model, conditioning: dict, image: torch.Tensor, **options):
        images = model(PaellaImg2ImgPipeline, conditioning, image=to_pixels(image), output_type="pt", **options)
        return (to_image(images),)


class PaellaInpaint(Node):
    TITLE = "Paella: inpaint"
    DESCRIPTION = "Replaces a picture where the mask is white; all other pixels stay as they are."
    RETURN_TYPES = ("IMAGE",)
    INPUTS = {
        "model": MODEL,
        "conditioning": CONDITIONING,
        "image": ("IMAGE",),
        "mask_image": ("MASK",),
        "strength": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}),
        **SAMPLING,
    }
    OPTIONAL = GUIDANCE

    def run(self, model: Model, conditioning: dict, image: torch.Tensor, mask_image: torch.Tensor, **options):
        pictures = {"image": to_pixels(image), "mask_image": mask_image[:, None]}
        return (to_image(model(PaellaInpaintPipeline, conditioning, output_type="pt", **pictures, **options)),)


class PaellaOutpaint(Node):
    TITLE = "Paella: outpaint"
    DESCRIPTION = "Extends a picture by so many pixels at each side (`padding`)."
    RETURN_TYPES = ("IMAGE",)
    INPUTS = {
        "model": MODEL,
        "conditioning": CONDITIONING,
        "image": ("IMAGE",),
        **dict.fromkeys(("left", "top", "right", "bottom"), ("INT", {"default": 0, "min": 0, "max": 4096})),
        **SAMPLING,
    }
    OPTIONAL = GUIDANCE

    def run(self, model: Model, conditioning: dict, image: torch.Tensor, left, top, right, bottom, **options):
        padding = (left, top, right, bottom)
        images = model(
            PaellaInpaintPipeline, conditioning, image=to_pixels(image), padding=padding, output_type="pt", **options
        )
        return (to_image(images),)


NODES = [
    PaellaLoad,
    PaellaLora,
    PaellaEncode,
    PaellaEncodeImage,
    PaellaGuidance,
    PaellaSample,
    PaellaDecode,
    PaellaImageToImage,
    PaellaInpaint,
    PaellaOutpaint,
]
