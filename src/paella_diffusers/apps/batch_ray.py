"""Drawing a job's shards in a Ray cluster, by Ray Data: actors hold the pipeline, and Ray replaces those that die."""

from collections.abc import Callable, Generator
from typing import Any

import ray
from ray.data import ActorPoolStrategy

from .batch import Job, Worker


class ShardActor:
    """What `map_batches` calls: a worker as every engine has it."""

    def __init__(self, job: Job, load: Callable):
        self.worker = Worker(job, load)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for index in batch["shard"]:
            self.worker(int(index))
        return batch


def draw_in_actors(job: Job, load: Callable, shards: list[int], most: int | None) -> Generator[int, None, None]:
    """
    Draw shards in up to `most` actors; Ray starts them as long as shards wait and the cluster has room. Yields each shard
    when it is written. One whose actor died is drawn again elsewhere: what is done is in the job's output, not in Ray.
    """
    if not shards:
        return
    if not ray.is_initialized():
        ray.init()  # the cluster of RAY_ADDRESS, or else one on this machine
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one, of all engines
    on_gpus = ray.cluster_resources().get("GPU", 0) > 0
    drawn = ray.data.from_items([{"shard": index} for index in shards], override_num_blocks=len(shards)).map_batches(
        ShardActor,
        fn_constructor_args=(job, load),
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, max_size=most),
        num_cpus=job.threads,
        num_gpus=1 if on_gpus else 0,
    )
    for row in drawn.iter_rows():
        yield int(row["shard"])
