"""Numbers of the engine for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jax_mla.serving.events import Stats

_GAUGES = {
    "running": "Requests in the batch",
    "waiting": "Requests in the queue",
    "num_pages": "Pages of the pool",
    "pages_in_use": "Pages that requests hold",
    "cached_pages": "Pages that nobody holds and whose tokens can be found",
}
_COUNTERS = {
    "computed_tokens": "Tokens put through the model",
    "hit_tokens": "Tokens of prompts found in the prefix cache",
    "generated_tokens": "Tokens written",
    "preemptions": "Requests that lost their pages and wait again",
    "page_copies": "Pages copied before a write",
    "steps": "Calls of a program",
    "recompiles": "Programs compiled after the warm-up",
}


def exposition(stats: Stats) -> bytes:
    """Stats in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Engine(stats))
    return generate_latest(registry)


class _Engine(Collector):
    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        for name, what in _GAUGES.items():
            yield GaugeMetricFamily(f"jax_mla_{name}", what, getattr(self._stats, name))
        for name, what in _COUNTERS.items():
            yield CounterMetricFamily(f"jax_mla_{name}", what, getattr(self._stats, name))
        finished = CounterMetricFamily(
            "jax_mla_finished_requests", "Requests that have ended, by reason", labels=["reason"]
        )
        for reason, count in self._stats.finished.items():
            finished.add_metric([reason], count)
        yield finished
