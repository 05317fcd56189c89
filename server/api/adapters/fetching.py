"""Bringing adapters in from a source: while the client waits, or in the background and across restarts."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from adapters.errors import AdapterConflict, AdapterError
from adapters.records import Inspected, PendingAdapter
from adapters.registry.registry import AdapterRecord
from adapters.sources import check, copy_from
from server.api.adapters.publishing import examine, publish
from server.api.adapters.schemas import RegisterRequest
from server.api.adapters.selftest import tried
from server.api.context import AppContext
from server.ipc.client import AdapterMoveRefused, EngineUnavailable

log = logging.getLogger(__name__)

_ENGINE_POLL_SECONDS = 1.0


async def register(context: AppContext, body: RegisterRequest) -> tuple[AdapterRecord, bool]:
    """Fetch from an allowed source, validate and publish."""
    async with _fetched(context, body.source) as (folder, inspected, source):
        return await publish(
            context, body.name, inspected, folder, source=source, replace=body.replace, pinned=body.pinned
        )


async def try_out(context: AppContext, source: str) -> Inspected:
    """Fetch and validate, and publish nothing."""
    async with _fetched(context, source) as (_, inspected, _):
        return inspected


@asynccontextmanager
async def _fetched(context: AppContext, source: str) -> AsyncIterator[tuple[Path, Inspected, str]]:
    """A staged folder, what is in it, and the source as it was resolved."""
    with context.registry.store.stage() as folder:
        resolved = await _copy(context, source, folder)
        inspected = await examine(context, folder, context.spec)
        async with tried(context, inspected, folder):
            yield folder, inspected, resolved


async def _copy(context: AppContext, source: str, folder: Path) -> str:
    """The source as it was resolved. Whoever stops waiting stops the copying."""
    config, stop = context.config, threading.Event()
    copy = partial(copy_from, source, config.allow_source, folder, max_bytes=config.max_upload_bytes, stop=stop)
    try:
        return await asyncio.get_running_loop().run_in_executor(context.fetchers, copy)
    finally:
        stop.set()


async def register_lazily(context: AppContext, body: RegisterRequest) -> PendingAdapter:
    """Fetch in the background; until that is done, or when it failed, the registry has the name as pending."""
    await asyncio.to_thread(check, body.source, context.config.allow_source)
    async with context.lock(body.name):
        if body.name in context.fetching:
            raise AdapterConflict(f"The adapter '{body.name}' is being fetched already.")
        pending = PendingAdapter(body.name, body.source, body.replace, body.pinned, int(time.time()))
        await asyncio.to_thread(context.registry.remember, pending)
        _start_fetching(context, pending)
    return pending


def resume(context: AppContext) -> None:
    """Go on with what an earlier process did not finish."""
    for pending in context.registry.pending.values():
        if pending.error is None:
            _start_fetching(context, pending)


def _start_fetching(context: AppContext, pending: PendingAdapter) -> None:
    task = context.fetching[pending.name] = asyncio.create_task(_fetch(context, pending))
    task.add_done_callback(lambda _: context.fetching.pop(pending.name))


async def _fetch(context: AppContext, pending: PendingAdapter) -> None:
    body = RegisterRequest(
        name=pending.name, source=pending.source, replace=pending.replacing, pinned=pending.pinned, lazy=True
    )
    try:
        while True:
            try:
                await register(context, body)
                return
            except EngineUnavailable:  # says nothing about the adapter
                await asyncio.sleep(_ENGINE_POLL_SECONDS)
    except (AdapterError, AdapterMoveRefused) as error:
        await _note_failure(context, pending, str(error))
    except Exception:
        log.exception("adapter %s could not be fetched", pending.name)
        await _note_failure(context, pending, "The adapter could not be fetched.")
        raise


async def _note_failure(context: AppContext, pending: PendingAdapter, reason: str) -> None:
    """Keep it as failed, unless something was published under its name meanwhile."""
    log.warning("adapter %s could not be fetched: %s", pending.name, reason)
    async with context.lock(pending.name):
        if context.registry.pending.get(pending.name) == pending:
            await asyncio.to_thread(context.registry.remember, replace(pending, error=reason))


async def forget(context: AppContext, name: str) -> None:
    """Stop fetching `name`, and forget that it was asked for."""
    task = context.fetching.get(name)
    if task is not None:
        task.cancel()
        await asyncio.wait([task])
    await asyncio.to_thread(context.registry.forget, name)
