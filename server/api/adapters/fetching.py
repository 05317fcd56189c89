"""Registration of adapters from a source: while the client waits, or in the background and across restarts."""

import asyncio
import json
import logging
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from adapters.errors import AdapterConflict, AdapterError, reraise_unless_foreign
from adapters.records import PendingAdapter
from adapters.sources import check_source, copy_from
from server.api.adapters import settings
from server.api.adapters.publishing import Publication, Published, audit_publication, publish_from
from server.api.adapters.schemas import RegisterRequest
from server.api.adapters.threads import finish_in_thread
from server.api.context import AppContext
from server.api.errors import ApiError
from server.api.middleware.auth import ANYONE, Key
from server.ipc.client import AdapterMoveRefused
from server.ipc.supervisor import EngineUnavailable

log = logging.getLogger(__name__)

_ENGINE_POLL_SECONDS = 1.0


async def register(
    context: AppContext, body: RegisterRequest, key: Key = ANYONE, *, dry_run: bool = False
) -> Published:
    """Fetch an adapter from an allowed source, validate it, and publish it unless this is a dry run. It counts in the
    quota of `key`."""

    async def fill(folder: Path) -> Publication:
        source = await _copy(context, body.source, folder)
        return Publication.of(body, source, key, dry_run=dry_run)

    return await publish_from(context, fill)


async def _copy(context: AppContext, source: str, folder: Path) -> str:
    """Copy the source into `folder` and return the resolved source. Cancelling the caller stops the copy."""
    config, stop = context.config, threading.Event()
    copy = partial(copy_from, source, config.allow_source, folder, max_bytes=config.max_upload_bytes, stop=stop)
    try:
        return await asyncio.get_running_loop().run_in_executor(context.fetchers, copy)
    finally:
        stop.set()


async def register_lazily(context: AppContext, body: RegisterRequest) -> PendingAdapter:
    """Fetch an adapter in the background. The name is pending in the registry until the fetch succeeds."""
    await settings.check(context, body)
    await asyncio.to_thread(check_source, body.source, context.config.allow_source)
    async with context.lock(body.name):
        if body.name in context.fetching:
            raise AdapterConflict(f"The adapter '{body.name}' is already being fetched.")
        changes = body.changes()
        pending = PendingAdapter(
            body.name,
            body.source,
            body.replace,
            body.pinned,
            int(time.time()),
            settings_json=settings.as_json(changes),
        )
        await asyncio.to_thread(context.registry.remember, pending)
        _start_fetching(context, pending)
    return pending


def resume(context: AppContext) -> None:
    """Continue the fetches that an earlier process did not finish."""
    for pending in context.registry.pending.values():
        if pending.error is None:
            _start_fetching(context, pending)


def _start_fetching(context: AppContext, pending: PendingAdapter) -> None:
    task = context.fetching[pending.name] = asyncio.create_task(_fetch(context, pending))
    task.add_done_callback(lambda _: context.fetching.pop(pending.name))


async def _fetch(context: AppContext, pending: PendingAdapter) -> None:
    body = RegisterRequest(
        name=pending.name,
        source=pending.source,
        replace=pending.replacing,
        pinned=pending.pinned,
        lazy=True,
        **json.loads(pending.settings_json or "{}"),
    )
    try:
        while True:
            try:
                async with context.fetches:
                    audit_publication(context, "fetch", await register(context, body))
                return
            except EngineUnavailable:  # not a failure of the adapter
                await asyncio.sleep(_ENGINE_POLL_SECONDS)
    except ApiError as error:
        await _note_failure(context, pending, str(error.detail))
    except (AdapterError, AdapterMoveRefused) as error:
        await _note_failure(context, pending, str(error))
    except BaseException as error:
        reraise_unless_foreign(error)
        log.exception("adapter %s could not be fetched", pending.name)
        await _note_failure(
            context,
            pending,
            "The adapter could not be fetched because of an internal error; the server's log has details.",
        )
        raise


async def _note_failure(context: AppContext, pending: PendingAdapter, reason: str) -> None:
    """Record the failure, unless another version was published under the name meanwhile."""
    log.warning("adapter %s could not be fetched: %s", pending.name, reason)
    async with context.lock(pending.name):
        if context.registry.pending.get(pending.name) == pending:
            await finish_in_thread(partial(context.registry.remember, replace(pending, error=reason)))


async def forget(context: AppContext, name: str) -> None:
    """Stop fetching `name` and remove it from the pending adapters. A publication that has begun is complete when this
    returns; none begins afterwards."""
    task = context.fetching.get(name)
    if task is not None:
        task.cancel()
        await asyncio.wait([task])
    async with context.lock(name):
        if name not in context.fetching:  # else it was registered again meanwhile
            await asyncio.to_thread(context.registry.forget, name)
