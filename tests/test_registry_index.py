"""The registry's index equals a plain dict after any sequence of changes."""

from hypothesis import given
from hypothesis import strategies as st

from adapters.records import AdapterRecord, AdapterVersion, Entry
from adapters.registry.index import RegistryIndex

NAMES, DIGESTS = st.sampled_from("abcdef"), st.sampled_from(["", "1", "2", "3"])
CHANGES = st.lists(st.tuples(NAMES, st.none() | DIGESTS), max_size=40)


def entry_of(name: str, digest: str) -> Entry:
    record = AdapterRecord(name, AdapterVersion(digest, 8, (), 1, 1, "{}"), "upload", False, 1)
    return Entry(record, (record,), (), None)


@given(at_start=st.dictionaries(NAMES, DIGESTS), changes=CHANGES, after=NAMES)
def test_the_index_equals_a_dict(at_start: dict[str, str], changes: list[tuple[str, str | None]], after: str) -> None:
    index = RegistryIndex({name: entry_of(name, digest) for name, digest in at_start.items()})
    model = dict(at_start)
    for name, digest in changes:
        old = index.put(name, None if digest is None else entry_of(name, digest))
        assert (old.record.version.digest if old else None) == model.pop(name, None)
        if digest is not None:
            model[name] = digest
    assert len(index) == len(model)
    assert [record.name for record in index.walk("")] == sorted(model)
    assert [record.name for record in index.walk(after)] == sorted(name for name in model if name > after)
    assert index.digests() == set(model.values())
    for digest in ("", "1", "2", "3"):
        assert list(index.names_of(digest)) == sorted(name for name in model if model[name] == digest)
    for name in "abcdef":
        found = index.get(name)
        assert (found.record.version.digest if found else None) == model.get(name)


def test_an_iteration_survives_changes() -> None:
    index = RegistryIndex({name: entry_of(name, name) for name in "abcd"})
    walk = index.walk("")
    assert next(walk).name == "a"
    index.put("c", None)
    index.put("bb", entry_of("bb", "x"))
    index.put("a", None)
    assert [record.name for record in walk] == ["b", "d"]
