"""Multipart uploads, streamed directly into a staging folder, without spooling or buffering files in memory."""

import asyncio
import math
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import BinaryIO

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from adapters.peft.files import FILES, TOKENIZER_FILES
from adapters.peft.foreign_files import foreign_weights
from server.api.errors import ApiError, bad_request

_KNOWN = (*FILES, *TOKENIZER_FILES)
_MAX_FIELD_BYTES = 1024
_LONG_FIELDS = {"description": 16 << 10, "labels": 64 << 10, "defaults": 512 << 10}
_MAX_FIELDS = 8
_BATCH_BYTES = 1 << 20


async def receive_upload(request: Request, folder: Path) -> dict[str, str]:
    """Write the files of an adapter into `folder` and return the other fields of the form.

    Only keys with the scope `admin` reach this code (`server.api.middleware.auth`), so an admin chose every chat
    template.
    """
    _, options = parse_options_header(request.headers["content-type"])
    with _Upload(options.get(b"boundary", b""), folder) as upload:
        async with aclosing(request.stream()) as chunks:
            async for batch in _batches(chunks):
                await asyncio.to_thread(upload.feed, batch)
        return upload.finish()


async def _batches(chunks: AsyncIterable[bytes]) -> AsyncIterator[list[bytes]]:
    """Yield the chunks in lists of about `_BATCH_BYTES`: a thread for each chunk of 64 KiB would take longer than what
    it does."""
    batch: list[bytes] = []
    size = 0
    async for chunk in chunks:
        batch.append(chunk)
        size += len(chunk)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


class _Upload:
    """Writes the adapter files of a form to disk, collects a few short fields, and refuses all other parts."""

    def __init__(self, boundary: bytes, folder: Path):
        if not boundary:
            raise bad_request("The multipart body has no boundary.")
        self._folder = folder
        self._fields: dict[str, bytearray] = {}
        self._files: dict[str, BinaryIO] = {}
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._sink: bytearray | BinaryIO = bytearray()
        self._left: float = math.inf  # bytes that the current file or field may still receive
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_end": self._on_end,
                },
            )
        except FormParserError:
            raise _malformed() from None

    def __enter__(self) -> "_Upload":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def feed(self, chunks: list[bytes]) -> None:
        try:
            for chunk in chunks:
                self._parser.write(chunk)
        except FormParserError:
            raise _malformed() from None

    def finish(self) -> dict[str, str]:
        if not self._ended:
            raise bad_request("The multipart body is incomplete.")
        for name in FILES:
            if name not in self._files:
                raise bad_request(f"The upload lacks the file '{name}'.", name)
        for file in self._files.values():
            file.close()
        return {name: value.decode("utf-8", "replace") for name, value in self._fields.items()}

    def _on_part_begin(self) -> None:
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _on_header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" in options:
            self._sink = self._open_file(name, options[b"filename"].decode("utf-8", "replace"))
        elif not name or name in self._fields or len(self._fields) == _MAX_FIELDS:
            raise bad_request("The form has a field without a name, a duplicate field, or too many fields.")
        else:
            self._sink = self._fields[name] = bytearray()
            self._left = _LONG_FIELDS.get(name, _MAX_FIELD_BYTES)

    def _open_file(self, field: str, filename: str) -> BinaryIO:
        """Open a file of the adapter by its field name or file name. A client's name never becomes a path."""
        name = next((known for known in _KNOWN if known in (field, filename)), None)
        if name is None:
            other = foreign_weights((field, filename))
            hint = f" To convert {other[1]}, run {other[2]}." if other else ""
            raise ApiError(
                415, f"The upload may only contain the files {', '.join(_KNOWN)}.{hint}", code="unsupported_media_type"
            )
        if name in self._files:
            raise bad_request(f"The upload contains '{name}' twice.", name)
        self._files[name] = file = (self._folder / name).open("wb")
        self._left = TOKENIZER_FILES.get(name, math.inf)
        return file

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._left -= end - start
        if isinstance(self._sink, bytearray):
            if self._left < 0:
                raise bad_request("A form field is longer than its limit of bytes.")
            self._sink.extend(data[start:end])
        else:
            if self._left < 0:
                raise ApiError(413, "A tokenizer file exceeds the size limit.", code="too_large")
            self._sink.write(memoryview(data)[start:end])

    def _on_end(self) -> None:
        self._ended = True


def _malformed() -> ApiError:
    return bad_request("The multipart body is malformed.")
