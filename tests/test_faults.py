"""Whatever goes wrong ends what caused it: a row, a message, or an engine that cannot go on."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from server.engine import engine as engine_module
from server.engine import isolation
from server.engine import selftest as selftest_module
from server.engine.faults import MAX_FAILED_STEPS, EngineBroken
from server.engine.loop import run_loop
from server.ipc.messages import Abort, FromEngine, Merge, MoveAdapter, PinAdapter, RunSelfTest
from server.model.batch import ForwardBatch
from server.model.sampling.sampler import Started, start_sampling
from server.sequence import ScheduledBatch
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import Driver
from tests.test_architectures import greedy
from tests.test_engine import BLOCK_BYTES, Drivers, assert_the_cache_is_finite, prompt_of


@pytest.fixture
def drivers(llama_folder: Path, tmp_path: Path) -> Iterator[Drivers]:
    with ExitStack() as stack:
        yield Drivers(llama_folder, tmp_path, stack)


def an_adapter(driver: Driver, folder: Path) -> str:
    return driver.add_adapter(write_adapter(tiny_llama(), folder / "adapter", scale=0.2))


# -- steps that raise --------------------------------------------------------------------------------------------------


def faulty(driver: Driver, monkeypatch: pytest.MonkeyPatch, *guilty: str) -> list[list[str]]:
    """Let every step raise that has one of these sequences. Returns the sequences of each step, as they are tried."""
    tried: list[list[str]] = []
    build = driver.engine._forward_batch

    def failing(batch: ScheduledBatch, *late: Any) -> ForwardBatch:
        tried.append([scheduled.seq.seq_id for scheduled in batch.sequences])
        if set(guilty) & set(tried[-1]):
            raise RuntimeError("a kernel does not like this row")
        return build(batch, *late)

    monkeypatch.setattr(driver.engine, "_forward_batch", failing)
    return tried


@pytest.mark.reliability("T48")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("max_batch_tokens", [16, 512])
def test_a_step_that_fails_ends_the_guilty_sequence_alone(
    drivers: Drivers, monkeypatch: pytest.MonkeyPatch, overlap: bool, max_batch_tokens: int
) -> None:
    driver = drivers.make(max_num_seqs=6, max_batch_tokens=max_batch_tokens)
    driver.engine.overlap = overlap
    asked = {f"s{i}": {"prompt": prompt_of(5 + 9 * i, i), "temperature": i % 2, "seed": i} for i in range(7)}
    for seq_id, request in asked.items():
        driver.submit(f"{seq_id} alone", **request)  # type: ignore[arg-type]
        driver.run()
    tried = faulty(driver, monkeypatch, "s2", "s5")
    for seq_id, request in asked.items():
        driver.submit(seq_id, **request)  # type: ignore[arg-type]
    driver.run()
    assert {seq_id for seq_id in asked if driver.finish_reason(seq_id) == "error"} == {"s2", "s5"}
    assert driver.outputs["s2"][-1].error == "the engine failed to compute this step"
    for seq_id in asked.keys() - {"s2", "s5"}:
        assert driver.tokens(seq_id) == driver.tokens(f"{seq_id} alone")
    assert len(tried) < 60 and driver.engine.broken is None
    assert driver.steps[-1].stats.blocks_used == 0
    assert_the_cache_is_finite(driver)


@pytest.mark.reliability("T48")
@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_whose_tokens_cannot_be_collected_is_computed_again(
    drivers: Drivers, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """The step was launched and its sequences had moved on; with overlap, the next step is on its way as well."""
    driver = drivers.make(kv_cache_bytes=9 * BLOCK_BYTES)  # some are preempted
    driver.engine.overlap = overlap
    requests = {f"s{i}": prompt_of(16 + 7 * i, i) for i in range(4)}
    for seq_id, prompt in requests.items():
        driver.submit(f"{seq_id} alone", prompt, max_tokens=30)
        driver.run()
    steps = itertools.count()

    def late(*asked: Any) -> Started:
        started = start_sampling(*asked)
        failing = next(steps) % 5 == 3
        return Started(started.tokens, Mock(side_effect=RuntimeError("lost")) if failing else started.collect)

    monkeypatch.setattr(engine_module, "start_sampling", late)
    for seq_id, prompt in requests.items():
        driver.submit(seq_id, prompt, max_tokens=30)
    driver.run()
    ended = [seq_id for seq_id in requests if driver.finish_reason(seq_id) != "length"]
    assert len(ended) < len(requests), "a step of one sequence that fails ends it"
    for seq_id in requests.keys() - set(ended):
        assert driver.tokens(seq_id) == driver.tokens(f"{seq_id} alone")
    assert driver.steps[-1].stats.blocks_used == 0
    assert_the_cache_is_finite(driver)


@pytest.mark.reliability("T48")
def test_an_engine_that_can_compute_nothing_is_broken(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.engine._runner, "run", Mock(side_effect=RuntimeError("no")))
    for index in range(MAX_FAILED_STEPS):
        assert driver.engine.broken is None
        driver.submit(f"s{index}", prompt_of(5))
        driver.step()
        assert driver.finish_reason(f"s{index}") == "error"
    assert driver.engine.broken == "8 steps in a row failed"


def test_a_guilty_sequence_now_and_then_breaks_no_engine(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(driver, monkeypatch, *(f"bad{index}" for index in range(3 * MAX_FAILED_STEPS)))
    for index in range(3 * MAX_FAILED_STEPS):
        if index % (MAX_FAILED_STEPS - 1) == 0:
            driver.submit(f"good{index}", prompt_of(5), max_tokens=1)
            driver.run()
        driver.submit(f"bad{index}", prompt_of(5))
        driver.run()
    assert driver.engine.broken is None


@pytest.mark.parametrize("beside", [[], ["beside"]])
def test_a_lost_device_breaks_the_engine_and_says_to_whom_it_is_due(
    drivers: Drivers, monkeypatch: pytest.MonkeyPatch, beside: list[str]
) -> None:
    driver = drivers.make(max_num_seqs=1 + len(beside))
    faulty(driver, monkeypatch, "guilty")
    monkeypatch.setattr(isolation, "is_lost", lambda device: True)
    for seq_id in ("guilty", *beside, "waiting"):
        driver.submit(seq_id, prompt_of(5))
    driver.step()
    assert driver.engine.broken == "the device is lost" and driver.engine.has_work()
    for seq_id in ("guilty", *beside):
        error = driver.outputs[seq_id][-1].error
        assert error and error.endswith("the engine restarts") and ("any may be the cause" in error) == bool(beside)
    assert "waiting" not in driver.outputs, "the client ends it, with the word that the engine restarts"
    emitted: list[FromEngine] = []
    with pytest.raises(EngineBroken, match="lost"):
        run_loop(driver.engine, lambda _: [], emitted.append)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_bias": {100_000: 1.0}}, "token 100000 is not in the vocabulary of 97"),
        ({"logit_bias": {-1: 1.0}}, "token -1 is not in the vocabulary"),
        ({"prompt": [5, 97]}, "token 97 is not in the vocabulary of 97"),
        ({"prompt": [5, -3]}, "token -3 is not in the vocabulary"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [5] * 513}, "the prompt has more than 512 tokens"),
        ({"logprobs": 98}, "the vocabulary has 97 tokens and not 98"),
    ],
)
def test_what_the_model_cannot_compute_is_refused_before_it_is_in_a_step(
    driver: Driver, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    digest = an_adapter(driver, tmp_path)
    for seq_id, adapter in (("base", None), ("adapted", digest)):
        driver.submit(seq_id, **{"prompt": prompt_of(5), "adapter": adapter, **changes})
        driver.submit(f"beside {seq_id}", prompt_of(5))
    driver.run()
    for seq_id in ("base", "adapted"):
        (output,) = driver.outputs[seq_id]
        assert (output.finish_reason, output.error) == ("error", message)
        assert driver.tokens(f"beside {seq_id}") == greedy(tiny_llama(), prompt_of(5), 8)


def test_end_tokens_beyond_the_vocabulary_are_left_out_of_min_tokens(drivers: Drivers) -> None:
    driver = drivers.make()
    driver.engine._eos_token_ids = frozenset([2, 151_645])
    driver.submit("min", prompt_of(5), min_tokens=2, stop_token_ids=(99_999,), ignore_eos=False)
    driver.submit("beside it", prompt_of(5))
    driver.run()
    assert driver.finish_reason("min") != "error"
    assert driver.tokens("beside it") == greedy(tiny_llama(), prompt_of(5), 8)


@pytest.mark.parametrize(
    ("failure", "code"), [(torch.OutOfMemoryError("none left"), "no_room"), (RuntimeError("a bug"), "failed")]
)
def test_a_selftest_that_raises_ends_alone(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, code: str
) -> None:
    digest = an_adapter(driver, tmp_path)
    monkeypatch.setattr(selftest_module, "try_adapter", Mock(side_effect=failure))
    driver.submit("running", prompt_of(5))
    driver.step()
    driver.engine.handle(RunSelfTest(1, digest))
    driver.run()
    error = driver.replies[1].error
    assert error is not None and error[0] == code
    assert driver.tokens("running") == greedy(tiny_llama(), prompt_of(5), 8)
    driver.engine.handle(MoveAdapter(2, digest, "disk"))  # nothing holds on to its slot
    driver.run()
    assert driver.replies[2].error is None


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("residency.bring", MoveAdapter(1, "d" * 64, "host")),
        ("residency.expect", MoveAdapter(1, "d" * 64, "device")),
        ("residency.expect", PinAdapter(1, "d" * 64, True)),
        ("residency.unpin", PinAdapter(1, "d" * 64, False)),
        ("residency.unload", MoveAdapter(1, "d" * 64, "disk")),
        ("residency.expect", RunSelfTest(1, "d" * 64)),
        ("_messages._selftests._reference", RunSelfTest(1, "d" * 64)),
        ("merging.prepare", Merge(1, "d" * 64, drain=True)),
    ],
)
def test_a_message_that_raises_gets_an_error_and_nothing_else_ends(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, where: str, message: Any
) -> None:
    driver.submit("running", prompt_of(5))
    driver.step()
    *path, name = where.split(".")
    monkeypatch.setattr(attrgetter(".".join(path))(driver.engine), name, Mock(side_effect=RuntimeError("a bug")))
    driver.engine.handle(message)
    driver.run()
    error = driver.replies[1].error
    assert error is not None and error[0] in ("failed", "invalid")
    assert driver.tokens("running") == greedy(tiny_llama(), prompt_of(5), 8)
    assert driver.engine.broken is None


def test_a_submission_that_raises_ends_alone(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.submit("running", prompt_of(5))
    driver.step()
    with monkeypatch.context() as broken:
        broken.setattr(driver.engine.scheduler.policy, "arrived", Mock(side_effect=RuntimeError("a bug")))
        driver.submit("bad", prompt_of(5))
    driver.run()
    assert [output.finish_reason for output in driver.outputs["bad"]] == ["error"]
    assert driver.tokens("running") == greedy(tiny_llama(), prompt_of(5), 8)


def test_a_sequence_that_cannot_be_removed_breaks_the_engine(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.submit("running", prompt_of(5))
    driver.step()
    monkeypatch.setattr(type(driver.engine.scheduler), "finish", Mock(side_effect=RuntimeError("a bug")))
    driver.engine.handle(Abort(["running"]))
    assert driver.engine.broken == "a sequence could not be aborted"
    driver.engine.step()
