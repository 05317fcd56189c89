"""Whole servers that end at fault points: what was acknowledged is served by the next one."""

from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from transformers import AutoModelForCausalLM

from adapters.fault_points import KILLED, VARIABLE
from adapters.registry.registry import AdapterRegistry
from tests.fixtures.adapter_factory import write_adapter
from tests.fixtures.timing import HANG_SECONDS, patience, wait_for
from tests.fixtures.tiny_server import RunningServer, running_server, start_server, wait_until_ready, write_tiny_model
from tests.test_server import ENGINE_FLAGS, answer_of

ADAPTERS = 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for index in range(ADAPTERS):
        write_adapter(model, folder / f"adapter-{index}", seed=index, r=4, scale=0.3, target_modules="all-linear")
    return folder


def uploads_until_the_end(tiny: Path, data: Path, fault: str, prefix: str) -> list[str]:
    """Upload adapters to a server with this fault until it dies; returns the names that it acknowledged."""
    flags = ("--port", "0", "--model", str(tiny / "model"), *ENGINE_FLAGS)
    process = start_server(data, *flags, environment={VARIABLE: fault})
    running = RunningServer(*wait_until_ready(process))
    engine, acknowledged = running.engine_pid(), []
    with running.client() as client, suppress(httpx.TransportError):
        for number in range(ADAPTERS):
            running.upload(client, f"{prefix}-{number}", tiny / f"adapter-{number}").raise_for_status()
            acknowledged.append(f"{prefix}-{number}")
        process.kill()
        raise AssertionError(f"{fault} was not passed: {acknowledged}")
    assert process.wait(HANG_SECONDS) == KILLED
    assert process.stdout is not None
    process.stdout.close()
    wait_for(lambda: not psutil.pid_exists(engine), "the end of the engine")
    return acknowledged


@pytest.mark.slow
@pytest.mark.reliability("T10", "T65")
def test_an_acknowledged_upload_outlives_every_crash(tiny: Path, tmp_path: Path) -> None:
    data, acknowledged = tmp_path / "data", list[str]()
    for prefix, fault in (("a", "publish.published:2"), ("b", "upload.received:3"), ("c", "ipc.to_engine:3")):
        acknowledged += uploads_until_the_end(tiny, data, fault, prefix)
    assert {"a-0", "b-0", "b-1"} <= set(acknowledged)
    with running_server(data, "--model", str(tiny / "model"), *ENGINE_FLAGS) as running, running.client() as client:
        listed = {record["name"]: record for record in client.get("/v1/adapters").json()["data"]}
        assert set(acknowledged) <= listed.keys() and "b-2" not in listed
        assert {record["state"] for record in listed.values()} == {"ready"}
        texts = {}
        for number in range(ADAPTERS):
            running.upload(client, f"new-{number}", tiny / f"adapter-{number}").raise_for_status()
            texts[number] = answer_of(running, client, f"new-{number}")
        assert len(set(texts.values())) == ADAPTERS
        for name in listed:
            assert answer_of(running, client, name) == texts[int(name[-1])]
            client.delete(f"/v1/adapters/{name}").raise_for_status()
    registry = AdapterRegistry(data)
    assert len(registry) == ADAPTERS == len(registry.store.digests())
    assert list((data / "store" / ".staging").iterdir()) == []
    registry.close()


@pytest.mark.slow
@pytest.mark.reliability("T48", "T60")
def test_an_engine_that_dies_again_and_again_says_nothing_wrong(tiny: Path, tmp_path: Path) -> None:
    """At a step, in a load and at messages: a response is right, or says that the engine is away."""
    flags = ("--model", str(tiny / "model"), *ENGINE_FLAGS, "--adapter-slots", "2")
    names = [f"adapter-{number}" for number in range(ADAPTERS)]
    with running_server(tmp_path, *flags) as running, running.client() as client:
        for name in names:
            running.upload(client, name, tiny / name).raise_for_status()
        texts = {name: answer_of(running, client, name) for name in names}
    fault = {VARIABLE: "engine.step:80,engine.load:11,ipc.to_api:150"}
    with running_server(tmp_path, *flags, environment=fault) as running, running.client() as client:
        lives = {running.engine_pid()}
        for _ in patience("the third life of the engine"):
            for name in names:
                body = {"model": name, "prompt": "hello", "temperature": 0, "max_tokens": 16}
                answer = client.post("/v1/completions", json=body)
                if answer.status_code == 200:
                    assert answer.json()["choices"][0]["text"] == texts[name]
                else:
                    assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_unavailable"
                    wait_for(lambda: client.get("/readyz").status_code == 200, "the restart")
                    lives.add(running.engine_pid())
            if len(lives) >= 3:
                break
        assert {record["state"] for record in client.get("/v1/adapters").json()["data"]} == {"ready"}
