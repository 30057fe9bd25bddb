"""Making diffusers know our classes: the one place that touches its private tables."""

import diffusers
from diffusers.utils import logging

logger = logging.get_logger(__name__)

LIBRARY = "paella_diffusers"


def library_names(components: dict) -> dict[str, tuple[str, str]]:
    """
    What `model_index.json` should say of components where diffusers would record a module path that it then refuses to load
    from the Hub: our classes are of the library `paella_diffusers`, and transformers' PIL image processor goes by its
    documented name.
    """
    names = {}
    for name, component in components.items():
        cls = type(getattr(component, "_orig_mod", component))  # compiled modules wrap the original
        if cls.__module__.split(".")[0] == LIBRARY:
            names[name] = (LIBRARY, cls.__name__)
        elif cls.__name__ == "CLIPImageProcessorPil":
            names[name] = ("transformers", "CLIPImageProcessor")
    return names


def register():
    """Let diffusers resolve the library name `paella_diffusers` in a `model_index.json`."""
    import paella_diffusers

    diffusers.pipelines.paella_diffusers = paella_diffusers
