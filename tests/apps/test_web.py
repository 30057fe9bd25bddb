"""The page's functions, and the page itself as `gradio_client` sees it. `make test-web` opens it in a browser."""

import re
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from gradio_client import Client
from PIL import Image, ImageDraw

from paella_diffusers import EMOJI_MODEL, PaellaPipeline
from paella_diffusers.apps import web_tasks
from paella_diffusers.apps.web import OUTSIDE_LINK, Page, launch, make_page
from paella_diffusers.apps.web_calls import GUIDERS, SCHEDULERS, Call, make_preview, watch
from paella_diffusers.cli import main

SETTINGS = {
    "seed": 3,
    "random_seed": False,
    "num_inference_steps": "2",
    "guidance_scale": "",
    "temperature": "",
    "scheduler": "",
    "guider": "",
    "negative_prompt": "",
}


@pytest.fixture(scope="module")
def emoji() -> PaellaPipeline:
    return PaellaPipeline.from_pretrained(EMOJI_MODEL)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(path)
    return str(path)


@pytest.fixture(scope="module")
def served(emoji):
    """A client of a page of the embedded model."""
    page = make_page(emoji)
    _, address, _ = launch(page, quiet=True, prevent_thread_lock=True)
    yield SimpleNamespace(pipe=emoji, address=address, visit=lambda: Client(address, verbose=False))
    page.close(verbose=False)


def painted(picture: str, **strokes: tuple[int, int, int, int]) -> dict:
    """What the editor gives: a picture, and rectangles in the brush's colours over it."""
    layer = Image.new("RGBA", Image.open(picture).size)
    for colour, box in strokes.items():
        ImageDraw.Draw(layer).rectangle(box, web_tasks.COLOURS[colour])
    return {"background": Image.open(picture), "layers": [layer], "composite": None}


def calls(picture: str) -> dict[str, Call]:
    """One of every task, and of every kind of setting."""
    made = {
        "text to image": web_tasks.text_to_image("red heart", "64", "32"),
        "variations": web_tasks.variations("", picture, picture),
        "image to image": web_tasks.image_to_image("red heart", picture, 0.5),
        "inpainting": web_tasks.inpainting("red heart", painted(picture, orange=(8, 8, 30, 30)), 1.0),
        "outpainting": web_tasks.outpainting("red heart", picture, 16, 0, 16, 0),
        "regions": web_tasks.regions("sun", painted(picture, blue=(0, 0, 31, 63)), "", "red heart", "", side=64),
        "editing": web_tasks.editing("sun", "red heart", picture, 0.9, 0.75),
        "interpolation": web_tasks.interpolation("sun", "", None, picture, 2),
    }
    return {name: web_tasks.with_settings(call, dict(SETTINGS)) for name, call in made.items()}


@pytest.mark.parametrize(
    "task",
    ["text to image", "variations", "image to image", "inpainting", "outpainting", "regions", "editing", "interpolation"],
)
def test_the_code_of_each_task_makes_the_same_picture(emoji, picture, tmp_path, monkeypatch, task):
    check_code(calls(picture)[task], emoji, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduler": "PaellaPsiScheduler", "guider": "PaellaRescaledGuidance", "guidance_scale": "1.5, 3"},
        {"scheduler": "DiscreteDDIMScheduler", "negative_prompt": 'it\'s a "quote" \\ and\u2028more', "seed": 2**32 - 1},
    ],
)
def test_the_code_has_the_settings(emoji, tmp_path, monkeypatch, settings):
    call = web_tasks.with_settings(web_tasks.text_to_image('say "hi"', "", ""), SETTINGS | settings)
    check_code(call, emoji, tmp_path, monkeypatch)


def check_code(call: Call, pipe, folder: Path, monkeypatch):
    before = dict(pipe.components)
    images = call.run(pipe)
    assert pipe.components == before
    for name, one in call.pictures().items():
        one.save(folder / name)
    call.save(images, folder / "expected.png")
    monkeypatch.chdir(folder)
    names = {}
    exec(call.code(pipe, {}), names)
    assert [image.tobytes() for image in names["images"]] == [image.tobytes() for image in images]
    assert Path("paella.png").read_bytes() == Path("expected.png").read_bytes()
    assert np.ptp(np.asarray(images[-1])) > 0


def test_the_code_loads_the_model_as_it_was_loaded(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    pipe = PaellaPipeline.from_pretrained(tmp_path / "tiny", dtype=torch.bfloat16, low_memory=True, prior=None)
    code = Call("PaellaPipeline", {"prompt": "a"}).code(
        pipe, {"prior": None, "cache_dir": Path("a")}, ["pipe.set_adapters(['ink'])"]
    )
    where = repr(str(tmp_path / "tiny"))
    assert (
        f"pipe = PaellaPipeline.from_pretrained({where}, dtype=torch.bfloat16, low_memory=True, prior=None, cache_dir='a')\n"
        "pipe.set_adapters(['ink'])\nimages = pipe(\n    prompt='a',\n"
    ) in code


def test_every_scheduler_and_guidance_method_is_offered():
    assert {"PaellaScheduler", "PaellaPsiScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"} <= set(SCHEDULERS)
    assert {"PaellaClassifierFreeGuidance", "PaellaSmoothedEnergyGuidance"} <= set(GUIDERS)


# --------------------------------------------------------------------------------------------------------- the fields


def test_masks_are_what_is_painted(picture):
    call = web_tasks.inpainting("a", painted(picture, orange=(8, 16, 31, 23)), 0.5)
    mask = np.asarray(call.arguments["mask_image"])
    assert mask.shape == (64, 64) and (mask[16:24, 8:32] == 255).all() and mask.sum() == 255 * 8 * 24
    assert call.arguments["strength"] == 0.5
    call = web_tasks.regions(
        "a", painted(picture, orange=(0, 0, 31, 63), green=(32, 0, 63, 15)), "b", "unused", "c", side=32
    )
    assert call.arguments["prompt"] == ["a", "b", "c"]
    elsewhere, left, corner = (np.asarray(mask) // 255 for mask in call.arguments["region_masks"])
    assert (elsewhere + left + corner == 1).all() and left[:, :16].all() and corner[:8, 16:].all()
    assert web_tasks.regions("a", None, "b", "", "", side=32).arguments["prompt"] == ["a"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda picture: web_tasks.image_to_image("a", None, 0.5), "no picture yet"),
        (lambda picture: web_tasks.inpainting("a", None, 1.0), "no picture yet"),
        (lambda picture: web_tasks.inpainting("a", painted(picture), 1.0), "Nothing is painted over"),
        (lambda picture: web_tasks.outpainting("a", picture, 0, 0, 0, 0), "nothing to draw"),
        (lambda picture: web_tasks.outpainting("a", picture, 4096, 0, 0, 0), "`padding` must be an integer of at most 1024"),
        (lambda picture: web_tasks.regions("a", painted(picture, blue=(0, 0, 9, 9)), "", " ", "", side=64), "no prompt"),
        (lambda picture: web_tasks.text_to_image("a", "4096", ""), "`width` must be an integer of at most 1024, got 4096"),
        (lambda picture: web_tasks.text_to_image("a", "wide", ""), "`width` must be an integer.*got 'wide'"),
        (lambda picture: web_tasks.interpolation("a", "b", None, None, 99), "`num_images` must be an integer of at most 16"),
    ],
)
def test_what_cannot_be_drawn_is_said(picture, call, message):
    with pytest.raises(ValueError, match=message):
        call(picture)


def test_steps_are_bounded():
    with pytest.raises(ValueError, match="`num_inference_steps` must be an integer of at most 1000"):
        web_tasks.with_settings(Call("PaellaPipeline", {}), SETTINGS | {"num_inference_steps": "99999"})


# --------------------------------------------------------------------------------------------------------- running


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as executor:
        yield executor


def watched(pipe, executor, cancelled, steps: int = 3):
    call = Call("PaellaPipeline", {"prompt": "a", "num_inference_steps": steps})
    return watch(call, pipe, make_preview(pipe), executor, cancelled)


def test_previews_are_the_predictions(pipe, executor):
    seen = []
    keep = lambda made, step, timestep, tensors: seen.append(tensors["pred_original_sample"])
    call = Call("PaellaPipeline", {"prompt": "a", "num_inference_steps": 3})
    images = call.run(pipe, keep)
    *previews, result = watched(pipe, executor, threading.Event())
    assert result.is_result and result.images[0].tobytes() == images[0].tobytes()
    assert previews and all(one.num_steps == 3 and not one.is_result for one in previews)
    for preview in previews:
        expected = pipe.decode(seen[preview.step - 1])[0]
        assert preview.images[0].tobytes() == expected.tobytes()


def test_cancelled_calls_end_with_their_step(pipe, executor):
    cancelled, taken = threading.Event(), []
    for progress in watched(pipe, executor, cancelled, steps=500):
        taken.append(progress)
        cancelled.set()
    assert len(taken) < 500 and not taken[-1].is_result
    steps = watched(pipe, executor, threading.Event(), steps=500)
    assert next(steps).step < 500
    steps.close()  # as when a visitor leaves
    *_, result = watched(pipe, executor, threading.Event())  # the one thread is free again
    assert result.is_result


def test_previews_with_low_memory_leave_the_weights_alone(tmp_path, executor):
    tiny_pipeline().save_pretrained(tmp_path)
    pipe = PaellaPipeline.from_pretrained(tmp_path, low_memory=True)
    loads, load = [], pipe.unet.weights_on_disk.weights.load
    pipe.unet.weights_on_disk.weights.load = lambda: loads.append(1) or load()
    *previews, result = watched(pipe, executor, threading.Event())
    assert previews and len(loads) == 1
    assert (
        result.images[0].tobytes()
        == Call("PaellaPipeline", {"prompt": "a", "num_inference_steps": 3}).run(pipe)[0].tobytes()
    )


# --------------------------------------------------------------------------------------------------------- the page


def draw(page: Page, visitor: str, made: list, task=web_tasks.text_to_image, fields=("a", "", ""), **settings) -> list[dict]:
    """What a visitor sees: each change of the page."""
    return [*page.on_draw(task, (*fields, *(SETTINGS | settings).values(), made), visitor)]


def test_two_visitors_at_once_do_not_mix(pipe):
    page = Page(pipe, 2, {}, [])
    before, results = dict(pipe.components), {}

    def visit(name, scheduler):
        made = []
        for seed in range(3):
            *_, last = draw(page, name, made, fields=(name, "", ""), seed=seed, scheduler=scheduler)
            made = last[page.made]
        results[name] = made

    threads = [threading.Thread(target=visit, args=one) for one in (("a", ""), ("b", "PaellaPsiScheduler"))]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    for name, scheduler in (("a", None), ("b", "PaellaPsiScheduler")):
        assert [one.title for one in results[name]] == [f"{name} (seed {seed})" for seed in range(3)]
        for seed, one in enumerate(results[name]):
            call = Call("PaellaPipeline", {"prompt": name, "num_inference_steps": 2}, seed, scheduler)
            assert Image.open(one.file).tobytes() == call.run(pipe)[0].tobytes()
    assert pipe.components == before and not page.running


def test_what_a_visitor_sees(pipe, picture):
    page = Page(pipe, 1, {}, [])
    start, *steps, end = draw(page, "a", [], random_seed=True)
    assert start[page.seed] in range(2**32) and start[page.status] == "Starting …"
    assert steps and all(re.match(r"Step \d of 2<progress .*max=\"2\"", step[page.status]) for step in steps)
    made = end[page.made]
    assert made[0].title == f"a (seed {start[page.seed]})" and made[0].title in end[page.status]
    assert end[page.gallery] == [(made[0].file, made[0].title)] and f"manual_seed({start[page.seed]})" in end[page.code]
    assert page.on_take_last(made) == made[0].file
    *_, end = draw(page, "a", made, web_tasks.editing, ("a", "b", picture, 0.9, 0.75))
    assert end[page.before_after]["visible"] and not end[page.result]["visible"]
    before, after = end[page.before_after]["value"]
    assert Image.open(before).tobytes() == Image.open(picture).tobytes() and after == end[page.made][1].file
    assert end[page.files]["value"] == [before]
    chosen = page.on_select(end[page.made], SimpleNamespace(index=1))  # the newest comes first
    assert chosen[page.result]["value"] == made[0].file and chosen[page.code] == made[0].code


def test_closing_ends_running_calls_and_deletes_the_pictures(pipe):
    page = Page(pipe, 1, {}, [])
    *_, end = draw(page, "a", [])
    settings = SETTINGS | {"num_inference_steps": "500"}
    changes = page.on_draw(web_tasks.text_to_image, ("a", "", "", *settings.values(), end[page.made]), "a")
    assert next(changes)[page.status] == "Starting …" and "of 500" in next(changes)[page.status]
    page.close()
    assert not any(page.made in change for change in changes)
    assert not Path(page.folder.name).exists()


def test_waiting_calls_are_bounded(pipe):
    assert make_page(pipe)._queue.max_size == 64


def test_old_pictures_of_a_visit_are_forgotten(pipe, monkeypatch):
    monkeypatch.setattr("paella_diffusers.apps.web.MOST_KEPT", 2)
    page, made, folders = Page(pipe, 1, {}, []), [], []
    for seed in range(3):
        *_, end = draw(page, "a", made, seed=seed)
        made = end[page.made]
        folders.append(Path(made[-1].folder))
    assert [one.title for one in made] == ["a (seed 1)", "a (seed 2)"]
    assert [folder.exists() for folder in folders] == [False, True, True]


def test_errors_are_words(pipe):
    page = Page(pipe, 1, {}, [])
    changes = page.on_draw(web_tasks.text_to_image, ("a", "33", "", *SETTINGS.values(), []), "a")
    with pytest.raises(gr.Error, match="`height` and `width` must be multiples of 16, got 32 and 33"):
        list(changes)
    assert not page.running
    with pytest.raises(gr.Error, match="Nothing has been drawn yet"):
        page.on_take_last([])


def test_a_client_draws_and_has_its_own_gallery(served):
    first, second = served.visit(), served.visit()
    job = first.submit("red heart", "", "", *SETTINGS.values(), api_name="/text_to_image")
    *_, gallery = job.result()
    assert [one["caption"] for one in gallery] == ["red heart (seed 3)"] and len(job.outputs()) > 2
    settings = SETTINGS | {"seed": 4}
    *_, gallery = second.predict("dog face", "", "", *settings.values(), api_name="/text_to_image")
    assert [one["caption"] for one in gallery] == ["dog face (seed 4)"]
    *_, gallery = first.predict("sun", "", "", *settings.values(), api_name="/text_to_image")
    assert [one["caption"] for one in gallery] == ["sun (seed 4)", "red heart (seed 3)"]
    expected = web_tasks.with_settings(web_tasks.text_to_image("sun", "", ""), settings).run(served.pipe)[0]
    assert Image.open(gallery[0]["image"]).tobytes() == expected.tobytes()


def test_the_template_has_no_outside_link(served):
    response = httpx.get(served.address)
    assert not OUTSIDE_LINK.search(response.text) and "og:image" not in response.text.split("<style>")[0]
    assert "default-src 'self'" in response.headers["content-security-policy"]
    config = httpx.get(f"{served.address}config").json()
    assert not config["analytics_enabled"] and not config["stylesheets"] and not config["footer_links"]


# ---------------------------------------------------------------------------------------------------- the command


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_the_command(tmp_path, monkeypatch, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    seen, handlers, before = [], [], signal.getsignal(signal.SIGTERM)

    def visit(page):
        address = capsys.readouterr().out.split()[4]
        settings = SETTINGS | {"num_inference_steps": "1"}
        seen.extend(Client(address, verbose=False).predict("a", "", "", *settings.values(), api_name="/text_to_image"))
        page.close(verbose=False)
        handlers.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setattr(gr.Blocks, "block_thread", visit)
    port = free_port()
    assert main(["web", "--model", str(tmp_path / "tiny"), "--low-memory", "--no-prior", "--port", str(port)]) == 0
    assert "low_memory=True, prior=None, prior_scheduler=None)" in seen[2] and seen[-1][0]["caption"] == "a (seed 3)"
    assert handlers == [signal.default_int_handler] and signal.getsignal(signal.SIGTERM) == before


def test_what_the_command_refuses(monkeypatch, capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        assert main(["web", "--port", port]) == 2
    assert f"web: --host 127.0.0.1 --port {port}: Address already in use." in capsys.readouterr().err
    assert main(["web", "--model", "a/b/c"]) == 2
    assert "--model a/b/c: there is no such file or folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["web"]) == 2
    assert "web needs Gradio: pip install" in capsys.readouterr().err
