"""What Hugging Face Inference Endpoints run: `push_to_hub(..., endpoint=True)` copies this file, as `handler.py`."""

from typing import Any

import torch
from PIL import Image

from paella_diffusers import PaellaPipeline

ARGUMENTS = {"negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "seed"}


class EndpointHandler:
    """Text to image. `InferenceClient(ENDPOINT).text_to_image(prompt, seed=1)` calls it."""

    def __init__(self, path: str = ""):
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.pipe: PaellaPipeline = PaellaPipeline.from_pretrained(path).to(device)

    def __call__(self, data: dict[str, Any]) -> Image.Image:
        """The picture (`PIL.Image.Image`) for the prompt `data["inputs"]`, by `data["parameters"]`, some of `ARGUMENTS`."""
        arguments = dict(data.get("parameters") or {})
        if unknown := arguments.keys() - ARGUMENTS:
            raise ValueError(f"`parameters` takes {', '.join(sorted(ARGUMENTS))}, got {', '.join(sorted(unknown))}.")
        seed = arguments.pop("seed", None)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self.pipe(data["inputs"], generator=generator, **arguments).images[0]
