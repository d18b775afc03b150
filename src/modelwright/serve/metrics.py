"""Counts and times for Prometheus, in a registry of their own so that two servers in one process do not mix.

Time to first token counts from the moment the request was understood, so it includes waiting in the queue.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from modelwright.base.types import Usage
from modelwright.serve.web import prometheus_client as prometheus
from modelwright.serve.web import text_string_to_metric_families

TIME_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60, 120)
GAP_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)


class EngineCollector:
    """Reads the engine's own figures at the moment they are asked for."""

    def __init__(self, stats: Callable[[], Any]):
        self.stats = stats

    def collect(self) -> Iterable[Any]:
        """Yield one gauge for each number in the engine's statistics."""
        stats = self.stats()
        for name in sorted(getattr(stats, "__dataclass_fields__", {})):
            value = getattr(stats, name)
            if isinstance(value, (int, float)):
                text = f"The engine's {name.replace('_', ' ')}."
                yield prometheus.metrics_core.GaugeMetricFamily(f"modelwright_engine_{name}", text, float(value))


class Metrics:
    """What one server counts."""

    def __init__(self, stats: Callable[[], Any] | None):
        self.registry = registry = prometheus.CollectorRegistry()
        made: dict[str, Any] = {"registry": registry, "namespace": "modelwright"}
        self.requests = prometheus.Counter("requests", "HTTP requests answered.", ["route", "status"], **made)
        self.cut_off = prometheus.Counter("answers_cut_off", "Answers whose client went away.", **made)
        self.tokens = prometheus.Counter("tokens", "Tokens by kind: prompt, cached, completion.", ["kind"], **made)
        self.running = prometheus.Gauge("running_answers", "Answers being written.", ["model"], **made)
        self.first = prometheus.Histogram(
            "time_to_first_token_seconds", "Wait for the first text.", ["model"], buckets=TIME_BUCKETS, **made
        )
        self.gaps = prometheus.Histogram(
            "inter_token_seconds", "Time between pieces of text.", ["model"], buckets=GAP_BUCKETS, **made
        )
        self.whole = prometheus.Histogram(
            "answer_seconds", "Time for a whole answer.", ["model"], buckets=TIME_BUCKETS, **made
        )
        if stats is not None:
            registry.register(EngineCollector(stats))  # type: ignore[arg-type]

    def count_usage(self, usage: Usage) -> None:
        """Add the tokens of one answer."""
        self.tokens.labels("prompt").inc(usage.prompt_tokens)
        self.tokens.labels("cached").inc(usage.cached_tokens)
        self.tokens.labels("completion").inc(usage.completion_tokens)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return prometheus.generate_latest(self.registry)


class Timer:
    """Times the pieces of one answer for `Metrics`."""

    def __init__(self, metrics: Metrics, model: str):
        self.metrics, self.model = metrics, model
        self.start = self.last = time.perf_counter()
        self.is_first = True

    def lap(self) -> None:
        """Note one piece."""
        now = time.perf_counter()
        kind = self.metrics.first if self.is_first else self.metrics.gaps
        kind.labels(self.model).observe(now - self.last)
        self.last, self.is_first = now, False

    def finish(self) -> None:
        """Note the end of the answer."""
        self.metrics.whole.labels(self.model).observe(time.perf_counter() - self.start)


class Labelled:
    """The figures of several processes, each with the name of its process as the label ``replica``."""

    def __init__(self, texts: Mapping[str, str]):
        self.texts = texts

    def collect(self) -> Iterable[Any]:
        """Yield one family for each metric, with the samples of all processes."""
        families: dict[str, Any] = {}
        for name, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                kept = families.setdefault(family.name, type(family)(family.name, family.documentation, family.type))
                kept.samples += [s._replace(labels={**s.labels, "replica": name}) for s in family.samples]
        return families.values()


def merged(texts: Mapping[str, str]) -> bytes:
    """Return one text of the figures of several processes, by their names."""
    registry = prometheus.CollectorRegistry()
    registry.register(Labelled(texts))  # type: ignore[arg-type]
    return prometheus.generate_latest(registry)
