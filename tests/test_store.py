"""The store's folders are absent or complete, whatever happens during a write."""

import errno
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters.errors import NoSpace
from adapters.peft.files import FILES, TOKENIZER_FILES
from adapters.registry import store as store_module
from adapters.registry.store import AdapterStore

ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def put(store: AdapterStore, digest: str, content: bytes = b"x", beside: Iterable[str] = ()) -> Path:
    with store.stage() as folder:
        for name in (*FILES, *beside):
            (folder / name).write_bytes(content)
        return store.commit(folder, digest)


def staged(store: AdapterStore) -> list[Path]:
    return list((store.path(ONE).parents[1] / ".staging").iterdir())


def test_commits_to_a_place_made_of_the_digest(store: AdapterStore, tmp_path: Path) -> None:
    assert ONE not in store
    place = put(store, ONE)
    assert place == store.path(ONE) == tmp_path / "store" / "11" / ONE
    assert sorted(path.name for path in place.iterdir()) == sorted(FILES)
    assert ONE in store and TWO not in store
    assert store.digests() == [ONE]
    assert staged(store) == []


def test_the_same_content_again_changes_nothing(store: AdapterStore) -> None:
    before = os.stat(put(store, ONE) / FILES[0])
    assert os.stat(put(store, ONE) / FILES[0]).st_ino == before.st_ino
    assert store.digests() == [ONE]
    assert staged(store) == []


def test_a_place_that_lost_a_file_is_absent_and_can_be_filled_again(store: AdapterStore) -> None:
    place = put(store, ONE)
    (place / FILES[1]).unlink()
    assert ONE not in store
    put(store, ONE)
    assert ONE in store


def test_a_tokenizer_is_kept_with_its_adapter(store: AdapterStore) -> None:
    place = put(store, ONE, beside=TOKENIZER_FILES)
    assert {path.name for path in place.iterdir()} == {*FILES, *TOKENIZER_FILES}
    (place / "tokenizer.json").unlink()
    put(store, ONE, beside=TOKENIZER_FILES)
    assert (place / "tokenizer.json").exists()


def test_an_incomplete_folder_is_not_committed(store: AdapterStore) -> None:
    with store.stage() as folder, pytest.raises(FileNotFoundError):
        (folder / FILES[0]).write_bytes(b"x")
        store.commit(folder, ONE)
    assert ONE not in store and staged(store) == []


def test_staging_is_removed_also_after_an_error(store: AdapterStore) -> None:
    with pytest.raises(RuntimeError), store.stage() as folder:
        (folder / "part").write_bytes(b"x")
        raise RuntimeError
    assert staged(store) == []


def test_sweep_removes_folders_of_an_earlier_process(store: AdapterStore, tmp_path: Path) -> None:
    left = tmp_path / "store" / ".staging" / "abc"
    left.mkdir()
    (left / FILES[0]).write_bytes(b"x")
    put(store, ONE)
    again = AdapterStore(tmp_path / "store")
    again.sweep()
    assert staged(again) == []
    assert again.digests() == [ONE]


def test_delete(store: AdapterStore) -> None:
    put(store, ONE)
    put(store, TWO)
    store.delete(ONE)
    store.delete(ONE)
    assert store.digests() == [TWO]
    assert staged(store) == []


@pytest.mark.reliability("T6")
@pytest.mark.parametrize(
    "digest", ["", "..", "../" * 20, "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", "/" + "a" * 63]
)
def test_only_digests_reach_the_disk(store: AdapterStore, digest: str) -> None:
    with pytest.raises(ValueError, match="64 lowercase hex"):
        store.path(digest)
    with pytest.raises(ValueError, match="64 lowercase hex"):
        store.delete(digest)


@pytest.mark.reliability("T11")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_space(store: AdapterStore, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoSpace), store.stage():
        raise OSError(number, os.strerror(number))
    assert staged(store) == []

    def full(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store_module, "_fsync", full)
    with pytest.raises(NoSpace):
        put(store, ONE)
    monkeypatch.undo()
    assert ONE not in store and staged(store) == []
    put(store, ONE)
    assert ONE in store


def test_another_disk_error_is_raised_unchanged(store: AdapterStore) -> None:
    with pytest.raises(OSError, match="Input/output"), store.stage():
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert staged(store) == []


def test_bytes_are_on_disk_before_the_folder_is_in_its_place(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = store_module._fsync, Path.rename

    def synced(path: Path) -> None:
        order.append(path.name)
        fsync(path)

    def renamed(path: Path, target: Path) -> Path:
        order.append("rename")
        return rename(path, target)

    monkeypatch.setattr(store_module, "_fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    put(store, ONE, beside=["tokenizer.json"])
    position = order.index("rename")
    assert {*FILES, "tokenizer.json"} < set(order[:position]) and len(order[:position]) == 4
    assert order[position + 1 :] == ["11", "store"]


@pytest.mark.reliability("T12")
def test_many_threads_store_one_content_once(store: AdapterStore) -> None:
    with ThreadPoolExecutor(16) as pool:
        places = list(pool.map(lambda _: put(store, ONE), range(32)))
    assert len(set(places)) == 1
    assert ONE in store and staged(store) == []
