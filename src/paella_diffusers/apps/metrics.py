"""What `serve.py` tells Prometheus, in a registry of its own."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .batching import Batcher

PATHS = (
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/images/variations",
    "/v1/models",
    "/health",
    "/metrics",
)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Requests, calls of the pipeline, pictures and the queue."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self):
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter("paella_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.request_seconds = Histogram(
            "paella_request_seconds",
            "From a request to the end of its answer.",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.pictures = Counter("paella_pictures", "Pictures drawn.", registry=registry)
        self.call_pictures = Histogram(
            "paella_call_pictures",
            "Pictures in a call of the pipeline.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.call_seconds = Histogram("paella_call_seconds", "A call of the pipeline.", buckets=SECONDS, registry=registry)
        self.waiting = Gauge("paella_waiting_pictures", "Pictures that wait.", registry=registry)

    def watch_queue(self, batcher: Batcher) -> None:
        self.waiting.set_function(lambda: batcher.num_waiting)

    def observe_call(self, num_pictures: int, seconds: float) -> None:
        """After a call of the pipeline."""
        self.pictures.inc(num_pictures)
        self.call_pictures.observe(num_pictures)
        self.call_seconds.observe(seconds)

    def observe_request(self, path: str, status: int, seconds: float) -> None:
        """After a request; unknown paths are one, so that clients cannot make up ever more."""
        path = path if path in PATHS else "other"
        self.requests.labels(path, status).inc()
        self.request_seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
