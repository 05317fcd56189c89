"""The panels of the dashboards, declared once: `deploy.dashboards` writes them for Grafana and for Perses.

The variables `$job`, `$instance` and `$adapter` are those of the dashboard; `$__rate_interval` exists in both programs.
"""

from typing import Literal, NamedTuple

SERVER = 'job=~"$job",instance=~"$instance"'
ADAPTER = f'{SERVER},adapter=~"$adapter"'
RATE = "$__rate_interval"
Unit = Literal["s", "ops", "percentunit", "short"]


class Query(NamedTuple):
    expression: str
    legend: str


class Panel(NamedTuple):
    title: str
    unit: Unit
    description: str
    queries: tuple[Query, ...]


class Dashboard(NamedTuple):
    name: str
    title: str
    panels: tuple[Panel, ...]
    by_adapter: bool = False  # offers a choice of adapters


def _rate(metric: str, by: str, selector: str = SERVER) -> str:
    return f"sum by ({by}) (rate({metric}{{{selector}}}[{RATE}]))"


def _quantiles(histogram: str, selector: str = SERVER) -> tuple[Query, ...]:
    buckets = _rate(f"{histogram}_bucket", "le", selector)
    return tuple(Query(f"histogram_quantile({q}, {buckets})", f"p{q * 100:.0f}") for q in (0.5, 0.95, 0.99))


def _p95(histogram: str, by: str, selector: str = ADAPTER) -> Query:
    buckets = _rate(f"{histogram}_bucket", f"{by}, le", selector)
    return Query(f"histogram_quantile(0.95, {buckets})", f"{{{{{by}}}}}")


def _total(metric: str, by: str = "", selector: str = SERVER) -> str:
    return f"sum by ({by}) ({metric}{{{selector}}})" if by else f"sum({metric}{{{selector}}})"


def _sum_rate(metric: str, selector: str = SERVER) -> str:
    return f"sum(rate({metric}{{{selector}}}[{RATE}]))"


def _ratio(metric: str, to: str) -> str:
    return f"{_sum_rate(metric)} / {_sum_rate(to)}"


def _mean(histogram: str) -> str:
    return _ratio(f"{histogram}_sum", f"{histogram}_count")


_FAILED = f'{SERVER},status=~"5.."'
_ERRORS = f"({_sum_rate('loraplex_requests_total', _FAILED)} or vector(0)) / {_sum_rate('loraplex_requests_total')}"

OVERVIEW = Dashboard(
    "loraplex-overview",
    "Loraplex overview",
    (
        Panel(
            "Requests",
            "ops",
            "Inference requests per second by status.",
            (Query(_rate("loraplex_requests_total", "status"), "{{status}}"),),
        ),
        Panel("Errors", "percentunit", "Share of requests with a status of 500 or more.", (Query(_ERRORS, "errors"),)),
        Panel(
            "Tokens",
            "ops",
            "Tokens per second: computed of prompts, and generated.",
            (
                Query(_sum_rate("loraplex_prompt_tokens_total"), "prompt"),
                Query(_sum_rate("loraplex_generated_tokens_total"), "generated"),
            ),
        ),
        Panel(
            "Time to first token",
            "s",
            "From arrival to the first token.",
            _quantiles("loraplex_time_to_first_token_seconds"),
        ),
        Panel(
            "Time between tokens",
            "s",
            "From one token of a sequence to its next.",
            _quantiles("loraplex_inter_token_latency_seconds"),
        ),
        Panel(
            "Duration of requests",
            "s",
            "From arrival to the last token.",
            _quantiles("loraplex_request_duration_seconds"),
        ),
        Panel(
            "Sequences",
            "short",
            "Sequences in the batch, and sequences that wait to be admitted.",
            (
                Query(_total("loraplex_requests_running"), "running"),
                Query(_total("loraplex_requests_waiting"), "waiting"),
            ),
        ),
        Panel(
            "KV cache",
            "percentunit",
            "Share of KV blocks in use. Near 1, sequences wait or are preempted.",
            (Query(f"max by (instance) (loraplex_kv_cache_usage_ratio{{{SERVER}}})", "{{instance}}"),),
        ),
        Panel(
            "Damage",
            "short",
            "Adapters that are not served because stored data is damaged, and registry files that were put aside.",
            (
                Query(_total("loraplex_adapters_damaged"), "adapters"),
                Query(_total("loraplex_registry_set_aside"), "registry files"),
            ),
        ),
    ),
)

ADAPTERS = Dashboard(
    "loraplex-adapters",
    "Loraplex adapters",
    (
        Panel(
            "Requests by adapter",
            "ops",
            "The ten adapters with the most requests. `_base` is the base model, `_unknown` any name that is none.",
            (Query(f"topk(10, {_rate('loraplex_requests_total', 'adapter', ADAPTER)})", "{{adapter}}"),),
        ),
        Panel(
            "Generated tokens by adapter",
            "ops",
            "Tokens per second of the ten busiest adapters.",
            (Query(f"topk(10, {_rate('loraplex_generated_tokens_total', 'adapter', ADAPTER)})", "{{adapter}}"),),
        ),
        Panel(
            "Time to first token by adapter, p95",
            "s",
            "An adapter that has to be loaded first shows here.",
            (_p95("loraplex_time_to_first_token_seconds", "adapter"),),
        ),
        Panel(
            "Time in the queue by adapter, p95",
            "s",
            "From arrival at the engine to admission to the batch.",
            (_p95("loraplex_queue_seconds", "adapter"),),
        ),
        Panel(
            "Adapters by tier",
            "short",
            "Adapter versions on disk, in host memory and on the device, by state.",
            (Query(_total("loraplex_adapters", "tier, state"), "{{tier}} {{state}}"),),
        ),
        Panel(
            "Device slots",
            "short",
            "Slots that are used, pinned or free. With none free, each further adapter evicts one.",
            (Query(_total("loraplex_adapter_slots", "state"), "{{state}}"),),
        ),
        Panel(
            "Loads",
            "ops",
            "Loads per second by tiers and outcome.",
            (Query(_rate("loraplex_adapter_loads_total", "from, to, outcome"), "{{from}} to {{to}}: {{outcome}}"),),
        ),
        Panel(
            "Time of loads, p95",
            "s",
            "Time of loads by target tier.",
            (_p95("loraplex_adapter_load_seconds", "to", SERVER),),
        ),
        Panel(
            "Evictions",
            "ops",
            "Evictions per second by tier. Many evictions from the device mean too few slots for the traffic.",
            (Query(_rate("loraplex_adapter_evictions_total", "tier"), "{{tier}}"),),
        ),
        Panel(
            "Merged adapter",
            "short",
            "1 while an adapter is merged into the base model.",
            (Query(_total("loraplex_merged_adapter_info", "adapter"), "{{adapter}}"),),
        ),
    ),
    by_adapter=True,
)

ENGINE = Dashboard(
    "loraplex-engine",
    "Loraplex engine",
    (
        Panel("Time of a step", "s", "Time of one engine step.", _quantiles("loraplex_engine_step_seconds")),
        Panel(
            "Steps",
            "ops",
            "Engine steps per second. Zero while sequences run means that the engine hangs.",
            (Query(_rate("loraplex_engine_step_seconds_count", "instance"), "{{instance}}"),),
        ),
        Panel(
            "Tokens in a step",
            "short",
            "Mean number of tokens of a step.",
            (Query(_mean("loraplex_batch_tokens"), "mean"),),
        ),
        Panel(
            "Adapters in a step",
            "short",
            "Distinct adapters in one step.",
            (
                Query(_mean("loraplex_batch_adapters"), "mean"),
                _quantiles("loraplex_batch_adapters")[1],
            ),
        ),
        Panel(
            "Time in the queue", "s", "From arrival at the engine to the batch.", _quantiles("loraplex_queue_seconds")
        ),
        Panel(
            "Prefix cache",
            "percentunit",
            "Share of prompt tokens found in the prefix cache.",
            (
                Query(
                    _ratio("loraplex_prefix_cache_hits_total", "loraplex_prefix_cache_queries_total"),
                    "hits",
                ),
            ),
        ),
        Panel(
            "Preemptions",
            "ops",
            "Sequences that lost their KV blocks and are recomputed, per second.",
            (Query(_rate("loraplex_preemptions_total", "instance"), "{{instance}}"),),
        ),
        Panel(
            "CUDA graphs",
            "percentunit",
            "Share of steps that ran as CUDA graphs; zero on a CPU.",
            (
                Query(
                    _ratio("loraplex_graph_steps_total", "loraplex_engine_step_seconds_count"),
                    "graphs",
                ),
            ),
        ),
        Panel(
            "Merges",
            "ops",
            "Merges of an adapter into the base model and back, per second.",
            (Query(_rate("loraplex_merge_switches_total", "direction, reason"), "{{direction}}: {{reason}}"),),
        ),
        Panel(
            "Checks of the store",
            "ops",
            "Stored versions that were read and compared with their digests, per second.",
            (Query(_rate("loraplex_store_checks_total", "outcome"), "{{outcome}}"),),
        ),
    ),
)

DASHBOARDS = (OVERVIEW, ADAPTERS, ENGINE)
