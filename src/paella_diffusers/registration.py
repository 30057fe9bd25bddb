"""
Making diffusers know our classes, as soon as it is imported and without importing anything ourselves: the one place that
touches its private tables.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

LIBRARY = "paella_diffusers"
PIPELINES = {  # and the table of their task, if diffusers has one
    "PaellaPipeline": "AUTO_TEXT2IMAGE_PIPELINES_MAPPING",
    "PaellaImg2ImgPipeline": "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    "PaellaInpaintPipeline": "AUTO_INPAINT_PIPELINES_MAPPING",
    "PaellaInversionPipeline": None,
}
COMPONENTS = [
    "PaellaVQModel",
    "PaellaUNet",
    "PaellaPrior",
    "PaellaScheduler",
    "PaellaConfidenceScheduler",
    "PaellaFlowMatchEulerScheduler",
    "DDIMWuerstchenScheduler",
]


def install():
    """
    Let diffusers find our pipelines and components by name, `paella_diffusers` as the library of a `model_index.json`, and
    `"paella"` in the automatic pipelines; now, or when the module concerned is imported.
    """
    _after_import("diffusers", lambda module: _add_names(module, "pipelines.", [*PIPELINES, *COMPONENTS]))
    _after_import("diffusers.pipelines", lambda module: _add_names(module, "", PIPELINES))
    _after_import("diffusers.pipelines.auto_pipeline", _add_tasks)


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


def _add_names(module, prefix: str, names):
    """Add names to a lazy module of diffusers: they resolve to this package, which loads them when they are used."""
    table = vars(module).get("_class_to_module")
    if not isinstance(table, dict):
        raise ImportError(_moved(f"{module.__name__}._class_to_module"))
    package = sys.modules[LIBRARY]
    sys.modules[f"diffusers.pipelines.{LIBRARY}"] = package
    table.update(dict.fromkeys(names, prefix + LIBRARY))
    if module.__name__ == "diffusers.pipelines":
        setattr(module, LIBRARY, package)


def _add_tasks(module):
    package = sys.modules[LIBRARY]
    for name, table in PIPELINES.items():
        if table is None:
            continue
        if not isinstance(vars(module).get(table), dict):
            raise ImportError(_moved(f"{module.__name__}.{table}"))
        vars(module)[table]["paella"] = getattr(package, name)


def _moved(what: str) -> str:
    return (
        f"This version of diffusers has no {what}, which paella-diffusers extends: install diffusers 0.42, or a newer "
        "paella-diffusers."
    )


def _after_import(name: str, action: Callable):
    """Call `action` with a module once it has been imported."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))


class _AfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, action: Callable):
        self.name, self.action = name, action

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # or it would ask itself
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            sys.meta_path.remove(self)  # only now: a spec may be asked for without an import
            execute(module)
            self.action(sys.modules[fullname])  # diffusers puts a lazy module in the place of this one

        spec.loader.exec_module = exec_module
        return spec
