"""`paella-diffusers serve`: what it refuses, and that SIGTERM lets it finish."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from openai import OpenAI

from paella_diffusers.cli import main, serve


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)


def refused(capsys, *arguments) -> str:
    assert main(["serve", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org", "192.0.2.1"])
def test_addresses_that_others_reach_need_a_key(capsys, host):
    message = refused(capsys, "--host", host)
    assert message.startswith(f"paella-diffusers serve: --host {host} can be reached") and "PAELLA_API_KEY" in message


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_addresses_of_this_machine_need_none(host):
    assert serve.is_loopback(host)


def test_keys(capsys, tmp_path, monkeypatch):
    file = tmp_path / "key"
    assert serve.read_key(None) is None
    monkeypatch.setenv(serve.KEY_VARIABLE, "k" * 16)
    assert serve.read_key(None) == "k" * 16
    file.write_text("f" * 20 + "\n")
    assert serve.read_key(file) == "f" * 20
    for text in ("", "too short", "two words of some length", "schlüssel-von-16-zeichen"):
        file.write_text(text)
        assert "must hold an API key of at least 16" in refused(capsys, "--api-key-file", str(file))
    file.write_bytes(b"\xff" * 20)
    assert "--api-key-file" in refused(capsys, "--api-key-file", str(file))
    assert "No such file" in refused(capsys, "--api-key-file", str(tmp_path / "other"))
    monkeypatch.setenv(serve.KEY_VARIABLE, "short")
    assert "PAELLA_API_KEY must hold" in refused(capsys)


def test_refused_before_the_model_is_loaded(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "load", None)
    assert "--max-n 100 needs a --max-waiting" in refused(capsys, "--max-n", "100")
    assert "there is no such file or folder" in refused(capsys, "--model", str(tmp_path / "nothing"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"--host 127.0.0.1 --port {port}: Address already in use" in refused(capsys, "--port", port)
    monkeypatch.setattr(serve, "MODULES", ("a_module_that_is_not_there",))
    assert "serve needs a_module_that_is_not_there: pip install" in refused(capsys)


def test_sigterm_lets_a_request_finish():
    command = [sys.executable, "-m", "paella_diffusers.cli", "serve", "--port", "0", "--model-name", "icons"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address, _, model = process.stdout.readline().partition(" with the model ")
        assert model == "icons\n"
        client = OpenAI(base_url=address, api_key="none", max_retries=5)  # it may not listen yet
        events = client.images.generate(prompt="a secret wish", stream=True, partial_images=3)
        assert next(iter(events)).type == "image_generation.partial_image"
        os.kill(process.pid, signal.SIGTERM)
        *_, last = events
        assert last.type == "image_generation.completed"
        _, log = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode in (0, -signal.SIGTERM)  # uvicorn ends by the signal that it got
    assert "Application shutdown complete" in log and "'/v1/images/generations' 200" in log
    assert "Traceback" not in log and "secret" not in log
