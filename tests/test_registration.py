"""The package as a plugin: plain diffusers finds our classes. Where imports matter, a case has a process of its own."""

import json
import re
import shutil
import subprocess
import sys

import diffusers
import pytest
import torch
from conftest import TINY_UNET, tiny_components, tiny_pipeline, tiny_unet
from diffusers import (
    AutoModel,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ClassifierFreeGuidance,
)

from paella_diffusers import (
    PaellaClassifierFreeGuidance,
    PaellaImg2ImgPipeline,
    PaellaInpaintPipeline,
    PaellaInversionPipeline,
    PaellaPipeline,
    PaellaPrior,
    PaellaUNet,
    VQModel,
)
from paella_diffusers.about import DIFFUSERS
from paella_diffusers.registration import library_names

AUTOMATIC = (AutoPipelineForText2Image, AutoPipelineForImage2Image, AutoPipelineForInpainting)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline(image_encoder=None, feature_extractor=None).save_pretrained(folder)
    return folder


def run(code: str, *arguments: str) -> str:
    return run_with_errors(code, *arguments)[0]


def run_with_errors(code: str, *arguments: str) -> tuple[str, str]:
    process = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip(), process.stderr


@pytest.mark.parametrize("imports", ["import paella_diffusers, diffusers", "import diffusers, paella_diffusers"])
def test_plain_diffusion_pipeline_returns_ours(saved, imports):
    code = f"import sys; {imports}; print(type(diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])).__module__)"
    assert run(code, saved) == "paella_diffusers.pipelines.pipeline_paella"


def test_from_the_hub(saved, hub, tmp_path):
    shutil.copytree(saved, hub.repo("someone/finetune"), dirs_exist_ok=True)
    pipe = diffusers.DiffusionPipeline.from_pretrained("someone/finetune", cache_dir=tmp_path)
    assert type(pipe.unet) is PaellaUNet


def test_automatic_models(saved):
    for name, cls in (("unet", PaellaUNet), ("vqgan", VQModel), ("prior", PaellaPrior)):
        assert type(AutoModel.from_pretrained(str(saved), subfolder=name)) is cls
    assert type(AutoModel.from_pretrained(f"{saved}/unet")) is PaellaUNet


def test_automatic_pipelines_between_tasks(saved):
    text, image, inpaint = (automatic.from_pretrained(saved) for automatic in AUTOMATIC)
    assert [type(pipe) for pipe in (text, image, inpaint)] == [
        PaellaPipeline,
        PaellaImg2ImgPipeline,
        PaellaInpaintPipeline,
    ]
    other = AutoPipelineForImage2Image.from_pipe(text)
    assert type(other) is PaellaImg2ImgPipeline and other.unet is text.unet
    assert type(AutoPipelineForInpainting.from_pipe(text)) is PaellaInpaintPipeline
    assert type(AutoPipelineForText2Image.from_pipe(other)) is PaellaPipeline


def test_automatic_pipelines_of_an_inversion(saved, tmp_path):
    """It is image to image: its folder gives it back, and the other tasks take its components."""
    inversion = PaellaInversionPipeline.from_pretrained(saved)
    text = AutoPipelineForText2Image.from_pipe(inversion)
    assert text.unet is inversion.unet
    assert type(AutoPipelineForImage2Image.from_pipe(text)) is PaellaImg2ImgPipeline
    inversion.save_pretrained(tmp_path)
    expected = [PaellaPipeline, PaellaInversionPipeline, PaellaInpaintPipeline]
    assert [type(automatic.from_pipe(inversion)) for automatic in AUTOMATIC] == expected
    assert [type(automatic.from_pretrained(tmp_path)) for automatic in AUTOMATIC] == expected


def test_modular_pipelines(saved):
    """From the folder of a plain pipeline, without remote code."""
    pipe = diffusers.ModularPipeline.from_pretrained(saved)
    pipe.load_components()
    images = pipe(prompt="a", num_inference_steps=1, output="images")
    assert type(pipe).__name__ == "PaellaModularPipeline" and type(pipe.unet) is PaellaUNet
    assert images[0].size == (32, 32)


def test_guiders_are_saved_and_loaded_by_plain_diffusers(saved, tmp_path):
    """Ours and theirs, alone and in a pipeline."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(saved)
    for library, cls in (("paella_diffusers", PaellaClassifierFreeGuidance), ("diffusers", ClassifierFreeGuidance)):
        pipe.guider = cls(guidance_scale=3.0)
        folder = tmp_path / library
        pipe.save_pretrained(folder)
        again = diffusers.DiffusionPipeline.from_pretrained(folder)
        diffusers.DiffusionPipeline.save_pretrained(again, folder / "again")
        index = json.loads((folder / "again/model_index.json").read_text())
        alone = cls.from_pretrained(folder / "again", subfolder="guider")
        assert index["guider"] == [library, cls.__name__]
        assert again.guider.config.guidance_scale == alone.config.guidance_scale == 3.0


def test_names_on_diffusers_load_lazily():
    code = (
        "import sys, paella_diffusers, diffusers, diffusers.pipelines; from diffusers import DiffusionPipeline; "
        "parts = ('pipelines', 'modular', 'sampling'); "
        "lazy = not any(name.startswith('paella_diffusers.' + part) for name in sys.modules for part in parts); "
        "same = diffusers.PaellaPipeline is diffusers.pipelines.PaellaPipeline is paella_diffusers.PaellaPipeline; "
        "print(lazy, same, diffusers.PaellaUNet is paella_diffusers.PaellaUNet)"
    )
    assert run(code) == "True True True"


def test_asking_for_diffusers_is_not_importing_it():
    code = (
        "import paella_diffusers, importlib.util; importlib.util.find_spec('diffusers'); "
        "import diffusers; print(diffusers.PaellaPipeline.__name__)"
    )
    assert run(code) == "PaellaPipeline"


def test_library_names_are_those_of_public_classes():
    """A subclass of a user's is not of this library, whatever its name is."""
    unet = tiny_unet()
    theirs = type("PaellaUNet", (PaellaUNet,), {})(**TINY_UNET)
    components = {"ours": unet, "compiled": torch.compile(unet, backend="eager"), "theirs": theirs, "none": None}
    ours = ("paella_diffusers", "PaellaUNet")
    assert library_names(components) == {"ours": ours, "compiled": ours}
    named = library_names({"processor": tiny_components()["feature_extractor"]})  # its class depends on torchvision
    assert named in ({}, {"processor": ("transformers", "CLIPImageProcessor")})


TABLES = {
    "diffusers": "_class_to_module",
    "diffusers.pipelines": "_class_to_module",
    "diffusers.pipelines.pipeline_loading_utils": "LOADABLE_CLASSES",
    "diffusers.pipelines.auto_pipeline": "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    "diffusers.modular_pipelines.modular_pipeline": "MODULAR_PIPELINE_MAPPING",
}
IMPORTS = "import " + ", ".join(TABLES)


def test_each_table_that_is_gone_is_named():
    """diffusers was imported first."""
    code = (
        f"import sys; {IMPORTS}; import paella_diffusers\n"
        f"for name, table in {TABLES}.items():\n"
        "    kept = vars(sys.modules[name]).pop(table)\n"
        "    paella_diffusers.registration._warned = False\n"
        "    paella_diffusers.registration.install()\n"
        "    vars(sys.modules[name])[table] = kept\n"
    )
    errors = run_with_errors(code)[1]
    reasons = re.findall(r"cannot extend this version of diffusers \(it has no (\S+)\)", errors)
    assert reasons == [f"{module}.{table}" for module, table in TABLES.items()]


def test_importing_diffusers_goes_on_without_its_tables(saved):
    """They are made otherwise within its own import: one warning, and the rest works."""
    code = (
        "import sys, types; from importlib.machinery import PathFinder; from paella_diffusers import registration\n"
        f"for name, table in {TABLES}.items():\n"
        "    freeze = lambda m, table=table: vars(m).update({table: types.MappingProxyType(vars(m)[table])})\n"
        "    registration._after_import(name, freeze)\n"
        "    sooner = sys.meta_path.pop(0)\n"
        "    sys.meta_path.insert(sys.meta_path.index(PathFinder), sooner)\n"
        f"{IMPORTS}\n"
        "from paella_diffusers import PaellaPipeline; print(type(PaellaPipeline.from_pretrained(sys.argv[1]).unet).__name__)"
    )
    printed, errors = run_with_errors(code, saved)
    assert printed == "PaellaUNet"
    assert errors.count("cannot extend this version of diffusers") == 1 and f"install `{DIFFUSERS}`" in errors
    assert "(it has no diffusers._class_to_module). `DiffusionPipeline`, `AutoModel` and automatic pipelines" in errors


def test_importing_diffusers_goes_on_when_this_package_cannot_be_imported():
    code = (
        "import paella_diffusers; paella_diffusers._MODULES['PaellaInpaintPipeline'] = 'pipelines.moved'; "
        f"{IMPORTS}; print('imported')"
    )
    printed, errors = run_with_errors(code)
    assert printed == "imported" and "(No module named 'paella_diffusers.pipelines.moved')" in errors
