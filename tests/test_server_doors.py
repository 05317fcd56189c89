"""What whole processes show of doors that must be closed: signals, keys that change, and what killed servers leave."""

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from server.cli.main import app
from tests.fixtures.timing import HANG_SECONDS, wait_for
from tests.fixtures.tiny_server import running_server, sse_events, write_tiny_model
from tests.test_auth import bearer
from tests.test_server import ENGINE_FLAGS


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return ("--model", str(write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")), *ENGINE_FLAGS)


def made_key(file: Path, name: str, *scopes: str) -> dict[str, str]:
    chosen = [argument for scope in scopes for argument in ("--scope", scope)]
    result = CliRunner().invoke(app, ["keys", "new", name, "--keys-file", str(file), *chosen])
    assert result.exit_code == 0, result.output
    return bearer(result.output.strip())


@pytest.mark.reliability("T64")
@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_streams_with_an_error_event(
    flags: tuple[str, ...], tmp_path: Path, second: signal.Signals
) -> None:
    with running_server(tmp_path, *flags, "--drain-timeout", "600") as running:
        found: list[dict[str, Any] | None] = []
        begun = threading.Event()

        def stream() -> None:
            body = {"model": "tiny-base", "prompt": "abc", "temperature": 0, "max_tokens": 1900, "stream": True}
            with running.client() as own, own.stream("POST", "/v1/completions", json=body) as answer:
                for event in sse_events(answer.iter_lines()):
                    begun.set()
                    found.append(event)

        reader = threading.Thread(target=stream)
        reader.start()
        assert begun.wait(HANG_SECONDS)
        with running.client() as client:
            running.process.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/readyz").status_code == 503, "the drain")
        assert reader.is_alive()
        running.process.send_signal(second)
        assert running.process.wait(HANG_SECONDS) == 0
        reader.join(HANG_SECONDS)
        assert found[-1] is None and found[-2] is not None and found[-2]["error"]["code"] == "aborted"


@pytest.mark.slow
def test_keys_change_under_a_running_server_and_files_are_private(flags: tuple[str, ...], tmp_path: Path) -> None:
    file, data = tmp_path / "keys.toml", tmp_path / "data"
    first = made_key(file, "first", "infer", "observe")
    with running_server(data, *flags, "--keys-file", str(file)) as running, running.client() as client:

        def status(headers: dict[str, str]) -> int:
            return client.get("/v1/models", headers=headers).status_code

        assert status(first) == 200
        second = made_key(file, "second")
        wait_for(lambda: status(second) == 200, "the file to be read")
        CliRunner().invoke(app, ["keys", "revoke", "first", "--keys-file", str(file)])
        running.process.send_signal(signal.SIGHUP)
        wait_for(lambda: status(first) == 401, "the key to be revoked")
        assert status(second) == 200
    modes = {path.stat().st_mode & 0o077 for path in (data, *data.rglob("*"))}
    assert modes == {0}
    assert '"action": "reload keys"' in (data / "audit.jsonl").read_text()


@pytest.mark.reliability("T64")
@pytest.mark.slow
def test_the_next_server_removes_what_killed_ones_left(flags: tuple[str, ...], tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {"TMPDIR": str(temporary)}
    with running_server(tmp_path / "data", *flags, environment=environment) as running:
        engine = running.engine_pid()
        for pid in (running.process.pid, engine):
            os.kill(pid, signal.SIGKILL)
        running.process.wait()
        wait_for(lambda: not psutil.pid_exists(engine), "the end of the engine")
    left = list(temporary.iterdir())
    assert left
    with running_server(tmp_path / "data", *flags, environment=environment):
        assert not any(path.exists() for path in left)
    assert list(temporary.iterdir()) == []


@pytest.mark.reliability("T25", "T66")
@pytest.mark.slow
def test_a_thousand_idle_connections_leave_the_server_usable(flags: tuple[str, ...], tmp_path: Path) -> None:
    """With 256 descriptors, of which 128 are for connections and 64 of these for one address."""
    limited = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
    with running_server(tmp_path, *flags, within=limited) as running:
        host, port = running.url.removeprefix("http://").split(":")
        flood = [socket.create_connection((host, int(port))) for _ in range(1000)]
        with socket.create_connection((host, int(port)), source_address=("127.0.0.2", 0)) as other:
            other.settimeout(HANG_SECONDS)
            other.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            assert b"200" in other.recv(100)
        for client in flood:
            client.close()
        with running.client() as client_:
            wait_for(lambda: _is_served(client_), "a place for the address")
            assert running.complete(client_, "tiny-base", "abc")["usage"]["completion_tokens"] == 16


def _is_served(client: httpx.Client) -> bool:
    try:
        return client.get("/livez").status_code == 200
    except httpx.HTTPError:
        return False
