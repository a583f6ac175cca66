"""What a server tells Prometheus. Labels have few values: names of models, not what clients send."""

from __future__ import annotations

import os

STAGES = ("read", "decode", "queue", "run", "total")
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""Where several processes keep what they count together, by prometheus_client's own rule."""


class Metrics:
    """Counters of one process; with several processes they are added up where they are read."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        self._requests = Counter(
            "convscale_requests", "Requests answered.", ["endpoint", "model", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "convscale_seconds",
            "Seconds of a request by stage: read, decode, queue, run, total.",
            ["model", "stage"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._batches = Histogram(
            "convscale_batch_images", "Images of a batch.", ["model"], buckets=IMAGES, registry=self._registry
        )
        self._dropped = Counter(
            "convscale_dropped",
            "Work that was not done: the client left, it came too late, the queue was full.",
            ["model", "why"],
            registry=self._registry,
        )
        self._swaps = Counter(
            "convscale_versions", "Versions taken up, and refused.", ["model", "outcome"], registry=self._registry
        )
        self._open = Gauge(
            "convscale_open_requests",
            "Requests being answered.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )

    def request(self, endpoint: str, model: str, status: int, seconds: float) -> None:
        """A request was answered; ``model``: a known one's name, or empty."""
        self._requests.labels(endpoint, model, str(status)).inc()
        if endpoint in ("infer", "classify") and model:
            self.stage(model, "total", seconds)

    def opened(self, change: int) -> None:
        """A request came (1) or went (-1)."""
        self._open.inc(change)

    def stage(self, model: str, stage: str, seconds: float) -> None:
        """What a stage of ``STAGES`` took."""
        self._seconds.labels(model, stage).observe(seconds)

    def dropped(self, model: str, why: str) -> None:
        """Work was not done: ``left``, ``late`` or ``full``."""
        self._dropped.labels(model, why).inc()

    def version(self, model: str, outcome: str) -> None:
        """A version was ``taken`` or ``refused``."""
        self._swaps.labels(model, outcome).inc()

    def watching(self, model: str) -> OfModel:
        """What the batcher of a model tells."""
        return OfModel(self, model)

    def batch(self, model: str, images: int, run_s: float) -> None:
        """A batch was run."""
        self._batches.labels(model).observe(images)
        self.stage(model, "run", run_s)

    def text(self) -> tuple[bytes, str]:
        """All of it, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

        registry = self._registry
        if os.environ.get(SHARED):
            from prometheus_client.multiprocess import MultiProcessCollector

            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry), CONTENT_TYPE_LATEST


class OfModel:
    """The metrics of one model's batcher."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model

    def batch(self, images: int, run_s: float) -> None:
        """A batch was run."""
        self._metrics.batch(self._model, images, run_s)

    def dropped(self, why: str) -> None:
        """A job was not run."""
        self._metrics.dropped(self._model, why)
