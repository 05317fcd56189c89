"""Downloads over HTTP for the hub and S3: limited in size, verified and retried."""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import httpx

from adapters.errors import AdapterTooLarge, SourceNotFound, SourceUnavailable
from adapters.peft.files import FILES
from adapters.sources.redirects import RedirectNotAllowed, Redirects

T = TypeVar("T")
log = logging.getLogger(__name__)

WAITS_SECONDS = (0.5, 1.0, 2.0, 4.0)  # before each new attempt
_TIMEOUT = httpx.Timeout(20.0, connect=5.0)
_CHUNK_BYTES = 1 << 20
_PROGRESS_SECONDS = 5.0
_MAX_ANSWER_BYTES = 16 << 20  # of a response that is not a file
_WORTH_ANOTHER_TRY = (408, 425, 429, 500, 502, 503, 504)
_NOTHING_THERE = (401, 403, 404, 410)  # remotes hide objects that the credentials may not read


@dataclass(frozen=True, slots=True)
class Digest:
    """The digest stated by a remote: `hexdigest` of `prefix` followed by the file, by one of hashlib's algorithms."""

    algorithm: str
    hexdigest: str
    prefix: bytes = b""


class _Transient(Exception):
    """This attempt failed and another may succeed; the text is for the log."""


class Download:
    """The files of one source, together at most `max_bytes` bytes. Use it as a context manager.

    Methods raise `SourceNotFound`, `SourceUnavailable` or `AdapterTooLarge`. A redirect to another host is sent without
    the request's credentials (httpx sees to that).
    """

    def __init__(self, source: str, max_bytes: int, stop: threading.Event, redirects: Redirects | None = None):
        """`redirects` None: none is followed."""
        self._source = source
        self._left = max_bytes
        self._stop = stop
        self._client = httpx.Client(
            timeout=_TIMEOUT,
            follow_redirects=redirects is not None,
            headers={"accept-encoding": "identity"},
            event_hooks={"request": [redirects.check] if redirects else []},
        )

    def __enter__(self) -> "Download":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def read(self, url: str, headers: Mapping[str, str]) -> bytes:
        """Return the body of a short response."""

        def attempt() -> bytes:
            body = bytearray()
            with self._get(url, headers) as answer:
                for chunk in self._chunks(answer):
                    body += chunk
                    if len(body) > _MAX_ANSWER_BYTES:
                        raise self.unavailable("cannot be fetched: its server sent a response that is too large")
            return bytes(body)

        return self._persistently(attempt)

    def save(
        self,
        url: str,
        target: Path,
        digest: Callable[[httpx.Headers], Digest | None],
        headers: Mapping[str, str] | None = None,
        *,
        max_bytes: int | None = None,
    ) -> None:
        """Write a file to `target` and verify it against the `digest` derived from the response's headers."""
        limit = self._left if max_bytes is None else min(self._left, max_bytes)

        def attempt() -> int:
            with self._get(url, headers or {}) as answer:
                return self._write(answer, target, digest(answer.headers), limit)

        self._left -= self._persistently(attempt)

    def check_size(self, nbytes: int) -> None:
        """Raise `AdapterTooLarge` when the files, announced to have `nbytes` bytes, exceed the limit."""
        if nbytes > self._left:
            raise _too_large()

    def not_found(self) -> SourceNotFound:
        """Return the error for a source without an adapter's files."""
        return SourceNotFound(f"The source {self._source[:200]!r} does not have {' and '.join(FILES)} for this server.")

    def unavailable(self, what: str) -> SourceUnavailable:
        """Return the error for a source that cannot be fetched; `what` completes the sentence."""
        return SourceUnavailable(f"The source {self._source[:200]!r} {what}.")

    def _persistently(self, attempt: Callable[[], T]) -> T:
        for wait in WAITS_SECONDS:
            try:
                return attempt()
            except (httpx.HTTPError, _Transient) as error:
                log.warning("%s: %s; trying again in %g s", self._source, _shown(error), wait)
            if self._stop.wait(wait):
                raise self.unavailable("is not fetched any more")
        try:
            return attempt()
        except (httpx.HTTPError, _Transient) as error:
            log.warning("%s: %s; giving up", self._source, _shown(error))
            raise self.unavailable("cannot be fetched: its server failed several times; try again later") from error

    @contextmanager
    def _get(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        with self._stream(url, headers) as answer:
            if answer.status_code in _NOTHING_THERE:
                raise self.not_found()
            if answer.status_code in _WORTH_ANOTHER_TRY:
                raise _Transient(f"status {answer.status_code}")
            if answer.status_code != 200:
                log.warning("%s: status %d", self._source, answer.status_code)
                raise self.unavailable("cannot be fetched: its server responded with an unexpected status")
            yield answer

    @contextmanager
    def _stream(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        try:
            with self._client.stream("GET", url, headers=headers) as answer:
                yield answer
        except RedirectNotAllowed as error:
            log.warning("%s: %s", self._source, error)
            raise self.unavailable("cannot be fetched: its server redirects to a host that is not allowed") from None

    def _chunks(self, answer: httpx.Response) -> Iterator[bytes]:
        for chunk in answer.iter_bytes(_CHUNK_BYTES):
            if self._stop.is_set():
                raise self.unavailable("is not fetched any more")
            yield chunk

    def _write(self, answer: httpx.Response, target: Path, expected: Digest | None, limit: int) -> int:
        """Write the body to `target` and verify it; returns the file's size in bytes."""
        size = answer.headers.get("content-length", "")
        if size.isdecimal() and int(size) > limit:
            raise _too_large()
        found = hashlib.new(expected.algorithm, expected.prefix, usedforsecurity=False) if expected else None
        written, told = 0, time.monotonic()
        with target.open("wb") as file:
            for chunk in self._chunks(answer):
                written += len(chunk)
                if written > limit:
                    raise _too_large()
                file.write(chunk)
                if found:
                    found.update(chunk)
                if time.monotonic() - told > _PROGRESS_SECONDS:
                    told = time.monotonic()
                    log.info("%s: %s, %d of %s bytes", self._source, target.name, written, size or "?")
        if expected and found and found.hexdigest() != expected.hexdigest:
            raise _Transient(f"{target.name} does not have the {expected.algorithm} that the remote says")
        log.info("%s: %s, %d bytes", self._source, target.name, written)
        return written


def _too_large() -> AdapterTooLarge:
    return AdapterTooLarge("The adapter's files are larger than this server accepts.")


def _shown(error: Exception) -> str:
    """Return the error without URLs, which may be signed."""
    return str(error) if isinstance(error, _Transient) else type(error).__name__
