"""Pushing to the Hub and loading from it, in another process, over a local server."""

import json
import os
import runpy
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from conftest import tiny_pipeline
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from PIL import Image

from paella_diffusers import PaellaImg2ImgPipeline, PaellaPipeline, PaellaScheduler, PaellaUNet
from paella_diffusers.about import pip_install, requirement
from paella_diffusers.training import corrupt, paella_loss

CALL = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}


def tokens(pipe, **kwargs):
    return pipe("a", generator=torch.Generator().manual_seed(0), **CALL | kwargs).images


@pytest.fixture
def pipe():
    pipe = tiny_pipeline(prior=None, prior_scheduler=None)
    pipe.scheduler = PaellaScheduler(num_vq_embeddings=32, temperature=(1.0, 0.5))
    return pipe


def train(unet, steps: int = 2):
    """A finetune of two steps."""
    optimizer = torch.optim.SGD((p for p in unet.parameters() if p.requires_grad), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        clean = torch.randint(32, (2, 8, 8), generator=generator)
        timestep = torch.rand(2, generator=generator)
        noised, mask = corrupt(clean, timestep, 32, generator)
        logits = unet(noised, timestep, torch.randn(2, 3, 16, generator=generator)).sample
        paella_loss(logits, clean, mask, timestep).backward()
        optimizer.step()
        optimizer.zero_grad()


def in_another_process(code: str, **environment) -> list:
    """What the code prints last, as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_finetunes_load_in_another_process(hub, pipe, tmp_path):
    train(pipe.unet)
    expected = tokens(pipe).flatten().tolist()
    url = pipe.push_to_hub("me/whole", commit_message="The finetune", private=True)
    assert "/me/whole" in url and hub.created[0]["visibility"] == "private"
    assert hub.commits[0]["summary"] == "The finetune"
    pipe.push_to_hub("me/sharded", max_shard_size="50KB")
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in hub.files("me/sharded")
    pipe.unet.push_to_hub("me/unet")
    pipe.unet.push_to_hub("me/unet", subfolder="inner", variant="bf16")
    assert "inner/diffusion_pytorch_model.bf16.safetensors" in hub.files("me/unet")
    pipe.scheduler.push_to_hub("me/scheduler")
    tiny_pipeline(prior=None, prior_scheduler=None).push_to_hub("me/request")
    pipe.push_to_hub("me/request", create_pr=True)
    assert hub.commits[-1]["revision"] == "refs/pr/1"
    other = tiny_pipeline(prior=None, prior_scheduler=None)
    other.unet = pipe.unet
    other.push_to_hub("me/parts", variant="bf16")

    loaded = in_another_process(f"""
import json, torch
from paella_diffusers import PaellaPipeline, PaellaScheduler, PaellaUNet, VQModel
from diffusers import DiffusionPipeline
def tokens(pipe):
    return pipe("a", generator=torch.Generator().manual_seed(0), **{CALL}).images.flatten().tolist()
base = PaellaPipeline.from_pretrained("me/whole", use_safetensors=True)
results = [tokens(pipe) for pipe in (
    base,
    DiffusionPipeline.from_pretrained("me/whole"),
    PaellaPipeline.from_pretrained("me/sharded"),
    PaellaPipeline.from_pretrained("me/request", revision="refs/pr/1"),
    PaellaPipeline.from_pretrained("me/parts", variant="bf16", scheduler=PaellaScheduler.from_pretrained("me/scheduler")),
    PaellaPipeline.from_pretrained("me/request", unet=PaellaUNet.from_pretrained("me/unet"), scheduler=base.scheduler),
    PaellaPipeline.from_pretrained("me/request", scheduler=base.scheduler,
                                   unet=PaellaUNet.from_pretrained("me/unet", subfolder="inner", variant="bf16")),
)]
results.append(tokens(PaellaPipeline.from_pretrained("me/request")))
print(json.dumps(results))
""")
    assert all(result == expected for result in loaded[:-1])
    assert loaded[-1] != expected  # the request is not merged


def test_adapters_load_in_another_process(hub, pipe):
    pipe.push_to_hub("me/base")
    pipe.unet.requires_grad_(False)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "style")
    torch.nn.init.normal_(next(p for n, p in pipe.unet.named_parameters() if "lora_B" in n), std=2.0)
    train(pipe.unet)
    url = pipe.push_lora_to_hub("me/adapter", base_model="me/base", license="mit", training={"rank": 2, "steps": 2})
    assert "/me/adapter" in url
    assert hub.files("me/adapter") == ["README.md", "pytorch_lora_weights.safetensors"]
    card = ModelCard.load(hub.repo("me/adapter") / "README.md")
    assert card.data.base_model == "me/base" and "lora" in card.data.tags and "| rank | 2 |" in card.content
    loaded = in_another_process(f"""
import json, torch
from paella_diffusers import PaellaPipeline
pipe = PaellaPipeline.from_pretrained("me/base")
pipe.load_lora_weights("me/adapter")
print(json.dumps(pipe("a", generator=torch.Generator().manual_seed(0), **{CALL}).images.flatten().tolist()))
""")
    assert loaded == tokens(pipe).flatten().tolist()
    pipe.push_lora_to_hub("me/adapters", subfolder="ink", commit_message="Ink")
    pipe.push_lora_to_hub("me/adapters", create_pr=True)
    for arguments in ({"subfolder": "ink"}, {"revision": "refs/pr/1"}, {"subfolder": "ink", "local_files_only": True}):
        again = PaellaPipeline.from_pretrained("me/base")
        again.load_lora_weights("me/adapters", **arguments)
        assert torch.equal(tokens(again), tokens(pipe))
    with pytest.raises(ValueError, match=r"`adapter_name` must be one of the attached adapters, \['style'\], got 'other'"):
        pipe.push_lora_to_hub("me/adapter", "other")


def test_custom_pipeline_for_who_never_imported_the_package(hub, pipe):
    pipe.push_to_hub("me/whole")
    assert {"pipeline.py", "unet/paella_diffusers.py", "scheduler/paella_diffusers.py"} <= set(hub.files("me/whole"))
    loaded = in_another_process(f"""
import json, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("me/whole", custom_pipeline="me/whole", trust_remote_code=True)
print(json.dumps(pipe("a", generator=torch.Generator().manual_seed(0), **{CALL}).images.flatten().tolist()))
""")
    assert loaded == tokens(pipe).flatten().tolist()
    # and without the package, the stub says what to install
    code = (hub.repo("me/whole") / "pipeline.py").read_text()
    code = "import sys; sys.modules['paella_diffusers'] = None\n" + code
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"me/whole needs paella-diffusers: {pip_install()}" in result.stderr


# -------------------------------------------------------------------------------------------------------------- the card


def test_card_has_everything_and_is_kept_once_edited(hub, pipe):
    samples = [{"image": Image.new("RGB", (8, 8)), "prompt": "red heart", "seed": 7}]
    details = {"base_model": "dome272/Paella", "license": "mit", "training": {"learning rate": "1e-4"}, "samples": samples}
    pipe.push_to_hub("me/whole", tags=["emoji"], **details)
    card = ModelCard.load("me/whole")
    assert card.data.base_model == "dome272/Paella" and card.data.license == "mit"
    assert {"paella", "text-to-image", "emoji"} <= set(card.data.tags) and card.data.library_name == "diffusers"
    assert 'PaellaPipeline.from_pretrained("me/whole")' in card.content and "| learning rate | 1e-4 |" in card.content
    assert "![red heart](samples/0.png) “red heart”, seed 7" in card.content
    assert "samples/0.png" in hub.files("me/whole")

    pipe.push_to_hub("me/whole", training={"learning rate": "2e-4"})  # not edited: made anew
    readme = hub.repo("me/whole") / "README.md"
    assert "2e-4" in readme.read_text()
    readme.write_text(readme.read_text().replace("# whole", "# My own words"))
    pipe.push_to_hub("me/whole")
    assert "# My own words" in readme.read_text() and "2e-4" in readme.read_text()


def test_an_edited_card_that_cannot_be_read_is_not_written_over(hub, pipe, monkeypatch):
    pipe.scheduler.push_to_hub("me/whole")
    readme = hub.repo("me/whole") / "README.md"
    readme.write_text("My own words")

    def out_of_reach(*args):
        raise LocalEntryNotFoundError("The Hub is out of reach.")

    monkeypatch.setattr("paella_diffusers.loaders.hub.download", out_of_reach)
    with pytest.raises(LocalEntryNotFoundError):
        pipe.scheduler.push_to_hub("me/whole")
    assert readme.read_text() == "My own words"


def test_base_model_is_where_it_was_loaded_from(hub, pipe):
    pipe.push_to_hub("me/base")
    finetune = PaellaPipeline.from_pretrained("me/base")
    finetune.push_to_hub("me/finetune")
    assert ModelCard.load("me/finetune").data.base_model == "me/base"
    PaellaImg2ImgPipeline.from_pipe(finetune).push_to_hub("me/edit")
    assert ModelCard.load("me/edit").data.base_model == "me/base"


def test_a_second_push_keeps_what_was_said(hub, pipe):
    pipe.push_to_hub("me/whole", base_model="dome272/Paella", license="mit")
    PaellaPipeline.from_pretrained("me/whole").push_to_hub("me/whole", training={"steps": 7})
    data = ModelCard.load("me/whole")
    assert data.data.base_model == "dome272/Paella" and data.data.license == "mit" and "| steps | 7 |" in data.content
    PaellaPipeline.from_pretrained("me/whole").push_to_hub("me/whole", license="apache-2.0")
    assert ModelCard.load("me/whole").data.license == "apache-2.0"


def test_saving_can_push(hub, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe", push_to_hub=True, repo_id="me/whole")
    pipe.unet.save_pretrained(tmp_path / "unet", push_to_hub=True, repo_id="me/unet", commit_message="Mine")
    assert "model_index.json" in hub.files("me/whole") and "config.json" in hub.files("me/unet")
    assert hub.commits[-1]["summary"] == "Mine"
    pipe.unet.save_pretrained(tmp_path / "unet", safe_serialization=False, push_to_hub=True, repo_id="me/pickled")
    assert "diffusion_pytorch_model.bin" in hub.files("me/pickled")


def test_bad_details_are_refused_before_anything_is_made(hub, pipe):
    with pytest.raises(TypeError, match="licence"):
        pipe.push_to_hub("me/whole", licence="mit")
    with pytest.raises(ValueError, match="`samples` must be dictionaries"):
        pipe.push_to_hub("me/whole", samples=[{"prompt": "a"}])
    assert not hub.created


def test_a_space_shows_what_was_pushed(hub, pipe, monkeypatch):
    pipe.push_to_hub("me/whole", space=True)
    folder = hub.repo("me/whole") / "space"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "app.py", "requirements.txt"]
    assert ModelCard.load(folder / "README.md").data.to_dict() == {
        "title": "whole",
        "sdk": "gradio",
        "sdk_version": "6.31.0",
        "app_file": "app.py",
        "models": ["me/whole"],
    }
    assert (folder / "requirements.txt").read_text().strip() == requirement("web")
    pages = []
    monkeypatch.setattr("paella_diffusers.apps.web.launch", pages.append)
    exec((folder / "app.py").read_text(), {})
    assert pages[0].title == "Paella" and "me/whole" in str(pages[0].config)
    for wrong in (
        lambda: pipe.unet.push_to_hub("me/unet", space=True),
        lambda: pipe.push_to_hub("me/a", subfolder="b", space=True),
    ):
        with pytest.raises(ValueError, match="`space=True` is for a pipeline"):
            wrong()


# ------------------------------------------------------------------------------------------------------------- faults


def test_cut_upload_commits_nothing_and_can_be_repeated(hub, pipe):
    hub.fail("PUT /lfs/", cut=100, times=99)
    with pytest.raises(OSError, match="connection to the Hub broke while me/whole was uploaded.*Call again"):
        pipe.push_to_hub("me/whole")
    assert not hub.commits and hub.files("me/whole") == []
    hub.faults.clear()
    pipe.push_to_hub("me/whole")
    assert torch.equal(tokens(PaellaPipeline.from_pretrained("me/whole")), tokens(pipe))


def test_cut_download_is_never_loaded(hub, pipe, tmp_path):
    pipe.push_to_hub("me/whole")
    hub.fail("GET /me/whole/resolve/.*unet.*safetensors", cut=200, times=99)
    with pytest.raises(OSError, match="connection to the Hub broke while me/whole was loaded.*Call again"):
        PaellaPipeline.from_pretrained("me/whole", cache_dir=tmp_path)
    with pytest.raises((OSError, ValueError)):
        PaellaPipeline.from_pretrained("me/whole", cache_dir=tmp_path, local_files_only=True)
    hub.faults.clear()
    assert torch.equal(tokens(PaellaPipeline.from_pretrained("me/whole", cache_dir=tmp_path)), tokens(pipe))


@pytest.mark.parametrize("status", [429, 503])
def test_busy_servers_are_asked_again(hub, pipe, tmp_path, status):
    pipe.push_to_hub("me/whole")
    hub.fail("HEAD /me/whole/resolve/.*unet", status=status, headers={"Retry-After": "0"})
    assert torch.equal(tokens(PaellaPipeline.from_pretrained("me/whole", cache_dir=tmp_path)), tokens(pipe))


@pytest.mark.parametrize("status", [429, 503])
def test_busy_servers_are_sent_again(hub, pipe, status):
    for request in ("POST .*/info/lfs/objects/batch", "PUT /lfs/"):
        hub.fail(request, status=status, headers={"Retry-After": "0"})
    hub.fail("POST .*/commit/", status=status)  # which the client does not repeat, as it cannot know what was done
    with pytest.raises(HfHubHTTPError, match=str(status)):
        pipe.push_to_hub("me/whole")
    assert not hub.commits
    pipe.push_to_hub("me/whole")
    assert torch.equal(tokens(PaellaPipeline.from_pretrained("me/whole")), tokens(pipe)) and len(hub.commits) == 1


GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model me/whole is restricted"}


@pytest.mark.parametrize(
    ("fault", "call", "message"),
    [
        ({"status": 403, "headers": GATED}, {}, "me/whole is gated: model_index.json needs.*hf auth login"),
        ({"status": 401, "headers": {"X-Error-Code": "RepoNotFound"}}, {}, "no me/whole on the Hub, or it is private"),
        ({}, {"revision": "v9"}, "me/whole has no revision v9"),
        ({}, {"local_files_only": True}, "me/whole has neither model_index.json nor paella_v3.pt in the cache.*online"),
    ],
)
def test_what_cannot_be_read_says_which_file_and_what_to_do(hub, pipe, tmp_path, fault, call, message):
    pipe.push_to_hub("me/whole")
    if fault:
        hub.fail("(GET|HEAD) .*me/whole", times=99, **fault)
    with pytest.raises(OSError, match=message):
        PaellaPipeline.from_pretrained("me/whole", cache_dir=tmp_path, **call)


@pytest.mark.parametrize(
    ("fault", "call", "message"),
    [
        ({"status": 403, "headers": GATED}, {}, "me/whole is gated: {file} needs.*hf auth login"),
        ({"status": 401, "headers": GATED}, {}, "me/whole is gated: {file} needs.*hf auth login"),
        ({"status": 401, "headers": {"X-Error-Code": "RepoNotFound"}}, {}, "no me/whole on the Hub, or it is private"),
        ({}, {"revision": "v9"}, "me/whole has no revision v9"),
        ({}, {"local_files_only": True}, "{file}.* is not in the cache.*online"),
    ],
)
@pytest.mark.parametrize("what", ["model", "scheduler", "adapter", "single file"])
def test_what_parts_cannot_be_read(hub, pipe, tmp_path, what, fault, call, message):
    pipe.push_to_hub("me/whole")
    if fault:
        hub.fail("(GET|HEAD) .*me/whole", times=99, **fault)
    call = {"cache_dir": tmp_path} | call
    load, file = {
        "model": (lambda: PaellaUNet.from_pretrained("me/whole", subfolder="unet", **call), "config.json"),
        "scheduler": (
            lambda: PaellaScheduler.from_pretrained("me/whole", subfolder="scheduler", **call),
            "scheduler_config.json",
        ),
        "adapter": (lambda: pipe.load_lora_weights("me/whole", **call), "pytorch_lora_weights.*"),
        "single file": (lambda: PaellaUNet.from_single_file(f"{hub.endpoint}/me/whole/resolve/main/a.pt", **call), "a.pt"),
    }[what]
    with pytest.raises(OSError, match=message.format(file=file)):
        load()


def test_which_file_is_missing_is_said(published, hub, tmp_path, pipe):
    """Not the one that was asked for first, nor of the repository whose parts come from others."""
    (hub.repo("dome272/Paella") / "vqgan_f4.pt").rename(tmp_path / "vqgan_f4.pt")
    with pytest.raises(FileNotFoundError, match="dome272/Paella has no vqgan_f4.pt"):
        PaellaPipeline.from_pretrained("dome272/Paella", **published)
    shutil.copy(tmp_path / "vqgan_f4.pt", hub.repo("dome272/Paella"))
    hub.fail("(GET|HEAD) .*google/byt5-xl", status=403, headers=GATED, times=99)
    with pytest.raises(OSError, match="google/byt5-xl"):
        PaellaPipeline.from_pretrained("dome272/Paella", **published)
    pipe.push_to_hub("me/whole")
    next((hub.repo("me/whole") / "unet").glob("*.safetensors")).unlink()
    for load in (PaellaUNet, PaellaPipeline):
        kwargs = {"subfolder": "unet"} if load is PaellaUNet else {}
        with pytest.raises(OSError, match="diffusion_pytorch_model"):
            load.from_pretrained("me/whole", cache_dir=tmp_path / load.__name__, **kwargs)


def test_single_files_of_the_hub_that_are_missing_or_cut(hub, golden_a, tmp_path):
    url, call = f"{hub.endpoint}/me/whole/resolve/main/paella_v3.pt", {"cache_dir": tmp_path}
    hub.repo("me/whole").joinpath("README.md").write_text("Nothing else")
    with pytest.raises(FileNotFoundError, match="me/whole has no paella_v3.pt"):
        PaellaUNet.from_single_file(url, golden_a.config["paella"], **call)
    shutil.copy(golden_a.folder / "paella.pt", hub.repo("me/whole") / "paella_v3.pt")
    hub.fail("GET .*paella_v3.pt", cut=1000, times=99)
    with pytest.raises(OSError, match="connection to the Hub broke while me/whole was loaded.*Call again"):
        PaellaUNet.from_single_file(url, golden_a.config["paella"], **call)
    hub.faults.clear()
    PaellaUNet.from_single_file(url, golden_a.config["paella"], **call)


def test_a_cut_download_goes_on_where_it_was_cut(hub, golden_a, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    shutil.copy(golden_a.folder / "paella.pt", hub.repo("me/whole") / "paella_v3.pt")
    load = lambda source, **call: PaellaUNet.from_single_file(source, golden_a.config["paella"], **call)
    hub.fail("GET .*paella_v3.pt", cut=1000)
    unet = load(f"{hub.endpoint}/me/whole/resolve/main/paella_v3.pt", cache_dir=tmp_path)
    assert hub.ranges[-1] == "bytes=1000-"
    assert torch.equal(unet.head.weight, load(golden_a.folder / "paella.pt").head.weight)


def test_what_is_not_there_is_named(hub):
    with pytest.raises(OSError, match="no me/nothing on the Hub"):
        PaellaPipeline.from_pretrained("me/nothing")
    with pytest.raises(OSError, match="/no/where is neither a folder nor a Hub id"):
        PaellaPipeline.from_pretrained("/no/where")


# ------------------------------------------------------------------------------------------------- files that deceive


class Malicious:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (str(self.canary),))


@pytest.mark.parametrize("part", ["unet", "vqgan", "text_encoder"])
def test_malicious_pickles_are_refused_and_nothing_is_executed(hub, pipe, tmp_path, part):
    canary = tmp_path / "canary"
    pipe.save_pretrained(hub.repo("me/whole"))
    folder = hub.repo("me/whole") / part
    weights = next(folder.glob("*.safetensors"))
    weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({"weight": Malicious(canary)}, folder / name)
    with pytest.raises(Exception):  # noqa: B017 - diffusers and transformers differ in what they raise
        PaellaPipeline.from_pretrained("me/whole", cache_dir=tmp_path / "cache")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["paella_v3.pt", "vqgan_f4.pt", "prior_v1.pt"])
def test_malicious_pickles_in_the_published_layout(published, hub, tmp_path, name):
    canary = tmp_path / "canary"
    torch.save({"weight": Malicious(canary)}, hub.repo("dome272/Paella") / name)
    with pytest.raises(ValueError, match=f"{name} is not a state dict.*Nothing in it was executed"):
        PaellaPipeline.from_pretrained("dome272/Paella", **published)
    assert not canary.exists()


def test_what_inference_endpoints_run(hub, pipe):
    pipe.push_to_hub("me/tiny", endpoint=True)
    folder = hub.repo("me/tiny")
    assert (folder / "requirements.txt").read_text() == requirement() + "\n"
    namespace = runpy.run_path(str(folder / "handler.py"))
    handler = namespace["EndpointHandler"](str(folder))
    image = handler({"inputs": "a", "parameters": {"seed": 0, "num_inference_steps": 2, "guidance_scale": 3.0}})
    expected = pipe("a", generator=torch.Generator().manual_seed(0), **CALL | {"output_type": "pil"}).images[0]
    assert image.tobytes() == expected.tobytes()
    assert handler({"inputs": "a"}).size == image.size
    with pytest.raises(ValueError, match="`parameters` takes guidance_scale, .*, got output_type"):
        handler({"inputs": "a", "parameters": {"output_type": "latent"}})
    for refused in (lambda: pipe.unet.push_to_hub("me/unet", endpoint=True),
                    lambda: pipe.push_to_hub("me/other", endpoint=True, subfolder="part")):  # fmt: skip
        with pytest.raises(ValueError, match="`endpoint=True` is for a pipeline"):
            refused()
    assert not hub.folder("me/unet").exists()
