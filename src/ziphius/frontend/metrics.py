"""Numbers about the service, for /metrics and /status. They are counted where things happen."""

from __future__ import annotations

import bisect
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ziphius.ipc.messages import EngineStats

_LATENCY = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0, 200.0, 400.0)
_TOKEN_LATENCY = (
    0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.025, 0.030, 0.035, 0.040, 0.060, 0.080, 0.100, 0.200, 0.400,
    0.600, 0.800, 1.0, 2.0, 4.0, 8.0,
)  # fmt: skip
_TOKENS = (1.0, 10.0, 50.0, 100.0, 200.0, 400.0, 700.0, 1000.0, 2000.0, 4000.0, 8000.0, 16000.0, 32000.0, 128000.0)


class Histogram:
    """Counts per bucket. It is cheaper than prometheus_client's, because it is updated once per token."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, name: str, help: str, labels: dict[str, str]) -> HistogramMetricFamily:
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(name, help, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family


class TokenRate:
    """Events per second over the last few whole seconds."""

    WINDOW_S = 5

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: deque[tuple[int, int]] = deque()

    def add(self, count: int) -> None:
        second = int(self._clock())
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1] = (second, self._seconds[-1][1] + count)
            return
        self._seconds.append((second, count))
        while self._seconds[0][0] < second - self.WINDOW_S:
            self._seconds.popleft()

    def rate(self) -> float:
        """The mean over the window's seconds that are over. Seconds before the first event do not count."""
        now = int(self._clock())
        recent = [(second, count) for second, count in self._seconds if now - self.WINDOW_S <= second < now]
        if not recent:
            return 0.0
        return sum(count for _, count in recent) / (now - recent[0][0])


@dataclass(slots=True)
class Metrics:
    """Everything that this process counts. A number that SGLang has too has SGLang's name."""

    model_name: str = ""
    engine: EngineStats = field(default_factory=EngineStats)
    """The engine's latest statistics."""
    context_length: int = 0
    open_requests: int = 0
    requests: int = 0
    aborted: int = 0
    failed: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """By reason: queue_full, not_ready, ..."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(_LATENCY))
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(_TOKEN_LATENCY))
    e2e_latency: Histogram = field(default_factory=lambda: Histogram(_LATENCY))
    prompt_lengths: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    generation_lengths: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    http_requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By endpoint and method."""
    http_responses: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By endpoint, method and status code."""
    http_active: int = 0
    generated_rate: TokenRate = field(default_factory=TokenRate)
    prompt_rate: TokenRate = field(default_factory=TokenRate)

    @property
    def kv_tokens(self) -> int:
        return self.engine.pages_total * self.engine.page_size

    @property
    def kv_tokens_used(self) -> int:
        """Tokens of running requests. What only the prefix cache keeps can be evicted and does not count."""
        engine = self.engine
        return (engine.pages_total - engine.pages_free - engine.pages_cached) * engine.page_size


class Exposition:
    """The Prometheus text of one server's Metrics."""

    CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing. Without this method the registry would collect once only to learn the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        labels = {"model_name": self._metrics.model_name}
        for name, help, value in self._gauges():
            gauge = GaugeMetricFamily(name, help, labels=list(labels))
            gauge.add_metric(list(labels.values()), value)
            yield gauge
        for name, help, value in self._counters():
            counter = CounterMetricFamily(name, help, labels=list(labels))
            counter.add_metric(list(labels.values()), value)
            yield counter
        for name, help, histogram in self._histograms():
            yield histogram.family(name, help, labels)
        yield from self._labelled()

    def _gauges(self) -> list[tuple[str, str, float]]:
        m, engine = self._metrics, self._metrics.engine
        size = engine.page_size
        hit_rate = engine.cached_tokens / engine.prompt_tokens if engine.prompt_tokens else 0.0
        return [
            ("sglang:num_running_reqs", "Requests being computed.", engine.running),
            ("sglang:num_queue_reqs", "Requests waiting for a place in the batch.", engine.queued),
            ("sglang:gen_throughput", "Generated tokens per second, lately.", m.generated_rate.rate()),
            ("sglang:cache_hit_rate", "Share of prompt tokens found in the prefix cache since start.", hit_rate),
            ("sglang:token_usage", "Share of the KV cache held by requests.",
             m.kv_tokens_used / m.kv_tokens if m.kv_tokens else 0.0),
            ("sglang:num_used_tokens", "Tokens of the KV cache held by requests.", m.kv_tokens_used),
            ("sglang:kv_used_tokens", "Tokens of the KV cache held by requests.", m.kv_tokens_used),
            ("sglang:kv_available_tokens", "Tokens of the KV cache that hold nothing.", engine.pages_free * size),
            ("sglang:kv_evictable_tokens", "Tokens that only the prefix cache keeps.", engine.pages_cached * size),
            ("sglang:max_total_num_tokens", "Size of the KV cache in tokens.", m.kv_tokens),
            ("sglang:num_pages", "Pages of the KV cache.", engine.pages_total),
            ("sglang:page_size", "Tokens in a page.", size),
            ("sglang:context_len", "Longest prompt and answer together.", m.context_length),
            ("ziphius:open_requests", "Requests that this server has not finished yet.", m.open_requests),
            ("ziphius:prompt_throughput", "Prompt tokens per second, lately.", m.prompt_rate.rate()),
            ("sglang:http_requests_active", "HTTP requests being answered.", m.http_active),
        ]  # fmt: skip

    def _counters(self) -> list[tuple[str, str, float]]:
        m = self._metrics
        return [
            ("sglang:num_requests", "Requests that ended.", m.requests),
            ("sglang:num_aborted_requests", "Requests that were aborted.", m.aborted),
            ("ziphius:num_failed_requests", "Requests that ended in an error of the engine.", m.failed),
            ("sglang:prompt_tokens", "Prompt tokens of requests that began to be answered.", m.prompt_tokens),
            ("sglang:cached_tokens", "Of these, tokens found in the prefix cache.", m.cached_tokens),
            ("sglang:generation_tokens", "Tokens generated.", m.generated_tokens),
            ("sglang:num_retractions", "Preemptions: requests that gave up their pages for a while.",
             m.engine.preemptions),
            ("ziphius:engine_steps", "Steps of the engine.", m.engine.steps),
        ]  # fmt: skip

    def _histograms(self) -> list[tuple[str, str, Histogram]]:
        m = self._metrics
        return [
            ("sglang:time_to_first_token_seconds", "From arrival to the first token.", m.time_to_first_token),
            ("sglang:inter_token_latency_seconds", "Between two tokens of a request.", m.inter_token_latency),
            ("sglang:e2e_request_latency_seconds", "From arrival to the end.", m.e2e_latency),
            ("sglang:prompt_tokens_histogram", "Prompt lengths.", m.prompt_lengths),
            ("sglang:generation_tokens_histogram", "Answer lengths.", m.generation_lengths),
        ]

    def _labelled(self) -> Iterable[Metric]:
        m = self._metrics
        rejected = CounterMetricFamily("ziphius:rejected_requests", "Requests refused, by reason.", labels=["reason"])
        for reason, count in m.rejected.items():
            rejected.add_metric([reason], count)
        requests = CounterMetricFamily("sglang:http_requests", "HTTP requests.", labels=["endpoint", "method"])
        for key, count in m.http_requests.items():
            requests.add_metric(list(key), count)
        responses = CounterMetricFamily(
            "sglang:http_responses", "HTTP responses.", labels=["endpoint", "method", "status_code"]
        )
        for response, count in m.http_responses.items():
            responses.add_metric(list(response), count)
        return (rejected, requests, responses)
