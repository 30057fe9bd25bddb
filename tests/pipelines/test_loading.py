"""Loading and saving whole pipelines: dtypes, settings, what is printed, and folders that deceive."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from diffusers.guiders import ClassifierFreeGuidance
from safetensors.torch import load_file, save_file

from paella_diffusers import PaellaClassifierFreeGuidance, PaellaImg2ImgPipeline, PaellaPipeline
from paella_diffusers.convert import convert_to_diffusers

CALL = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "latent"}


def models(pipe) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def edit_index(folder, **entries):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture
def saved(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# ------------------------------------------------------------------------------------------------- dtypes and settings


@pytest.mark.parametrize("cls", [PaellaPipeline, DiffusionPipeline, AutoPipelineForText2Image])
def test_without_a_dtype_everything_is_float32_whatever_is_stored(tmp_path, cls):
    tiny_pipeline().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_file(tmp_path / "text_encoder" / "model.safetensors")["shared.weight"].dtype == torch.bfloat16
    pipe = cls.from_pretrained(tmp_path)
    assert {model.dtype for model in models(pipe).values()} == {torch.float32} and len(models(pipe)) == 6
    half = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {model.dtype for model in models(half).values()} == {torch.bfloat16}


def test_converted_folders_load_in_float32_too(published, tmp_path):
    convert_to_diffusers("dome272/Paella", tmp_path / "half", torch.bfloat16, **published)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "half")
    assert {model.dtype for model in models(pipe).values()} == {torch.float32}
    index = json.loads((tmp_path / "half" / "model_index.json").read_text())
    assert index["use_prior"] is None and index["guider"] == [None, None]


@pytest.mark.parametrize("guider", [PaellaClassifierFreeGuidance(guidance_scale=3.5), ClassifierFreeGuidance(2.5)])
def test_guider_and_use_prior_are_kept(tmp_path, guider):
    pipe = tiny_pipeline(guider=guider, use_prior=False)
    pipe.save_pretrained(tmp_path)
    loaded = PaellaPipeline.from_pretrained(tmp_path)
    for again in (
        loaded,
        DiffusionPipeline.from_pretrained(tmp_path),
        PaellaPipeline.from_pretrained(tmp_path, low_memory=True),
        PaellaImg2ImgPipeline.from_pipe(loaded),
        PaellaImg2ImgPipeline.from_pipe(loaded, dtype=torch.bfloat16),
        PaellaPipeline.from_pipe(PaellaImg2ImgPipeline.from_pipe(loaded)),
    ):
        assert type(again.guider) is type(guider) and again.guider.config.guidance_scale == guider.config.guidance_scale
        assert again.config.use_prior is False
    assert PaellaPipeline.from_pretrained(tmp_path, guider=None, use_prior=True).config.use_prior is True
    assert PaellaPipeline.from_pipe(loaded, guider=None).guider is None
    assert json.loads((tmp_path / "model_index.json").read_text())["use_prior"] is False


# ------------------------------------------------------------------------------------------------------ what is printed


def printed(code: str, hub_bars: bool = True) -> dict[str, list[str]]:
    """What a program writes to stderr after each `mark(name)`: the names of progress bars, and other lines as they are."""
    code = "import sys\nmark = lambda name: print(f'MARK {name}', file=sys.stderr, flush=True)\n" + code
    environment = dict(os.environ)
    if hub_bars:
        del environment["HF_HUB_DISABLE_PROGRESS_BARS"]  # which silences transformers as well
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    parts, lines = {}, []
    for line in filter(None, map(str.strip, re.split(r"[\r\n]|\x1b\[A", result.stderr))):
        if line.startswith("MARK "):
            lines = parts.setdefault(line.removeprefix("MARK "), [])
            continue
        bar = re.match(r"(.*?):?\s*\d+%\|.*\| \d+/(\d+) \[", line)
        line = f"bar to {bar[2]}: {bar[1]}".strip() if bar else line
        if line not in lines:
            lines.append(line)
    return parts


def test_a_newcomer_sees_one_bar_and_no_warning(saved, tmp_path):
    parts = printed(f"""
import torch
from paella_diffusers import PaellaPipeline
mark("load")
pipe = PaellaPipeline.from_pretrained({str(saved)!r})
mark("call")
pipe("red heart", num_inference_steps=2, prior_num_inference_steps=3)
mark("bfloat16")
pipe.to(torch.bfloat16)
pipe.unet.to(torch.float32)
mark("save")
pipe.save_pretrained({str(tmp_path / "again")!r})
mark("low memory")
PaellaPipeline.from_pretrained({str(saved)!r}, low_memory=True)
mark("float16")
PaellaPipeline.from_pretrained({str(saved)!r}, dtype=torch.float16).to("cpu")
mark("silent")
pipe.to(dtype=torch.float16, device="cpu", silence_dtype_warnings=True)
mark("user")
from transformers import T5EncoderModel  # what is not ours is as it was
T5EncoderModel.from_pretrained({str(saved / "text_encoder")!r})
""")
    load = "bar to 11: Loading pipeline components..."
    names = "vqgan, unet, text_encoder, text_encoder_2, image_encoder, prior"
    warning = f"{names}: float16 is slow on most CPUs. `to(torch.bfloat16)` needs as little memory."
    assert parts == {
        "load": [load],
        "call": ["bar to 2:"],
        "bfloat16": [],
        "save": [],
        "low memory": [load.replace("11", "8")],  # the models of this package are there already
        "float16": [load, warning],
        "silent": [],
        "user": [f"bar to {len(load_file(saved / 'text_encoder' / 'model.safetensors'))}: Loading weights"],
    }


def test_the_published_layout_shows_one_bar(published):
    options = {name: str(value) if name == "cache_dir" else value for name, value in published.items()}
    parts = printed(
        f"""
from paella_diffusers import PaellaPipeline
mark("load")
PaellaPipeline.from_pretrained("dome272/Paella", **{options!r})
""",
        hub_bars=False,
    )
    assert parts == {"load": ["bar to 12: Loading pipeline components..."]}


# ------------------------------------------------------------------------------------------------- folders that deceive


@pytest.mark.parametrize("low_memory", [True, False])
def test_no_code_is_imported_that_the_index_names(saved, tmp_path, monkeypatch, low_memory):
    """`payload.py` in the working directory would be found by an import."""
    (tmp_path / "payload.py").write_text("open('executed', 'w')\nclass Evil: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    load = lambda: PaellaPipeline.from_pretrained(saved, low_memory=low_memory)
    edit_index(saved, unet=["payload", "Evil"])
    with pytest.raises(ValueError, match="payload"):
        load()
    assert not (tmp_path / "executed").exists() and "payload" not in sys.modules
    for entry, message in (
        (["os", "system"], r"names \['os', 'system'\] as the unet in `model_index.json`, which is no class"),
        (["transformers", "pipeline"], "which is no class"),
        (["paella_diffusers"], "should be a library and a class"),
        (5, "should be a library and a class"),
        ([["paella_diffusers"], "PaellaUNet"], "should be a library and a class"),
        ({"a": 1}, "should be a library and a class"),
    ):
        edit_index(saved, unet=entry)
        with pytest.raises(ValueError, match=message):
            load()
    edit_index(saved, unet=["paella_diffusers", "PaellaUNet"], **{"../../../etc": ["payload", "Evil"], "extra": ["os", "x"]})
    assert load().unet is not None and "payload" not in sys.modules


def test_shards_are_in_their_folder(saved, tmp_path):
    folder = saved / "unet"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file(weights, tmp_path / "outside.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    for name in ("../../outside.safetensors", str(tmp_path / "outside.safetensors"), "..\\outside.safetensors"):
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        for low_memory in (True, False):
            with pytest.raises((ValueError, OSError), match="outside its folder|path separator|not appear to have"):
                PaellaPipeline.from_pretrained(saved, low_memory=low_memory)
    for index in ("[]", "{}", '{"weight_map": {"a": 5}}', "{", '{"weight_map": []}'):
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match="index.json (must hold a JSON object|is damaged)"):
            PaellaPipeline.from_pretrained(saved, low_memory=True)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("unet", "layers_per_block", [10**6, 2], "layers_per_block=.*more than 1000"),
        ("unet", "block_types", ["CT", "C" + "T" * 10**6], "block_types=.*more than 1000 entries"),
        ("unet", "num_vq_embeddings", 10**12, "num_vq_embeddings=1000000000000, more than"),
        ("unet", "layers_per_block", "many", "layers_per_block='many', which should be tuple"),
        ("unet", "sample_size", 8.5, "sample_size=8.5, which should be int"),
        ("unet", "self_attention", "yes", "self_attention='yes', which should be bool"),
        ("vqgan", "bottleneck_blocks", 10**6, "bottleneck_blocks=1000000, more than 1000"),
        ("vqgan", "scale_factor", float("nan"), "scale_factor=nan, which should be float"),
        ("prior", "num_layers", 10**6, "num_layers=1000000, more than 1000"),
        ("text_encoder", "num_layers", 10**6, r"text_encoder \(T5EncoderModel\) has num_layers=1000000"),
        ("image_encoder", "num_hidden_layers", 10**6, "num_hidden_layers=1000000, more than 1000"),
    ],
)
def test_hostile_configurations_are_refused_before_anything_is_built(saved, part, key, value, message):
    path = saved / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    for low_memory in (False, True):
        with pytest.raises(ValueError, match=message):
            PaellaPipeline.from_pretrained(saved, low_memory=low_memory)


@pytest.mark.parametrize("contents", [b"", b"null", b"5", b"{", b"[" * 10**5, b"\xff\xfe{}"])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_damaged_configurations_are_refused_by_name(saved, file, contents):
    (saved / file).write_bytes(contents)
    with pytest.raises(ValueError, match=f"{Path(file).name} (is damaged|must hold a JSON object)"):
        PaellaPipeline.from_pretrained(saved)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["os", "system"], "which is no class that can be loaded"),
        (["pathlib", "Path"], "which is no class that can be loaded"),
        ([5, 5], "which should be a library and a class"),
    ],
)
def test_hostile_entries_are_refused_for_given_components_too(saved, entry, message):
    path = saved / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vqgan": entry}))
    for given in ({}, {"vqgan": tiny_pipeline().vqgan}):
        with pytest.raises(ValueError, match=message):
            PaellaPipeline.from_pretrained(saved, **given)


# ------------------------------------------------------------------------------------------------------------ low memory


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_low_memory_releases_weights_however_a_call_ends(saved, stop):
    pipe = PaellaPipeline.from_pretrained(saved, low_memory=True)
    pipe.set_progress_bar_config(disable=True)

    def callback(*args):
        assert not any(parameter.is_meta for parameter in pipe.unet.parameters())
        raise stop

    with pytest.raises(stop):
        pipe("a", callback_on_step_end=callback, **CALL)
    assert all(parameter.is_meta for model in models(pipe).values() for parameter in model.parameters())
    assert pipe("a", **CALL).images.shape == (1, 8, 8)


def test_low_memory_is_not_offloaded_twice(saved, monkeypatch):
    pipe = PaellaPipeline.from_pretrained(saved, low_memory=True)
    with pytest.raises(ValueError, match="With `low_memory` models are offloaded already"):
        pipe.enable_model_cpu_offload(device="meta")
    assert pipe("a", **CALL).images.shape == (1, 8, 8)
