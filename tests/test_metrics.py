import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.ipc.client import EngineClient
from server.ipc.messages import EngineStats, MergeStatus, ResidencyReport
from server.metric_specs import METRICS
from server.metrics import MAX_ADAPTER_LABELS, Metrics
from tests.fixtures.api_server import BASE, Api, serving
from tests.fixtures.timing import eventually

MODEL = (("model_name", BASE),)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def samples(api: Api) -> Samples:
    text = (await api.http.get("/metrics")).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_everything_declared_is_exposed_and_nothing_else(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        await api.http.post("/v1/adapters/acme/load")
        await api.http.post("/v1/adapters/acme/unload")
        await api.http.post("/v1/merge", json={"name": "acme"})
        await api.chat(model="acme")
        await api.upload("beta", seed=1)
        await api.http.post("/v1/adapters/beta/load")
        text = (await api.http.get("/metrics")).text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        created = {name for name in families if name.endswith("_created")}
        assert families.keys() - created == {spec.name.removesuffix("_total") for spec in METRICS}
        for spec in METRICS:
            family = families[spec.name.removesuffix("_total")]
            assert family.type == spec.type and family.documentation == spec.help
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            assert labels == set(spec.labels), spec.name


async def test_requests_are_counted_by_adapter_route_and_status(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        await api.chat(model="acme")
        await api.complete()
        await api.chat(model="nope")
        await api.chat(n=129)
        api.engine.fail_after = 2
        await api.chat(stream=True)
        found = await samples(api)
        chat, plain = "/v1/chat/completions", "/v1/completions"
        expected = {
            ("acme", chat, "200"),
            ("_base", plain, "200"),
            ("_unknown", chat, "404"),
            ("_unknown", chat, "400"),
        }
        expected.add(("_base", chat, "500"))  # the stream that began well and failed
        counted = {
            tuple(dict(labels)[label] for label in ("adapter", "route", "status"))
            for name, labels in found
            if name == "loraplex_requests_total"
        }
        assert counted == expected
        acme = (("adapter", "acme"),)
        assert found["loraplex_generated_tokens_total", acme] == 12
        assert found["loraplex_prompt_tokens_total", acme] > 0
        for histogram in ("time_to_first_token_seconds", "request_duration_seconds", "queue_seconds"):
            assert found[f"loraplex_{histogram}_count", acme] == 1
        assert found["loraplex_inter_token_latency_seconds_count", acme] == 11


@pytest.mark.reliability("T26")
async def test_a_client_that_names_unknown_models_makes_no_series(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.chat(model="nope-0")
        before = len(await samples(api))
        for i in range(50):
            await api.chat(model=f"nope-{i}")
        assert len(await samples(api)) == before


@pytest.mark.reliability("T26")
async def test_a_deleted_adapter_leaves_no_series(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        api.waits_after(1)
        running = asyncio.create_task(api.chat(model="acme"))
        await eventually(lambda: api.generated)
        deleting = asyncio.create_task(api.http.delete("/v1/adapters/acme"))
        await eventually(lambda: "acme" not in api.context.registry)
        api.goes_on()
        assert (await running).status_code == (await deleting).status_code == 200
        text = (await api.http.get("/metrics")).text
        assert "acme" not in text
        stats = (await api.http.get("/v1/stats")).json()
        assert [use["name"] for use in stats["adapters"]] == []


@pytest.mark.reliability("T26")
def test_labels_are_bounded() -> None:
    metrics = Metrics("base")
    for i in range(MAX_ADAPTER_LABELS + 10):
        metrics.add_adapter(f"a{i}")
    assert metrics.label("") == "_base" and metrics.label("a0") == "a0"
    assert metrics.label(f"a{MAX_ADAPTER_LABELS}") == "_other"
    metrics.remove_adapter("a0")
    assert metrics.label("a0") == "_other"
    metrics.add_adapter("late")
    assert metrics.label("late") == "late"


async def test_gauges_say_what_the_engine_said_last(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        await api.upload("beta", seed=1)
        await api.http.post("/v1/adapters/acme/pin")
        await api.http.post("/v1/adapters/beta/unload")  # a small version may be loaded ahead of its first request
        api.waits_after(1)
        running = asyncio.create_task(api.chat(model="acme"))
        await eventually(lambda: api.generated)
        found = await samples(api)
        api.goes_on()
        await running
        assert found["loraplex_requests_running", ()] == found["vllm:num_requests_running", MODEL] == 1
        assert found["loraplex_kv_cache_usage_ratio", ()] == found["vllm:kv_cache_usage_perc", MODEL] == 0.01
        assert found["vllm:gpu_cache_usage_perc", MODEL] == 0.01
        assert found["vllm:num_gpu_loaded_lora_adapters", MODEL] == 1
        assert found["vllm:num_cpu_loaded_lora_adapters", MODEL] == 0
        assert found["vllm:lora_adapter_loaded", loaded("acme", "gpu", "true")] == 1
        assert found["loraplex_graph_steps_total", ()] == 7
        assert found["loraplex_eager_steps_total", (("reason", "prefill"),)] == 3
        assert found["loraplex_adapter_slots", (("state", "pinned"),)] == 1
        assert found["loraplex_adapter_slots", (("state", "free"),)] == 3
        assert found["loraplex_adapters", (("state", "ready"), ("tier", "device"))] == 1
        assert found["loraplex_adapters", (("state", "ready"), ("tier", "disk"))] == 1
        labels = next(dict(labels) for name, labels in found if name == "vllm:lora_requests_info")
        assert labels == {"max_lora": "4", "running_lora_adapters": "acme", "waiting_lora_adapters": ""}


def loaded(name: str, level: str, pinned: str) -> tuple[tuple[str, str], ...]:
    return ("adapter_name", name), ("level", level), ("pinned", pinned)


async def test_requests_are_counted_once_in_vllm_s_names(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        await api.chat(model="acme")
        await api.chat()
        found = await samples(api)
        for ours, vllms in (
            ("time_to_first_token_seconds_count", "time_to_first_token_seconds_count"),
            ("request_duration_seconds_count", "e2e_request_latency_seconds_count"),
            ("queue_seconds_count", "request_queue_time_seconds_count"),
            ("inter_token_latency_seconds_count", "inter_token_latency_seconds_count"),
            ("inter_token_latency_seconds_sum", "time_per_output_token_seconds_sum"),
            ("prompt_tokens_total", "prompt_tokens_total"),
            ("generated_tokens_total", "generation_tokens_total"),
        ):
            by_adapter = [value for (name, _), value in found.items() if name == f"loraplex_{ours}"]
            assert len(by_adapter) == 2 and found[f"vllm:{vllms}", MODEL] == pytest.approx(sum(by_adapter)), vllms
        buckets = [labels for name, labels in found if name == "vllm:time_per_output_token_seconds_bucket"]
        assert len(buckets) == len({labels for labels in buckets}) == 20
        before = found["vllm:generation_tokens_total", MODEL]
        await api.http.delete("/v1/adapters/acme")
        assert (await samples(api))["vllm:generation_tokens_total", MODEL] == before  # counters never go down


async def test_ten_thousand_adapters_make_few_series() -> None:
    """Of vLLM's metrics, the loaded adapters alone are listed by name, and up to a bound."""
    count, metrics = 10_000, Metrics(BASE)
    digests = [f"{i:064x}" for i in range(count)]
    engine = SimpleNamespace(
        stats=EngineStats(),
        merge_status=MergeStatus(),
        residency=ResidencyReport(device=digests[-64:], host=digests, pinned={digests[-1]: 1}),
        add_listener=lambda _: None,
    )
    metrics.watch(cast(EngineClient, engine), lambda digest: [f"a{int(digest, 16)}"], lambda: set(digests))
    for i in range(count):
        metrics.add_adapter(f"a{i}")
        metrics.observe("loraplex_queue_seconds", f"a{i}", 0.1)
        metrics.add_tokens(f"a{i}", 1, 0.1)
    families = {family.name: family for family in text_string_to_metric_families(metrics.exposition().decode())}
    listed = families["vllm:lora_adapter_loaded"].samples
    assert len(listed) == MAX_ADAPTER_LABELS + 1 and sum(sample.value for sample in listed) == count
    found = {tuple(sorted(sample.labels.items())): sample.value for sample in listed}
    assert found[loaded(f"a{count - 1}", "gpu", "true")] == found[loaded(f"a{count - 2}", "gpu", "false")] == 1
    assert found[loaded("_other", "cpu", "false")] == count - MAX_ADAPTER_LABELS
    assert families["vllm:num_gpu_loaded_lora_adapters"].samples[0].value == 64
    assert families["vllm:num_cpu_loaded_lora_adapters"].samples[0].value == count - 64
    others = [family for name, family in families.items() if name.startswith("vllm:") and "lora" not in name]
    assert {sample.labels["model_name"] for family in others for sample in family.samples} == {BASE}


async def test_stats(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        await api.chat(model="acme")
        await api.chat()
        stats = (await api.http.get("/v1/stats")).json()
        assert stats["engine"]["state"] == "ready" and stats["slots"]["total"] == 4
        by_name = {use["name"]: use for use in stats["adapters"]}
        assert by_name.keys() == {"acme", "tiny-base"}
        assert by_name["acme"]["generated_tokens"] == 12 and by_name["acme"]["requests"] == 1
        assert by_name["acme"]["tokens_per_second"] > 0
        version = (await api.http.get("/version")).json()
        assert version["base_fingerprint"] == "0123456789ab" and version["base_model"] == "tiny-base"
