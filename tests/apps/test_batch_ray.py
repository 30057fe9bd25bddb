"""A batch in a Ray cluster of two nodes, of which a worker is killed: `make test-ray`."""

import functools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import tiny_pipeline
from kills import contents, leftovers
from test_batch import make_job, quiet_pipeline, write_rows

from paella_diffusers.apps.batch import run

pytestmark = pytest.mark.ray


def load_and_note(folder: str, notes: Path):
    """A pipeline; a file in `notes` has the number of the process that loaded it."""
    (notes / str(os.getpid())).touch()
    return quiet_pipeline(folder)


@pytest.fixture
def two_nodes(monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of the workers
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    ray.init(address=cluster.address)
    yield ray
    ray.shutdown()
    cluster.shutdown()


def test_a_killed_worker_loses_nothing_and_makes_nothing_twice(two_nodes, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"picture {number}"} for number in range(30)])
    whole, out, notes = tmp_path / "whole", tmp_path / "out", tmp_path / "notes"
    notes.mkdir()
    run(make_job(source, whole), functools.partial(quiet_pipeline, str(tmp_path / "model")))

    def kill_one():
        while len(list(out.glob("??????.json"))) < 2:
            time.sleep(0.01)
        os.kill(int(next(notes.iterdir()).name), signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    load = functools.partial(load_and_note, str(tmp_path / "model"), notes)
    assert run(make_job(source, out), load, processes=2, engine="ray") == (10, 10, 0)
    killer.join()
    assert sum(node["Alive"] for node in two_nodes.nodes()) == 2
    print(f"{len(list(notes.iterdir()))} processes loaded the model, one was killed")
    assert len(list(notes.iterdir())) >= 2  # the killed one was replaced
    assert contents(out) == contents(whole)
    assert not leftovers(out)
