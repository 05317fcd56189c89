"""The usage ledger and its route."""

import csv
import sqlite3
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from server import usage
from server.api.middleware.auth import Key, KeyRing
from server.keys_file import digest_of
from server.usage import FILE, Counts, Row, UsageLedger
from tests.fixtures.api_server import BASE, assert_error, serving
from tests.fixtures.tiny_server import running_server, write_tiny_model

DAY = "2026-11-30"
NOON = datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The ledger's clock, and a day that is never too old to be kept."""
    moving = SimpleNamespace(now=NOON)
    monkeypatch.setattr(usage.time, "time", lambda: moving.now)
    monkeypatch.setattr(usage, "DAYS_KEPT", 40_000)
    return moving


async def rows(ledger: UsageLedger) -> dict[Row, Counts]:
    return dict(await ledger.between(date(2000, 1, 1), date(2100, 1, 1)))


async def test_counts_add_up_by_day_key_and_adapter_and_survive_a_restart(
    tmp_path: Path, clock: SimpleNamespace
) -> None:
    ledger = UsageLedger(tmp_path)
    for _ in range(2):
        ledger.add("a", "sql", Counts(1, 10, 0))
        ledger.add("a", "sql", Counts(generated_tokens=5))
        ledger.add("b", "sql", Counts(1, 1, 1))
        await ledger.flush()
    clock.now += 12 * 3600
    ledger.add("a", "sql", Counts(1, 2, 3))
    expected = {
        Row(DAY, "a", "sql"): Counts(2, 20, 10),
        Row(DAY, "b", "sql"): Counts(2, 2, 2),
        Row("2026-12-01", "a", "sql"): Counts(1, 2, 3),
    }
    assert await rows(ledger) == expected
    ledger.close()
    again = UsageLedger(tmp_path)
    assert await rows(again) == expected
    assert [row.day for row, _ in await again.between(date(2026, 12, 1), date(2026, 12, 1))] == ["2026-12-01"]
    again.close()


async def test_rows_of_a_day_are_bounded_and_no_token_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "ROWS_A_DAY", 3)
    ledger = UsageLedger(tmp_path)
    for number in range(20):
        ledger.add("a", f"adapter-{number:02}", Counts(1, 1, 1))
    found = await rows(ledger)
    assert len(found) == 4 and found[Row(DAY, "a", usage.OTHER)] == Counts(17, 17, 17)
    ledger.add("a", "adapter-00", Counts(1, 1, 1))
    assert (await rows(ledger))[Row(DAY, "a", "adapter-00")] == Counts(2, 2, 2)
    ledger.close()


async def test_old_days_are_removed(tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    today = datetime.now(UTC)
    monkeypatch.setattr(usage, "DAYS_KEPT", 400)
    ledger = UsageLedger(tmp_path)
    for age in (402, 399, 0):
        clock.now = (today - timedelta(days=age)).timestamp()
        ledger.add("a", "x", Counts(1))
    assert len(await rows(ledger)) == 2
    ledger.close()


async def test_what_cannot_be_written_is_kept_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = UsageLedger(tmp_path)

    def refused(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_write", refused)
        for _ in range(3):
            ledger.add("a", "x", Counts(1, 2, 3))
            await ledger.flush()
    assert caplog.text.count("disk is full") == 1
    assert await rows(ledger) == {Row(DAY, "a", "x"): Counts(3, 6, 9)}
    ledger.close()


async def test_a_damaged_ledger_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    ledger = UsageLedger(tmp_path)
    ledger.add("a", "x", Counts(1))
    assert await rows(ledger) == {Row(DAY, "a", "x"): Counts(1)}
    assert "is damaged" in caplog.text and len(list(tmp_path.glob(f"{FILE}.damaged-*"))) == 1
    ledger.close()


async def test_the_route_returns_what_was_used_by_whom(tmp_path: Path) -> None:
    secrets = {name: name * 16 for name in ("infers", "watches")}
    scopes = {"infers": frozenset({"infer", "admin"}), "watches": frozenset({"observe"})}
    ring = KeyRing([Key(name, digest_of(secrets[name]), scopes[name]) for name in secrets])  # type: ignore[arg-type]
    using, watching = ({"authorization": f"Bearer {secrets[name]}"} for name in ("infers", "watches"))
    async with serving(tmp_path, keys=ring) as api:
        api.http.headers.update(using)
        await api.upload("acme")
        for model in ("acme", "acme", BASE):
            body = (await api.complete(model=model)).json()
        await api.complete(model="unknown")
        assert_error(await api.http.get("/v1/usage"), 403, "insufficient_scope")
        dates = {"start": DAY, "end": DAY}
        found = (await api.http.get("/v1/usage", params=dates, headers=watching)).json()["data"]
        one = {"prompt_tokens": body["usage"]["prompt_tokens"], "generated_tokens": body["usage"]["completion_tokens"]}
        shared = {"day": DAY, "key": "infers"}
        assert found == [
            {**shared, "adapter": BASE, "requests": 1, **one},
            {**shared, "adapter": "acme", "requests": 2, **{name: 2 * count for name, count in one.items()}},
        ]
        table = await api.http.get("/v1/usage", params={**dates, "format": "csv"}, headers=watching)
        assert table.headers["content-type"].startswith("text/csv")
        assert list(csv.DictReader(table.text.splitlines())) == [
            {name: str(value) for name, value in row.items()} for row in found
        ]
        assert (await api.http.get("/v1/usage", params={"end": "2020-01-31"}, headers=watching)).json()["data"] == []
        backwards = {"start": "2026-12-01", "end": DAY}
        assert_error(await api.http.get("/v1/usage", params=backwards, headers=watching), 400, "invalid_value")
        assert_error(await api.http.get("/v1/usage?start=x", headers=watching), 400, "invalid_value")
        api.context.usage.close()


async def test_a_cell_of_the_table_is_no_formula(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.context.usage.add("=1+1", "x", Counts(1))
        text = (await api.http.get("/v1/usage", params={"start": DAY, "end": DAY, "format": "csv"})).text
        assert text.splitlines()[1] == f"{DAY},'=1+1,x,1,0,0"
        api.context.usage.close()


@pytest.mark.slow
def test_a_server_writes_its_ledger_when_it_ends(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    flags = ("--model", str(model), "--served-model-name", BASE, "--dtype", "float32")
    with running_server(tmp_path / "data", *flags) as server, server.client() as client:
        spent = server.complete(client, BASE, "Hello")["usage"]
    ledger = sqlite3.connect(tmp_path / "data" / FILE)
    found = ledger.execute("SELECT adapter, requests, prompt_tokens, generated_tokens FROM usage").fetchall()
    ledger.close()
    assert found == [("", 1, spent["prompt_tokens"], spent["completion_tokens"])]
