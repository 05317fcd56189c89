"""Chat templates of adapters, rendered in worker processes with limits on time, memory and output.

A template is a program. Only admins can add one (uploads and sources both need that scope), and it must not harm more
than the request that uses it. The base model's own template is not sandboxed.
"""

from pathlib import Path
from typing import Any

from server.api.text import template_worker
from server.api.text.worker_pool import WorkerFailed, WorkerPool

WORKERS = 2
RENDER_SECONDS = 2.0
_MAX_RESPONSE_BYTES = 6 * template_worker.MAX_OUTPUT_CHARS + 1024  # a character takes at most six bytes in JSON


class TemplateFailed(Exception):
    """The template cannot be compiled or rendered; the message has the reason in at most a few hundred characters."""


class TemplateSandbox:
    """Worker processes for templates."""

    def __init__(self) -> None:
        self._workers = WorkerPool(Path(template_worker.__file__), WORKERS, _MAX_RESPONSE_BYTES)

    async def check(self, template: str) -> None:
        """Compile a template without rendering it. Raises `TemplateFailed`."""
        await self._request({"template": template})

    async def render(self, template: str, context: dict[str, Any]) -> str:
        """Render `template` with `context`, which must be JSON. Raises `TemplateFailed`."""
        return await self._request({"template": template, "context": context})

    async def close(self) -> None:
        """End the workers. The sandbox must not be used afterwards."""
        await self._workers.close()

    async def _request(self, request: dict[str, Any]) -> str:
        try:
            return await self._workers.request(request, RENDER_SECONDS)
        except WorkerFailed as failed:
            raise TemplateFailed(str(failed)) from None
