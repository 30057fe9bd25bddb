"""Configurations with other values than any real model has, and files that are damaged or made to do harm."""

import atexit
import copy
import functools
import inspect
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import load_golden, tiny_components, tiny_pipeline
from diffusers.utils import logging
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes

from paella_diffusers import PaellaPipeline, PaellaPrior, PaellaUNet, VQModel

from .calls import GUIDERS, OWN, SCHEDULERS, normal, seeded, tokens
from .outcomes import Outcome, attempt, expect

FILE_ERRORS = (ValueError, OSError)
ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_encoder", "feature_extractor")


@functools.cache
def good() -> Path:
    """A folder with a pipeline, other schedulers, an adapter, the published layout and a shard."""
    folder = Path(tempfile.mkdtemp(prefix="paella-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "pipeline")
    for name, make in (SCHEDULERS | GUIDERS).items():
        if name in OWN:
            make().save_pretrained(folder / name)
    pipe.unet.save_pretrained(folder / "shards", max_shard_size="40KB")
    _save_adapter(folder / "adapter")
    golden = load_golden("a")
    shutil.copytree(golden.folder, folder / "published")
    for ours, name in (("paella", "paella_v3"), ("vqgan", "vqgan_f4"), ("prior", "prior_v1")):
        shutil.move(folder / "published" / f"{ours}.pt", folder / "published" / f"{name}.pt")
    (folder / "shard").mkdir()
    _write_shard(folder / "shard" / "0.tar")
    return folder


def _save_adapter(folder: Path):
    import peft

    pipe = tiny_pipeline()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "made")
    weights = peft.get_peft_model_state_dict(pipe.unet, adapter_name="made")
    pipe.save_lora_weights(folder, weights, unet_lora_adapter_metadata=pipe.unet.peft_config["made"].to_dict())


def _write_shard(path: Path, samples: int = 12):
    with tarfile.open(path, "w") as shard:
        for index in range(samples):
            buffer = io.BytesIO()
            from .calls import picture

            picture(index, 16, 16).save(buffer, "PNG")
            for suffix, data in ((".png", buffer.getvalue()), (".txt", b"a caption")):
                entry = tarfile.TarInfo(f"{index:03d}{suffix}")
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))


@functools.cache
def _encoders() -> dict[str, Any]:
    components = tiny_components()
    return {name: components[name] for name in ENCODERS}


# ------------------------------------------------------------------------------------------- how each file is loaded


def _load_pipeline(folder: Path, **kwargs):
    logging.disable_progress_bar()
    return PaellaPipeline.from_pretrained(folder, **_encoders() | kwargs)


def _load_published(folder: Path):
    config = load_golden("a").config
    given = dict.fromkeys(ENCODERS)
    return PaellaPipeline.from_pretrained(folder, original_config=config, **given)


def _run_pipeline(pipe):
    """Two steps of whatever was loaded: the images are in range."""
    call = {"num_inference_steps": 2, "use_prior": False, "generator": seeded(0), "output_type": "pt"}
    width = pipe.unet.config.text_embed_dim
    call |= {"prompt_embeds": normal(0, 1, 2, width), "negative_prompt_embeds": normal(1, 1, 2, width)}
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**call, height=pipe.unet.sample_multiple * 4, width=pipe.unet.sample_multiple * 4).images
    expect(images.isfinite().all() and images.min() >= 0 and images.max() <= 1, "images out of range")


@torch.no_grad()
def _run_unet(unet):
    logits = unet(tokens(0, 1, 8, 8), 0.5, normal(0, 1, 2, 16), clip_text_embeds=normal(0, 1, 12)).sample
    expect(logits.shape == (1, 32, 8, 8) and logits.isfinite().all(), "logits of another shape, or not finite")


@torch.no_grad()
def _run_vqgan(vqgan):
    images = vqgan.decode_indices(tokens(0, 1, 4, 4)).sample
    expect(images.shape[:2] == (1, 3) and images.isfinite().all(), "images of another shape, or not finite")
    indices = vqgan.encode(images).indices
    expect(indices.min() >= 0 and indices.max() < vqgan.config.num_vq_embeddings, "tokens out of range")


@torch.no_grad()
def _run_prior(prior):
    expect(prior(normal(0, 1, 12), 0.5, normal(1, 1, 12)).sample.isfinite().all(), "embeddings that are not finite")


def _run_scheduler(scheduler):
    sample, options = tokens(0, 1, 4, 4), {"noise": tokens(1, 1, 4, 4), "codebook": normal(0, 32, 4)}
    known = inspect.signature(scheduler.step).parameters
    options = {name: value for name, value in options.items() if name in known}
    output = scheduler.step(normal(0, 1, 32, 4, 4), scheduler.timesteps[0], sample, **options)
    expect(output.prev_sample.shape == sample.shape, "tokens of another shape")
    scheduler.add_noise(sample, None, 0.5)


def _run_guider(guider):
    pipe = copy.copy(_tiny_pipeline())
    pipe.guider = guider
    _run_pipeline(pipe)


CONFIGURATIONS = {  # file: how its folder is loaded, and used
    "pipeline/vqgan/config.json": (VQModel.from_pretrained, _run_vqgan),
    "pipeline/unet/config.json": (PaellaUNet.from_pretrained, _run_unet),
    "pipeline/prior/config.json": (PaellaPrior.from_pretrained, _run_prior),
    "pipeline/model_index.json": (_load_pipeline, _run_pipeline),
}
CONFIGURATIONS |= {
    f"{name}/scheduler_config.json": (OWN[name].from_pretrained, _run_scheduler) for name in SCHEDULERS if name in OWN
}
CONFIGURATIONS |= {f"{name}/guider_config.json": (OWN[name].from_pretrained, _run_guider) for name in GUIDERS if name in OWN}


@contextmanager
def _copy_of(folder: str):
    """A copy of a good folder, beside a module that must not be imported: it would run a command."""
    with tempfile.TemporaryDirectory(prefix="paella-fuzz-") as name:
        place = Path(name) / "copy"
        shutil.copytree(good() / folder, place)
        (Path(name) / "paella_payload.py").write_text("import os\nos.system('true')\nclass Evil: pass\n")
        sys.path.insert(0, name)
        try:
            yield place
        finally:
            sys.path.remove(name)
            sys.modules.pop("paella_payload", None)


# ----------------------------------------------------------------------------------------------------- configurations

JUNK = [None, True, False, -1, 0, 1, 2, 3, 7, 10**5, 10**9, 10**30, 10**400, 0.5, -0.5, 1e-40, 1e300, float("nan")]
JUNK += [float("inf"), "", "x", "a" * 2000, "../../etc", "nan", [], {}, [1], [[1]], [0] * 2000, [None], ["C"], {"a": 1}]
ENTRIES = [
    ["paella_payload", "Evil"],
    ["os", "system"],
    ["diffusers", "nothing"],
    ["diffusers", "logging"],
    ["torch", "load"],
]
ENTRIES += [["paella_diffusers", "PaellaUNet"], ["diffusers", ["UNet2DModel"]], [5, 5], ["transformers", "T5EncoderModel"]]
ENTRIES += [["", ""], ["..", "Evil"], ["diffusers.utils", "logging"], ["pathlib", "Path"], [None, None]]
NAMES = ["../../../etc", "unet", "new", "_class_name", "", "/etc", "a" * 300]


@dataclass
class Configuration:
    """A configuration file with other contents: one entry, or bytes in place of all."""

    file: str
    name: str = ""
    value: Any = None
    removed: bool = False
    contents: bytes | None = None
    low_memory: bool = False


@st.composite
def configurations(draw) -> Configuration:
    file = draw(st.sampled_from(sorted(CONFIGURATIONS)))
    low_memory = file.endswith("model_index.json") and draw(st.booleans())
    original = (good() / file).read_bytes()
    if draw(st.integers(0, 5)) == 0:
        whole = [b"", b"null", b"[]", b"5", b"{", b"\xff\xfe{}", b"[" * 100_000, original[:-20], original + b"}", b"\0" * 50]
        whole += [b'{"a": ' * 5000 + b"1" + b"}" * 5000, "{'ä': 1}".encode("latin-1")]
        return Configuration(file, contents=draw(st.sampled_from(whole)), low_memory=low_memory)
    name = draw(st.sampled_from(sorted(json.loads(original))) | st.sampled_from(NAMES))
    if draw(st.integers(0, 9)) == 0:
        return Configuration(file, name, removed=True, low_memory=low_memory)
    junk = JUNK + ENTRIES if file.endswith("model_index.json") else JUNK
    return Configuration(file, name, draw(st.sampled_from(junk)), low_memory=low_memory)


def attempt_configuration(case: Configuration) -> tuple[Outcome, str]:
    folder, _, inner = case.file.rpartition("/")
    load, run = CONFIGURATIONS[case.file]
    with _copy_of(folder) as place:
        if case.contents is not None:
            (place / inner).write_bytes(case.contents)
        else:
            contents = json.loads((place / inner).read_text())
            contents.pop(case.name, None) if case.removed else contents.update({case.name: case.value})
            (place / inner).write_text(json.dumps(contents))
        options = {"low_memory": True} if case.low_memory else {}
        bad = ""
        if case.value in ENTRIES[:1]:
            bad = f"{case.file}: {case.name}={case.value}" if case.name in ("unet", "vqgan", "prior", "scheduler") else ""
        found = attempt(
            lambda: load(place, **options),
            judge=lambda result: _run(run, result),
            must_be_refused=bad,
            may_be_refused=True,
            errors=FILE_ERRORS,
            named=(place.name + "/", inner),
        )
    what = f"{case.file}{' low_memory' * case.low_memory}: {case.name}={case.value!r:.40}"
    return found[0], found[1] and f"{what if case.contents is None else f'{case.file}: {case.contents[:10]!r}'}: {found[1]}"


def _run(run: Callable, loaded):
    try:
        run(loaded)
    except FILE_ERRORS as error:
        expect(False, f"loaded, but of no use: {error!s:.100}")


# ---------------------------------------------------------------------------------------------------------------- damage


class Payload:
    """Pickled, it runs a command when it is loaded without care."""

    def __reduce__(self):
        return os.system, ("true",)


@dataclass
class Damage:
    """A file of which some bytes are others."""

    file: str
    kind: str
    place: float  # in [0, 1): where in the file
    seed: int

    def __call__(self, data: bytes) -> bytes:
        at, random = int(self.place * len(data)), seeded(self.seed)
        number = lambda limit: int(torch.randint(limit, (), generator=random))
        changed = bytearray(data)
        if self.kind == "flip a bit" and data:
            changed[at] ^= 1 << number(8)
        elif self.kind == "cut off":
            del changed[at:]
        elif self.kind == "zeros":
            changed[at : at + 1 + number(600)] = bytes(len(changed[at : at + 1 + number(600)]))
        elif self.kind == "insert":
            changed[at:at] = bytes(number(256) for _ in range(1 + number(20)))
        elif self.kind == "remove":
            del changed[at : at + 1 + number(600)]
        elif self.kind == "append":
            changed += bytes(number(256) for _ in range(100))
        elif self.kind == "noise":
            changed[at : at + 50] = bytes(number(256) for _ in range(50))
        return bytes(changed)


KINDS = ["flip a bit", "flip a bit", "flip a bit", "cut off", "zeros", "insert", "remove", "append", "noise"]
HEADERS = st.floats(0, 0.02) | st.floats(0, 0.999)


@st.composite
def damages(draw, files) -> Damage:
    return Damage(draw(st.sampled_from(files)), draw(st.sampled_from(KINDS)), draw(HEADERS), draw(st.integers(0, 2**32 - 1)))


WEIGHTS = {
    "pipeline/unet/diffusion_pytorch_model.safetensors": lambda folder: PaellaUNet.from_pretrained(folder),
    "pipeline/vqgan/diffusion_pytorch_model.safetensors": lambda folder: VQModel.from_pretrained(folder),
    "shards/diffusion_pytorch_model.safetensors.index.json": lambda folder: PaellaUNet.from_pretrained(folder),
    "published/paella_v3.pt": lambda folder: PaellaUNet.from_single_file(
        folder / "paella_v3.pt", load_golden("a").config["paella"]
    ),
    "published/prior_v1.pt": lambda folder: PaellaPrior.from_single_file(
        folder / "prior_v1.pt", load_golden("a").config["prior"]
    ),
}


def attempt_weights(case: Damage) -> tuple[Outcome, str]:
    folder, _, inner = case.file.rpartition("/")
    with _copy_of(folder) as place:
        (place / inner).write_bytes(case((place / inner).read_bytes()))
        found = attempt(
            lambda: WEIGHTS[case.file](place),
            judge=lambda model: _judge_weights(case.file, model),
            may_be_refused=True,
            errors=FILE_ERRORS,
            named=(inner,),
        )
    return found[0], found[1] and f"{case.file}: {found[1]}"


def _judge_weights(file: str, model):
    """Values may be damaged, which no checksum tells; everything else is as it was."""
    reference = _reference(file)
    weights = model.state_dict()
    expect(
        {name: (t.shape, t.dtype) for name, t in weights.items()} == reference, "weights of other names, shapes or dtypes"
    )
    expect(not any(t.is_meta or t.layout != torch.strided for t in weights.values()), "weights without values")


@functools.cache
def _reference(file: str):
    weights = WEIGHTS[file](good() / file.rpartition("/")[0]).state_dict()
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}


# -------------------------------------------------------------------------------------------------------- hostile files


def _torch_bytes(content, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def _zip(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"archive/{name.replace('_', '.')}", data)
    return buffer.getvalue()


@functools.cache
def hostile_checkpoints() -> dict[str, bytes]:
    """By what is wrong with them."""
    state = torch.load(good() / "published/paella_v3.pt", weights_only=True)
    first = next(iter(state))
    replaced = lambda value: _torch_bytes(state | {first: value})
    header = lambda text: len(text).to_bytes(8, "little") + text
    return {
        "a payload": pickle.dumps(Payload()),
        "a payload in a zip": _torch_bytes({"x": Payload()}),
        "a payload beside weights": _torch_bytes(state | {"x": Payload()}),
        "a payload, legacy format": _torch_bytes({"x": Payload()}, _use_new_zipfile_serialization=False),
        "a payload as data.pkl": _zip(data_pkl=pickle.dumps(Payload()), version=b"3"),
        "a list": _torch_bytes([1, 2]),
        "a tensor": _torch_bytes(torch.ones(3)),
        "nothing": b"",
        "an empty dictionary": _torch_bytes({}),
        "numbers as keys": _torch_bytes({1: torch.ones(3)}),
        "numbers as values": _torch_bytes({"a": 5}),
        "a meta tensor": replaced(torch.empty(state[first].shape, device="meta")),
        "a sparse tensor": replaced(state[first].to_sparse()),
        "integers": replaced(state[first].long()),
        "complex numbers": replaced(state[first].to(torch.complex64)),
        "another shape": replaced(torch.ones(1)),
        "a tensor missing": _torch_bytes({name: value for name, value in state.items() if name != first}),
        "a tensor more": _torch_bytes(state | {"more": torch.ones(1)}),
        "GGUF": b"GGUF" + bytes(100),
        "an empty zip": _zip(),
        "a zip of something else": _zip(a=b"b"),
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a safetensors header of 2**62 bytes": (2**62).to_bytes(8, "little") + b"{}",
        "safetensors offsets out of the file": header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'),
        "a huge safetensors shape": header(b'{"a":{"dtype":"F32","shape":[99999999999999],"data_offsets":[0,0]}}'),
        "a negative safetensors shape": header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + bytes(4),
        "a safetensors header that is no JSON": header(b"{{{"),
    }


@dataclass
class Hostile:
    """A file made to do harm, or that is something else, under the name of one that is loaded."""

    file: str
    what: str


HOSTILE_FILES = {
    **WEIGHTS,
    "pipeline/low_memory": lambda folder: _load_pipeline(folder, low_memory=True),
    "adapter/pytorch_lora_weights.bin": lambda folder: _tiny_pipeline().load_lora_weights(folder),
    "adapter/pytorch_lora_weights.safetensors": lambda folder: _tiny_pipeline().load_lora_weights(folder),
}
INDICES = [
    "../secret.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..",
    "",
    "\\\\host\\x",
    "missing.safetensors",
    5,
    None,
]


@st.composite
def hostile_files(draw) -> Hostile:
    file = draw(st.sampled_from(sorted(HOSTILE_FILES)))
    if file.endswith("index.json"):
        return Hostile(file, draw(st.sampled_from(INDICES)))
    return Hostile(file, draw(st.sampled_from(sorted(hostile_checkpoints()))))


def attempt_hostile_file(case: Hostile) -> tuple[Outcome, str]:
    folder, _, inner = case.file.rpartition("/")
    with _copy_of(folder) as place:
        if inner == "low_memory":
            inner = "unet/diffusion_pytorch_model.safetensors"
        if inner.endswith("index.json"):
            index = json.loads((place / inner).read_text())
            index["weight_map"][next(iter(index["weight_map"]))] = case.what
            contents = json.dumps(index).encode()
        else:
            contents = hostile_checkpoints()[case.what]
        if inner.endswith(".bin"):
            (place / "pytorch_lora_weights.safetensors").unlink()
        (place / inner).write_bytes(contents)
        return attempt(
            lambda: HOSTILE_FILES[case.file](place),
            must_be_refused=f"{case.file}: {case.what}",
            errors=FILE_ERRORS,
            named=(Path(inner).name, "git-lfs"),
        )


# ------------------------------------------------------------------------------------------------------------- adapters


@dataclass
class Adapter:
    """An adapter's file: damaged, or with other metadata or other keys."""

    damage: Damage | None = None
    metadata: dict[str, Any] | str | None = None
    keys: str = ""


METADATA = {
    "r": [10**9, 0, -1, "x", 1.5, None, True],
    "lora_alpha": [float("nan"), float("inf"), 1e300, "x", [], None, 0, -1],
    "target_modules": ["(a+)+$", ["to_q"], 5, ".*", ["nothing"], "(" * 50],
    "rank_pattern": [{"to_q": 10**9}, {"(a+)+$": 2}, 5, "x", {"to_q": "x"}, {"to_q": None}],
    "alpha_pattern": [{"to_q": float("nan")}, {"(a+)+$": 2}, [], {"to_q": "x"}],
    "peft_type": ["ADALORA", "x", 5, None],
    "lora_dropout": [2, -1, float("nan"), "x"],
    "use_dora": [True, "x"],
    "auto_mapping": [{"base_model_class": "os.system"}],
    "exclude_modules": ["(a+)+$", 5],
    "modules_to_save": [["head"], 5],
    "layers_to_transform": [5, [0]],
    "bias": ["all", 5],
}
KEYS = ["no prefix", "no .weight", "half of a pair", "another layer", "not lora", "nan", "integers", "other rank"]


@st.composite
def adapters(draw) -> Adapter:
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return Adapter(damage=draw(damages(["adapter/pytorch_lora_weights.safetensors"])))
    if kind == 1:
        name = draw(st.sampled_from(sorted(METADATA)))
        return Adapter(
            metadata=draw(st.sampled_from([{f"unet.{name}": value} for value in METADATA[name]] + ["{", "[]", "5"]))
        )
    return Adapter(keys=draw(st.sampled_from(KEYS)))


@functools.cache
def _tiny_pipeline():
    return tiny_pipeline(prior=None, prior_scheduler=None)


@torch.no_grad()
def _logits():
    return _tiny_pipeline().unet(tokens(0, 1, 4, 4), 0.5, normal(0, 1, 3, 16)).sample


@functools.cache
def _plain_logits():
    return _logits()


def attempt_adapter(case: Adapter) -> tuple[Outcome, str]:
    pipe, _ = _tiny_pipeline(), _plain_logits()
    with _copy_of("adapter") as place:
        path = place / "pytorch_lora_weights.safetensors"
        path.write_bytes(case.damage(path.read_bytes()) if case.damage else _other_adapter(path, case))
        found = attempt(
            lambda: pipe.load_lora_weights(place, adapter_name="fuzzed"),
            judge=lambda _: expect(_logits().isfinite().all(), "logits that are not finite"),
            must_be_refused=case.keys and f"keys: {case.keys}",
            may_be_refused=True,
            errors=FILE_ERRORS,
            named=(path.name,),
            afterwards=_remove_adapter,
        )
    return found[0], found[1] and f"{case.metadata or case.keys or 'damaged'}: {found[1]}"


def _remove_adapter():
    pipe = _tiny_pipeline()
    pipe.unload_lora_weights()
    expect(torch.equal(_logits(), _plain_logits()), "the U-Net is another after the adapter was removed")


def _other_adapter(path: Path, case: Adapter) -> bytes:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    if isinstance(case.metadata, dict):
        metadata |= case.metadata
    first = sorted(weights)[0]
    if case.keys == "no prefix":
        weights = {key.removeprefix("unet."): tensor for key, tensor in weights.items()}
    elif case.keys == "no .weight":
        weights = {key.removesuffix(".weight"): tensor for key, tensor in weights.items()}
    elif case.keys == "half of a pair":
        del weights[first]
    elif case.keys == "another layer":
        weights[f"unet.nothing.{first.rpartition('.lora')[1]}.lora_A.weight"] = torch.ones(2, 16)
    elif case.keys == "not lora":
        weights["unet.head.weight"] = torch.ones(1)
    elif case.keys == "nan":
        weights[first] = weights[first] * float("nan")
    elif case.keys == "integers":
        weights[first] = weights[first].long()
    elif case.keys == "other rank":
        weights[first] = torch.cat([weights[first]] * 2)
    text = case.metadata if isinstance(case.metadata, str) else json.dumps(metadata)
    return safetensors_bytes(weights, {"format": "pt", "lora_adapter_metadata": text})


# ---------------------------------------------------------------------------------------------------------------- shards


def attempt_shard(case: Damage) -> tuple[Outcome, str]:
    """Whatever is damaged is counted: a shard gives all of its twelve samples, or says how many it could not."""
    from paella_diffusers.training.data import SampleTransform, ShardStream

    def read(path) -> tuple[int, int]:
        stream = ShardStream([str(path)], SampleTransform(16), epochs=1)
        samples = list(stream)
        unreadable = sum(sample["unreadable"] for sample in samples) + stream.skipped["unreadable"]
        expect(all(sample["pixels"].shape == (3, 16, 16) for sample in samples), "pictures of another shape")
        return len(samples), unreadable

    def judge(counts):
        samples, unreadable = counts
        expect(samples <= 12 and (samples == 12 or unreadable), f"{12 - samples} samples are gone, and not counted")

    with _copy_of("shard") as place:
        (place / "0.tar").write_bytes(case((place / "0.tar").read_bytes()))
        found = attempt(
            lambda: read(place / "0.tar"), judge=judge, may_be_refused=True, errors=FILE_ERRORS, named=("0.tar",)
        )
    return found[0], found[1] and f"{case.kind}: {found[1].lstrip('0123456789 ')}"
