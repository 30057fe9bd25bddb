"""Making diffusers know our classes: the one place that touches its private tables."""

import diffusers
import diffusers.pipelines.auto_pipeline as auto_pipeline

import paella_diffusers

LIBRARY = "paella_diffusers"
AUTO_TABLES = {
    "text2image": "AUTO_TEXT2IMAGE_PIPELINES_MAPPING",
    "image2image": "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    "inpainting": "AUTO_INPAINT_PIPELINES_MAPPING",
}


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


def register(pipelines: dict[str, type]):
    """
    Let diffusers find the library `paella_diffusers` of a `model_index.json`, and the pipelines by name and by task.

    Args:
        pipelines (`dict[str, type]`): Pipeline classes by task: `text2image`, `image2image`, `inpainting`.

    Raises:
        ImportError: If this version of diffusers has no such tables.
    """
    diffusers.pipelines.paella_diffusers = paella_diffusers
    for task, cls in pipelines.items():
        setattr(diffusers, cls.__name__, cls)
        setattr(diffusers.pipelines, cls.__name__, cls)
        table = getattr(auto_pipeline, AUTO_TABLES[task], None)
        if table is None:
            raise ImportError(
                f"diffusers {diffusers.__version__} has no {AUTO_TABLES[task]}, which paella-diffusers "
                f"{paella_diffusers.__version__} extends: install diffusers 0.42, or a newer paella-diffusers."
            )
        table["paella"] = cls
