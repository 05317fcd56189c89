"""The audit log: who changed what, who was refused, and nothing that must stay secret."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from server import audit
from server.audit import AuditLog
from tests.fixtures.api_server import serving
from tests.test_auth import ADMIN_KEY, INFER_KEY, TENANT_KEY, bearer, ring


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / audit.FILE).read_text().splitlines()]


@pytest.mark.reliability("T35")
async def test_changes_and_refusals_are_recorded(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    async with serving(tmp_path, keys=ring(tmp_path), audit=log) as api:
        api.http.headers.update(bearer(ADMIN_KEY))
        version = (await api.upload("mine")).json()["version"]
        await api.upload("mine", seed=1)
        await api.http.post("/v1/adapters/mine/pin", headers={"x-request-id": "its-id"})
        await api.http.delete("/v1/adapters/mine")
        await api.http.get("/v1/adapters")
        api.http.headers.update(bearer(INFER_KEY))
        await api.chat("the prompt")
        await api.http.delete("/v1/adapters/mine")
        api.http.headers.update(bearer("a-wrong-secret"))
        await api.chat("the prompt")
        await api.http.post("/v1/completions", json={}, headers={"origin": "https://evil.example"})
        api.http.headers.update(bearer(TENANT_KEY))
        await api.upload("theirs")
    log.close()
    found = lines(tmp_path)
    shown = [(line["kind"], line["who"], line["action"], line["status"]) for line in found]
    assert shown == [
        ("change", "ops", "POST /v1/adapters", 201),
        ("change", "ops", "POST /v1/adapters", 409),
        ("change", "ops", "POST /v1/adapters/mine/pin", 200),
        ("change", "ops", "DELETE /v1/adapters/mine", 200),
        ("refusal", "app", "DELETE /v1/adapters/mine", 403),
        ("refusal", "", "POST /v1/chat/completions", 401),
        ("refusal", "", "POST /v1/completions", 403),
        ("refusal", "tenant", "POST /v1/adapters", 403),
    ]
    assert found[0]["adapter"] == "mine" and found[0]["version"] == version and found[0]["tenant"] == "operations"
    assert found[2]["request_id"] == "its-id" and found[6]["code"] == "cross_site"
    text = (tmp_path / audit.FILE).read_text()
    for secret in (ADMIN_KEY, INFER_KEY, TENANT_KEY, "a-wrong-secret", "the prompt"):
        assert secret not in text
    assert stat.S_IMODE((tmp_path / audit.FILE).stat().st_mode) == 0o600


def test_a_flood_of_refusals_leaves_the_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(audit.time, "monotonic", lambda: now)
    log = AuditLog(tmp_path)
    for _ in range(1000):
        log.refused("", "GET /v1/models\r\n" + "x" * 1000)
    log.changed("ops", "DELETE /v1/adapters/mine")
    now += 1
    log.refused("", "GET /v1/models")
    log.close()
    found = lines(tmp_path)
    assert len(found) == 22 and found[20]["who"] == "ops" and found[21]["left_out"] == 980
    assert all(len(line["action"]) <= 300 for line in found)


def test_the_log_is_rotated_and_each_file_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_FILE_BYTES", 1000)
    log = AuditLog(tmp_path)
    for number in range(100):
        log.changed("ops", f"change {number}")
    log.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5 and all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert lines(tmp_path)[-1]["action"] == "change 99"


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(tmp_path / "absent")
    for _ in range(10):
        log.changed("ops", "change")
    log.close()
    assert caplog.text.count("the audit log cannot be written") == 1
