"""The listening server: uvicorn with bounded connections."""

import asyncio
from functools import partial
from typing import Any

import uvicorn

from server.http.limits import ConnectionLimits, most_connections, raise_descriptor_limit
from server.http.protocol import BoundedProtocol

# asyncio accepts so many connections before the first of them is refused, so they must fit into the reserve.
_BACKLOG = 128
_TICKS_BETWEEN_CHECKS = 5  # uvicorn ticks ten times a second


class HttpServer(uvicorn.Server):
    """Serves an ASGI application over HTTP/1.1."""

    def __init__(self, app: Any, host: str = "127.0.0.1", port: int = 0, connections: int = 0):
        """`connections` is the largest number of them; 0 follows from the limit of open files, which is raised."""
        limits = ConnectionLimits(connections or most_connections(raise_descriptor_limit()))
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=partial(BoundedProtocol, limits=limits),  # type: ignore[arg-type]
                ws="none",
                backlog=_BACKLOG,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_BETWEEN_CHECKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, BoundedProtocol):
                    connection.enforce(now)
        return await super().on_tick(counter)
