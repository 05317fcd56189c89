"""Progress within a step is reported where the step may be long, and costs nothing elsewhere."""

import pytest

from server.engine import loop as loop_module
from server.engine.loop import HEARTBEAT_SECONDS, run_loop
from server.ipc.messages import FromEngine, Progress, Shutdown, StepOutputs, Submit
from server.request import SamplingParams
from tests.fixtures.adapter_factory import tiny_llama
from tests.fixtures.engine_driver import Driver
from tests.fixtures.timing import Clock


def test_each_layer_of_a_step_that_may_be_long_is_reported(driver: Driver) -> None:
    reports: list[None] = []
    progress = driver.engine.progress
    progress.report = lambda: reports.append(None)
    driver.submit("unknown", [5, 6, 7], max_tokens=1)
    driver.run()
    layers = tiny_llama().config.num_hidden_layers
    assert len(reports) == 1 + layers, "how long a first step takes is not known"
    progress.took(1, 0.01)
    driver.submit("short", [5, 6, 8], max_tokens=1)
    driver.run()
    assert len(reports) == 1 + layers
    progress.took(1, 0.01)
    driver.submit("long", [5] * 100, max_tokens=1)
    driver.run()
    assert len(reports) == 2 + 2 * layers


def test_a_long_step_emits_heartbeats(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer takes as long as a heartbeat."""
    clock, emitted = Clock(), list[FromEngine]()
    monkeypatch.setattr(loop_module, "time", clock)
    for layer in driver.engine.progress._layers:
        layer.register_forward_pre_hook(lambda *_: setattr(clock, "now", clock.now + 1.01 * HEARTBEAT_SECONDS))
    messages = [[Submit("s", [5, 6, 7], SamplingParams(1))], [Shutdown()]]
    run_loop(driver.engine, lambda _: messages.pop(0), emitted.append)
    assert [type(message) for message in emitted] == [Progress, Progress, Progress, StepOutputs]
