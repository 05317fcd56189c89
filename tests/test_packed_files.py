"""Packed copies on disk: bounded, oldest use first, and never a reason for a load to fail."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.registry import packed_files as packed_files_module
from adapters.registry.packed_files import PackedFiles, remove_packed
from adapters.registry.registry import AdapterRegistry

LAYOUT = "a" * 32


def digest(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def stored() -> set[str]:
    return {digest(number) for number in range(10)}


@pytest.fixture
def make(tmp_path: Path, stored: set[str]) -> Callable[..., PackedFiles]:
    def made(max_bytes: int = 1000, layout: str = LAYOUT, min_free: int = 0) -> PackedFiles:
        return PackedFiles(tmp_path / "packed", layout, max_bytes, stored.__contains__, min_free)

    return made


def put(files: PackedFiles, number: int, size: int = 100) -> bool:
    return files.write(digest(number), [memoryview(b"x" * (size - 1)), memoryview(b"y")])


def read(files: PackedFiles, number: int) -> bytes | None:
    file = files.open(digest(number))
    if file is None:
        return None
    with file:
        return file.read()


def kept(tmp_path: Path) -> list[int]:
    return sorted(int(path.name, 16) for path in (tmp_path / "packed").glob("*/*"))


def use(tmp_path: Path, number: int, seconds: int, layout: str = LAYOUT) -> None:
    os.utime(tmp_path / "packed" / layout / digest(number), (seconds, seconds))


def test_a_file_is_read_as_it_was_written(make: Callable[..., PackedFiles], tmp_path: Path) -> None:
    files = make()
    assert read(files, 1) is None
    assert put(files, 1)
    assert read(files, 1) == b"x" * 99 + b"y"
    assert [path.name for path in (tmp_path / "packed" / LAYOUT).iterdir()] == [digest(1)]  # nothing temporary
    assert (tmp_path / "packed" / LAYOUT / digest(1)).stat().st_mode & 0o077 == 0
    assert read(make(layout="b" * 32), 1) is None
    files.discard(digest(1))
    files.discard(digest(1))
    assert read(files, 1) is None


def test_the_oldest_use_leaves_first(make: Callable[..., PackedFiles], tmp_path: Path) -> None:
    files = make(300)
    for number in range(3):
        put(files, number)
        use(tmp_path, number, number)
    assert read(files, 0)  # used now
    assert put(files, 3)
    assert kept(tmp_path) == [0, 3]  # down to nine tenths of what is left for the others
    assert not put(files, 4, 301) and kept(tmp_path) == [0, 3]


def test_the_bound_counts_files_of_earlier_processes_and_of_other_layouts(
    make: Callable[..., PackedFiles], tmp_path: Path
) -> None:
    before = make(1000, layout="b" * 32)
    for number in range(5):
        put(before, number)
        use(tmp_path, number, number, "b" * 32)
    files = make(500)
    assert put(files, 5, 460)
    assert kept(tmp_path) == [5]
    assert [path.name for path in (tmp_path / "packed").iterdir()] == [LAYOUT]


def test_leftovers_of_earlier_processes_are_removed(
    make: Callable[..., PackedFiles], tmp_path: Path, stored: set[str]
) -> None:
    put(make(), 1)
    put(make(), 2)
    folder = tmp_path / "packed" / LAYOUT
    (folder / ".unfinished").write_bytes(b"x" * 1000)
    (folder / "foreign").write_bytes(b"x" * 1000)
    stored.remove(digest(1))
    assert read(make(), 1) is None
    assert put(make(), 3)
    assert sorted(path.name for path in folder.iterdir()) == [digest(2), digest(3)]


def test_a_version_that_is_deleted_during_the_write_leaves_no_file(
    make: Callable[..., PackedFiles], tmp_path: Path, stored: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def deleted(*paths: Any) -> None:
        stored.clear()
        remove_packed(tmp_path / "packed", digest(1))
        replace(*paths)

    monkeypatch.setattr(os, "replace", deleted)
    assert not put(make(), 1)
    assert kept(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["mkdir", "mkstemp", "write", "replace"])
def test_a_disk_that_takes_nothing_is_no_error(
    make: Callable[..., PackedFiles],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    code: int,
) -> None:
    files = make()
    put(files, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    class Full:
        def __init__(self, handle: int, _: str) -> None:
            os.close(handle)

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None: ...

        writelines = fail

    places: dict[str, tuple[Any, str, Any]] = {
        "mkdir": (Path, "mkdir", fail),
        "mkstemp": (packed_files_module.tempfile, "mkstemp", fail),
        "write": (os, "fdopen", Full),
        "replace": (os, "replace", fail),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*places[call])
        assert not put(files, 2) and not put(files, 2)
    assert kept(tmp_path) == [1]
    assert [path.name for path in (tmp_path / "packed" / LAYOUT).iterdir()] == [digest(1)]
    assert len(caplog.records) == 1  # not one for each load
    assert put(files, 2)


def test_space_is_left_for_uploads(make: Callable[..., PackedFiles], tmp_path: Path) -> None:
    assert not put(make(min_free=1 << 62), 1)
    assert kept(tmp_path) == []


def test_only_regular_files_are_opened(make: Callable[..., PackedFiles], tmp_path: Path) -> None:
    files = make()
    put(files, 1)
    folder = tmp_path / "packed" / LAYOUT
    (folder / digest(2)).symlink_to(folder / digest(1))
    os.mkfifo(folder / digest(3))
    (folder / digest(4)).mkdir()
    assert [read(files, number) is not None for number in (1, 2, 3, 4)] == [True, False, False, False]
    with pytest.raises(ValueError):
        files._path("../" + digest(1))


def test_a_version_that_the_registry_deletes_loses_its_packed_copies(tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path)
    copies = [tmp_path / "packed" / layout / digest(1) for layout in ("a", "b")]
    for copy in copies:
        copy.parent.mkdir(parents=True)
        copy.write_bytes(b"x")
        (copy.parent / digest(2)).write_bytes(b"x")
    with registry.store.stage() as folder:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).write_bytes(b"x")
        registry.hold(digest(1), folder)
    assert registry.collect_garbage() == [] and all(copy.exists() for copy in copies)
    registry.release(digest(1))
    assert registry.collect_garbage() == [digest(1)]
    assert not any(copy.exists() for copy in copies)
    assert all((copy.parent / digest(2)).exists() for copy in copies)
    registry.close()


def test_everything_is_removed_where_no_copies_are_wanted(make: Callable[..., PackedFiles], tmp_path: Path) -> None:
    files = make()
    put(files, 1)
    files.clear()
    files.clear()
    assert not (tmp_path / "packed").exists()
