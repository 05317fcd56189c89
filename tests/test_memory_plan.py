"""The memory plan: what fits is planned up to the last tenth of a device, and what does not is refused by a flag."""

import dataclasses
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adapters.runtime import reference
from adapters.runtime.pool import page_bytes
from server.cli.main import app
from server.cli.plan import plan_offline, size_in_bytes
from server.config import GIB, ServeConfig
from server.engine.memory import sizing
from server.engine.memory.memory_plan import (
    BLOCK_SIZE,
    DRIVER_BYTES,
    REFERENCE_ROWS,
    DeviceMemory,
    MemoryPlan,
    ModelFacts,
    PlanRefused,
    make_plan,
)
from server.engine.memory.model_facts import facts_from_config, loaded_weights
from server.model.graphs import bucket_sizes
from server.model.loading.loader import ModelRefused, load_model
from server.model.loading.probe import probe
from tests.fixtures.adapter_factory import spec_of, tiny_llama

CONFIGS = sorted((Path(__file__).parent / "fixtures" / "model_configs").glob("*.json"))
CARDS = (16, 24, 40, 48, 80, 141)  # GiB
# Parameters in billions, as their publishers give them.
PARAMETERS = {
    "llama-3.2-1b": 1.24,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "qwen2.5-72b": 72.7,
    "gemma-2-9b": 9.24,
}
PARAMETERS |= {"mixtral-8x7b": 46.7, "mistral-nemo-12b": 12.2, "phi-4": 14.7, "gpt2-xl": 1.56, "qwen3-30b-a3b": 30.5}


@cache
def facts(config: Path, quantization: str = "none") -> ModelFacts:
    return facts_from_config(str(config), "auto", quantization, 0, 64)


def planned(config: Path, gpu: int, **settings: Any) -> MemoryPlan:
    wanted = ServeConfig(model=str(config), **settings)
    device = DeviceMemory(gpu * GIB, taken=DRIVER_BYTES)
    return make_plan(facts(config, wanted.quantization), wanted, device, bucket_sizes(wanted.max_num_seqs))


def named(name: str) -> Path:
    return next(config for config in CONFIGS if config.stem == name)


def test_there_are_twenty_models() -> None:
    assert len(CONFIGS) >= 20 and PARAMETERS.keys() <= {config.stem for config in CONFIGS}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_config_has_the_weights_of_its_model(name: str) -> None:
    assert facts(named(name)).weights / 2e9 == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_plan_fits_its_card_and_wastes_little(config: Path, quantization: str) -> None:
    for gpu in CARDS:
        try:
            plan = planned(config, gpu, quantization=quantization)
        except PlanRefused as refused:
            assert re.search(r"--[a-z-]+", str(refused)), refused
            continue
        assert plan.unused >= 0 and sum(size for _, size in plan.rows()[:-1]) == gpu * GIB
        assert all(size >= 0 for _, size in plan.rows()), plan
        wasted = plan.unused + plan.parts["margin"]
        tokens = plan.num_blocks * BLOCK_SIZE
        assert wasted <= gpu * GIB / 10 or tokens >= 64 * facts(config, quantization).max_model_len
        assert plan.num_pages >= 4 and plan.max_model_len >= min(1024, facts(config).max_model_len)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_refusal_names_a_change_that_works(config: Path) -> None:
    for gpu in CARDS:
        try:
            planned(config, gpu)
        except PlanRefused as refused:
            advice = str(refused).split("; ")[1]
            if "--model" in advice:
                assert facts(config).weights > 0.2 * gpu * GIB
                continue
            changes = dict(re.findall(r"--([a-z0-9-]+) (\w+)", advice))
            settings = {key.replace("-", "_"): int(v) if v.isdigit() else v for key, v in changes.items()}
            assert settings and planned(config, gpu, **settings)


def test_the_cards_that_ran_out_of_memory_do_not() -> None:
    """With default flags, an 8B model in bf16 took 2.9 GiB too many on 24 GiB, and a 70B one in NF4 10.8 on 141."""
    for name, quantization, gpu in (("llama-3.1-8b", "none", 24), ("llama-3.1-8b", "none", 48)):
        assert planned(named(name), gpu, quantization=quantization).max_model_len >= 32768
    assert planned(named("llama-3.1-70b"), 141, quantization="nf4").num_pages >= 16


@pytest.mark.parametrize(
    ("gpu", "settings", "advice"),
    [
        (24, {"kv_cache_bytes": 30 * GIB}, "--kv-cache-bytes 0"),
        (24, {"adapter_device_bytes": 20 * GIB}, "--adapter-device-bytes 0"),
        (24, {"adapter_override_bytes": 20 * GIB}, "--adapter-override-bytes 0"),
        (24, {"max_batch_tokens": 65536}, "--max-batch-tokens 256"),
        (24, {"max_num_seqs": 4096}, "--max-num-seqs 16"),
        (24, {"max_model_len": 131072}, "--max-model-len 2048"),
        (19, {"max_adapter_rank": 512}, "--max-adapter-rank 16"),
    ],
)
def test_what_was_set_too_high_is_named(gpu: int, settings: dict[str, int], advice: str) -> None:
    with pytest.raises(PlanRefused, match=advice):
        planned(named("llama-3.1-8b"), gpu, **settings)


def test_what_is_set_is_granted() -> None:
    plan = planned(named("llama-3.1-8b"), 80, kv_cache_bytes=8 * GIB, adapter_device_bytes=4 * GIB)
    page = facts(named("llama-3.1-8b")).page
    assert plan.parts["adapter pool"] == 4 * GIB // page * page
    assert plan.parts["KV cache"] == 8 * GIB and plan.unused > 40 * GIB
    assert planned(named("llama-3.1-8b"), 80, adapter_override_bytes=GIB).override_bytes == GIB


def test_a_measured_workspace_takes_the_place_of_the_estimate() -> None:
    config, device = ServeConfig(), DeviceMemory(24 * GIB, taken=DRIVER_BYTES)
    estimated = make_plan(facts(named("llama-3.1-8b")), config, device)
    measured = make_plan(facts(named("llama-3.1-8b")), config, device, measured_workspace=GIB)
    assert measured.parts["workspace"] == GIB and measured.workspace == "measured"
    assert "not yet measured" in estimated.workspace and measured.num_blocks < estimated.num_blocks


def test_the_facts_from_a_config_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    found = facts_from_config(str(tmp_path), "float32", "none", 0, 64)
    spec = spec_of(model)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert 0 <= loaded_weights(model) - found.weights < 1024  # buffers
    assert found.page == page_bytes(spec, torch.float32)
    assert found.whole == 2 * 97 * 64 * 4
    assert found.kv_token == 2 * 2 * 2 * 16 * 4 and found.vocab == 97 and found.max_model_len == 512


def test_the_plan_counts_the_rows_that_the_reference_reads() -> None:
    assert REFERENCE_ROWS == reference.REFERENCE_ROWS


def test_on_a_cpu_the_sizes_are_upper_bounds(tmp_path: Path) -> None:
    """Memory is taken as it is written, so that a plan beyond the host's memory is no reason to refuse."""
    small = dataclasses.replace(facts(named("llama-3.2-1b")), weights=GIB)
    plan = make_plan(small, ServeConfig(), DeviceMemory(4 * GIB, lazy=True))
    assert plan.parts["KV cache"] == pytest.approx(GIB / 2, rel=0.01) and plan.num_pages == 68
    assert plan.override_bytes == GIB / 2


@pytest.mark.parametrize(("gpu", "rank"), [(20, 64), (24, 128), (80, 128)])
def test_the_largest_rank_is_128_where_memory_allows(gpu: int, rank: int) -> None:
    plan = planned(named("llama-3.1-8b"), gpu)
    assert plan.max_rank == rank and plan.num_pages >= rank // 16
    asked = planned(named("llama-3.1-8b"), gpu, max_adapter_rank=64)
    assert asked.max_rank == 64 and 0 <= plan.num_pages - asked.num_pages <= 4  # the room of one more rank
    assert planned(named("llama-3.1-8b"), 80, max_adapter_rank=256).max_rank == 256


# -- a server's start --------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_fit_is_refused_before_its_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no weights beside these configs."""
    config = ServeConfig(model=str(named("llama-3.1-8b")))
    monkeypatch.setattr(sizing, "chosen_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (15 * GIB, 16 * GIB))
    with pytest.raises(ModelRefused, match="--quantization nf4"):
        sizing.refuse_early(config)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (23 * GIB, 24 * GIB))
    sizing.refuse_early(config)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (15 * GIB, 24 * GIB))  # other programs have the rest
    with pytest.raises(ModelRefused, match="--quantization nf4"):
        sizing.refuse_early(config)


def test_a_server_takes_its_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of other programs does not count in the share, as in vLLM."""
    model = str(named("llama-3.1-8b"))
    monkeypatch.setattr(sizing, "chosen_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 * GIB, 80 * GIB))
    device = torch.device("cuda")
    for share, total in ((1.0, 80), (0.5, 50), (0.95, 80)):
        memory = sizing._device_memory(ServeConfig(gpu_memory_utilization=share), device, 0)
        assert (memory.total, memory.taken) == (total * GIB, 10 * GIB)
    sizing.refuse_early(ServeConfig(model=model, gpu_memory_utilization=0.5))
    with pytest.raises(ModelRefused, match="--quantization nf4"):
        sizing.refuse_early(ServeConfig(model=model, gpu_memory_utilization=0.15))


def test_a_model_that_cannot_be_planned_is_loaded_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sizing, "chosen_device", lambda _: torch.device("cuda"))
    sizing.refuse_early(ServeConfig(model=str(tmp_path)))


def test_the_plan_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = ServeConfig(model=str(tmp_path), dtype="float32", device="cpu", kv_cache_bytes=8 << 20)
    loaded = load_model(config.model, "float32", "none", "cpu", 0)
    with caplog.at_level("INFO"):
        plan = sizing.plan_memory(config, loaded, *probe(loaded, 64))
    assert plan.parts["weights"] == loaded_weights(loaded.model) and plan.max_model_len == 512
    for part in plan.parts:
        assert part in caplog.text


# -- the command -------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_prints_json_and_a_table() -> None:
    model = str(named("llama-3.2-1b"))
    given = ("--model", model, "--gpu", "24GiB", "--adapters", "8", "--rank", "32")
    found = json.loads(run(*given, "--json").output)
    assert found["total"] == 24 * GIB == sum(found["parts"].values()) + found["unused"]
    assert found["adapter_pages"] == 16 and "--max-adapter-rank 32" in found["serve"]
    shown = run(*given)
    assert shown.exit_code == 0 and "KV cache" in shown.output and "loraplex serve --model" in shown.output


def test_the_command_names_the_flag_of_a_refusal() -> None:
    refused = run("--model", str(named("llama-3.1-8b")), "--gpu", "16GiB")
    assert refused.exit_code == 2 and "--quantization nf4" in refused.output
    assert "--gpu" in run("--model", str(named("gpt2-xl")), "--gpu", "large").output
    assert "cannot be used" in run("--model", str(Path(__file__).parent), "--gpu", "16GiB").output


def test_a_planned_offline_config_is_what_the_server_would_be_started_with() -> None:
    config, plan = plan_offline(ServeConfig(model=str(named("llama-3.2-1b"))), 16 * GIB, adapters=100)
    assert config.adapter_slots == 100 and plan.num_pages == 400


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("1.5 GiB", 3 * GIB // 2), ("80GB", 80 * 10**9), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_in_bytes(text) == size
