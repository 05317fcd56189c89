"""A lost registry is never silent, and its names come back from the journal beside it."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adapters.errors import AdapterNotFound
from adapters.peft.files import WEIGHTS_FILE
from adapters.registry.db import DATABASE
from adapters.registry.journal import JOURNAL, Journal
from adapters.registry.registry import AdapterRegistry
from server.cli.main import app
from tests.fixtures.api_server import serving
from tests.test_healing import flip, register
from tests.test_registry import publish, state


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def before(data_dir: Path) -> Iterator[Any]:
    """The state of a registry with a history, a pin, a deletion, a rollback and an alias; it is closed."""
    registry = AdapterRegistry(data_dir)
    register(registry, "one")
    register(registry, "one", seed=1)
    registry.rollback("one", None)
    register(registry, "two", seed=2)
    registry.set_pinned("two", True)
    register(registry, "gone", seed=3)
    registry.retire("gone")
    registry.collect_garbage()
    registry.split("prod", {"one": 3, "two": 1})
    registry.split("old", {"one": 1})
    registry.unsplit("old")
    found = state(registry), registry.aliases
    registry.close()
    yield found


def ruin(data_dir: Path) -> None:
    (data_dir / DATABASE).write_bytes(b"garbage" * 1000)


LOSSES: dict[str, Callable[[Path], None]] = {
    "garbage": ruin,
    "empty": lambda data_dir: (data_dir / DATABASE).write_bytes(b"") and None,
    "absent": lambda data_dir: (data_dir / DATABASE).unlink(),
    "cut short": lambda data_dir: (data_dir / DATABASE).write_bytes((data_dir / DATABASE).read_bytes()[:9000]) and None,
}


def rebuild(data_dir: Path) -> Result:
    return CliRunner().invoke(app, ["registry", "rebuild", "--data-dir", str(data_dir)], env={"COLUMNS": "200"})


def examined(data_dir: Path) -> dict[str, str]:
    result = CliRunner().invoke(app, ["doctor", "--json", "--data-dir", str(data_dir)])
    assert result.exit_code == 0, result.output
    found: dict[str, str] = json.loads(result.output)["data folder"]
    return found


@pytest.mark.reliability("T13")
@pytest.mark.parametrize("starts", [0, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_names_histories_pins_and_aliases_come_back(loss: str, starts: int, data_dir: Path, before: Any) -> None:
    LOSSES[loss](data_dir)
    for _ in range(starts):
        AdapterRegistry(data_dir).close()
    result = rebuild(data_dir)
    assert result.exit_code == 0, result.output
    assert "restored" in result.output and "gone" not in result.output
    for _ in range(2):
        registry = AdapterRegistry(data_dir)
        assert (state(registry), registry.aliases) == before
        assert registry.set_aside == [] and registry.damaged == {}
        registry.close()
    assert not list(data_dir.glob("*.damaged-*"))
    if loss != "absent":
        assert list(data_dir.glob("*.rebuilt-*"))


def test_a_loss_is_logged_and_shown(data_dir: Path, before: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert examined(data_dir)["what to do"] == "nothing"
    ruin(data_dir)
    assert examined(data_dir)["registry"].startswith("damaged")
    registry = AdapterRegistry(data_dir)
    (message,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert "put aside" in message and "loraplex registry rebuild" in message
    assert len(registry.set_aside) == 1
    found = examined(data_dir)
    assert found["in use by"] == f"process {os.getpid()}"
    assert ".damaged-" in found["damaged registries put aside"]
    assert found["stored versions"] == "3, of which 3 have no name in the registry"
    assert found["journal of names"] == "2 names" and "registry rebuild" in found["what to do"]
    registry.close()
    assert examined(data_dir)["in use by"] == "no server"


def test_examining_changes_nothing(data_dir: Path, before: Any) -> None:
    ruin(data_dir)
    files = {path: path.read_bytes() for path in data_dir.rglob("*") if path.is_file()}
    examined(data_dir)
    assert {path: path.read_bytes() for path in data_dir.rglob("*") if path.is_file()} == files
    assert examined(data_dir / "none")["folder"].endswith("does not exist")


async def test_the_metrics_and_statistics_show_a_loss(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
    ruin(tmp_path / "data")
    async with serving(tmp_path) as api:
        assert "loraplex_registry_set_aside 1.0" in (await api.http.get("/metrics")).text
        assert (await api.http.get("/v1/stats")).json()["registry"]["set_aside"] == 1


def test_a_folder_in_use_is_refused(data_dir: Path, before: Any) -> None:
    registry = AdapterRegistry(data_dir)
    result = rebuild(data_dir)
    assert result.exit_code == 2 and f"process {os.getpid()}" in result.output and "Stop the server" in result.output
    registry.close()
    assert rebuild(data_dir.parent / "none").exit_code == 2


def test_what_was_published_since_is_kept(data_dir: Path, before: Any) -> None:
    ruin(data_dir)
    registry = AdapterRegistry(data_dir)
    new = register(registry, "one", seed=4)
    registry.close()
    assert "was in the registry" in rebuild(data_dir).output
    registry = AdapterRegistry(data_dir)
    assert registry.resolve("one").version.digest == new
    assert registry.resolve("two").pinned
    registry.close()


def test_what_was_deleted_since_stays_deleted(data_dir: Path, before: Any) -> None:
    ruin(data_dir)
    registry = AdapterRegistry(data_dir)
    register(registry, "two", seed=2)
    registry.retire("two")
    registry.collect_garbage()
    registry.close()
    rebuild(data_dir)
    registry = AdapterRegistry(data_dir)
    with pytest.raises(AdapterNotFound):
        registry.resolve("two")
    assert registry.aliases == {}  # one of its members is gone
    registry.close()


def test_damaged_and_lost_files_are_told(data_dir: Path, before: Any) -> None:
    store = AdapterRegistry(data_dir)
    one, two = (store.record(name).version.digest for name in ("one", "two"))
    flip(store.store.path(one) / WEIGHTS_FILE)
    (store.store.path(two) / WEIGHTS_FILE).unlink()
    store.close()
    ruin(data_dir)
    output = rebuild(data_dir).output
    assert "its stored files are damaged" in output and "not in the store" in output
    registry = AdapterRegistry(data_dir)
    assert list(registry.damaged) == ["one"]
    register(registry, "one")
    assert registry.damaged == {}
    registry.close()


def test_a_version_without_a_name_is_told_and_stays(data_dir: Path, before: Any) -> None:
    ruin(data_dir)
    (data_dir / JOURNAL).unlink()
    result = rebuild(data_dir)
    assert result.exit_code == 0 and result.output.count("loraplex adapters push NAME") == 3
    for seed in range(3):  # as an operator does, from the folders that were shown
        registry = AdapterRegistry(data_dir)
        assert len(registry.store.digests()) == 3
        register(registry, f"n{seed}", seed=seed)
        registry.close()
    rebuild(data_dir)
    assert not list(data_dir.glob("*.damaged-*"))


@pytest.mark.parametrize("damage", ["cut", "flip", "garbage"])
def test_a_damaged_line_costs_no_other_name(damage: str, data_dir: Path, before: Any) -> None:
    path = data_dir / JOURNAL
    AdapterRegistry(data_dir).close()  # one line for each name
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    if damage == "cut":
        path.write_bytes(b"".join(lines)[:-5])
    elif damage == "flip":
        path.write_bytes(lines[0].replace(b"one", b"onf", 1) + b"".join(lines[1:]))
    else:
        path.write_bytes(b"\xff\x00 garbage\n[]\n" + b"".join(lines))
    assert Journal(data_dir).read().unreadable == (2 if damage == "garbage" else 1)
    ruin(data_dir)
    rebuild(data_dir)
    registry = AdapterRegistry(data_dir)
    assert registry.resolve("two")
    assert ("one" in registry) == (damage != "flip")
    registry.close()


def test_a_journal_that_cannot_be_written_fails_no_change(data_dir: Path) -> None:
    registry = AdapterRegistry(data_dir)
    registry._journal._path = data_dir / "none" / JOURNAL
    publish(registry, "one", "v1")
    assert registry.resolve("one")
    registry.close()
    AdapterRegistry(data_dir).close()
    assert list(Journal(data_dir).read().names) == ["one"]


def test_the_journal_does_not_grow_for_ever(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.registry.journal._GROWTH_BYTES", 10_000)
    registry = AdapterRegistry(data_dir)
    publish(registry, "one", "v1")
    for i in range(200):
        registry.set_pinned("one", i % 2 == 0)
    assert (data_dir / JOURNAL).stat().st_size < 12_000
    assert Journal(data_dir).read().names["one"]["pinned"] == 0
    registry.close()


PUBLISH_FOREVER = """
import sys
from pathlib import Path
from adapters.registry.registry import AdapterRegistry
from tests.test_registry import publish
registry = AdapterRegistry(Path(sys.argv[1]))
print("open", flush=True)
for i in range(10_000):
    publish(registry, f"n{i % 5}", f"v{i}", replace=True)
    print(i, flush=True)
"""


@pytest.mark.reliability("T10")
def test_after_a_kill_at_any_moment_the_journal_has_what_was_published(data_dir: Path) -> None:
    moments = random.Random(2)
    for _ in range(3):
        command = [sys.executable, "-c", PUBLISH_FOREVER, str(data_dir)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as child:
            assert child.stdout is not None and child.stdout.readline() == b"open\n"
            for _ in range(moments.randint(8, 20)):
                child.stdout.readline()
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        noted = Journal(data_dir).read()
        registry = AdapterRegistry(data_dir)
        records = {record.name: record.version.digest for record in registry.walk()}
        journal = {name: {v["digest"] for v in line["versions"]} for name, line in noted.names.items()}
        behind = [name for name, digest in records.items() if digest not in journal.get(name, set())]
        assert len(behind) <= 1  # the change that the kill met
        registry.close()
