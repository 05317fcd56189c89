"""Each beacon emits its own token, however often device slots change hands."""

from dataclasses import replace
from pathlib import Path

import pytest

from adapters.residency.slots import Slot
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.pool import AdapterPool
from load_tests import beacons


@pytest.mark.reliability("T50")
def test_no_beacon_emits_another_s_token(tmp_path: Path) -> None:
    count = beacons.run(tmp_path, beacons=40, tokens=1000, seed=1)
    assert count.tokens >= 1000 and count.wrong == 0
    assert count.reassignments >= 25


@pytest.mark.reliability("T50")
def test_a_page_that_keeps_its_last_owner_s_columns_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beacons would not prove much if they won whatever lies in their pages."""
    write, written = AdapterPool.write, set[int]()

    def forgetful(pool: AdapterPool, slot: Slot, packed: PackedAdapter) -> None:
        write(pool, replace(slot, pages=[page for page in slot.pages if page not in written or page % 8]), packed)
        written.update(slot.pages)

    monkeypatch.setattr(AdapterPool, "write", forgetful)
    assert beacons.run(tmp_path, beacons=40, tokens=1000, seed=1).wrong > 0
