"""
Run the workflows of this folder through ComfyUI's own executor, headlessly on the CPU, and check the pictures that it saves:

    python run_workflows.py COMFYUI_FOLDER

ComfyUI's server is started with a base directory of its own, which has this folder as its only custom node.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
MINUTES = 10
PICTURES = {
    "text_to_image": {"6": (64, 64)},
    "edit_picture": {"10": (64, 64), "11": (64, 64), "12": (96, 64), "13": (64, 64)},
}


def request(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as response:
        return json.load(response)


def wait_for(what: str, get):
    """What `get` returns, once it is true and raises no connection error."""
    end = time.monotonic() + 60 * MINUTES
    while time.monotonic() < end:
        try:
            if found := get():
                return found
        except OSError:
            pass
        time.sleep(1)
    sys.exit(f"{what} took more than {MINUTES} minutes.")


def main():
    comfyui = Path(sys.argv[1]).resolve()
    if not (comfyui / "main.py").is_file():
        sys.exit(f"{comfyui} is not a clone of ComfyUI: it has no main.py.")
    with socket.socket() as free, tempfile.TemporaryDirectory() as base:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        for name in ("custom_nodes", "input"):
            (Path(base) / name).mkdir()
        (Path(base) / "custom_nodes/paella").symlink_to(HERE, target_is_directory=True)
        picture = Image.new("RGBA", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((12, 12, 52, 52), fill="red")
        picture.paste((255, 255, 255, 0), (0, 40, 64, 64))  # transparent: ComfyUI makes a mask of it
        picture.save(Path(base) / "input/paella_heart.png")
        command = [sys.executable, "main.py", "--cpu", "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--port", str(port), "--base-directory", base, "--database-url", "sqlite:///:memory:"]
        server = subprocess.Popen(command, cwd=comfyui)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for("Starting ComfyUI", lambda: request(f"{address}/object_info/PaellaSample"))
            for workflow, expected in PICTURES.items():
                graph = json.loads((HERE / f"workflows/{workflow}.json").read_text("utf-8"))
                prompt = request(f"{address}/prompt", {"prompt": graph})["prompt_id"]
                history = wait_for(workflow, lambda prompt=prompt: request(f"{address}/history/{prompt}").get(prompt))
                if history["status"]["status_str"] != "success":
                    sys.exit(f"{workflow}: {json.dumps(history['status'], indent=2)}")
                for node, size in expected.items():
                    for image in history["outputs"][node]["images"]:
                        found = Image.open(Path(base) / "output" / image["subfolder"] / image["filename"]).size
                        if found != size:
                            sys.exit(f"{workflow}: node {node} saved a picture of {found}, not {size}.")
                print(f"{workflow}: passed")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
