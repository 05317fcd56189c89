"""The engine as a whole, step by step: one batch of many adapters gives everybody the answer they would get alone."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.residency import residency
from adapters.runtime.pool import page_bytes
from server.engine.scheduling.step_cost import MIN_CHUNK
from server.ipc.messages import Abort, MoveAdapter, PinAdapter, RetireAdapter, Submit
from server.model.loading.loader import ModelRefused
from server.request import SamplingParams
from server.sequence import Sequence
from tests.fixtures.adapter_factory import tiny_llama, with_peft, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver, plain
from tests.fixtures.timing import HANG_SECONDS, Clock, patience
from tests.test_architectures import greedy

BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16  # layers, keys and values, heads, head dimension, bytes, tokens
EOS = 2

# Ranks 1 to 64, every kind of target, both kinds of scaling.
ADAPTERS: dict[str, dict[str, Any]] = {
    "r1": {"r": 1, "lora_alpha": 2},
    "r4": {"r": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "r16": {"r": 16, "target_modules": "all-linear"},
    "r24": {"r": 24, "target_modules": ["o_proj", "k_proj"], "use_rslora": True},
    "r40": {"r": 40, "target_modules": ["lm_head", "q_proj"], "lora_alpha": 20},
    "r64": {"r": 64, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(tiny_llama(), root / name, seed=seed, scale=0.2, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }


@pytest.fixture
def drivers(llama_folder: Path, tmp_path: Path) -> Iterator["Drivers"]:
    with ExitStack() as stack:
        yield Drivers(llama_folder, tmp_path, stack)


class Drivers:
    """Makes engines over one model, and ends their reader threads."""

    def __init__(self, model: Path, data_dir: Path, stack: ExitStack):
        self._model, self._data_dir, self._stack = model, data_dir, stack

    def make(self, **settings: Any) -> Driver:
        driver = make_driver(self._model, self._data_dir, **settings)
        self._stack.callback(driver.engine.residency.close)
        return driver


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def submit(driver: Driver, seq_id: str, prompt: list[int], adapter: str | None, salt: str) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    driver.engine.handle(Submit(seq_id, prompt, params, plain(adapter), salt))


def running(driver: Driver, seq_id: str) -> Sequence:
    return next(seq for seq in driver.engine.scheduler.running if seq.seq_id == seq_id)


def step_until_running(driver: Driver, *seq_ids: str) -> None:
    """Step until all of these have run at least once."""
    for _ in patience(f"a step of {seq_ids}"):
        if set(seq_ids) <= {seq.seq_id for seq in driver.engine.scheduler.running}:
            return
        driver.step()


def next_logits(driver: Driver) -> dict[str, torch.Tensor]:
    """Logits of the batch that would run next, by sequence; the batch is not run."""
    batch = driver.engine.scheduler.schedule()
    runner = driver.engine._runner
    logits = runner.run(driver.engine._forward_batch(batch))
    return {scheduled.seq.seq_id: row for scheduled, row in zip(batch.sequences, logits, strict=True)}


# -- many adapters in one batch ----------------------------------------------------------------------------------------


@pytest.mark.reliability("T55")
def test_every_stream_of_a_mixed_batch_is_that_of_peft_alone(drivers: Drivers, adapters: dict[str, Path]) -> None:
    """Six adapters and the base over three slots, two streams each, prefilled in chunks."""
    driver = drivers.make(adapter_slots=3, max_batch_tokens=32)
    digests = {name: driver.add_adapter(folder) for name, folder in adapters.items()}
    driver.bring_to_device(*digests.values())  # so that all slots are in use in the first steps
    prompts = [prompt_of(5), prompt_of(37, seed=1)]
    for index, prompt in enumerate(prompts):
        for name in ["base", *adapters]:
            driver.submit(f"{name} {index}", prompt, digests.get(name), max_tokens=12)
    driver.run()
    assert max(step.stats.batch_adapters for step in driver.steps) == 3
    model = tiny_llama()
    for index, prompt in enumerate(prompts):
        answers = {"base": greedy(model, prompt, 12)}
        answers |= {name: greedy(with_peft(model, folder), prompt, 12) for name, folder in adapters.items()}
        assert {name: driver.tokens(f"{name} {index}") for name in answers} == answers
        assert len({tuple(answer) for answer in answers.values()}) == len(answers)  # each adapter has its own


@pytest.mark.parametrize("trio", [("r1", "r4", "r16"), ("r24", "r40", "r64")])
def test_the_logits_of_a_mixed_batch_are_those_of_peft_alone(
    drivers: Drivers, adapters: dict[str, Path], trio: tuple[str, ...]
) -> None:
    driver = drivers.make(adapter_slots=3)
    digests = {name: driver.add_adapter(adapters[name]) for name in trio}
    driver.bring_to_device(*digests.values())
    prompts = {name: prompt_of(9 + 4 * index, seed=index) for index, name in enumerate(["base", *trio])}
    for name, prompt in prompts.items():
        driver.submit(name, prompt, digests.get(name))
    got = next_logits(driver)
    assert got.keys() == prompts.keys()
    model = tiny_llama()
    for name, prompt in prompts.items():
        tuned = with_peft(model, adapters[name]) if name in adapters else model
        expected = tuned(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(got[name], expected, atol=1e-4, rtol=0)


@pytest.mark.reliability("T55")
@pytest.mark.parametrize("decoding", [False, True])
def test_base_rows_have_the_bits_of_an_engine_without_adapters(
    drivers: Drivers, adapters: dict[str, Path], decoding: bool
) -> None:
    """The same batch shape twice: base and adapters mixed, and all base."""
    mixed, plain = drivers.make(adapter_slots=3), drivers.make(adapter_slots=3)
    digests = [mixed.add_adapter(adapters[name]) for name in ("r16", "r40", "r64")]
    mixed.bring_to_device(*digests)
    for index, adapter in enumerate([None, None, None, *digests]):
        prompt = prompt_of(7 + index, seed=index)
        mixed.submit(f"s{index}", prompt, adapter)
        # Beyond the prompt the adapters' tokens would differ, but not the shape of the batch.
        plain.submit(f"s{index}", prompt)
    for driver in (mixed, plain) if decoding else ():
        driver.step()
    with_adapters, without = next_logits(mixed), next_logits(plain)
    assert list(with_adapters) == list(without)
    for name in ("s0", "s1", "s2"):
        assert torch.equal(with_adapters[name], without[name])
    assert not torch.equal(with_adapters["s3"], without["s3"])


def test_more_adapters_than_slots_take_turns(drivers: Drivers, adapters: dict[str, Path]) -> None:
    driver = drivers.make(adapter_slots=1)
    digests = [driver.add_adapter(folder) for folder in adapters.values()]
    for index, digest in enumerate(digests * 2):
        driver.submit(f"s{index}", prompt_of(4, seed=index), digest, max_tokens=3)
    driver.run()
    assert {driver.finish_reason(f"s{index}") for index in range(12)} == {"length"}


def test_an_adapter_that_is_not_there_ends_its_own_requests_only(driver: Driver, adapters: dict[str, Path]) -> None:
    digest = driver.add_adapter(adapters["r16"])
    driver.submit("missing", prompt_of(5), "f" * 64)
    driver.submit("not even a digest", prompt_of(5), "../../etc")
    driver.submit("base", prompt_of(5))
    driver.submit("lora", prompt_of(5), digest)
    driver.run()
    for seq_id in ("missing", "not even a digest"):
        assert driver.finish_reason(seq_id) == "error"
        assert "adapter could not be loaded" in str(driver.outputs[seq_id][-1].error)
    assert driver.finish_reason("base") == driver.finish_reason("lora") == "length"
    assert driver.tokens("base") == greedy(tiny_llama(), prompt_of(5), 8)


# -- the prefix cache --------------------------------------------------------------------------------------------------


def test_a_prefix_hit_changes_nothing_but_the_work(driver: Driver, adapters: dict[str, Path]) -> None:
    digest = driver.add_adapter(adapters["r16"])
    for adapter in (None, digest):
        for turn in ("cold", "warm"):
            driver.submit(f"{adapter} {turn}", prompt_of(40), adapter)
            driver.run()
        assert driver.outputs[f"{adapter} cold"][-1].num_cached_tokens == 0
        assert driver.outputs[f"{adapter} warm"][-1].num_cached_tokens == 32
        assert driver.tokens(f"{adapter} warm") == driver.tokens(f"{adapter} cold")
    assert driver.steps[-1].stats.prefix_hits == 64


@pytest.mark.reliability("T51")
def test_a_prefix_is_never_shared_across_adapters_versions_or_salts(
    driver: Driver, adapters: dict[str, Path], tmp_path: Path
) -> None:
    first = driver.add_adapter(adapters["r16"])
    second = driver.add_adapter(write_adapter(tiny_llama(), tmp_path / "next", seed=77, **ADAPTERS["r16"]))
    assert first != second
    everybody = [(None, ""), (first, ""), (second, ""), (None, "x"), (first, "x"), (first, "y")]
    for index, (adapter, salt) in enumerate(everybody):
        submit(driver, f"s{index}", prompt_of(40), adapter, salt)
        driver.run()
        assert driver.outputs[f"s{index}"][-1].num_cached_tokens == 0
    submit(driver, "again", prompt_of(40), first, "x")
    driver.run()
    assert driver.outputs["again"][-1].num_cached_tokens == 32


# -- long prompts beside streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_a_long_prompt_beside_a_stream_is_cut_by_time_and_its_tokens_stay_the_same(
    drivers: Drivers, overlap: bool
) -> None:
    """No step is as short as this target, so chunks are the smallest ones. Alone, the prompt takes whole steps."""
    driver = drivers.make(max_step_ms=1e-6)
    driver.engine.overlap = overlap
    driver.submit("alone", prompt_of(200, 1))
    driver.run()
    assert driver.steps[0].stats.batch_tokens == 200
    driver.submit("stream", prompt_of(20, 2), max_tokens=40)
    while not driver.outputs.get("stream"):
        driver.step()
    before = len(driver.steps)
    driver.submit("beside", [*prompt_of(199, 3), 5], max_tokens=8)
    driver.submit("again", prompt_of(200, 1), max_tokens=8)
    driver.run()
    sizes = [step.stats.batch_tokens for step in driver.steps[before:]]
    assert sizes[:12] == [1 + MIN_CHUNK] * 12
    assert driver.tokens("again") == driver.tokens("alone")
    assert all(driver.finish_reason(name) == "length" for name in ("stream", "beside", "again"))
    assert driver.engine.scheduler.step_budget.cost.predict(1, MIN_CHUNK) > 0


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.reliability("T47")
def test_preempted_sequences_give_exactly_the_tokens_they_would_alone(
    drivers: Drivers, adapters: dict[str, Path]
) -> None:
    """Six sequences that need 36 blocks at their longest, and there are 12."""
    crowded = drivers.make(kv_cache_bytes=12 * BLOCK_BYTES, max_batch_tokens=64)
    roomy = drivers.make()
    digest = crowded.add_adapter(adapters["r16"])
    seqs = {f"s{index}": (prompt_of(20 + index, seed=index), (None, digest)[index % 2]) for index in range(6)}
    for seq_id, (prompt, adapter) in seqs.items():
        crowded.submit(seq_id, prompt, adapter, max_tokens=60)
    crowded.run()
    assert crowded.steps[-1].stats.preemptions > 0
    for seq_id, (prompt, adapter) in seqs.items():
        roomy.submit(seq_id, prompt, adapter, max_tokens=60)
        roomy.run()
        assert crowded.tokens(seq_id) == roomy.tokens(seq_id)
    assert crowded.tokens("s0") == greedy(tiny_llama(), seqs["s0"][0], 60)


def test_seeded_sampling_survives_preemption(drivers: Drivers) -> None:
    crowded, roomy = drivers.make(kv_cache_bytes=8 * BLOCK_BYTES), drivers.make()
    for driver in (crowded, roomy):
        for index in range(3):
            driver.submit(f"s{index}", prompt_of(30, index), max_tokens=40, temperature=1.0, seed=index)
        driver.run()
    assert crowded.steps[-1].stats.preemptions > 0
    assert all(crowded.tokens(f"s{index}") == roomy.tokens(f"s{index}") for index in range(3))


@pytest.mark.reliability("T40")
@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "waiting for an adapter"])
def test_an_abort_frees_everything_within_one_step(drivers: Drivers, adapters: dict[str, Path], state: str) -> None:
    driver = drivers.make(adapter_slots=1, max_num_seqs=1 if state == "waiting" else 4, max_batch_tokens=16)
    first, second = driver.add_adapter(adapters["r4"]), driver.add_adapter(adapters["r16"])
    if state.startswith("waiting"):
        driver.submit("other", prompt_of(4), first, max_tokens=400)
        step_until_running(driver, "other")
    driver.submit("ours", prompt_of(60), second if state == "waiting for an adapter" else first, max_tokens=100)
    if state in ("prefilling", "decoding"):
        step_until_running(driver, "ours")
    for _ in range(8 if state == "decoding" else 1):
        driver.step()
    seq = driver.engine._live.by_id["ours"]
    if state == "prefilling":
        assert 0 < seq.num_computed_tokens < seq.num_prompt_tokens
    assert (seq.num_output_tokens > 0) == (state == "decoding")
    driver.engine.handle(Abort(["ours", "other", "never heard of"]))
    step = driver.step()
    assert {output.seq_id: output.finish_reason for output in step.outputs}["ours"] == "abort"
    assert (step.stats.running, step.stats.waiting, step.stats.blocks_used) == (0, 0, 0)
    assert all(slot.ref_count == 0 for slot in driver.engine.residency.slots.slots())
    driver.run()
    assert [output.finish_reason for output in driver.outputs["ours"] if output.finish_reason] == ["abort"]


# -- numbers that go bad -----------------------------------------------------------------------------------------------


def overflowing_adapter(folder: Path) -> Path:
    """Finite as stored, so that validation lets it pass; its products are not."""
    write_adapter(tiny_llama(), folder, scale=3e37, target_modules=["k_proj", "v_proj"])
    file = folder / "adapter_model.safetensors"
    save_file({name: t * 1e4 if "lora_A" in name else t for name, t in load_file(file).items()}, file)
    return folder


def assert_the_cache_is_finite(driver: Driver) -> None:
    cache = driver.engine._runner.kv_cache
    assert all(torch.isfinite(tensor).all() for tensor in (*cache.keys, *cache.values))


@pytest.mark.reliability("T55")
@pytest.mark.parametrize("victim", ["s0", "s1", "s2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_nan_ends_its_own_sequence_and_is_never_read_again(driver: Driver, victim: str, temperature: float) -> None:
    """Three decode side by side at different lengths; the cache of one goes bad."""
    prompts = {"s0": prompt_of(7), "s1": prompt_of(40, 1), "s2": prompt_of(24, 2)}
    clean = {}
    for seq_id, prompt in prompts.items():
        submit(driver, seq_id, prompt, None, salt="clean")
        driver.run()
        clean[seq_id] = driver.tokens(seq_id)
    driver.outputs.clear()
    for seq_id, prompt in prompts.items():
        driver.submit(seq_id, prompt, temperature=temperature, seed=1)
    driver.step()
    driver.step()
    table = running(driver, victim).block_table
    driver.engine._runner.kv_cache.keys[0][table[0], 0] = float("nan")
    driver.run()
    reasons = {seq_id: driver.finish_reason(seq_id) for seq_id in prompts}
    assert reasons == {seq_id: "nonfinite" if seq_id == victim else "length" for seq_id in prompts}
    assert "not finite" in str(driver.outputs[victim][-1].error)
    assert_the_cache_is_finite(driver)
    for seq_id in prompts:
        if temperature == 0 and seq_id != victim:
            assert driver.tokens(seq_id) == clean[seq_id]
    driver.submit("again", prompts[victim])
    driver.run()
    assert driver.outputs["again"][-1].num_cached_tokens == 0
    assert driver.tokens("again") == clean[victim]


@pytest.mark.reliability("T58")
def test_an_adapter_that_overflows_ends_its_own_requests_only(
    driver: Driver, adapters: dict[str, Path], tmp_path: Path
) -> None:
    bad, good = driver.add_adapter(overflowing_adapter(tmp_path / "bad")), driver.add_adapter(adapters["r16"])
    driver.bring_to_device(bad, good)
    for name, adapter in (("bad", bad), ("good", good), ("base", None)):
        driver.submit(name, prompt_of(20), adapter)
    driver.run()
    assert driver.finish_reason("bad") == "nonfinite"
    assert driver.tokens("base") == greedy(tiny_llama(), prompt_of(20), 8)
    assert driver.tokens("good") == greedy(with_peft(tiny_llama(), adapters["r16"]), prompt_of(20), 8)
    assert_the_cache_is_finite(driver)


def test_what_an_aborted_prefill_left_behind_is_not_read_by_others(drivers: Drivers, tmp_path: Path) -> None:
    """A long prompt on an overflowing adapter, dropped before anything was sampled from it."""
    driver = drivers.make(kv_cache_bytes=8 * BLOCK_BYTES, max_batch_tokens=16)
    bad = driver.add_adapter(overflowing_adapter(tmp_path / "bad"))
    driver.bring_to_device(bad)
    driver.submit("bad", prompt_of(100), bad)
    for _ in range(5):
        driver.step()
    driver.engine.handle(Abort(["bad"]))
    driver.step()
    for index in range(6):
        driver.submit(f"s{index}", prompt_of(40, index))
    driver.run()
    assert {driver.finish_reason(f"s{index}") for index in range(6)} == {"length"}


# -- deadlines ---------------------------------------------------------------------------------------------------------


def outlast(deadline: float) -> None:
    while time.monotonic() < deadline:
        time.sleep(0.001)


def computed(driver: Driver) -> int:
    return sum(step.stats.batch_tokens for step in driver.steps)


def test_what_expired_before_it_started_never_starts(driver: Driver, adapters: dict[str, Path]) -> None:
    reads, digest = [], driver.add_adapter(adapters["r16"])
    driver.engine.residency._read = lambda digest: reads.append(digest)  # type: ignore[assignment,return-value]
    driver.submit("late", prompt_of(20), digest, deadline=time.monotonic() - 1)
    driver.run()
    (output,) = driver.outputs["late"]
    assert (output.finish_reason, output.token_ids) == ("timeout", [])
    assert "before it started" in str(output.error)
    assert computed(driver) == 0 and not reads


def test_one_that_waits_in_the_queue_ends_at_its_deadline(drivers: Drivers) -> None:
    driver = drivers.make(max_num_seqs=1)
    driver.submit("runs", prompt_of(5), max_tokens=30)
    driver.submit("waits", prompt_of(5, 1), deadline=(deadline := time.monotonic() + 0.05))
    driver.step()
    outlast(deadline)
    driver.step()
    assert driver.finish_reason("waits") == "timeout"
    driver.run()
    assert (len(driver.outputs["waits"]), driver.finish_reason("runs")) == (1, "length")


@pytest.mark.parametrize("overlap", [False, True])
def test_one_that_runs_ends_at_its_deadline_and_frees_everything(driver: Driver, overlap: bool) -> None:
    driver.engine.overlap = overlap
    driver.submit("runs", prompt_of(20), max_tokens=100, deadline=(deadline := time.monotonic() + 0.1))
    driver.submit("beside", prompt_of(5), max_tokens=8)
    driver.step()
    driver.step()
    outlast(deadline)
    driver.step()
    assert driver.finish_reason("runs") == "timeout"
    assert "after" in str(driver.outputs["runs"][-1].error)
    driver.run()
    assert [output.finish_reason for output in driver.outputs["runs"]].count(None) == len(driver.outputs["runs"]) - 1
    assert driver.tokens("beside") == greedy(tiny_llama(), prompt_of(5), 8)
    assert driver.steps[-1].stats.blocks_used == 0


def test_one_that_ends_in_time_says_nothing_of_its_deadline(driver: Driver) -> None:
    driver.submit("s", prompt_of(5), max_tokens=3, deadline=time.monotonic() + 3600)
    driver.run()
    assert (driver.finish_reason("s"), len(driver.tokens("s"))) == ("length", 3)


def test_a_request_whose_client_is_gone_never_starts(driver: Driver) -> None:
    """Its abort is behind it in the inbox of the same step."""
    driver.submit("gone", prompt_of(20))
    driver.engine.handle(Abort(["gone"]))
    driver.run()
    (output,) = driver.outputs["gone"]
    assert (output.finish_reason, computed(driver)) == ("abort", 0)


# -- moves on request --------------------------------------------------------------------------------------------------


def test_a_version_is_moved_up_and_down_on_request(driver: Driver, adapters: dict[str, Path]) -> None:
    digest = driver.add_adapter(adapters["r16"])
    assert driver.settled(MoveAdapter(1, digest, "host")) is None
    assert driver.engine.residency.where(digest) == "host"
    assert driver.settled(MoveAdapter(2, digest, "device")) is None
    assert driver.engine.residency.where(digest) == "device"
    assert driver.settled(MoveAdapter(3, digest, "host")) is None  # it is there already, and better
    assert driver.settled(MoveAdapter(4, digest, "disk")) is None
    assert driver.engine.residency.where(digest) == "disk"
    assert driver.settled(MoveAdapter(5, digest, "disk")) is None
    reported = [step.residency for step in driver.steps if step.residency is not None]
    assert [digest] in [residency.device for residency in reported]
    assert (reported[-1].device, reported[-1].host) == ([], [])
    assert [(move.source, move.target) for step in driver.steps for move in step.moves] == [
        ("disk", "host"),
        ("host", "device"),
        ("device", "disk"),
    ]


def test_moves_that_cannot_be_done_say_why(drivers: Drivers, adapters: dict[str, Path]) -> None:
    driver = drivers.make(adapter_slots=2)
    digests = [driver.add_adapter(adapters[name]) for name in ("r1", "r4", "r16")]
    assert driver.settled(MoveAdapter(1, "f" * 64, "device")) == "invalid"
    driver.bring_to_device(*digests[:2])
    for index in range(2):
        driver.submit(f"s{index}", prompt_of(4), digests[index], max_tokens=400)
    step_until_running(driver, "s0", "s1")
    assert driver.settled(MoveAdapter(2, digests[0], "disk")) == "busy"
    assert driver.settled(MoveAdapter(3, digests[2], "device")) == "no_room"
    assert driver.settled(PinAdapter(4, digests[0], True)) is None
    assert driver.settled(PinAdapter(5, digests[1], True)) == "no_room"
    assert driver.steps[-1].stats.slots_pinned == 1
    assert driver.settled(PinAdapter(6, digests[0], False)) is None
    assert driver.settled(PinAdapter(7, digests[1], True)) is None
    driver.engine.handle(Abort(["s0", "s1"]))
    driver.run()


def test_a_load_is_tried_anew_after_an_old_failure(
    driver: Driver, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "time", clock := Clock())
    digest = driver.add_adapter(adapters["r16"])
    driver.store.path(digest).rename(tmp_path / "away")
    driver.submit("s", prompt_of(4), digest)
    driver.run()
    assert driver.finish_reason("s") == "error"
    (tmp_path / "away").rename(driver.store.path(digest))
    clock.now += residency.RETRY_SECONDS + 0.01
    assert driver.settled(MoveAdapter(1, digest, "device")) is None


@pytest.mark.reliability("T42")
def test_reads_that_nobody_waits_for_any_more_are_dropped(
    driver: Driver, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both reader threads are busy. Of the reads in their queue those of an aborted request go; those that another
    request, a load or a self-test waits for stay."""
    digests = [driver.add_adapter(folder) for folder in adapters.values()]
    names = dict(zip(digests, adapters, strict=True))
    gate, read, begun = threading.Event(), driver.engine.residency._read, []

    def held(digest: str) -> Any:
        begun.append(names[digest])
        assert gate.wait(HANG_SECONDS)
        return read(digest)

    monkeypatch.setattr(driver.engine.residency, "_read", held)
    for digest in digests[:5]:
        driver.submit(names[digest], [1, 5, 9], digest, max_tokens=1)
    driver.submit("also r24", [1, 5, 9], digests[3], max_tokens=1)
    driver.engine.handle(MoveAdapter(1, digests[4], "host"))
    driver.step()
    driver.engine.handle(Abort(["r16", "r24", "r40"]))
    driver.step()
    assert names.keys() - {digests[2], digests[5]} == set(driver.engine.residency.loading())
    gate.set()
    driver.run()
    assert sorted(begun) == ["r1", "r24", "r4", "r40"]
    assert driver.replies[1].error is None and driver.finish_reason("also r24") == "length"


def test_device_memory_is_taken_by_native_rank(drivers: Drivers, adapters: dict[str, Path], tmp_path: Path) -> None:
    """A budget for one adapter of rank 64 holds four of rank 16, and no byte more is allocated."""
    page = page_bytes(drivers.make().info.spec, torch.float32)
    driver = drivers.make(adapter_slots=8, max_adapter_rank=64, adapter_device_bytes=5 * page - 1)
    assert driver.engine._runner.pool.nbytes() == 4 * page
    assert (driver.info.adapter_slots, driver.info.adapter_pages) == (8, 4)
    small = [write_adapter(tiny_llama(), tmp_path / f"{i}", seed=i, r=16) for i in range(5)]
    digests = [driver.add_adapter(folder) for folder in (*small, adapters["r64"])]
    table = driver.engine.residency.slots

    def used() -> dict[str, int]:
        return {slot.digest: len(slot.pages) * page for slot in table.slots()}

    for index, digest in enumerate(digests[:4]):
        assert driver.settled(MoveAdapter(index, digest, "device")) is None
    assert used() == dict.fromkeys(digests[:4], page)
    assert driver.settled(MoveAdapter(5, digests[4], "device")) is None
    assert used() == dict.fromkeys(digests[1:5], page)  # there are slots left, but no memory
    assert driver.settled(MoveAdapter(6, digests[5], "device")) is None
    assert used() == {digests[5]: 4 * page}
    assert driver.settled(PinAdapter(7, digests[5], True)) == "no_room"
    for index, digest in enumerate(digests):
        driver.submit(f"s{index}", prompt_of(4), digest, max_tokens=3)
    driver.run()
    assert {driver.finish_reason(f"s{index}") for index in range(6)} == {"length"}


def test_a_budget_without_room_for_the_largest_rank_is_refused(drivers: Drivers) -> None:
    page = page_bytes(drivers.make().info.spec, torch.float32)
    with pytest.raises(ModelRefused, match=f"--adapter-device-bytes {4 * page - 1}; raise it to {4 * page} "):
        drivers.make(adapter_device_bytes=4 * page - 1)
    assert drivers.make(adapter_device_bytes=4 * page).info.adapter_pages == 4
    assert drivers.make(adapter_device_bytes=10**12, adapter_slots=3).info.adapter_pages == 24


def test_whole_weights_leave_the_device_with_their_adapter(drivers: Drivers, tmp_path: Path) -> None:
    """They are counted by their size, bounded, and freed on unload, eviction and deletion."""
    copy = 97 * 64 * 4  # of the output head
    config: dict[str, Any] = {"r": 4, "modules_to_save": ["lm_head"]}
    folders = [write_adapter(tiny_llama(), tmp_path / f"{i}", seed=i, **config) for i in range(3)]
    driver = drivers.make(adapter_override_bytes=2 * copy + 1)
    a, b, c = (driver.add_adapter(folder) for folder in folders)
    pool, residency = driver.engine._runner.pool, driver.engine.residency

    def kept() -> list[str]:
        found = [slot for slot in residency.slots.slots() if pool.extra_bytes().get(slot.index) == copy]
        assert len(found) == len(pool.extra_bytes())
        return [slot.digest for slot in found]

    for index, digest in enumerate((a, b)):
        assert driver.settled(MoveAdapter(index, digest, "device")) is None
    assert kept() == [a, b]
    assert driver.settled(MoveAdapter(3, c, "device")) is None
    assert kept() == [b, c]  # a slot and pages were left, but no room for a third head
    assert driver.settled(MoveAdapter(4, b, "disk")) is None
    assert kept() == [c]
    driver.engine.handle(RetireAdapter(c))
    driver.run()
    assert kept() == []


def test_an_adapter_with_more_whole_weights_than_the_budget_is_refused(drivers: Drivers, tmp_path: Path) -> None:
    driver = drivers.make(adapter_override_bytes=1000)
    folder = write_adapter(tiny_llama(), tmp_path / "big", seed=1, modules_to_save=["lm_head"])
    driver.submit("s", [1, 5, 9], driver.add_adapter(folder))
    driver.run()
    assert "--adapter-override-bytes" in str(driver.outputs["s"][-1].error)


def test_pinning_loads_and_protects(drivers: Drivers, adapters: dict[str, Path]) -> None:
    driver = drivers.make(adapter_slots=2)
    digests = [driver.add_adapter(adapters[name]) for name in ("r1", "r4", "r16")]
    assert driver.settled(PinAdapter(1, digests[0], True)) is None
    for index, digest in enumerate(digests * 2):
        driver.submit(f"s{index}", prompt_of(4), digest, max_tokens=2)
        driver.run()
    assert driver.engine.residency.where(digests[0]) == "device"
    evicted = {move.digest for step in driver.steps for move in step.moves if move.source == "device"}
    assert evicted == set(digests[1:])


@pytest.mark.parametrize("later", [PinAdapter(2, "", False), RetireAdapter("")], ids=["unpinned", "retired"])
def test_a_pin_that_is_on_its_way_does_not_come_back_after_its_end(
    driver: Driver, adapters: dict[str, Path], later: PinAdapter | RetireAdapter
) -> None:
    """An engine that was restarted loads all pins anew, and meanwhile one of them is unpinned."""
    digest = driver.add_adapter(next(iter(adapters.values())))
    driver.engine.handle(PinAdapter(1, digest, True))
    driver.step()
    driver.engine.handle(msgspec.structs.replace(later, digest=digest))
    driver.engine.handle(PinAdapter(3, digest, False))
    driver.run()
    assert driver.replies[3].error is None
    assert driver.replies[1].error is not None and driver.replies[1].error[0] == "busy"
    assert len(driver.engine.residency.pinned()) == 0
    assert driver.engine.residency.where(digest) != "device"


@pytest.mark.reliability("T41")
def test_an_adapter_that_is_deleted_while_it_loads_leaves_no_memory_behind(
    driver: Driver, adapters: dict[str, Path]
) -> None:
    digest = driver.add_adapter(next(iter(adapters.values())))
    driver.engine.handle(MoveAdapter(1, digest, "device"))
    driver.step()
    driver.engine.handle(RetireAdapter(digest))
    driver.run()
    assert driver.replies[1].error is not None and driver.replies[1].error[0] == "busy"
    assert driver.engine.residency.where(digest) == "disk"


# -- how an answer ends ------------------------------------------------------------------------------------------------


@pytest.mark.reliability("T41")
def test_a_retired_version_goes_when_its_last_sequence_ends(driver: Driver, adapters: dict[str, Path]) -> None:
    """Running and waiting sequences keep it; then device and host memory are free, even if it was pinned."""
    digest = driver.add_adapter(next(iter(adapters.values())))
    assert driver.settled(PinAdapter(0, digest, True)) is None
    driver.submit("running", prompt_of(20), digest, max_tokens=8)
    step_until_running(driver, "running")
    driver.submit("waiting", prompt_of(20, seed=1), digest, max_tokens=8)
    driver.engine.handle(RetireAdapter(digest))
    driver.run()
    assert driver.finish_reason("running") == driver.finish_reason("waiting") == "length"
    assert driver.engine.residency.where(digest) == "disk"
    assert len(driver.engine.residency.pinned()) == 0


def test_an_idle_version_that_is_retired_goes_at_once(driver: Driver, adapters: dict[str, Path]) -> None:
    digest = driver.add_adapter(next(iter(adapters.values())))
    driver.bring_to_device(digest)
    driver.engine.handle(RetireAdapter(digest))
    driver.engine.handle(RetireAdapter("0" * 64))
    driver.run()
    assert driver.engine.residency.where(digest) == "disk"


def test_a_retired_version_that_is_asked_for_again_stays(driver: Driver, adapters: dict[str, Path]) -> None:
    digest = driver.add_adapter(next(iter(adapters.values())))
    driver.submit("before", prompt_of(20), digest, max_tokens=8)
    step_until_running(driver, "before")
    driver.engine.handle(RetireAdapter(digest))
    driver.submit("after", prompt_of(20), digest, max_tokens=8)
    driver.run()
    assert driver.engine.residency.where(digest) == "device"


def test_a_retired_version_that_is_pinned_again_stays(driver: Driver, adapters: dict[str, Path]) -> None:
    """A rollback under traffic: the name comes back to the version before its last sequence has ended."""
    digest = driver.add_adapter(next(iter(adapters.values())))
    driver.submit("running", prompt_of(20), digest, max_tokens=8)
    step_until_running(driver, "running")
    driver.engine.handle(RetireAdapter(digest))
    assert driver.settled(PinAdapter(0, digest, True)) is None
    driver.run()
    assert driver.finish_reason("running") == "length"
    assert driver.engine.residency.where(digest) == "device"
    assert len(driver.engine.residency.pinned()) == 1


def test_an_answer_ends_at_max_tokens(driver: Driver) -> None:
    driver.submit("s", prompt_of(5), max_tokens=5)
    driver.run()
    assert (len(driver.tokens("s")), driver.finish_reason("s")) == (5, "length")


def test_an_answer_ends_at_eos_unless_told_to_ignore_it(driver: Driver) -> None:
    driver.submit("stops", prompt_of(5), ignore_eos=False, logit_bias={EOS: 100.0})
    driver.submit("ignores", prompt_of(5), ignore_eos=True, logit_bias={EOS: 100.0})
    driver.run()
    assert (driver.tokens("stops"), driver.finish_reason("stops")) == ([EOS], "stop")
    assert (driver.tokens("ignores"), driver.finish_reason("ignores")) == ([EOS] * 8, "length")


def test_an_answer_ends_at_a_stop_token_which_is_part_of_it(driver: Driver) -> None:
    answer = greedy(tiny_llama(), prompt_of(5), 8)
    driver.submit("s", prompt_of(5), stop_token_ids=(answer[4],))
    driver.run()
    assert driver.tokens("s") == answer[: answer.index(answer[4]) + 1]
    assert driver.finish_reason("s") == "stop"


def test_an_answer_has_at_least_min_tokens(driver: Driver) -> None:
    driver.submit("s", prompt_of(5), ignore_eos=False, logit_bias={EOS: 100.0}, min_tokens=3)
    driver.run()
    tokens = driver.tokens("s")
    assert EOS not in tokens[:3]
    assert tokens[3:] == [EOS]
    assert driver.finish_reason("s") == "stop"


@pytest.mark.parametrize("prompt_length", [20, 31])
def test_an_answer_ends_at_the_longest_sequence_the_model_takes(drivers: Drivers, prompt_length: int) -> None:
    driver = drivers.make(max_model_len=32)
    driver.submit("s", prompt_of(prompt_length), max_tokens=1000)
    driver.run()
    assert (len(driver.tokens("s")), driver.finish_reason("s")) == (32 - prompt_length, "length")


@pytest.mark.reliability("T47")
def test_the_longest_sequence_fits_the_cache_to_the_last_block(drivers: Drivers) -> None:
    driver = drivers.make(kv_cache_bytes=4 * BLOCK_BYTES)
    assert driver.info.max_model_len == 48
    for seq_id in ("cold", "warm"):
        driver.submit(seq_id, prompt_of(47), max_tokens=1000)
        driver.run()
        assert (len(driver.tokens(seq_id)), driver.finish_reason(seq_id)) == (1, "length")


def test_logprobs_come_with_every_token(driver: Driver) -> None:
    driver.submit("s", prompt_of(5), logprobs=2)
    driver.run()
    for output in driver.outputs["s"]:
        assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
        assert output.logprobs[0].top[0][0] == output.token_ids[0]  # greedy takes the likeliest


def test_a_prompt_that_several_requests_share_stays_as_it_was(driver: Driver) -> None:
    """Without a process in between, the engine gets the very list that the caller holds."""
    prompt = prompt_of(5)
    submit(driver, "a", prompt, None, salt="")
    submit(driver, "b", prompt, None, salt="")
    driver.run()
    assert prompt == prompt_of(5)
    assert driver.tokens("a") == driver.tokens("b") == greedy(tiny_llama(), prompt, 8)


def test_every_sequence_ends_exactly_once_and_the_queue_time_is_told(driver: Driver) -> None:
    started = time.monotonic()
    for index in range(10):
        driver.submit(f"s{index}", prompt_of(5, index), max_tokens=1 + index)
    driver.run()
    for index in range(10):
        endings = [output.finish_reason for output in driver.outputs[f"s{index}"]]
        assert endings == [None] * index + ["length"]
        assert 0 <= driver.outputs[f"s{index}"][-1].queue_seconds <= time.monotonic() - started
    assert not driver.engine.has_work()
