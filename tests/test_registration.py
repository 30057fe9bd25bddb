"""The package as a plugin: plain diffusers finds our classes. Each case runs in a process with imports of its own."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import tiny_pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline(image_encoder=None, feature_extractor=None).save_pretrained(folder)
    return folder


def run(code: str, *arguments: str) -> str:
    process = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@pytest.mark.parametrize("imports", ["import paella_diffusers, diffusers", "import diffusers, paella_diffusers"])
def test_plain_diffusion_pipeline_returns_ours(saved, imports):
    code = f"import sys; {imports}; print(type(diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])).__module__)"
    assert run(code, saved) == "paella_diffusers.pipelines.pipeline_paella"


def test_from_the_hub(saved, hub, tmp_path):
    shutil.copytree(saved, hub.repo("someone/finetune"), dirs_exist_ok=True)
    code = (
        "import sys, paella_diffusers; from diffusers import DiffusionPipeline; "
        "pipe = DiffusionPipeline.from_pretrained('someone/finetune', cache_dir=sys.argv[1]); "
        "print(type(pipe.unet).__name__)"
    )
    assert os.environ["HF_ENDPOINT"] == hub.endpoint
    assert run(code, tmp_path) == "PaellaUNet"


def test_automatic_pipelines_and_models(saved):
    code = (
        "import sys, paella_diffusers; from diffusers import AutoModel, AutoPipelineForText2Image; "
        "print(type(AutoPipelineForText2Image.from_pretrained(sys.argv[1])).__name__, "
        "*[type(AutoModel.from_pretrained(sys.argv[1], subfolder=s)).__name__ for s in ('unet', 'vqgan', 'prior')], "
        "type(AutoModel.from_pretrained(sys.argv[1] + '/unet')).__name__)"
    )
    assert run(code, saved) == "PaellaPipeline PaellaUNet PaellaVQModel PaellaPrior PaellaUNet"


def test_automatic_pipelines_between_tasks(saved):
    code = (
        "import sys, paella_diffusers; from diffusers import AutoPipelineForText2Image as T, "
        "AutoPipelineForImage2Image as I, AutoPipelineForInpainting as P; "
        "names = [type(A.from_pretrained(sys.argv[1])).__name__ for A in (T, I, P)]; "
        "pipe = T.from_pretrained(sys.argv[1]); other = I.from_pipe(pipe); "
        "print(*names, *[type(A.from_pipe(pipe)).__name__ for A in (I, P)], type(T.from_pipe(other)).__name__, "
        "other.unet is pipe.unet)"
    )
    three = "PaellaPipeline PaellaImg2ImgPipeline PaellaInpaintPipeline"
    assert run(code, saved) == f"{three} PaellaImg2ImgPipeline PaellaInpaintPipeline PaellaPipeline True"


def test_names_on_diffusers_load_lazily():
    code = (
        "import sys, paella_diffusers, diffusers, diffusers.pipelines; from diffusers import DiffusionPipeline; "
        "lazy = not any(name.startswith('paella_diffusers.pipelines') for name in sys.modules); "
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


@pytest.mark.parametrize(
    ("module", "table"),
    [
        ("diffusers", "_class_to_module"),
        ("diffusers.pipelines", "_class_to_module"),
        ("diffusers.pipelines.auto_pipeline", "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING"),
    ],
)
def test_moved_tables_are_explained(module, table):
    code = (
        f"import sys, {module}; del {module}.{table}\n"
        "try:\n    import paella_diffusers\nexcept ImportError as error:\n    print(error)"
    )
    assert f"has no {module}.{table}, which paella-diffusers extends: install diffusers" in run(code)
