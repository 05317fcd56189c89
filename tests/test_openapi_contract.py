"""Requests made from the OpenAPI document, allowed and forbidden ones: no 500, and only responses that it declares."""

from pathlib import Path

import httpx
import pytest

from load_tests.contract import schemathesis
from server.api.middleware.auth import ALL_SCOPES, Key, KeyRing
from server.keys_file import digest_of
from tests.fixtures.api_server import BASE, adapter_files, form, listening, secret
from tests.fixtures.timing import HANG_SECONDS

KEY = secret("contract")


def failures(folder: Path, *options: str, phases: tuple[str, ...]) -> int:
    keys = KeyRing([Key("contract", digest_of(KEY), ALL_SCOPES)])
    adapter = folder / "adapter"
    adapter.mkdir()
    for name, data in adapter_files().items():
        (adapter / name).write_bytes(data)
    with listening(folder / "server", keys=keys) as live:
        for name in ("first", "second", "third"):  # for sequences, which begin with what the server lists
            sent = {"data": {"name": name}, "files": form(), "headers": {"authorization": f"Bearer {KEY}"}}
            httpx.post(f"{live.url}/v1/adapters", timeout=HANG_SECONDS, **sent).raise_for_status()
        return schemathesis(live.url, KEY, BASE, adapter, "--seed", "1", *options, phases=phases)


@pytest.mark.reliability("T27")
def test_single_requests(tmp_path: Path) -> None:
    assert failures(tmp_path, "--max-examples", "1", "--no-shrink", phases=("fuzzing",)) == 0


@pytest.mark.slow
@pytest.mark.reliability("T27")
def test_sequences(tmp_path: Path) -> None:
    """Requests that use what earlier ones returned. `make fuzz-contract` adds every bound of every field."""
    assert failures(tmp_path, "--max-examples", "3", "--no-shrink", phases=("stateful",)) == 0
