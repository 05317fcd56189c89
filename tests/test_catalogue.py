"""The catalogue beside a plain dict, after any sequence of changes."""

from hypothesis import given
from hypothesis import strategies as st

from adapters.records import AdapterRecord, AdapterVersion, Entry
from adapters.registry.index import Catalogue

NAMES, DIGESTS = st.sampled_from("abcdef"), st.sampled_from(["", "1", "2", "3"])
CHANGES = st.lists(st.tuples(NAMES, st.none() | DIGESTS), max_size=40)


def entry_of(name: str, digest: str) -> Entry:
    record = AdapterRecord(name, AdapterVersion(digest, 8, (), 1, 1, "{}"), "upload", False, 1)
    return Entry(record, (record,), (), None)


@given(at_start=st.dictionaries(NAMES, DIGESTS), changes=CHANGES, after=NAMES)
def test_it_is_what_a_dict_would_be(
    at_start: dict[str, str], changes: list[tuple[str, str | None]], after: str
) -> None:
    catalogue = Catalogue({name: entry_of(name, digest) for name, digest in at_start.items()})
    model = dict(at_start)
    for name, digest in changes:
        old = catalogue.put(name, None if digest is None else entry_of(name, digest))
        assert (old.record.version.digest if old else None) == model.pop(name, None)
        if digest is not None:
            model[name] = digest
    assert len(catalogue) == len(model)
    assert [record.name for record in catalogue.walk("")] == sorted(model)
    assert [record.name for record in catalogue.walk(after)] == sorted(name for name in model if name > after)
    assert catalogue.digests() == set(model.values())
    for digest in ("", "1", "2", "3"):
        assert list(catalogue.names_of(digest)) == sorted(name for name in model if model[name] == digest)
    for name in "abcdef":
        found = catalogue.get(name)
        assert (found.record.version.digest if found else None) == model.get(name)


def test_a_walk_survives_changes() -> None:
    catalogue = Catalogue({name: entry_of(name, name) for name in "abcd"})
    walk = catalogue.walk("")
    assert next(walk).name == "a"
    catalogue.put("c", None)
    catalogue.put("bb", entry_of("bb", "x"))
    catalogue.put("a", None)
    assert [record.name for record in walk] == ["b", "d"]
