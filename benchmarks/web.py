"""
How long does `paella-diffusers web` take until its page answers, and until it has drawn the first picture?

    python benchmarks/web.py [--repeats 5]

Each time in a new process, on the embedded model: seconds from the command to the first answer with the page, and to the
end of the first call, of 12 steps, by a client that was ready before. Then a second call's seconds, from the click to the
first preview and to the picture. The first turn warms the system's file cache up and does not count. Medians.
"""

import argparse
import socket
import statistics
import subprocess
import sys
import time

import httpx
from gradio_client import Client

SETTINGS = (0, False, "12", "", "", "", "", "")  # seed, whether a new one, steps, ...


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def measure() -> list[float]:
    """Seconds to the page, to the first picture, to the second call's first preview and picture."""
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "paella_diffusers.cli", "web", "--port", str(port)]
    browser = httpx.Client(trust_env=False)
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                browser.get(address).raise_for_status()
                break
            except httpx.TransportError:
                if server.poll() is not None:
                    raise SystemExit("paella-diffusers web ended: start it to see why.") from None
                time.sleep(0.05)
        answered = time.perf_counter() - start
        client = Client(address, verbose=False, httpx_kwargs={"timeout": 60})
        client.predict("red heart", "", "", *SETTINGS, api_name="/text_to_image")
        drawn = time.perf_counter() - start
        start = time.perf_counter()
        job = client.submit("dog face", "", "", *SETTINGS, api_name="/text_to_image")
        while len(job.outputs()) < 2:  # the first says that it starts
            time.sleep(0.002)
        preview = time.perf_counter() - start
        job.result()
        return [answered, drawn, preview, time.perf_counter() - start]
    finally:
        server.terminate()
        server.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    runs = [measure() for _ in range(args.repeats + 1)][1:]
    print("| the page answers | first picture | second call's first preview | and picture |")
    print("|---" * 4 + "|")
    print("| " + " | ".join(f"{statistics.median(column):.2f} s" for column in zip(*runs)) + " |")
    print(f"\nThe first picture: from {min(run[1] for run in runs):.2f} to {max(run[1] for run in runs):.2f} s.")


if __name__ == "__main__":
    main()
