"""Worker processes for work that a request could make endless or boundless: each reads one request per line and writes
one response per line, and one that takes too long is killed and replaced when needed.

A worker limits its own memory and output, and writes an empty line once it is ready.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

_START_SECONDS = 30.0


class WorkerFailed(Exception):
    """The work could not be done; the message has the reason in at most a few hundred characters."""


class WorkerPool:
    """Workers that run `script`, which start on demand and run until `close`."""

    def __init__(self, script: Path, workers: int, max_response_bytes: int) -> None:
        self._script = script
        self._max_response_bytes = max_response_bytes
        self._free = asyncio.Semaphore(workers)
        self._idle: list[Process] = []

    async def request(self, request: dict[str, Any], seconds: float) -> str:
        """Return the `text` of the response. Raises `WorkerFailed` for its `error`, or after `seconds`."""
        async with self._free:
            worker = self._idle.pop() if self._idle else await self._start(seconds)
            response: dict[str, str] | None = None
            try:
                response = await exchange(worker, request, seconds)
            finally:
                if response is None:
                    await _end(worker)
                else:
                    self._idle.append(worker)
        if "error" in response:
            raise WorkerFailed(response["error"])
        return response["text"]

    async def close(self) -> None:
        """End the workers. The pool must not be used afterwards."""
        while self._idle:
            await _end(self._idle.pop())

    async def _start(self, seconds: float) -> Process:
        """Start a worker without environment variables, which may contain keys, and without the server's import
        path."""
        worker = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            str(self._script),
            str(seconds + 1),  # the worker then ends by itself, in case this process is gone
            stdin=PIPE,
            stdout=PIPE,
            env={},
            limit=self._max_response_bytes,
            start_new_session=True,  # the server handles Ctrl-C in the terminal
        )
        try:
            await asyncio.wait_for(_read_line(worker), _START_SECONDS)
        except BaseException:
            await _end(worker)
            raise
        return worker


async def exchange(worker: Process, request: dict[str, Any], seconds: float) -> dict[str, str]:
    assert worker.stdin is not None
    try:
        async with asyncio.timeout(seconds):
            worker.stdin.write(json.dumps(request).encode() + b"\n")
            await worker.stdin.drain()
            response: dict[str, str] = json.loads(await _read_line(worker))
    except TimeoutError:
        raise WorkerFailed(f"it takes longer than {seconds:g} seconds") from None
    except (ConnectionError, EOFError):
        raise WorkerFailed("it ended its process") from None
    return response


async def _read_line(worker: Process) -> bytes:
    assert worker.stdout is not None
    line = await worker.stdout.readline()
    if not line:
        raise EOFError
    return line


async def _end(worker: Process) -> None:
    if worker.returncode is None:
        worker.kill()
    await worker.communicate()
