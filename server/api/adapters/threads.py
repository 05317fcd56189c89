"""Work in threads that a cancelled task waits for."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def finish_in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread. A cancelled caller waits until the thread has finished before it raises, so that nothing
    is written after the caller has ended."""
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        if not working.cancelled():
            working.exception()  # retrieved here, because the caller raises `CancelledError`
        raise
