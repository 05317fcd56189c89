"""Random traffic over few slots and little cache, while adapters are moved, pinned, deleted and merged: every sequence
says what it says alone. Also with slow reads, adapters that are published meanwhile, steps that fail, and engines that
crash and are started again."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.ipc.messages import (
    Abort,
    Merge,
    MoveAdapter,
    PinAdapter,
    RetireAdapter,
    RunSelfTest,
    Submit,
    ToEngine,
    Unmerge,
)
from server.request import SamplingParams, ScaledAdapter
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver, plain
from tests.fixtures.virtual_tokens import write_virtual
from tests.test_engine import BLOCK_BYTES, assert_the_cache_is_finite

ADAPTERS: list[dict[str, Any]] = [
    {"r": 4},
    {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 16, "target_modules": "all-linear"},
    {"r": 8, "use_dora": True},
    {"r": 20, "target_modules": ["embed_tokens", "o_proj"]},
    {"r": 4, "target_modules": ["lm_head", "down_proj"]},
]
REQUESTS = 24
HOST_BYTES = 400_000  # of two or three adapters, so that others are read again
LIMITS = {"adapter_slots": 3, "max_batch_tokens": 32, "max_num_seqs": 6, "max_wait_steps": 6}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(tiny_llama(), root / str(i), seed=i, scale=0.2, **config) for i, config in enumerate(ADAPTERS)
    ]


Make = Callable[..., Driver]


@pytest.fixture
def make(llama_folder: Path, tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:

        def new(data: str = "data", **settings: Any) -> Driver:
            limits = {"kv_cache_bytes": 8 * BLOCK_BYTES, **LIMITS, **settings}
            driver = make_driver(llama_folder, tmp_path / data, **limits)
            stack.callback(driver.engine.close)
            return driver

        yield new


def some_sampling(chance: random.Random) -> SamplingParams:
    """Whatever a request may ask of the sampler; some end before their length."""
    sampling: dict[str, Any] = {
        "max_tokens": chance.randint(1, 24),
        "temperature": chance.choice([0.0, 0.0, 1.0]),
        "seed": chance.randrange(99),
    }
    for name, value in (
        ("stop_token_ids", tuple(range(20))),
        ("min_tokens", min(5, sampling["max_tokens"])),
        ("logprobs", 2),
        ("logit_bias", {5: 3.0}),
        ("repetition_penalty", 1.3),
        ("presence_penalty", 0.7),
        ("frequency_penalty", 0.5),
        ("top_k", chance.choice([1, 5, 40])),
        ("top_p", 0.9),
        ("min_p", 0.1),
    ):
        if chance.random() < 0.2:
            sampling[name] = value
    return SamplingParams(**sampling)


def requests(seed: int, digests: list[str], late: bool) -> list[Submit]:
    """To the base, to an adapter, to two; `late`: some adapters see only the end of the prompt."""
    chance, asked = random.Random(seed), []
    for number in range(REQUESTS):
        names = chance.sample(digests, chance.choice([0, 1, 1, 1, 2]))
        adapters = tuple(ScaledAdapter(name, chance.choice([1.0, 0.5, 2.0]) if names[1:] else 1.0) for name in names)
        words = random.Random(number % 6)  # so that many begin alike
        prompt = [words.randrange(3, 97) for _ in range(chance.randint(1, 45))]
        active_from = chance.choice([0, 0, chance.randint(0, len(prompt))]) if adapters and late else 0
        tenant, priority = chance.choice(["", "t1", "t2"]), chance.choice([0, 0, 1])
        asked.append(
            Submit(f"s{number}", prompt, some_sampling(chance), adapters, tenant, active_from, priority, weight=2.0)
        )
    return asked


def in_a_hurry(chance: random.Random, request: Submit) -> Submit:
    """Some requests have a deadline, which may have passed."""
    if chance.random() < 0.8:
        return request
    return msgspec.structs.replace(request, deadline=time.monotonic() + chance.choice([-1.0, 0.0, 0.01, 60.0]))


def disturbance(chance: random.Random, digests: list[str], ids: Iterator[int], merges: bool) -> list[ToEngine]:
    """Choose an action of an operator or a client; mostly none."""
    digest, kind = chance.choice(digests), chance.randrange(20)
    if kind == 0:
        return [Abort([f"s{chance.randrange(REQUESTS)}"])]
    if kind in (1, 2):
        return [MoveAdapter(next(ids), digest, chance.choice(["disk", "host", "device"]))]
    if kind == 3:
        return [PinAdapter(next(ids), digest, True), PinAdapter(next(ids), digest, False)]
    if kind == 4:
        return [RetireAdapter(digest)]
    if kind == 5:
        return [RunSelfTest(next(ids), digest)]
    if kind == 6 and merges:
        return [Merge(next(ids), digest, drain=True, allow_requantize=False)]
    return [Unmerge(next(ids))] if kind == 7 and merges else []


def play(driver: Driver, seed: int, digests: list[str], merges: bool) -> None:
    chance, hurry, ids = random.Random(-1 - seed), random.Random(1000 + seed), count()
    for request in requests(seed, digests, not merges):
        driver.engine.handle(in_a_hurry(hurry, request))
        for _ in range(chance.randrange(4)):
            driver.step()
        for message in disturbance(chance, digests, ids, merges):
            driver.engine.handle(message)
    driver.run()


@pytest.mark.reliability("T40", "T54")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("merges", [False, True])  # into whose weights no adapter goes that sees only a prompt's end
@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_says_what_it_says_alone(
    make: Make, folders: list[Path], seed: int, merges: bool, overlap: bool
) -> None:
    alone = make()
    digests = [alone.add_adapter(folder) for folder in folders]
    driver = make()
    compare(alone, driver, seed, digests, merges, overlap)


def compare(alone: Driver, driver: Driver, seed: int, digests: list[str], merges: bool, overlap: bool) -> None:
    for request in requests(seed, digests, not merges):
        alone.engine.handle(request)
        alone.run()
    driver.engine.overlap = overlap
    play(driver, seed, digests, merges)
    assert driver.engine.scheduler.blocks.num_used == 0
    assert_the_cache_is_finite(driver)
    for seq_id in alone.outputs:
        said, expected = driver.tokens(seq_id), alone.tokens(seq_id)
        assert [output.finish_reason is not None for output in driver.outputs[seq_id]].count(True) == 1
        if driver.finish_reason(seq_id) in ("abort", "timeout"):
            assert said == expected[: len(said)]
        else:
            assert (said, driver.finish_reason(seq_id)) == (expected, alone.finish_reason(seq_id))


@pytest.fixture(scope="module")
def virtual(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, tokens = tmp_path_factory.mktemp("virtual"), {"P_TUNING": 21, "CARTRIDGE": 16, "PREFIX_TUNING": 35}
    return [write_virtual(tiny_llama(), root / name, name, count) for name, count in tokens.items()]


def put_in_place(driver: Driver, others: dict[str, str]) -> None:
    """Let messages about one adapter be about another, of virtual tokens; compositions stay as they are."""
    handle = driver.engine.handle

    def changed(message: ToEngine) -> None:
        if isinstance(message, Submit) and len(message.adapters) == 1 and message.adapters[0].digest in others:
            digest = others[message.adapters[0].digest]
            traits = driver.traits[digest]
            message = msgspec.structs.replace(
                message,
                adapters=plain(digest),
                active_from=0,
                virtual_tokens=traits.virtual_tokens,
                has_prefix=traits.has_prefix,
            )
        elif isinstance(message, MoveAdapter | PinAdapter | RetireAdapter | RunSelfTest) and message.digest in others:
            message = msgspec.structs.replace(message, digest=others[message.digest])
        handle(message)

    driver.engine.handle = changed  # type: ignore[method-assign]


@pytest.mark.reliability("T54")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_so_it_is_with_virtual_tokens(
    make: Make, folders: list[Path], virtual: list[Path], seed: int, merges: bool, overlap: bool
) -> None:
    drivers = make(), make()
    for driver in drivers:
        digests = [driver.add_adapter(folder) for folder in folders]
        own = [driver.add_adapter(folder) for folder in virtual]
        put_in_place(driver, dict(zip(digests[::2], own, strict=True)))
    compare(*drivers, seed, digests, merges, overlap)


class Troubled:
    """An engine whose reads are slow, whose steps fail now and then, and which crashes and is started again. What was
    not answered before a crash is asked again, as clients do."""

    def __init__(self, make: Make, folders: list[Path], seed: int, overlap: bool):
        self._make, self._overlap = make, overlap
        # Each has its own, so that what is asked does not depend on how many steps and reads there are.
        self._chance, self._slowness, self._bad_luck = (random.Random(f"{seed} {what}") for what in "abc")
        self._unpublished = list(folders)
        self._ids = count()
        self.published: list[str] = []
        self.asked: dict[str, Submit] = {}
        self.told: list[tuple[str, list[int]]] = []  # by sequence: the tokens before a crash
        self.tested: dict[int, str] = {}  # self-tests of this engine: id, digest
        self.crashes = self.failures = self.passed = 0
        self.driver = self._start()

    def _start(self) -> Driver:
        driver = self._make("troubled", adapter_host_bytes=HOST_BYTES)
        driver.engine.overlap = self._overlap
        residency, engine = driver.engine.residency, driver.engine
        read, forward = residency._read, engine._forward_batch

        def slow(digest: str) -> Any:
            time.sleep(self._slowness.choice([0, 0, 0.005, 0.02]))
            return read(digest)

        def failing(*arguments: Any) -> Any:
            if self._bad_luck.random() < 0.05:
                self.failures += 1
                raise RuntimeError("this step fails")
            return forward(*arguments)

        residency._read, engine._forward_batch = slow, failing  # type: ignore[method-assign]
        return driver

    def publish(self) -> None:
        """Store a version and test it; traffic for it may come at once."""
        if self._unpublished:
            digest = self.driver.add_adapter(self._unpublished.pop(0))
            self.published.append(digest)
            self.tested[request := next(self._ids)] = digest
            self.driver.engine.handle(RunSelfTest(request, digest))

    def ask(self, request: Submit) -> None:
        while not {adapter.digest for adapter in request.adapters} <= {*self.published}:
            self.publish()
        self.asked[request.seq_id] = request
        self.driver.engine.handle(request)

    def disturb(self, merges: bool) -> None:
        if self.published:
            for message in disturbance(self._chance, self.published, self._ids, merges):
                self.driver.engine.handle(message)
        kind = self._chance.randrange(12)
        if kind == 0:
            self.publish()
        if kind == 1:
            self.crash()

    def crash(self) -> None:
        self.crashes += 1
        self.check_replies(complete=False)
        before, self.driver = self.driver, self._start()
        before.engine.close()
        self.tested.clear()
        for seq_id, request in self.asked.items():
            if before.outputs.get(seq_id) and before.outputs[seq_id][-1].finish_reason is not None:
                self.driver.outputs[seq_id] = before.outputs[seq_id]
            else:
                self.told.append((seq_id, before.tokens(seq_id) if seq_id in before.outputs else []))
                self.driver.engine.handle(request)

    def finish(self) -> None:
        self.driver.run()
        self.check_replies(complete=True)

    def check_replies(self, complete: bool) -> None:
        """A self-test passes, or says why there was none: a full device, a merged base, or a failed load."""
        for request in self.tested:
            reply = self.driver.replies.get(request)
            assert reply is not None or not complete
            if reply is not None and reply.selftest is not None:
                assert reply.selftest.relative_error <= reply.selftest.tolerance
                self.passed += 1
            elif reply is not None:
                assert reply.error is not None and reply.error[0] in ("busy", "no_room", "failed")


def through_trouble(make: Make, folders: list[Path], seed: int, merges: bool, overlap: bool) -> Troubled:
    """Play one run and compare every answer with that of a quiet engine."""
    alone = make("alone")
    digests = [alone.add_adapter(folder) for folder in folders]
    wanted = requests(seed, digests, not merges)
    for request in wanted:
        alone.engine.handle(request)
        alone.run()
    chance = random.Random(-1 - seed)
    troubled = Troubled(make, folders, seed, overlap)
    for request in wanted:
        troubled.ask(request)
        for _ in range(chance.randrange(4)):
            troubled.driver.step()
        troubled.disturb(merges)
    troubled.finish()
    driver = troubled.driver
    assert driver.engine.scheduler.blocks.num_used == 0
    assert_the_cache_is_finite(driver)
    for seq_id in alone.outputs:
        said, expected = driver.tokens(seq_id), alone.tokens(seq_id)
        assert [output.finish_reason is not None for output in driver.outputs[seq_id]].count(True) == 1
        whole = (said, driver.finish_reason(seq_id)) == (expected, alone.finish_reason(seq_id))
        assert whole or (driver.finish_reason(seq_id) in ("abort", "error") and said == expected[: len(said)])
    for seq_id, said in troubled.told:
        assert said == alone.tokens(seq_id)[: len(said)]
    return troubled


@pytest.mark.reliability("T43")
@pytest.mark.parametrize(("merges", "overlap"), [(False, True), (True, False)])
def test_whatever_fails_an_answer_is_whole_or_says_that_it_is_not(
    make: Make, folders: list[Path], merges: bool, overlap: bool
) -> None:
    troubled = through_trouble(make, folders, 0, merges, overlap)
    assert troubled.crashes and troubled.failures and troubled.passed


@pytest.mark.reliability("T43")
@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("seed", range(1, 16))
def test_whatever_fails_in_more_runs(make: Make, folders: list[Path], seed: int, merges: bool, overlap: bool) -> None:
    through_trouble(make, folders, seed, merges, overlap)
