"""Versions of an earlier release that would be refused today: the load says why, and the record shows it."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from adapters.peft.digest import digest_of
from server.ipc.messages import PinAdapter, ResidencyReport
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.api_server import assert_error, serving
from tests.fixtures.engine_driver import Driver

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """An adapter that lost the tensors of one layer's q_proj."""
    folder = write_adapter(tiny_llama(), tmp_path / "partial", target_modules=["q_proj", "v_proj"])
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj" not in name}, folder / WEIGHTS
    )
    return folder


def test_lost_modules_are_named_at_the_load(driver: Driver, partial: Path) -> None:
    digest = digest_of(partial)
    with driver.store.stage() as staged:
        for name in (CONFIG, WEIGHTS):
            (staged / name).write_bytes((partial / name).read_bytes())
        driver.store.commit(staged, digest)
    assert driver.settled(PinAdapter(1, digest, True)) == "invalid"
    error = driver.replies[1].error
    assert error is not None and "layers.1.self_attn.q_proj" in error[1]
    reports = [step.residency for step in driver.steps if step.residency is not None]
    assert "layers.1.self_attn.q_proj" in reports[-1].failed[digest]


async def test_the_reason_is_in_the_record_and_in_the_response(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        digest = api.context.registry.record("acme").version.digest
        reason = "model.layers.1.self_attn.q_proj: found no tensors, expected lora_A and lora_B"
        api.context.engine.residency = ResidencyReport(failed={digest: reason})
        shown = (await api.http.get("/v1/adapters/acme")).json()
        assert (shown["state"], shown["error"]) == ("failed", reason)
        listed = (await api.http.get("/v1/adapters?state=failed")).json()["data"]
        assert [record["name"] for record in listed] == ["acme"]
        api.engine.fail_after, api.engine.failure = 0, f"the adapter could not be loaded: {reason}"
        assert reason in assert_error(await api.chat(model="acme"), 503, "adapter_failed")["message"]
