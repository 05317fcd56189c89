"""The Prometheus metrics that `server.metric_specs` declares. Requests and engine steps update counters and histograms;
gauges are read from the engine at scrape time."""

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from server.ipc.client import EngineClient
from server.ipc.messages import StepOutputs
from server.metric_specs import METRICS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BASE_LABEL, COMPOSED_LABEL, UNKNOWN_LABEL, OTHER_LABEL = "_base", "_composed", "_unknown", "_other"
MAX_ADAPTER_LABELS = 256

# Histograms of the server that have one series for each adapter here, and one for all of them in vLLM's name.
_IN_VLLM = {
    "loraplex_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "loraplex_request_duration_seconds": "vllm:e2e_request_latency_seconds",
    "loraplex_queue_seconds": "vllm:request_queue_time_seconds",
}
_SPECS = {spec.name: spec for spec in METRICS}
_TIERS = ("disk", "host", "device")


class TokenSeries(NamedTuple):
    """The series that every token of an adapter updates; cached because a lookup by label costs more than a count."""

    generated: Counter
    gaps: Histogram


class Metrics:
    """The metrics of one server, in their own Prometheus registry."""

    def __init__(self, model_name: str) -> None:
        """`model_name` is the base model's, the label of vLLM's metrics."""
        self._model_name = model_name
        self._token_series: dict[str, TokenSeries] = {}
        self._registry = CollectorRegistry()
        self._names: set[str] = set()
        self._fed: dict[str, Any] = {}
        self.requests = self._counter("loraplex_requests_total")
        self._latencies = {
            name: (self._histogram(name), self._histogram(in_vllm).labels(model_name))
            for name, in_vllm in _IN_VLLM.items()
        }
        self._gaps = self._histogram("loraplex_inter_token_latency_seconds")
        self._all_gaps = self._histogram("vllm:inter_token_latency_seconds")
        self._gaps_in_vllm = self._all_gaps.labels(model_name)
        self._prompt_tokens = self._counter("loraplex_prompt_tokens_total")
        self._generated_tokens = self._counter("loraplex_generated_tokens_total")
        self._prompt_tokens_in_vllm = self._counter("vllm:prompt_tokens_total").labels(model_name)
        self._generated_tokens_in_vllm = self._counter("vllm:generation_tokens_total").labels(model_name)
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
        self._registry.register(_InVllm(self._model_name, engine, names_of, self._all_gaps))

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
            series = TokenSeries(self._generated_tokens.labels(label), self._gaps.labels(label))
            self._token_series[label] = series
        return series

    def add_prompt_tokens(self, name: str, count: int) -> None:
        self._prompt_tokens.labels(self.label(name)).inc(count)
        self._prompt_tokens_in_vllm.inc(count)

    def add_tokens(self, name: str, count: int, gap: float | None) -> None:
        """Count tokens that came `gap` seconds apart; None for the first ones of a sequence."""
        series = self.token_series(name)
        series.generated.inc(count)
        self._generated_tokens_in_vllm.inc(count)
        if gap is not None:
            series.gaps.observe(gap)
            self._gaps_in_vllm.observe(gap)

    def observe(self, metric: str, name: str, seconds: float) -> None:
        """Observe a latency of a request, under its adapter and in vLLM's metric."""
        by_adapter, in_vllm = self._latencies[metric]
        by_adapter.labels(self.label(name)).observe(seconds)
        in_vllm.observe(seconds)

    def remove_adapter(self, name: str) -> None:
        """Remove the series of a deleted adapter. Its remaining requests count under `_other`."""
        if name in self._names:
            self._names.discard(name)
            self._token_series.pop(name, None)
            for metric_name, metric in self._fed.items():
                if "adapter" in _SPECS[metric_name].labels:
                    metric.remove_by_labels({"adapter": name})

    def summed(self, name: str) -> dict[str, float]:
        """Return a metric's samples summed over all labels: of a histogram by upper bound ("+Inf" is the number of
        observations), of a counter under ""."""
        sums: dict[str, float] = {}
        for metric in self._fed[name].collect():
            for sample in metric.samples:
                if sample.name.endswith(("_bucket", "_total")):
                    bound = sample.labels.get("le", "")
                    sums[bound] = sums.get(bound, 0.0) + sample.value
        return sums

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


class RequestTimer:
    """Measures one request: time to first token, gaps between tokens, duration."""

    def __init__(self, metrics: Metrics, name: str, started: float):
        self._metrics = metrics
        self._name = name
        self._started = started
        self._last: dict[int, float] = {}  # time of the latest token, by choice
        self._ended = False

    def submitted(self, prompt_tokens: int) -> None:
        self._metrics.add_prompt_tokens(self._name, prompt_tokens)

    def tokens(self, choice: int, count: int, queue_seconds: float) -> None:
        if not count:
            return
        now, last = time.monotonic(), self._last.get(choice)
        self._metrics.add_tokens(self._name, count, None if last is None else (now - last) / count)
        if last is None:
            self._metrics.observe("loraplex_queue_seconds", self._name, queue_seconds)
            if not self._last:
                self._metrics.observe("loraplex_time_to_first_token_seconds", self._name, now - self._started)
        self._last[choice] = now

    def ended(self) -> None:
        if not self._ended:
            self._ended = True
            duration = time.monotonic() - self._started
            self._metrics.observe("loraplex_request_duration_seconds", self._name, duration)


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


class _InVllm:
    """The engine's latest state in vLLM's metrics, whose label is the base model alone, so that their number does not
    depend on the number of adapters."""

    def __init__(
        self,
        model_name: str,
        engine: EngineClient,
        names_of: Callable[[str], list[str]],
        gaps: Histogram,
    ):
        self._model = (model_name,)
        self._engine = engine
        self._names_of = names_of
        self._gaps = gaps

    def collect(self) -> Iterator[Metric]:
        stats, residency = self._engine.stats, self._engine.residency
        device = set(residency.device)
        host = set(residency.host) - device
        usage = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        for name, value in (
            ("vllm:num_gpu_loaded_lora_adapters", len(device)),
            ("vllm:num_cpu_loaded_lora_adapters", len(host)),
            ("vllm:num_requests_running", stats.running),
            ("vllm:num_requests_waiting", stats.waiting),
            ("vllm:kv_cache_usage_perc", usage),
            ("vllm:gpu_cache_usage_perc", usage),
            ("vllm:num_preemptions_total", stats.preemptions),
            ("vllm:prefix_cache_queries_total", stats.prefix_queries),
            ("vllm:prefix_cache_hits_total", stats.prefix_hits),
        ):
            yield _sampled(name, {self._model: value})
        yield _sampled("vllm:lora_adapter_loaded", self._loaded({"gpu": device, "cpu": host}))
        yield _renamed(self._gaps, "vllm:time_per_output_token_seconds")

    def describe(self) -> Iterator[Metric]:
        """Describe nothing at registration, because the adapter registry may not be open yet."""
        return iter(())

    def _loaded(self, levels: dict[str, set[str]]) -> dict[tuple[str, ...], float]:
        """Return the number of loaded adapters by name, level and pin: those on the device first, and past
        `MAX_ADAPTER_LABELS` names under one label."""
        pinned, found = self._engine.residency.pinned, Tally[tuple[str, ...]]()
        for level, digests in levels.items():
            named = sorted(
                (name, str(digest in pinned).lower()) for digest in digests for name in self._names_of(digest)
            )
            for name, is_pinned in named:
                label = name if len(found) < MAX_ADAPTER_LABELS else OTHER_LABEL
                found[label, level, is_pinned] += 1
        return dict(found)


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


def _renamed(metric: Histogram, name: str) -> Metric:
    """Return the samples of a histogram under another name."""
    (found,), spec = metric.collect(), _SPECS[name]
    copy = Metric(spec.name, spec.help, spec.type)
    copy.samples = [each._replace(name=each.name.replace(found.name, name)) for each in found.samples]
    return copy


def _sampled(name: str, samples: dict[tuple[str, ...], float]) -> Metric:
    spec = _SPECS[name]
    family = CounterMetricFamily if spec.type == "counter" else GaugeMetricFamily
    metric = family(spec.name, spec.help, labels=spec.labels)
    for labels, value in samples.items():
        metric.add_metric(labels, value)
    return metric
