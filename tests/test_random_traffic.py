"""Random traffic over few slots and little cache, while adapters are moved, pinned, deleted and merged: every sequence
says what it says alone."""

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
from server.sequence import SamplingParams, ScaledAdapter
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
LIMITS = {"adapter_slots": 3, "max_batch_tokens": 32, "max_num_seqs": 6, "max_wait_steps": 6}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(tiny_llama(), root / str(i), seed=i, scale=0.2, **config) for i, config in enumerate(ADAPTERS)
    ]


Make = Callable[[], Driver]


@pytest.fixture
def make(llama_folder: Path, tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:

        def new() -> Driver:
            driver = make_driver(llama_folder, tmp_path / "data", kv_cache_bytes=8 * BLOCK_BYTES, **LIMITS)
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
