"""
Makes diffusers find our classes, as soon as it is imported and without importing anything here: the one place that touches
its private tables. Where a table has moved, diffusers works on without that entry, and one warning says what it would do.
"""

import importlib
import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

from .about import DIFFUSERS

LIBRARY = "paella_diffusers"
PIPELINES = ["PaellaPipeline", "PaellaImg2ImgPipeline", "PaellaInpaintPipeline", "PaellaInversionPipeline"]
COMPONENTS = [
    "PaellaVQModel",
    "PaellaUNet",
    "PaellaPrior",
    "PaellaScheduler",
    "PaellaConfidenceScheduler",
    "PaellaFlowMatchEulerScheduler",
    "PaellaFlowMatchTrapezoidalScheduler",
    "PaellaPsiScheduler",
    "DDIMWuerstchenScheduler",
    "PaellaClassifierFreeGuidance",
    "PaellaAdaptiveProjectedGuidance",
    "PaellaClassifierFreeZeroStarGuidance",
    "PaellaRescaledGuidance",
    "PaellaPerturbedAttentionGuidance",
    "PaellaSmoothedEnergyGuidance",
    "PaellaSemanticGuidance",
]
MODULAR = ["PaellaModularPipeline", "PaellaAutoBlocks"]
# Base classes of components of kinds that diffusers does not know, and their methods to save and to load.
COMPONENT_BASES = {"GuidanceMixin": ["save_pretrained", "from_pretrained"]}
# What the automatic pipelines of each task give for a model; the first model with a pipeline's class is that pipeline's.
TASKS = {
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": {"paella": "PaellaPipeline", "paella-inversion": "PaellaPipeline"},
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": {
        "paella": "PaellaImg2ImgPipeline",
        "paella-inversion": "PaellaInversionPipeline",
    },
    "AUTO_INPAINT_PIPELINES_MAPPING": {"paella": "PaellaInpaintPipeline", "paella-inversion": "PaellaInpaintPipeline"},
}

# diffusers' schedulers that take the configurations of ours, and their modules.
DISCRETE_SCHEDULERS = {
    "DiscreteDDIMScheduler": "diffusers.schedulers.scheduling_discrete_ddim",
    "EntropyBoundScheduler": "diffusers.schedulers.scheduling_entropy_bound",
}

logger = logging.getLogger(__name__)
_warned = False


def install() -> None:
    """
    Let diffusers find our pipelines and components by name, `paella_diffusers` as the library of a `model_index.json`, our
    models in the automatic and the modular pipelines, and our schedulers among those that swap with its discrete ones; now,
    or when the module concerned is imported.
    """
    _after_import("diffusers", lambda module: _add_names(module, "pipelines.", [*PIPELINES, *COMPONENTS, *MODULAR]))
    _after_import("diffusers.pipelines", lambda module: _add_names(module, "", PIPELINES))
    _after_import("diffusers.pipelines.pipeline_loading_utils", _add_component_bases)
    _after_import("diffusers.pipelines.auto_pipeline", _add_tasks)
    _after_import("diffusers.modular_pipelines.modular_pipeline", _add_modular)
    for name, module in DISCRETE_SCHEDULERS.items():
        _after_import(module, lambda module, name=name: _add_compatibles(getattr(module, name)))


def library_names(components: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """
    What `model_index.json` should say of components where diffusers would record a module path that it then refuses to load
    from the Hub: our public classes are of the library `paella_diffusers`, and transformers' PIL image processor goes by
    its documented name.
    """
    names = {}
    pil = sys.modules.get("transformers.models.clip.image_processing_pil_clip")  # no component is of it before its import
    for name, component in components.items():
        component = getattr(component, "_orig_mod", component)  # compiled modules wrap the original
        cls = type(component)
        if getattr(sys.modules[LIBRARY], cls.__name__, None) is cls:
            names[name] = (LIBRARY, cls.__name__)
        elif isinstance(component, getattr(pil, "CLIPImageProcessorPil", ())):
            names[name] = ("transformers", "CLIPImageProcessor")
    return names


def _add_names(module, prefix: str, names: Iterable[str]):
    """Add names to a lazy module of diffusers: they resolve to this package, which loads them when they are used."""
    package = sys.modules[LIBRARY]
    sys.modules[f"diffusers.pipelines.{LIBRARY}"] = package
    if module.__name__ == "diffusers.pipelines":
        setattr(module, LIBRARY, package)
    _update(module, "_class_to_module", dict.fromkeys(names, prefix + LIBRARY))


def _add_component_bases(module):
    """Add the base classes that `DiffusionPipeline.save_pretrained` looks for; by name, and so without importing them."""
    _update(module, "LOADABLE_CLASSES", {LIBRARY: COMPONENT_BASES})


def _add_tasks(module):
    for task, models in TASKS.items():
        _update(module, task, {model: getattr(sys.modules[LIBRARY], name) for model, name in models.items()})


def _add_modular(module):
    """Let `ModularPipeline.from_pretrained` find ours from the `model_index.json` of a plain pipeline."""
    models = {model for task in TASKS.values() for model in task}
    _update(module, "MODULAR_PIPELINE_MAPPING", dict.fromkeys(models, lambda config=None: MODULAR[0]))


def _add_compatibles(scheduler: type):
    """Let a discrete scheduler of diffusers be made from the configuration of any other without a warning."""
    ours = [name for name in COMPONENTS if name.startswith("Paella") and name.endswith("Scheduler")]
    scheduler._compatibles = [*scheduler._compatibles, *ours, *DISCRETE_SCHEDULERS]


def _update(module, table: str, entries: dict):
    if isinstance(vars(module).get(table), dict):
        vars(module)[table].update(entries)
    else:
        _warn(f"it has no {module.__name__}.{table}")


def _warn(reason: str | Exception):
    """Once in a process."""
    global _warned
    if not _warned:
        logger.warning(
            "paella-diffusers cannot extend this version of diffusers (%s). `DiffusionPipeline`, `AutoModel` and automatic "
            "pipelines such as `AutoPipelineForText2Image` may not find, load or save Paella's classes by name. Load with "
            "Paella's own, such as `PaellaPipeline.from_pretrained`, or install `%s` or a newer paella-diffusers.",
            reason,
            DIFFUSERS,
        )
    _warned = True


def _call(action: Callable, module):
    """Extend a module of diffusers, which works on whatever goes wrong."""
    try:
        action(module)
    except Exception as error:
        _warn(error)


def _after_import(name: str, action: Callable):
    """Call `action` with a module once it has been imported."""
    if name in sys.modules:
        _call(action, sys.modules[name])
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
            _call(self.action, sys.modules[fullname])  # diffusers puts a lazy module in the place of this one

        spec.loader.exec_module = exec_module
        return spec
