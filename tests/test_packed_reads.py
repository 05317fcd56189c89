"""A version that is loaded again comes from its packed copy, and is applied as if it had been read from its files."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig

import server.engine.build as build_module
from adapters.errors import AdapterInvalid
from adapters.runtime.pack import PackedAdapter
from server.ipc.messages import MoveAdapter
from tests.fixtures.adapter_factory import tiny_llama, write_adapter, write_peft_adapter
from tests.fixtures.engine_driver import Driver, make_driver
from tests.fixtures.parity_cases import LLAMA_CASES, LLAMA_PEFT_TYPES
from tests.test_packed_format import assert_same

CASES: dict[str, dict[str, Any] | PeftConfig] = {**LLAMA_PEFT_TYPES, **LLAMA_CASES}
# Computed with the base's weights, row maps, and forms of saved modules.
OF_THE_BASE = {"beft", "boft", "c3a", "deft", "hra", "ln_tuning", "oft", "road", "shira", "trainable_tokens"}
KEPT = {
    "alora",
    "expressions",
    "gaussian",
    "parameter of a linear",
    "patterns",
    "plain",
    "qalora",
    "rslora",
    *(case for case in LLAMA_PEFT_TYPES if case.partition(",")[0] not in OF_THE_BASE),
}
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kinds")
    model = tiny_llama(initializer_range=0.2, intermediate_size=128, attention_bias=True, mlp_bias=True)
    model.save_pretrained(path / "model")
    for seed, (case, settings) in enumerate(CASES.items()):
        if isinstance(settings, PeftConfig):
            write_peft_adapter(model, path / case, settings, seed=seed)
        else:
            write_adapter(model, path / case, seed=seed, **settings)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Driver]]:
    made: list[Driver] = []

    @cache
    def make(dtype: str) -> Driver:
        made.append(make_driver(folder / "model", tmp_path_factory.mktemp("data"), dtype=dtype))
        return made[-1]

    yield make
    for driver in made:
        driver.engine.close()


def copies(driver: Driver) -> list[Path]:
    return sorted((driver.store.path("0" * 64).parents[2] / "packed").glob("*/*"))


def copy_of(driver: Driver, digest: str) -> Path:
    (found,) = [path for path in copies(driver) if path.name == digest]
    return found


def cold(driver: Driver, digest: str) -> PackedAdapter:
    """What a reader thread does for a version that is on disk only."""
    residency = driver.engine.residency
    packed: PackedAdapter = residency._read(digest)
    residency._keep(digest, packed)
    return packed


class Loads:
    """Counts the versions that are read from their own files."""

    def __init__(self) -> None:
        self.count = 0

    def load(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        return _load(*arguments, **options)


_load = build_module.load


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    found = Loads()
    monkeypatch.setattr(build_module, "load", found.load)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_packed_copy_has_the_bits_of_a_fresh_pack(
    engine: Callable[[str], Driver], folder: Path, loads: Loads, case: str, dtype: str
) -> None:
    driver = engine(dtype)
    digest = driver.add_adapter(folder / case)
    fresh = cold(driver, digest)
    assert fresh.follows_from_shapes == (case in KEPT)
    assert [path.name for path in copies(driver)].count(digest) == (case in KEPT)
    again = cold(driver, digest)
    assert loads.count == (1 if case in KEPT else 2)
    assert_same(again, fresh)
    assert again.vocab_size == fresh.vocab_size
    assert again.module_overrides.keys() == fresh.module_overrides.keys()
    for name, modules in fresh.module_overrides.items():
        for own, other in zip(again.module_overrides[name], modules, strict=True):
            pairs = zip(own.state_dict().values(), other.state_dict().values(), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)


@pytest.fixture
def driver(llama_folder: Path, tmp_path: Path, loads: Loads) -> Iterator[Driver]:
    made = make_driver(llama_folder, tmp_path / "data")
    yield made
    made.engine.close()


@pytest.fixture
def digest(driver: Driver, tmp_path: Path) -> str:
    return driver.add_adapter(write_adapter(tiny_llama(), tmp_path / "adapter", scale=0.5))


def answer(driver: Driver, digest: str, name: str) -> list[int]:
    """The tokens of a request that loads the version from disk."""
    residency = driver.engine.residency
    if residency.where(digest) != "disk":
        residency.unload(digest)
    driver.submit(name, PROMPT, digest)
    driver.run()
    tokens = driver.tokens(name)
    while not residency._threads.submit(lambda: True).result():  # the copy is written after the report
        pass
    return tokens


def test_a_second_load_reads_the_packed_copy_alone(driver: Driver, digest: str, loads: Loads) -> None:
    first = answer(driver, digest, "first")
    assert loads.count == 1 and len(copies(driver)) == 1
    weights = driver.store.path(digest) / "adapter_model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert answer(driver, digest, "second") == first
    assert loads.count == 1


def damages() -> dict[str, Callable[[bytes], bytes]]:
    def flipped(place: int) -> Callable[[bytes], bytes]:
        return lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return {
        "nothing left": lambda _: b"",
        "half": lambda data: data[: len(data) // 2],
        "longer": lambda data: data + b"\0",
        "zeros": lambda data: bytes(len(data)),
        "first byte": flipped(0),
        "length of the header": flipped(9),
        "checksum": flipped(13),
        "header": flipped(40),
        "last byte": flipped(-2),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_copy_is_made_again(driver: Driver, digest: str, loads: Loads, damage: str) -> None:
    first = answer(driver, digest, "first")
    good = copy_of(driver, digest).read_bytes()
    copy_of(driver, digest).write_bytes(damages()[damage](good))
    assert answer(driver, digest, "second") == first
    assert loads.count == 2
    assert copy_of(driver, digest).read_bytes() == good
    assert answer(driver, digest, "third") == first
    assert loads.count == 2


def test_the_copy_of_another_version_is_not_used(driver: Driver, digest: str, loads: Loads, tmp_path: Path) -> None:
    other = driver.add_adapter(write_adapter(tiny_llama(), tmp_path / "other", seed=1, scale=0.5))
    first, of_other = answer(driver, digest, "first"), answer(driver, other, "other")
    assert first != of_other
    copy_of(driver, digest).write_bytes(copy_of(driver, other).read_bytes())
    assert answer(driver, digest, "second") == first
    assert loads.count == 3


def test_a_version_without_a_copy_is_verified_against_its_digest(driver: Driver, digest: str) -> None:
    answer(driver, digest, "first")
    copy_of(driver, digest).unlink()
    weights = driver.store.path(digest) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AdapterInvalid):
        cold(driver, digest)
    assert copies(driver) == []


def test_the_copy_of_a_version_that_the_store_has_no_longer_is_not_used(driver: Driver, digest: str) -> None:
    answer(driver, digest, "first")
    driver.store.delete(digest)
    with pytest.raises(AdapterInvalid):
        cold(driver, digest)


def test_a_version_under_self_test_is_packed_from_its_weights(driver: Driver, digest: str, loads: Loads) -> None:
    answer(driver, digest, "first")
    reader = driver.engine._messages._selftests._reader
    reader.share(digest, verify=True)
    assert cold(driver, digest).follows_from_shapes
    assert loads.count == 2
    reader.unshare(digest)
    assert not cold(driver, digest).follows_from_shapes


def test_another_engine_uses_the_copies_unless_its_layout_is_another(
    driver: Driver, digest: str, loads: Loads, llama_folder: Path, tmp_path: Path
) -> None:
    first = answer(driver, digest, "first")
    driver.engine.close()
    for settings, expected in (({}, 1), ({"dtype": "bfloat16"}, 2), ({"max_adapter_rank": 32}, 3), ({}, 3)):
        again = make_driver(llama_folder, tmp_path / "data", **settings)  # type: ignore[arg-type]
        assert len(answer(again, digest, "again")) == len(first)
        again.engine.close()
        assert loads.count == expected
    assert len(copies(driver)) == 3


def test_without_room_for_copies_versions_are_read_from_their_files(
    driver: Driver, digest: str, loads: Loads, llama_folder: Path, tmp_path: Path
) -> None:
    first = answer(driver, digest, "first")
    driver.engine.close()
    again = make_driver(llama_folder, tmp_path / "data", adapter_packed_bytes=0)
    assert answer(again, digest, "second") == first == answer(again, digest, "third")
    again.engine.close()
    assert copies(driver) == [] and loads.count == 3


def test_a_load_does_not_wait_for_its_copy(driver: Driver, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    residency = driver.engine.residency

    def broken(*_: Any) -> None:
        raise RuntimeError("no copy")

    monkeypatch.setattr(residency, "_keep", broken)
    driver.engine.handle(MoveAdapter(1, digest, "host"))
    driver.run()
    assert answer(driver, digest, "first")
    assert copies(driver) == [] and driver.finish_reason("first") == "length"
