"""A page on which every task is a tab: `paella-diffusers web`, or `launch(make_page(pipe))`."""

import html
import itertools
import logging
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import HTMLResponse

from .. import EMOJI_MODEL
from . import web_tasks
from .web_calls import GUIDERS, SCHEDULERS, Call, make_preview, watch

logger = logging.getLogger(__name__)

MOST_KEPT = 60  # pictures in a visit's gallery
MOST_WAITING = 64  # calls of all visitors
DAY = 24 * 3600  # seconds after which a visit's files are deleted
UPLOAD = {
    "type": "filepath",
    "image_mode": None,
    "sources": ("upload", "clipboard"),
    "height": 220,
    "elem_classes": "upload",
}
PAINTING: dict[str, Any] = {"type": "pil", "layers": False, "transforms": (), "height": 420, "buttons": []}

CSS = """
.layout { display: grid; gap: 1rem; align-items: start; }
.layout { grid-template: auto auto 1fr / minmax(0, 2fr) minmax(0, 3fr); }
.layout > .tasks { display: contents; }
.tasks > .tab-wrapper { grid-column: 1 / -1; }
.tasks > .tabitem, .settings { grid-column: 1; }
.results { grid-column: 2; grid-row: 2 / span 2; }
@media (max-width: 800px) {
    .layout { grid-template: none / minmax(0, 1fr); }
    .results { grid-column: 1; grid-row: auto; }
}
.visit .grid-wrap { height: auto; min-height: 8rem; }
.visit .grid-container { grid-template-columns: repeat(auto-fill, 6rem); grid-auto-rows: 6rem; padding-top: 1.5rem; }
.visit .caption-label { display: none; }
.result img, .upload img { width: 100%; height: 100%; object-fit: contain; }
.pixelated img { image-rendering: pixelated; }
.status [data-testid="status-tracker"]:has(.error) { display: none; }
.status { min-height: 2.5rem; }
.status progress { display: block; width: 100%; height: 0.6rem; margin-top: 0.4rem; accent-color: var(--primary-500); }
:focus-visible { outline: 3px solid var(--primary-500) !important; outline-offset: 2px; }
""" + "".join(
    f".brush-{name} label > span {{ border-left: 1.2rem solid {colour}; padding-left: 0.5rem; }}\n"
    for name, colour in web_tasks.COLOURS.items()
)
STATUS_IS_READ_ALOUD = "() => document.querySelector('.status').setAttribute('role', 'status')"
SYSTEM_FONTS: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
OUTSIDE_LINK = re.compile(r"<(?:meta|link|script)\b[^>]*https?://[^>]*>")
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:"
)


def make_page(pipe, concurrency_limit: int = 1, load_options: dict | None = None, setup: Sequence[str] = ()) -> gr.Blocks:
    """
    The page of a pipeline, for [`launch`].

    Args:
        pipe ([`PaellaPipelineBase`]): Its components serve all visitors; none of them is changed.
        concurrency_limit (`int`, defaults to 1): How many calls run at once. 64 others wait; more are refused.
        load_options (`dict`, *optional*):
            What `from_pretrained` was given, such as `{"revision": "v1"}`, for the Python call that is shown. The model's
            name, its dtype and `low_memory` are known.
        setup (`list[str]`, *optional*): Lines of that Python that change `pipe` after it is loaded, such as by adapters.
    """
    return Page(pipe, concurrency_limit, load_options or {}, setup).blocks


def launch(page: gr.Blocks, host: str | None = None, port: int | None = None, **options):
    """
    Serve a page that asks nothing of the internet.

    Args:
        page (`gr.Blocks`): From [`make_page`].
        host (`str`, *optional*): The address to listen on; unless given, Gradio's default: this machine alone.
        port (`int`, *optional*): The first free one from 7860 on unless given.
        options: Other arguments of `gr.Blocks.launch`, such as `prevent_thread_lock=True`.

    Returns:
        As `gr.Blocks.launch`: the application, its local address, and None.

    Raises:
        OSError: If the port is taken.
    """
    return page.launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(**SYSTEM_FONTS),
        css=CSS,
        js=STATUS_IS_READ_ALOUD,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        max_file_size="50mb",
        app_kwargs={"middleware": [Middleware(BaseHTTPMiddleware, dispatch=_without_outside_links)]},
        **options,
    )


async def _without_outside_links(request, call_next):
    """Remove the outside addresses in the head of Gradio's template, and let the browser ask nobody else."""
    response = await call_next(request)
    if not response.headers.get("content-type", "").startswith("text/html"):
        return response
    text = b"".join([part async for part in response.body_iterator]).decode()
    headers = {name: value for name, value in response.headers.items() if name != "content-length"}
    headers["content-security-policy"] = CONTENT_POLICY
    return HTMLResponse(OUTSIDE_LINK.sub("", text), response.status_code, headers)


class Made(NamedTuple):
    """
    A picture of a visit.

    Args:
        folder (`str`): With `paella.png` and the pictures that the call reads.
        title (`str`): Its prompts and its seed.
        code (`str`): Python that makes it again.
        before (`str`, *optional*): The file of what was edited.
    """

    folder: str
    title: str
    code: str
    before: str | None

    @property
    def file(self) -> str:
        return str(Path(self.folder, "paella.png"))

    @property
    def files_read(self) -> list[str]:
        return sorted(str(file) for file in Path(self.folder).iterdir() if file.name != "paella.png")


class Page:
    """
    The page's parts, and what they do. What a visitor made is in the visitor's own `gr.State`.

    Args:
        pipe, concurrency_limit, load_options, setup: As of [`make_page`].
    """

    def __init__(self, pipe, concurrency_limit: int, load_options: dict, setup: Sequence[str]):
        self.pipe, self.limit = pipe, concurrency_limit
        self.code_of = partial(Call.code, pipe=pipe, load_options=load_options, setup=setup)
        self.preview, self.executor = make_preview(pipe), ThreadPoolExecutor(concurrency_limit)
        self.running: list[tuple[str | None, threading.Event]] = []  # a visitor, and what cancels one of the visitor's calls
        self.folder = tempfile.TemporaryDirectory(prefix="paella-web-", ignore_cleanup_errors=True)
        self.numbers = itertools.count()
        self.draws = []  # the events that draw
        self.blocks = gr.Blocks(title="Paella", analytics_enabled=False, fill_width=True, delete_cache=(DAY, DAY))
        with self.blocks:
            gr.Markdown(self.introduction())
            self.made = gr.State([], time_to_live=DAY, delete_callback=_forget)  # a list of `Made`, the newest last
            with gr.Row(elem_classes=["layout", *(["pixelated"] if pipe.default_size < 128 else [])]):
                tabs = gr.Tabs(elem_classes="tasks")
                with gr.Column(elem_classes="settings", min_width=0):
                    self.add_settings()
                with gr.Column(elem_classes="results", min_width=0):
                    self.add_results()
            with tabs:
                self.add_tabs()
            quiet = {"queue": False, "api_visibility": "private"}
            cancelled = self.cancel.click(self.on_cancel, cancels=self.draws, **quiet)
            # in a turn of its own, so that a step that was on its way to the page does not come after it
            cancelled.then(lambda: _status("Cancelled."), outputs=self.status, **quiet)
        self.blocks.queue(max_size=MOST_WAITING)

    def close(self):
        """Serve no longer, end the running calls with their present step, and delete the pictures."""
        self.executor.shutdown(wait=False, cancel_futures=True)  # no call begins any more
        for _, cancelled in [*self.running]:
            cancelled.set()
        self.blocks.close(verbose=False)
        self.executor.shutdown()
        self.folder.cleanup()

    # --------------------------------------------------------------------------------------------------- parts

    def introduction(self) -> str:
        name, side = str(self.pipe.config.get("_name_or_path")), self.pipe.default_size
        if name == EMOJI_MODEL:
            return f"# Paella\nThe model in the package draws icons, {side} × {side} pixels, by names such as “dog face”."
        return f"# Paella\n{name}, {side} × {side} pixels."

    def add_settings(self):
        """What all tabs share, by the names that `with_settings` takes."""
        own_scheduler = type(self.pipe.scheduler).__name__
        own_guider = type(self.pipe.guider).__name__ if self.pipe.guider else "as published"
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=120)
                random_seed = gr.Checkbox(True, label="New seed each time", min_width=120)
            with gr.Row():
                steps = _number("Steps", "default")
                scale = _number("Guidance scale", "default")
                temperature = _number("Temperature", "default")
            self.settings = {
                "seed": self.seed,
                "random_seed": random_seed,
                "num_inference_steps": steps,
                "guidance_scale": scale,
                "temperature": temperature,
                "scheduler": gr.Dropdown([(f"The model's own ({own_scheduler})", ""), *SCHEDULERS], label="Scheduler"),
                "guider": gr.Dropdown([(f"The model's own ({own_guider})", ""), *GUIDERS], label="Guidance"),
                "negative_prompt": gr.Textbox("", label="Negative prompt", max_lines=1),
            }

    def add_results(self):
        show = {"format": "png", "height": 420, "interactive": False, "elem_classes": "result"}
        self.result = gr.Image(label="Result", buttons=["download"], **show)
        self.before_after = gr.ImageSlider(label="Before and after", visible=False, **show)
        with gr.Row():
            self.status = gr.HTML(_status("Ready."), elem_classes="status")
            self.cancel = gr.Button("Cancel", size="md", scale=0, min_width=100)
        with gr.Accordion("The Python call", open=False):
            self.code = gr.Code(language="python", label="Python", interactive=False)
            self.files = gr.File(label="Pictures that it reads", file_count="multiple", interactive=False, visible=False)
        self.gallery = gr.Gallery(
            label="Made in this visit",
            format="png",
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_classes="visit",
        )
        self.gallery.select(self.on_select, self.made, self.shown, api_visibility="private", show_progress="hidden")

    @property
    def shown(self) -> list:
        """The parts that show one picture."""
        return [self.result, self.before_after, self.code, self.files]

    def add_tabs(self):
        with gr.Tab("Text to image"):
            prompt = _prompt()
            with gr.Row():
                sides = [_number(label, f"{self.pipe.default_size}") for label in ("Width", "Height")]
            self.add_draw(web_tasks.text_to_image, [prompt, *sides])
        with gr.Tab("Variations"):
            first = self.add_picture("Picture")
            second = gr.Image(label="A second picture to mix in (optional)", **UPLOAD)
            self.add_draw(web_tasks.variations, [_prompt("Prompt (optional)"), first, second])
        with gr.Tab("Image to image"):
            image = self.add_picture("Picture")
            self.add_draw(web_tasks.image_to_image, [_prompt(), image, _strength(0.8)])
        with gr.Tab("Inpainting"):
            label, brush = "Picture; paint over what shall be new", self.brush("#d55e00")
            painted = gr.ImageEditor(label=label, sources=("upload", "clipboard"), brush=brush, **PAINTING)
            self.add_take_last(painted)
            self.add_draw(web_tasks.inpainting, [_prompt("Prompt for the whole picture"), painted, _strength(1.0)])
        with gr.Tab("Outpainting"):
            image = self.add_picture("Picture")
            half = self.pipe.default_size // 2
            with gr.Row():
                pixels = {"precision": 0, "minimum": 0, "step": self.pipe.vae_scale_factor, "min_width": 80}
                new = {"Pixels left": half, "Pixels top": 0, "Pixels right": half, "Pixels bottom": 0}
                sides = [gr.Number(value, label=label, **pixels) for label, value in new.items()]
            self.add_draw(web_tasks.outpainting, [_prompt("Prompt for the whole picture"), image, *sides])
        with gr.Tab("Regions"):
            brush = self.brush(*web_tasks.COLOURS.values())
            blank = Image.new("RGB", (self.pipe.default_size, self.pipe.default_size), "white")
            canvas = gr.ImageEditor(blank, label="Paint where each prompt applies", sources=(), brush=brush, **PAINTING)
            prompts = [_prompt("Prompt where nothing is painted")]
            prompts += [_prompt(f"Prompt for {name}", elem_classes=f"brush-{name}") for name in web_tasks.COLOURS]
            task = partial(web_tasks.regions, side=self.pipe.default_size)
            self.add_draw(task, [prompts[0], canvas, *prompts[1:]], name="regions")
        with gr.Tab("Editing"):
            image = self.add_picture("Picture")
            prompts = [_prompt("Prompt for the picture as it is"), _prompt("Prompt for the result")]
            kept = gr.Slider(0, 2, 0.9, step=0.05, label="How much of the picture is put back")
            self.add_draw(web_tasks.editing, [*prompts, image, kept, _strength(0.75)])
        with gr.Tab("Interpolation"):
            prompts = [_prompt("From the prompt"), _prompt("To the prompt")]
            frames = gr.Slider(2, web_tasks.MOST_FRAMES, 8, step=1, precision=0, label="Frames")
            with gr.Accordion("Pictures in place of prompts", open=False):
                ends = [gr.Image(label=label, **UPLOAD) for label in ("From the picture", "To the picture")]
            self.add_draw(web_tasks.interpolation, [*prompts, *ends, frames])

    def add_picture(self, label: str) -> gr.Image:
        image = gr.Image(label=label, **UPLOAD)
        self.add_take_last(image)
        return image

    def brush(self, *colours: str) -> gr.Brush:
        return gr.Brush(max(2, self.pipe.default_size // 8), colors=list(colours), color_mode="fixed")

    def add_take_last(self, image: gr.Image | gr.ImageEditor):
        button = gr.Button("Take the last result", size="sm")
        button.click(self.on_take_last, self.made, image, api_visibility="private", show_progress="hidden")

    def add_draw(self, task: Callable[..., Call], fields: list, name: str | None = None):
        """The button that draws; Enter in a prompt does the same."""
        button = gr.Button("Draw", variant="primary")

        def draw(request: gr.Request, *values):
            yield from self.on_draw(task, values, request.session_hash)

        event = gr.on(
            [button.click, *(field.submit for field in fields if isinstance(field, gr.Textbox))],
            draw,
            [*fields, *self.settings.values(), self.made],
            [*self.shown, self.status, self.seed, self.gallery, self.made],
            show_progress="minimal",
            show_progress_on=self.status,
            concurrency_limit=self.limit,
            concurrency_id="draw",
            api_name=name or task.__name__,
        )
        self.draws.append(event)

    # -------------------------------------------------------------------------------------------------- events

    def on_draw(self, task: Callable[..., Call], values: tuple, visitor: str | None) -> Iterator[dict]:
        """Draw; after each step and at the end, what changes of the page, by its parts."""
        *inputs, made = values
        fields, settings = inputs[: -len(self.settings)], dict(zip(self.settings, inputs[-len(self.settings) :]))
        if settings["random_seed"] or settings["seed"] is None:
            settings["seed"] = secrets.randbelow(2**32)
        cancelled = threading.Event()
        self.running.append((visitor, cancelled))
        try:
            call = web_tasks.with_settings(task(*fields), settings)
            yield {self.status: _status("Starting …"), self.seed: call.seed}
            for progress in watch(call, self.pipe, self.preview, self.executor, cancelled):
                if progress.is_result:
                    made = [*made, self.keep(call, progress.images)]
                    _forget(made[:-MOST_KEPT])
                    made = made[-MOST_KEPT:]
                    pictures = [(one.file, one.title) for one in reversed(made)]
                    yield self.show(made[-1]) | {
                        self.status: _status(f"Done: {made[-1].title}."),
                        self.gallery: pictures,
                        self.made: made,
                    }
                else:
                    text = f"Step {progress.step} of {progress.num_steps}"
                    yield self.show_image(_side_by_side(progress.images)) | {
                        self.status: _status(text, progress.step, progress.num_steps)
                    }
        except Exception as error:
            refused = isinstance(error, ValueError | TypeError | OSError)  # with words that are meant for users
            text = str(error) if refused else f"{type(error).__name__}: {error}"
            yield {self.status: _status(text)}
            raise gr.Error(text, print_exception=not refused) from error
        finally:
            self.running.remove((visitor, cancelled))

    def keep(self, call: Call, images: list[Image.Image]) -> Made:
        """Write the picture and those that the call reads."""
        folder = Path(self.folder.name, f"{next(self.numbers)}")
        folder.mkdir()
        for name, picture in call.pictures().items():
            picture.save(folder / name)
        call.save(images, folder / "paella.png")
        before = str(folder / "image.png") if call.pipeline == "PaellaInversionPipeline" else None
        return Made(str(folder), web_tasks.title(call), self.code_of(call), before)

    def show(self, made: Made) -> dict:
        """A picture, what it was before, if it was edited, and its call."""
        if made.before:
            both = (made.before, made.file)
            picture = {self.result: gr.update(visible=False), self.before_after: gr.update(value=both, visible=True)}
        else:
            picture = self.show_image(made.file)
        return picture | {self.code: made.code, self.files: gr.update(value=made.files_read, visible=bool(made.files_read))}

    def show_image(self, image: Image.Image | str) -> dict:
        return {self.result: gr.update(value=image, visible=True), self.before_after: gr.update(visible=False)}

    def on_cancel(self, request: gr.Request):
        for visitor, cancelled in [*self.running]:
            if visitor == request.session_hash:
                cancelled.set()

    def on_select(self, made: list[Made], chosen: gr.SelectData) -> dict:
        return self.show(made[-1 - chosen.index])

    def on_take_last(self, made: list[Made]) -> str:
        if not made:
            raise gr.Error("Nothing has been drawn yet in this visit.", print_exception=False)
        return made[-1].file


def _prompt(label: str = "Prompt", **options) -> gr.Textbox:
    return gr.Textbox("", label=label, placeholder="such as: red heart", max_lines=1, **options)


def _number(label: str, default: str) -> gr.Textbox:
    """A number, or two between a comma; empty for the default. (Gradio's own field for numbers cannot be empty.)"""
    return gr.Textbox("", label=label, placeholder=default, max_lines=1, min_width=100)


def _strength(value: float) -> gr.Slider:
    return gr.Slider(0.05, 1, value, step=0.05, label="Strength: how much of it is made new")


def _status(text: str, step: int = 0, num_steps: int = 0) -> str:
    bar = f'<progress aria-label="Steps" value="{step}" max="{num_steps}"></progress>' if num_steps else ""
    return f"{html.escape(text)}{bar}"


def _side_by_side(images: list[Image.Image]) -> Image.Image:
    return images[0] if len(images) == 1 else Image.fromarray(np.hstack([np.asarray(image) for image in images]))


def _forget(made: list[Made]):
    for one in made:
        shutil.rmtree(one.folder, ignore_errors=True)
