import ast
import subprocess
import sys
from pathlib import Path

import paella_diffusers


def test_every_public_name_is_there():
    for name in paella_diffusers.__all__:
        assert getattr(paella_diffusers, name) is not None
    assert paella_diffusers.VQModel is paella_diffusers.PaellaVQModel
    assert set(paella_diffusers.__all__) <= set(dir(paella_diffusers))
    assert len(dir(paella_diffusers)) == len(set(dir(paella_diffusers)))


def test_type_checkers_know_the_same_names():
    stub = ast.parse(Path(paella_diffusers.__file__).with_suffix(".pyi").read_text())
    imported = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    modules = {alias.asname: node.module for node in imported for alias in node.names if alias.asname == alias.name}
    assert modules == paella_diffusers._MODULES | {"__version__": "about"}


def test_importing_the_package_loads_neither_torch_nor_diffusers():
    heavy = "{'torch', 'diffusers', 'transformers'}"
    code = f"import sys, paella_diffusers, paella_diffusers.cli; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_models_and_schedulers_import_no_pipelines_and_leave_the_garbage_collector_alone():
    code = (
        "import gc, sys, paella_diffusers; collections = lambda: sum(older['collections'] for older in gc.get_stats()); "
        "before = collections(); from paella_diffusers import PaellaUNet, PaellaPrior; "
        "print(collections() > before, gc.isenabled()); "
        "gc.disable(); from paella_diffusers import PaellaScheduler, VQModel; print(gc.isenabled()); "
        "print([name for name in sys.modules if name.startswith('paella_diffusers.pipelines')])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["True", "True", "False", "[]"]
