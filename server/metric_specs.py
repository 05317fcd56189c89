"""Every Prometheus metric name, label and bucket, declared once; the reference table is generated from `METRICS`."""

from typing import Literal, NamedTuple

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_GAP = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_DURATION = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_LOAD = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ADAPTERS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# vLLM's own buckets, so that its dashboards draw both servers in one panel.
_VLLM_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_VLLM_TOKEN_GAP = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_VLLM_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_MODEL = ("model_name",)  # the base model, also for requests of adapters, as in vLLM


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
    MetricSpec(
        "vllm:lora_adapter_loaded",
        "gauge",
        ("adapter_name", "level", "pinned"),
        "1 for an adapter on the device (gpu) or in host memory alone (cpu); _other counts those past 256",
    ),
    MetricSpec("vllm:num_gpu_loaded_lora_adapters", "gauge", _MODEL, "Adapter versions on the device"),
    MetricSpec("vllm:num_cpu_loaded_lora_adapters", "gauge", _MODEL, "Adapter versions in host memory alone"),
    MetricSpec("vllm:num_requests_running", "gauge", _MODEL, "loraplex_requests_running in vLLM's name"),
    MetricSpec("vllm:num_requests_waiting", "gauge", _MODEL, "loraplex_requests_waiting in vLLM's name"),
    MetricSpec("vllm:kv_cache_usage_perc", "gauge", _MODEL, "loraplex_kv_cache_usage_ratio in vLLM's name"),
    MetricSpec("vllm:gpu_cache_usage_perc", "gauge", _MODEL, "The same in vLLM's older name"),
    MetricSpec("vllm:num_preemptions_total", "counter", _MODEL, "loraplex_preemptions_total in vLLM's name"),
    MetricSpec("vllm:prefix_cache_queries_total", "counter", _MODEL, "Prompt tokens looked up in the prefix cache"),
    MetricSpec("vllm:prefix_cache_hits_total", "counter", _MODEL, "Prompt tokens found in the prefix cache"),
    MetricSpec("vllm:prompt_tokens_total", "counter", _MODEL, "Prompt tokens of accepted requests"),
    MetricSpec("vllm:generation_tokens_total", "counter", _MODEL, "Tokens generated"),
    MetricSpec(
        "vllm:time_to_first_token_seconds", "histogram", _MODEL, "Time from arrival to first token", _VLLM_FIRST_TOKEN
    ),
    MetricSpec("vllm:inter_token_latency_seconds", "histogram", _MODEL, "Time between tokens", _VLLM_TOKEN_GAP),
    MetricSpec(
        "vllm:time_per_output_token_seconds", "histogram", _MODEL, "The same in vLLM's older name", _VLLM_TOKEN_GAP
    ),
    MetricSpec(
        "vllm:e2e_request_latency_seconds", "histogram", _MODEL, "Time from arrival to last token", _VLLM_REQUEST
    ),
    MetricSpec("vllm:request_queue_time_seconds", "histogram", _MODEL, "Time in the queue", _VLLM_REQUEST),
]
