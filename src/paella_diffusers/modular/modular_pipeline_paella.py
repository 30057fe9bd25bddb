"""Paella as a modular pipeline of diffusers."""

import os
from typing import Any

import torch
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks

from ..pipelines.pipeline_paella import PaellaPipeline
from .modular_blocks_paella import COMPONENTS


class PaellaModularPipeline(ModularPipeline):
    """
    Text to image, image to image, inpainting and outpainting from blocks that can be rearranged, with the folders that plain
    pipelines save and with the same tokens:

        pipe = ModularPipeline.from_pretrained(folder)
        pipe.load_components()
        image = pipe(prompt="red heart", output="images")[0]

    The guidance is the component `guider`. As in every modular pipeline, an input that is None is at its default; so
    `guidance_scale=1.0`, not None, turns guidance off.
    """

    default_blocks_name = "PaellaAutoBlocks"

    def __init__(
        self,
        blocks: ModularPipelineBlocks | None = None,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        *args: Any,
        config_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if config_dict is not None:  # parts that the folder does not have shall not be looked for
            config_dict = {name: value for name, value in config_dict.items() if value != [None, None]}
        if pretrained_model_name_or_path is not None:
            pretrained_model_name_or_path = os.fspath(pretrained_model_name_or_path)  # diffusers joins it with strings
        super().__init__(blocks, pretrained_model_name_or_path, *args, config_dict=config_dict, **kwargs)

    def load_components(self, names: list[str] | str | None = None, workflow: str | None = None, **kwargs: Any) -> None:
        """As diffusers', but in float32 unless `dtype` is given, whatever the stored dtype is."""
        super().load_components(names, workflow, **{"dtype": torch.float32} | kwargs)

    def as_pipeline(self) -> PaellaPipeline:
        """A plain pipeline of the same components, whose steps the blocks take."""
        components: dict[str, Any] = {name: getattr(self, name, None) for name in (*COMPONENTS, "guider")}
        return PaellaPipeline(**components, use_prior=self.config.get("use_prior"))
