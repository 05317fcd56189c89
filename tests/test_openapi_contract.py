"""Requests made from the OpenAPI document, allowed and forbidden ones: no 500, and only responses that it declares."""

from pathlib import Path

import pytest

from load_tests.contract import schemathesis
from server.api.middleware.auth import ALL_SCOPES, Key, KeyRing
from server.keys_file import digest_of
from tests.fixtures.api_server import BASE, adapter_files, listening, secret

KEY = secret("contract")


def failures(folder: Path, *options: str, phases: tuple[str, ...]) -> int:
    keys = KeyRing([Key("contract", digest_of(KEY), ALL_SCOPES)])
    adapter = folder / "adapter"
    adapter.mkdir()
    for name, data in adapter_files().items():
        (adapter / name).write_bytes(data)
    with listening(folder / "server", keys=keys) as live:
        return schemathesis(live.url, KEY, BASE, adapter, "--seed", "1", *options, phases=phases)


@pytest.mark.reliability("T27")
def test_single_requests(tmp_path: Path) -> None:
    assert failures(tmp_path, "--max-examples", "2", "--no-shrink", phases=("examples", "fuzzing")) == 0


@pytest.mark.slow
@pytest.mark.reliability("T27")
@pytest.mark.parametrize("phase", ["coverage", "stateful"])
def test_boundaries_and_sequences(tmp_path: Path, phase: str) -> None:
    """Every bound of every field, just within and just beyond; and requests that use what earlier ones returned."""
    assert failures(tmp_path, "--max-examples", "3", "--no-shrink", phases=(phase,)) == 0
