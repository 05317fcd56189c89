"""Every Prometheus metric name, label and bucket, declared once; the reference table is generated from `METRICS`.

Requests and engine steps update counters and histograms; gauges are read from the engine at scrape time.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from server.ipc.client import EngineClient
from server.ipc.messages import StepOutputs
from server.totals import Totals

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BASE_LABEL, COMPOSED_LABEL, UNKNOWN_LABEL, OTHER_LABEL = "_base", "_composed", "_unknown", "_other"
MAX_ADAPTER_LABELS = 256

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_GAP = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_DURATION = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_LOAD = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ADAPTERS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class MetricSpec(NamedTuple):
    name: str
    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


METRICS: list[MetricSpec] = [
    MetricSpec("loraplex_requests_total", "counter", ("adapter", "route", "status"), "Inference requests by status"),
    MetricSpec(
        "loraplex_time_to_first_token_seconds", "histogram", ("adapter",), "Time from arrival to first token", _LATENCY
    ),
    MetricSpec("loraplex_inter_token_latency_seconds", "histogram", ("adapter",), "Time between tokens", _TOKEN_GAP),
    MetricSpec(
        "loraplex_request_duration_seconds", "histogram", ("adapter",), "Time from arrival to last token", _DURATION
    ),
    MetricSpec("loraplex_queue_seconds", "histogram", ("adapter",), "Time in the queue", _LATENCY),
    MetricSpec("loraplex_prompt_tokens_total", "counter", ("adapter",), "Prompt tokens of accepted requests"),
    MetricSpec("loraplex_generated_tokens_total", "counter", ("adapter",), "Tokens generated"),
    MetricSpec("loraplex_requests_running", "gauge", (), "Sequences in the batch"),
    MetricSpec("loraplex_requests_waiting", "gauge", (), "Sequences waiting to be admitted"),
    MetricSpec("loraplex_kv_cache_usage_ratio", "gauge", (), "Share of KV blocks in use, 0 to 1"),
    MetricSpec("loraplex_prefix_cache_queries_total", "counter", (), "Prompt tokens looked up in the prefix cache"),
    MetricSpec("loraplex_prefix_cache_hits_total", "counter", (), "Prompt tokens found in the prefix cache"),
    MetricSpec("loraplex_preemptions_total", "counter", (), "Sequences preempted and recomputed"),
    MetricSpec("loraplex_adapters", "gauge", ("tier", "state"), "Adapter versions by tier and state"),
    MetricSpec("loraplex_adapter_slots", "gauge", ("state",), "Device slots: used (not pinned), pinned or free"),
    MetricSpec("loraplex_adapter_loads_total", "counter", ("from", "to", "outcome"), "Adapter loads by tier"),
    MetricSpec("loraplex_adapter_load_seconds", "histogram", ("from", "to"), "Time of adapter loads", _LOAD),
    MetricSpec("loraplex_adapter_evictions_total", "counter", ("tier",), "Adapters evicted from a tier"),
    MetricSpec("loraplex_adapters_damaged", "gauge", (), "Names that are not served because stored data is damaged"),
    MetricSpec("loraplex_store_checks_total", "counter", ("outcome",), "Stored versions checked: ok or damaged"),
    MetricSpec("loraplex_registry_set_aside", "gauge", (), "Damaged registry files that await `registry rebuild`"),
    MetricSpec("loraplex_merged_adapter_info", "gauge", ("adapter", "version"), "1 while merged into the base model"),
    MetricSpec("loraplex_merge_switches_total", "counter", ("direction", "reason"), "Merges and unmerges"),
    MetricSpec("loraplex_engine_step_seconds", "histogram", (), "Time of one engine step", _STEP),
    MetricSpec("loraplex_graph_steps_total", "counter", (), "Decode steps run as CUDA graphs"),
    MetricSpec("loraplex_eager_steps_total", "counter", ("reason",), "Steps run without CUDA graphs"),
    MetricSpec("loraplex_batch_adapters", "histogram", (), "Distinct adapters in one step", _ADAPTERS),
    MetricSpec("loraplex_batch_tokens", "histogram", (), "Tokens computed in one step", _TOKENS),
    MetricSpec(
        "vllm:lora_requests_info",
        "gauge",
        ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        "Adapters of running and waiting requests; the value is the time of the scrape",
    ),
    MetricSpec("vllm:num_requests_running", "gauge", (), "loraplex_requests_running, for vLLM's routers"),
    MetricSpec("vllm:num_requests_waiting", "gauge", (), "loraplex_requests_waiting, for vLLM's routers"),
    MetricSpec("vllm:kv_cache_usage_perc", "gauge", (), "loraplex_kv_cache_usage_ratio, for vLLM's routers"),
]

_SPECS = {spec.name: spec for spec in METRICS}
_TIERS = ("disk", "host", "device")


class TokenSeries(NamedTuple):
    """The series that every token of an adapter updates; cached because a lookup by label costs more than a count."""

    generated: Counter
    gaps: Histogram


class Metrics:
    """The metrics of one server, in their own Prometheus registry."""

    def __init__(self) -> None:
        self._token_series: dict[str, TokenSeries] = {}
        self._registry = CollectorRegistry()
        self._names: set[str] = set()
        self._fed: dict[str, Any] = {}
        self.totals = Totals()
        self.requests = self._counter("loraplex_requests_total")
        self.time_to_first_token = self._histogram("loraplex_time_to_first_token_seconds")
        self.inter_token_latency = self._histogram("loraplex_inter_token_latency_seconds")
        self.request_duration = self._histogram("loraplex_request_duration_seconds")
        self.queue = self._histogram("loraplex_queue_seconds")
        self.prompt_tokens = self._counter("loraplex_prompt_tokens_total")
        self.generated_tokens = self._counter("loraplex_generated_tokens_total")
        self._loads = self._counter("loraplex_adapter_loads_total")
        self._load_seconds = self._histogram("loraplex_adapter_load_seconds")
        self._evictions = self._counter("loraplex_adapter_evictions_total")
        self.store_checks = self._counter("loraplex_store_checks_total")
        for outcome in ("ok", "damaged"):
            self.store_checks.labels(outcome)
        self._merge_switches = self._counter("loraplex_merge_switches_total")
        self._step_seconds = self._histogram("loraplex_engine_step_seconds")
        self._batch_adapters = self._histogram("loraplex_batch_adapters")
        self._batch_tokens = self._histogram("loraplex_batch_tokens")

    def _counter(self, name: str) -> Counter:
        spec = _SPECS[name]
        self._fed[name] = Counter(spec.name, spec.help, spec.labels, registry=self._registry)
        return self._fed[name]  # type: ignore[no-any-return]

    def _histogram(self, name: str) -> Histogram:
        spec = _SPECS[name]
        self._fed[name] = Histogram(spec.name, spec.help, spec.labels, buckets=spec.buckets, registry=self._registry)
        return self._fed[name]  # type: ignore[no-any-return]

    def watch(
        self, engine: EngineClient, names_of: Callable[[str], list[str]], digests: Callable[[], set[str]]
    ) -> None:
        """Listen to the engine's steps and read its gauges at each scrape. `digests` returns all published versions."""
        engine.add_listener(self._on_step)
        self._registry.register(_EngineGauges(engine, names_of, digests, self.label))

    def watch_registry(self, damaged: Callable[[], int], set_aside: Callable[[], int]) -> None:
        """Read the number of damaged adapters and of registry files that were put aside at each scrape."""
        self._registry.register(_RegistryGauges(damaged, set_aside))

    def add_adapter(self, name: str) -> None:
        """Give a registered adapter its own label value, up to `MAX_ADAPTER_LABELS` adapters."""
        if len(self._names) < MAX_ADAPTER_LABELS:
            self._names.add(name)

    def label(self, name: str) -> str:
        """Return the `adapter` label of a registered name ("" is the base model). The number of labels is bounded.
        Requests for several adapters count under `_composed`."""
        if not name:
            return BASE_LABEL
        return name if name in self._names or name == COMPOSED_LABEL else OTHER_LABEL

    def token_series(self, name: str) -> TokenSeries:
        label = self.label(name)
        series = self._token_series.get(label)
        if series is None:
            series = TokenSeries(self.generated_tokens.labels(label), self.inter_token_latency.labels(label))
            self._token_series[label] = series
        return series

    def remove_adapter(self, name: str) -> None:
        """Remove the series of a deleted adapter. Its remaining requests count under `_other`."""
        if name in self._names:
            self._names.discard(name)
            self._token_series.pop(name, None)
            for metric_name, metric in self._fed.items():
                if "adapter" in _SPECS[metric_name].labels:
                    metric.remove_by_labels({"adapter": name})

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def _on_step(self, step: StepOutputs) -> None:
        for move in step.moves:
            if _TIERS.index(move.target) > _TIERS.index(move.source):
                self._loads.labels(move.source, move.target, move.outcome).inc()
                self._load_seconds.labels(move.source, move.target).observe(move.seconds)
            else:
                self._evictions.labels(move.source).inc()
        for switch in step.switches:
            self._merge_switches.labels(switch.direction, switch.reason).inc()
        if step.stats.batch_tokens:
            self._step_seconds.observe(step.stats.step_seconds)
            self._batch_tokens.observe(step.stats.batch_tokens)
            self._batch_adapters.observe(step.stats.batch_adapters)
            self.totals.batch_adapters.add(step.stats.batch_adapters)


class RequestTimer:
    """Measures one request: time to first token, gaps between tokens, duration."""

    def __init__(self, metrics: Metrics, name: str, started: float):
        self._metrics = metrics
        self._name = name
        self._started = started
        self._last: dict[int, float] = {}  # time of the latest token, by choice
        self._ended = False

    def submitted(self, prompt_tokens: int) -> None:
        self._metrics.prompt_tokens.labels(self._metrics.label(self._name)).inc(prompt_tokens)
        self._metrics.totals.prompt_tokens += prompt_tokens
        self._metrics.totals.requests += 1

    def tokens(self, choice: int, count: int, queue_seconds: float) -> None:
        if not count:
            return
        now, series, totals = time.monotonic(), self._metrics.token_series(self._name), self._metrics.totals
        series.generated.inc(count)
        totals.output_tokens += count
        if choice in self._last:
            gap = (now - self._last[choice]) / count
            series.gaps.observe(gap)
            totals.gaps.add(gap)
        else:
            label = self._metrics.label(self._name)
            self._metrics.queue.labels(label).observe(queue_seconds)
            if not self._last:
                self._metrics.time_to_first_token.labels(label).observe(now - self._started)
                totals.first_tokens.add(now - self._started)
        self._last[choice] = now

    def ended(self) -> None:
        if not self._ended:
            self._ended = True
            duration = time.monotonic() - self._started
            self._metrics.request_duration.labels(self._metrics.label(self._name)).observe(duration)


class _EngineGauges:
    """The engine's latest state as gauges, collected at scrape time, so that nothing is updated between scrapes."""

    def __init__(
        self,
        engine: EngineClient,
        names_of: Callable[[str], list[str]],
        digests: Callable[[], set[str]],
        label: Callable[[str], str],
    ):
        self._label = label
        self._engine = engine
        self._names_of = names_of
        self._digests = digests

    def collect(self) -> Iterator[Metric]:
        yield from self._load()
        yield from self._adapters()

    def describe(self) -> Iterator[Metric]:
        """Describe nothing at registration, because the adapter registry may not be open yet."""
        return iter(())

    def _load(self) -> Iterator[Metric]:
        stats = self._engine.stats
        usage = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        for name, value in (
            ("loraplex_requests_running", stats.running),
            ("loraplex_requests_waiting", stats.waiting),
            ("loraplex_kv_cache_usage_ratio", usage),
            ("loraplex_prefix_cache_queries_total", stats.prefix_queries),
            ("loraplex_prefix_cache_hits_total", stats.prefix_hits),
            ("loraplex_preemptions_total", stats.preemptions),
            ("loraplex_graph_steps_total", stats.graph_steps),
            ("vllm:num_requests_running", stats.running),
            ("vllm:num_requests_waiting", stats.waiting),
            ("vllm:kv_cache_usage_perc", usage),
        ):
            yield _sampled(name, {(): value})
        yield _sampled("loraplex_eager_steps_total", {(reason,): n for reason, n in stats.eager_steps.items()})

    def _adapters(self) -> Iterator[Metric]:
        stats = self._engine.stats
        slots: dict[tuple[str, ...], float] = {
            ("used",): stats.slots_used - stats.slots_pinned,
            ("pinned",): stats.slots_pinned,
            ("free",): stats.slots_total - stats.slots_used,
        }
        running, waiting = self._names(stats.running_adapters), self._names(stats.waiting_adapters)
        yield _sampled("loraplex_adapter_slots", slots)
        yield _sampled("loraplex_adapters", self._count_adapters())
        yield _sampled("loraplex_merged_adapter_info", self._merged())
        yield _sampled("vllm:lora_requests_info", {(str(stats.slots_total), running, waiting): time.time()})

    def _merged(self) -> dict[tuple[str, ...], float]:
        merge = self._engine.merge_status
        if merge.digest is None or merge.state not in ("merged", "leaving"):
            return {}
        return {(self._label(name), merge.digest[:12]): 1 for name in self._names_of(merge.digest)}

    def _names(self, digests: list[str]) -> str:
        return ",".join(sorted({name for digest in digests for name in self._names_of(digest)}))

    def _count_adapters(self) -> dict[tuple[str, ...], float]:
        residency = self._engine.residency
        device, host, loading = set(residency.device), set(residency.host), set(residency.loading)
        counts: dict[tuple[str, ...], float] = {(tier, "ready"): 0 for tier in _TIERS}
        for digest in self._digests() | device | host:
            tier = "device" if digest in device else "host" if digest in host else "disk"
            failed = digest in residency.failed
            state = "failed" if failed else "loading" if digest in loading else "ready"
            counts[tier, state] = counts.get((tier, state), 0) + 1
        return counts


class _RegistryGauges:
    """The damage that the registry knows of, collected at scrape time."""

    def __init__(self, damaged: Callable[[], int], set_aside: Callable[[], int]):
        self._damaged = damaged
        self._set_aside = set_aside

    def collect(self) -> Iterator[Metric]:
        yield _sampled("loraplex_adapters_damaged", {(): self._damaged()})
        yield _sampled("loraplex_registry_set_aside", {(): self._set_aside()})

    def describe(self) -> Iterator[Metric]:
        """Describe nothing at registration, because the adapter registry may not be open yet."""
        return iter(())


def _sampled(name: str, samples: dict[tuple[str, ...], float]) -> Metric:
    spec = _SPECS[name]
    family = CounterMetricFamily if spec.type == "counter" else GaugeMetricFamily
    metric = family(spec.name, spec.help, labels=spec.labels)
    for labels, value in samples.items():
        metric.add_metric(labels, value)
    return metric
