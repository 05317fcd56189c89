"""Chat templates of adapters, rendered in worker processes with limits on time, memory and output.

A template is a program. Only admins can add one (uploads and sources both need that scope), and it must not harm more
than the request that uses it: a worker that takes too long is killed and replaced when needed. The base model's own
template is not sandboxed.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

from server.api.text import template_worker

WORKERS = 2
RENDER_SECONDS = 2.0
_START_SECONDS = 30.0
_MAX_RESPONSE_BYTES = 6 * template_worker.MAX_OUTPUT_CHARS + 1024  # a character takes at most six bytes in JSON


class TemplateFailed(Exception):
    """The template cannot be compiled or rendered; the message has the reason in at most a few hundred characters."""


class TemplateSandbox:
    """A pool of worker processes, which start on demand and run until `close`."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(WORKERS)
        self._idle: list[Process] = []

    async def check(self, template: str) -> None:
        """Compile a template without rendering it. Raises `TemplateFailed`."""
        await self._request({"template": template})

    async def render(self, template: str, context: dict[str, Any]) -> str:
        """Render `template` with `context`, which must be JSON. Raises `TemplateFailed`."""
        return await self._request({"template": template, "context": context})

    async def close(self) -> None:
        """End the workers. The sandbox must not be used afterwards."""
        while self._idle:
            await _end(self._idle.pop())

    async def _request(self, request: dict[str, Any]) -> str:
        async with self._free:
            worker = self._idle.pop() if self._idle else await _start()
            response: dict[str, str] | None = None
            try:
                response = await _exchange(worker, request)
            finally:
                if response is None:
                    await _end(worker)
                else:
                    self._idle.append(worker)
        if "error" in response:
            raise TemplateFailed(response["error"])
        return response["text"]


async def _start() -> Process:
    """Start a worker without environment variables, which may contain keys, and without the server's import path."""
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(Path(template_worker.__file__)),
        str(RENDER_SECONDS + 1),  # the worker then ends by itself, in case this process is gone
        stdin=PIPE,
        stdout=PIPE,
        env={},
        limit=_MAX_RESPONSE_BYTES,
        start_new_session=True,  # the server handles Ctrl-C in the terminal
    )
    try:
        await asyncio.wait_for(_read_line(worker), _START_SECONDS)
    except BaseException:
        await _end(worker)
        raise
    return worker


async def _exchange(worker: Process, request: dict[str, Any]) -> dict[str, str]:
    assert worker.stdin is not None
    try:
        async with asyncio.timeout(RENDER_SECONDS):
            worker.stdin.write(json.dumps(request).encode() + b"\n")
            await worker.stdin.drain()
            response: dict[str, str] = json.loads(await _read_line(worker))
    except TimeoutError:
        raise TemplateFailed(f"it takes longer than {RENDER_SECONDS:g} seconds") from None
    except (ConnectionError, EOFError):
        raise TemplateFailed("it ended its process") from None
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
