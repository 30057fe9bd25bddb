"""The server in a thread, as the tests of it need it."""

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import uvicorn
from openai import OpenAI
from PIL import Image

from paella_diffusers.apps.batching import Batcher, Job
from paella_diffusers.apps.rows import Row
from paella_diffusers.apps.serve import Settings, create_app

PATIENCE = 120  # seconds, of a test that fails


@contextmanager
def serving(pipe, **settings) -> Iterator[SimpleNamespace]:
    """A server on a free port: its `address`, an OpenAI `client`, its `batcher`, and `stop`, which waits for its end."""
    app = create_app(pipe, Settings("emoji", **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, access_log=False, log_level="error"))
    started = threading.Event()
    startup = server.startup

    async def notice(sockets=None):
        await startup(sockets)
        started.set()

    server.startup = notice
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(PATIENCE)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    def stop():
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()

    client = OpenAI(base_url=f"{address}/v1", api_key=settings.get("api_key") or "none", max_retries=0)
    try:
        yield SimpleNamespace(address=address, client=client, batcher=app.state.batcher, server=server, stop=stop)
    finally:
        client.close()
        stop()


@contextmanager
def busy(pipe, batcher: Batcher) -> Iterator[None]:
    """While it lasts, the worker draws a picture that does not get on."""
    is_busy, release = threading.Event(), threading.Event()

    def wait(preview):
        is_busy.set()
        release.wait(PATIENCE)

    batcher.submit([Job(Row("busy", "busy", 0, {"num_inference_steps": 2}), pipe, frozenset([0]), wait)])
    assert is_busy.wait(PATIENCE)
    try:
        yield
    finally:
        release.set()


def picture(data) -> Image.Image:
    """The picture in an answer or event of OpenAI's client."""
    image = Image.open(io.BytesIO(base64.b64decode(data.b64_json)))
    image.load()
    return image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
