"""Chat templates that came with adapters, rendered in worker processes under bounds of time, memory and output.

A template is a program. Only admins can bring one in (uploads and sources both need that scope), and still it may cost
no more than the request that uses it: a worker that takes too long is killed, and another takes its place when needed.
The base model's own template does not come here.
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
_MAX_ANSWER_BYTES = 6 * template_worker.MAX_OUTPUT_CHARS + 1024  # JSON writes a character in six bytes at most


class TemplateFailed(Exception):
    """The template cannot be compiled or rendered; the message says why, in at most a few hundred characters."""


class TemplateSandbox:
    """Workers start with the first question and live until `close`."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(WORKERS)
        self._idle: list[Process] = []

    async def check(self, template: str) -> None:
        """Compile only. Raises `TemplateFailed`."""
        await self._ask({"template": template})

    async def render(self, template: str, context: dict[str, Any]) -> str:
        """The text that `template` makes of `context`, which JSON can carry. Raises `TemplateFailed`."""
        return await self._ask({"template": template, "context": context})

    async def close(self) -> None:
        """End the workers. Nothing may be asked any more."""
        while self._idle:
            await _end(self._idle.pop())

    async def _ask(self, question: dict[str, Any]) -> str:
        async with self._free:
            worker = self._idle.pop() if self._idle else await _start()
            answer: dict[str, str] | None = None
            try:
                answer = await _exchange(worker, question)
            finally:
                if answer is None:
                    await _end(worker)
                else:
                    self._idle.append(worker)
        if "error" in answer:
            raise TemplateFailed(answer["error"])
        return answer["text"]


async def _start() -> Process:
    """Isolated: no environment, which may hold keys, and no folder of ours to import from."""
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(Path(template_worker.__file__)),
        str(RENDER_SECONDS + 1),  # then it gives up by itself, should this process be gone
        stdin=PIPE,
        stdout=PIPE,
        env={},
        limit=_MAX_ANSWER_BYTES,
        start_new_session=True,  # Ctrl-C in the terminal is the server's to handle
    )
    try:
        await asyncio.wait_for(_read_line(worker), _START_SECONDS)
    except BaseException:
        await _end(worker)
        raise
    return worker


async def _exchange(worker: Process, question: dict[str, Any]) -> dict[str, str]:
    assert worker.stdin is not None
    try:
        async with asyncio.timeout(RENDER_SECONDS):
            worker.stdin.write(json.dumps(question).encode() + b"\n")
            await worker.stdin.drain()
            answer: dict[str, str] = json.loads(await _read_line(worker))
    except TimeoutError:
        raise TemplateFailed(f"it takes longer than {RENDER_SECONDS:g} seconds") from None
    except (ConnectionError, EOFError):
        raise TemplateFailed("it brought its process to an end") from None
    return answer


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
