"""Attacks on connections that need no key: many of them, slow ones, and malformed or costly requests."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from server.http import limits, protocol
from server.http.limits import ConnectionLimits, most_connections
from server.logs import OncePerSecond
from tests.fixtures.api_server import LiveServer, listening
from tests.fixtures.timing import HANG_SECONDS, wait_for

GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n"
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@contextmanager
def connected(server: LiveServer, sent: bytes = b"") -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=HANG_SECONDS) as client:
        client.sendall(sent)
        yield client


def answer(client: socket.socket) -> tuple[int, bytes]:
    """Read until the server closes; returns the first status and everything."""
    found = b""
    with suppress(ConnectionResetError):
        while chunk := client.recv(65536):
            found += chunk
    return int(found.split()[1]) if found else 0, found


def ask(server: LiveServer, request: bytes) -> tuple[int, bytes]:
    with connected(server, request) as client:
        client.shutdown(socket.SHUT_WR)
        return answer(client)


def code_of(response: bytes) -> str:
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"x-request-id:" in head.lower() and b"application/json" in head
    error = json.loads(body)["error"]
    assert {"message", "type", "param", "code"} == error.keys()
    return str(error["code"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with listening(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.mark.reliability("T22")
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/0.9\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400),
        (GET + b"bad header: x\r\n\r\n", 400),
        (CHAT + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (CHAT + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc", 400),
        (CHAT + b"content-length: -1\r\n\r\n", 400),
        (CHAT + b"transfer-encoding: gzip\r\n\r\n", 400),
        (CHAT.replace(b"/1.1", b"/1.0") + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (GET + b"a: b\r\n" * 5000 + b"\r\n", 431),
        (GET + b"a: " + b"b" * 100_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 431),
        (GET + b"a: b\r\n" * 101 + b"\r\n", 431),
    ],
)
def test_malformed_and_excessive_requests_get_an_error_body(server: LiveServer, request_: bytes, status: int) -> None:
    found, response = ask(server, request_)
    assert found == status
    assert code_of(response) == {400: "invalid_http", 431: "headers_too_large"}[status]
    assert response.count(b"HTTP/1.1 ") == 1  # what follows is no second request


def test_a_request_with_as_many_headers_as_allowed_is_served(server: LiveServer) -> None:
    assert ask(server, GET + b"a: b\r\n" * 90 + b"\r\n")[0] == 200


@pytest.mark.reliability("T22")
def test_a_malformed_chunk_ends_the_request(server: LiveServer) -> None:
    status, response = ask(server, CHAT + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\nzz\r\n")
    assert status == 400 and code_of(response) == "invalid_http"


def test_pipelined_requests_are_answered_in_order(server: LiveServer) -> None:
    _, response = ask(server, (GET + b"\r\n") * 20 + b"GET /nope HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert response.count(b"HTTP/1.1 200") == 20 and response.rfind(b"HTTP/1.1 404") > response.rfind(b"HTTP/1.1 200")


@pytest.mark.reliability("T22")
@pytest.mark.parametrize("pieces", [b"1\r\na\r\n" * 100_000, b"0\r\n" + b"a: b\r\n" * 40_000])
@pytest.mark.parametrize("before", [b"", GET + b"\r\n"])
def test_tiny_chunks_and_trailers_do_not_hold_up_others(server: LiveServer, before: bytes, pieces: bytes) -> None:
    """A loop that is blocked for the whole of it would take a second; probes go on in between."""
    with ExitStack() as stack:
        attack = before + CHAT + b"transfer-encoding: chunked\r\n\r\n" + pieces
        client = stack.enter_context(connected(server))
        sending = threading.Thread(target=lambda: _send(client, attack))
        sending.start()
        waits = []
        while sending.is_alive() or len(waits) < 20:
            began = time.monotonic()
            assert ask(server, GET + b"\r\n")[0] == 200
            waits.append(time.monotonic() - began)
            if len(waits) > 500:
                break
        sending.join(HANG_SECONDS)
    assert max(waits) < 0.3, sorted(waits)[-5:]


def _send(client: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # refused before the end
        client.sendall(data)


@pytest.mark.reliability("T25")
def test_slow_heads_unread_bodies_and_unread_responses_are_ended(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_PATIENCE", {"head": 0.5, "rest": 0.5, "reading": 0.5})
    with ExitStack() as stack:
        idle = stack.enter_context(connected(server))
        half = stack.enter_context(connected(server, GET))
        body = stack.enter_context(
            connected(server, CHAT.replace(b"json", b"xml") + b"content-length: 100\r\n\r\n")  # 415, and goes on
        )
        silent = stack.enter_context(connected(server))
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.sendall((b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n") * 200)  # megabytes, never read
        assert answer(idle)[0] == 0
        status, response = answer(half)
        assert status == 408 and code_of(response) == "timeout"
        assert answer(body)[0] == 415
        wait_for(lambda: not _is_open(silent), "the end of the connection that does not read")


def _is_open(client: socket.socket) -> bool:
    try:
        client.send(b"x")
    except OSError:
        return False
    return True


def test_drops_of_a_body_after_the_response_do_not_keep_a_connection(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(protocol._PATIENCE, "rest", 0.5)
    with connected(server, CHAT.replace(b"json", b"xml") + b"content-length: 100000\r\n\r\n") as client:
        wait_for(lambda: not _is_open(client), "the end of the connection")


@pytest.mark.reliability("T25")
def test_an_idle_flood_leaves_room_for_others(tmp_path: Path) -> None:
    """Of 16 places an address may hold 8; who comes later is told so, and places come back."""
    with listening(tmp_path, connections=16) as server, ExitStack() as stack:
        flood = [stack.enter_context(connected(server)) for _ in range(100)]
        refused = [client for client in flood if _was_refused(client)]
        assert len(refused) == 92
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), source_address=("127.0.0.2", 0)) as other:
            other.sendall(GET + b"connection: close\r\n\r\n")
            assert answer(other)[0] == 200
        for client in flood:
            client.close()
        wait_for(lambda: ask(server, GET + b"\r\n")[0] == 200, "a place")


def _was_refused(client: socket.socket) -> bool:
    client.settimeout(0.5)
    try:
        status, response = answer(client)
    except TimeoutError:
        return False
    return status == 503 and code_of(response) == "too_many_connections"


@pytest.mark.reliability("T66")
def test_connections_leave_descriptors_for_everything_else() -> None:
    assert [most_connections(n) for n in (64, 1024, 20_000, 1 << 16)] == [32, 768, 16_384, 16_384]
    assert limits.raise_descriptor_limit() >= 64


def test_an_ipv6_client_counts_by_its_network() -> None:
    counted = ConnectionLimits(4)
    assert [counted.enter(f"2001:db8::{n}") for n in range(3)] == [True, True, False]
    assert counted.enter("2001:db8:1::1") and counted.enter("10.0.0.1") and not counted.enter("10.0.0.2")
    counted.leave("2001:db8::1")
    assert counted.enter("10.0.0.2")


def test_a_kind_of_message_is_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logger = logging.getLogger("once")
    logger.addFilter(OncePerSecond())
    for number in range(100):
        logger.warning("request %d is invalid", number)
    logger.warning("another kind")
    assert [record.getMessage() for record in caplog.records] == ["request 0 is invalid", "another kind"]
