"""Hostile files of the corpora and mutations of them: seconds of what `make fuzz` does for minutes."""

import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.api_server import LiveServer, listening
from tests.fixtures.fuzzing import CORPORA, SECONDS, TARGETS, mutated, seeds
from tests.fixtures.raw_http import exchange, is_answered
from tests.fixtures.timing import cpu_seconds

MUTATIONS = 400
REQUESTS = 300
SILENCE = 0.02  # seconds


@pytest.mark.reliability("T9")
@pytest.mark.parametrize("target", TARGETS)
def test_every_file_of_a_corpus_is_refused_or_read(target: str) -> None:
    for data in seeds(target):
        assert cpu_seconds(lambda data=data: TARGETS[target](data)) < SECONDS  # type: ignore[misc]


@pytest.mark.reliability("T9")
@pytest.mark.parametrize("target", TARGETS)
def test_mutated_files_are_refused_or_read(target: str) -> None:
    rng, known = random.Random(1), seeds(target)
    for _ in range(MUTATIONS):
        TARGETS[target](mutated(rng, known))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with listening(tmp_path_factory.mktemp("server"), max_upload_bytes=1 << 20) as running:
        yield running


@pytest.mark.reliability("T28")
def test_valid_requests_of_the_corpus_are_served(server: LiveServer) -> None:
    """Mutations of requests that are refused at once would find little."""
    for path in sorted((CORPORA / "http").iterdir()):
        found = exchange(server.url, path.read_bytes())
        assert is_answered(found) and found.split()[1] in (b"200", b"201", b"404", b"405", b"409", b"413"), (
            path,
            found,
        )
    server.wait_idle()


@pytest.mark.reliability("T28", "T22")
def test_mutated_requests_get_a_response_that_is_no_server_error(server: LiveServer) -> None:
    rng, known = random.Random(2), seeds("http")
    for _ in range(REQUESTS):
        request = mutated(rng, known)
        assert is_answered(exchange(server.url, request, patience=SILENCE)), request
    server.wait_idle()
    staging = server.context.config.data_dir / "data" / "store" / ".staging"
    assert list(staging.iterdir()) == []
    assert (
        exchange(server.url, b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").split()[1]
        == b"200"
    )


def test_the_corpora_have_no_large_files() -> None:
    sizes = {path: path.stat().st_size for path in CORPORA.rglob("*") if path.is_file()}
    assert len(sizes) > 100 and max(sizes.values()) < 64 << 10 and sum(sizes.values()) < 1 << 20


def test_a_server_error_would_be_noticed(tmp_path: Path) -> None:
    assert not is_answered(b"HTTP/1.1 500 Internal Server Error\r\n\r\n")
    assert not is_answered(b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 503 Unavailable\r\nx: y\r\n\r\n{}")
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        nobody.close()
        with pytest.raises(OSError):
            exchange(address, b"GET / HTTP/1.1\r\n\r\n")
