"""Fault points: absent unless armed, and a crash at any of them loses nothing that was acknowledged."""

import ast
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters import fault_points
from adapters.fault_points import KILLED, POINTS, VARIABLE, arm, fault_point
from adapters.peft.files import FILES
from adapters.registry.packed_files import PackedFiles
from adapters.registry.registry import AdapterRegistry
from server.config import ConfigError, ServeConfig
from server.launch import launch

ROOT = Path(__file__).parent.parent
FORMS = ("nowhere", "store.synced:0", "store.synced:-1", "store.synced:x", "engine.step=explode", "engine.step=sleep-x")


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm("")


def test_every_point_is_passed_somewhere_and_no_other() -> None:
    found: list[str] = []
    for path in [*ROOT.glob("adapters/**/*.py"), *ROOT.glob("server/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "fault_point":
                found.append(ast.literal_eval(node.args[0]))
    assert sorted(found) == sorted(POINTS)


def test_without_the_variable_nothing_is_armed() -> None:
    program = (
        "import adapters.fault_points as f\n"
        "assert f.arm_from_environment() == '' and f._armed == ()\n"
        "for point in f.POINTS: f.fault_point(point)"
    )
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, check=True)


def test_a_fault_happens_at_its_passage_once() -> None:
    arm("engine.step:3=error, engine.load:*=full")
    fault_point("engine.step")
    fault_point("engine.step")
    for _ in range(2):
        with pytest.raises(OSError) as raised:
            fault_point("engine.load")
        assert raised.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match=VARIABLE):
        fault_point("engine.step")
    fault_point("engine.step")
    fault_point("store.synced")


def test_a_share_of_passages() -> None:
    arm("engine.step:20%=io")
    failed = 0
    for _ in range(1000):
        try:
            fault_point("engine.step")
        except OSError as error:
            assert error.errno == errno.EIO
            failed += 1
    assert 100 < failed < 300


def test_a_fault_may_wait() -> None:
    arm("engine.step=sleep-0.05")
    began = time.monotonic()
    fault_point("engine.step")
    assert time.monotonic() - began >= 0.05


@pytest.mark.parametrize("spec", FORMS)
def test_a_server_refuses_what_is_no_fault(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, spec)
    with pytest.raises(ConfigError, match=VARIABLE):
        launch(ServeConfig(model="x", data_dir=tmp_path))
    assert fault_points._armed == ()


# --- a crash of the process that stores ---

OPERATIONS: list[tuple[str, str, str]] = [
    ("publish", "a", "one"),
    ("publish", "b", "two"),
    ("publish", "a", "three"),
    ("damage", "a", "three"),
    ("publish", "a", "three"),
    ("retire", "b", ""),
    ("publish", "c", "two"),
    ("publish", "b", "four"),
    ("retire", "a", ""),
    ("publish", "a", "one"),
]
CHILD = """
import hashlib, json, sys
from pathlib import Path
from types import SimpleNamespace
from adapters.fault_points import arm_from_environment
from adapters.peft.files import FILES
from adapters.registry.registry import AdapterRegistry
registry = AdapterRegistry(Path(sys.argv[1]))
arm_from_environment()
for action, name, content in json.loads(sys.argv[2]):
    digest = hashlib.sha256(content.encode()).hexdigest()
    if action == "retire":
        registry.retire(name)
        registry.collect_garbage()
    elif action == "damage":
        (registry.store.path(digest) / FILES[1]).write_text("damaged")
    else:
        shape = dict(rank=8, target_modules=("q_proj",), nbytes=100, report={})
        with registry.store.stage() as folder:
            for file in FILES:
                (folder / file).write_text(content)
            registry.store.flush(folder)
            registry.publish(name, SimpleNamespace(digest=digest, **shape), folder, replace=True)
    print("acknowledged", flush=True)
"""
OF_THE_STORE = [
    *(f"store.flushed:{n}" for n in (1, 3, 5)),
    *(f"store.synced:{n}" for n in (1, 2, 3)),
    *(f"store.renamed:{n}" for n in (1, 2, 3)),
    *(f"store.healing:{n}" for n in (1, 2)),
    *(f"store.deleting:{n}" for n in (1, 2)),
    *(f"registry.writing:{n}" for n in (1, 3, 5, 7)),
    *(f"registry.committed:{n}" for n in (1, 3, 5, 7)),
]


def names_after(count: int) -> dict[str, str]:
    """The content under each name after that many operations."""
    names: dict[str, str] = {}
    for action, name, content in OPERATIONS[:count]:
        if action == "retire":
            names.pop(name)
        elif action == "publish":
            names[name] = content
    return names


@pytest.mark.reliability("T10", "T13")
@pytest.mark.parametrize("fault", OF_THE_STORE)
def test_a_kill_at_a_point_of_the_store_loses_nothing(fault: str, tmp_path: Path) -> None:
    """What was acknowledged is there; the operation that was cut is done or not done; the next one succeeds."""
    data = tmp_path / "data"
    acknowledged = run_operations(data, OPERATIONS, fault)
    registry = AdapterRegistry(data)
    found = {record.name: record.version.digest for record in registry.walk()}
    contents = {digest_of(content): content for _, _, content in OPERATIONS}
    done, undone = names_after(acknowledged + 1), names_after(acknowledged)
    assert {name: contents[digest] for name, digest in found.items()} in (done, undone)
    assert set(registry.store.digests()) == {entry.digest for name in found for entry in registry.history(name)}
    assert list((data / "store" / ".staging").iterdir()) == []
    damaged = digest_of("three") if ("damage", "a", "three") in OPERATIONS[:acknowledged] else ""
    for digest in registry.store.digests():
        for file in FILES:
            assert digest == damaged or (registry.store.path(digest) / file).read_text() == contents[digest]
    registry.close()
    assert run_operations(data, OPERATIONS[:5], "") == 5
    again = AdapterRegistry(data)
    assert (again.store.path(digest_of("three")) / FILES[1]).read_text() == "three" and again.damaged == {}
    again.close()


def digest_of(content: str) -> str:
    import hashlib

    return hashlib.sha256(content.encode()).hexdigest()


def run_operations(data: Path, operations: list[tuple[str, str, str]], fault: str) -> int:
    """Do them in a process that a fault ends; returns how many it acknowledged."""
    command = [sys.executable, "-c", CHILD, str(data), json.dumps(operations)]
    environment = {**os.environ, VARIABLE: fault}
    child = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.returncode == (KILLED if fault else 0)
    return child.stdout.count("acknowledged")


PACK = """
import sys
from pathlib import Path
from adapters.fault_points import arm_from_environment
from adapters.registry.packed_files import PackedFiles
arm_from_environment()
PackedFiles(Path(sys.argv[1]), "layout", 1 << 20, lambda _: True, min_free=0).write("a" * 64, [memoryview(b"whole")])
"""


@pytest.mark.reliability("T10")
@pytest.mark.parametrize("point", ["packed.written", "packed.renamed"])
def test_a_kill_while_a_packed_copy_is_written(point: str, tmp_path: Path) -> None:
    """A copy is whole or absent, and the next write removes what was left over."""
    command = [sys.executable, "-c", PACK, str(tmp_path)]
    child = subprocess.run(command, env={**os.environ, VARIABLE: point}, cwd=ROOT)
    assert child.returncode == KILLED
    files = PackedFiles(tmp_path, "layout", 1 << 20, lambda _: True, min_free=0)
    file = files.open("a" * 64)
    assert (file is None) is (point == "packed.written")
    if file is not None:
        assert file.read() == b"whole"
        file.close()
    assert files.write("b" * 64, [memoryview(b"other")])
    assert {path.name[0] for path in (tmp_path / "layout").iterdir()} <= {"a", "b"}
