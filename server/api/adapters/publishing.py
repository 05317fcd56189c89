"""Bringing adapters in and taking them out: stage, validate, publish; retire, drain, free."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from starlette.requests import Request

from adapters.errors import AdapterInvalid, AdapterNotFound, Problem
from adapters.model_spec import ModelSpec
from adapters.peft.tokenizer_files import CONFIG, TEMPLATE, read_tokenizer_files
from adapters.records import Inspected
from adapters.registry.registry import AdapterRecord, check_name
from adapters.validation.inspect import inspect
from server.api.adapters.multipart import receive_upload
from server.api.adapters.schemas import DeletedBody, UploadForm
from server.api.adapters.selftest import tried
from server.api.context import AppContext
from server.api.errors import ApiError, model_not_found
from server.api.middleware.auth import Key
from server.api.text.template_sandbox import TemplateFailed
from server.ipc.client import AdapterMoveRefused, EngineUnavailable


def find(context: AppContext, key: Key, name: str) -> AdapterRecord:
    """The record of a name, damaged ones included. Raises 404, also for what the key may not see; 409 for an alias."""
    if not key.sees(name):
        raise model_not_found(name)
    if name in context.registry.aliases:
        raise ApiError(409, f"'{name}' is an alias; this is done to its members.", code="conflict")
    try:
        return context.registry.record(name)
    except AdapterNotFound:
        raise model_not_found(name) from None


def check_writable(key: Key, name: str) -> None:
    """Raises unless `name` may name an adapter and the key may publish it."""
    check_name(name)
    if not key.sees(name):
        raise ApiError(403, "This API key may not publish under that name.", code="insufficient_scope")


async def upload(
    context: AppContext, request: Request, parse: Callable[[dict[str, str]], UploadForm], key: Key, *, dry_run: bool
) -> tuple[UploadForm, Inspected, tuple[AdapterRecord, bool] | None]:
    """Receive, validate and publish; a dry run (third value None) stops before publishing."""
    spec = context.spec
    with context.registry.store.stage() as folder:
        form = parse(await receive_upload(request, folder))
        check_writable(key, form.name)
        inspected = await examine(context, folder, spec)
        async with tried(context, inspected, folder):
            if dry_run:
                return form, inspected, None
            published = await publish(
                context, form.name, inspected, folder, source="upload", replace=form.replace, pinned=form.pinned
            )
            return form, inspected, published


async def examine(context: AppContext, folder: Path, spec: ModelSpec) -> Inspected:
    """All that is checked before an adapter is published. Raises `AdapterInvalid` with every problem found."""
    problems = await _template_problems(context, folder)
    try:
        inspected = await asyncio.to_thread(inspect, folder, spec)
    except AdapterInvalid as error:
        raise AdapterInvalid([*error.problems, *problems]) from None
    if problems:
        raise AdapterInvalid(problems)
    return inspected


async def _template_problems(context: AppContext, folder: Path) -> list[Problem]:
    """Compiling a template can cost as much as rendering it, so the sandbox does that too."""
    try:
        files = await asyncio.to_thread(read_tokenizer_files, folder)
        if files.chat_template is not None:
            await context.sandbox.check(files.chat_template)
    except AdapterInvalid:
        return []  # `inspect` says so too
    except TemplateFailed as failed:
        where = TEMPLATE if (folder / TEMPLATE).exists() else f"{CONFIG}: chat_template"
        return [Problem(where, str(failed), "a template that compiles", "malformed_file")]
    return []


async def publish(
    context: AppContext,
    name: str,
    inspected: Inspected,
    folder: Path,
    *,
    source: str,
    replace: bool,
    pinned: bool,
) -> tuple[AdapterRecord, bool]:
    """Point `name` at the staged content and have the engine follow; False when it pointed there already."""
    async with context.lock(name):
        old = _current(context, name)
        record, created = await asyncio.to_thread(
            context.registry.publish, name, inspected, folder, source=source, replace=replace
        )
        await follow(context, old, record)
        if pinned and not record.pinned:
            record = await pin(context, record)
        return record, created


def _current(context: AppContext, name: str) -> AdapterRecord | None:
    try:
        return context.registry.resolve(name)
    except AdapterNotFound:
        return None


async def pin(context: AppContext, record: AdapterRecord) -> AdapterRecord:
    if record.pinned:
        await context.engine.pin_adapter(record.version.digest, True)
        return record
    pinned = await asyncio.to_thread(context.registry.set_pinned, record.name, True)
    await _hold(context, pinned)
    return pinned


async def _hold(context: AppContext, record: AdapterRecord) -> None:
    """Have the engine pin what the registry says is pinned, in this order: so nobody who unpins the same version under
    another name can miss it. When the engine does not, the name is unpinned again, and its refusal is raised."""
    try:
        await context.engine.pin_adapter(record.version.digest, True)
    except (AdapterMoveRefused, EngineUnavailable):
        with suppress(EngineUnavailable):
            await unpin(context, record)
        raise


async def unpin(context: AppContext, record: AdapterRecord) -> AdapterRecord:
    unpinned = await asyncio.to_thread(context.registry.set_pinned, record.name, False)
    await _unpin_unless_shared(context, record.version.digest)
    return unpinned


async def follow(context: AppContext, old: AdapterRecord | None, new: AdapterRecord) -> None:
    """A name moved from one version to the next: what it left behind is let go, and its pin moves along. If the pin
    cannot, the name has none any more, and the refusal is raised."""
    if old is None or old.version.digest == new.version.digest:
        return
    try:
        await _let_go(context, old)
        if new.pinned:
            await _hold(context, new)
    finally:
        await asyncio.to_thread(context.registry.collect_garbage, context.in_flight.digests())


async def _let_go(context: AppContext, old: AdapterRecord) -> None:
    """The name points at `old` no longer. An engine that is away forgets it too."""
    if not context.registry.names_of(old.version.digest):
        context.engine.retire_adapter(old.version.digest)
    elif old.pinned:
        with suppress(EngineUnavailable):
            await _unpin_unless_shared(context, old.version.digest)


async def _unpin_unless_shared(context: AppContext, digest: str) -> None:
    names = context.registry.names_of(digest)
    if not any(record.pinned for name in names if (record := _current(context, name))):
        await context.engine.pin_adapter(digest, False)


async def remove(context: AppContext, name: str, drain_timeout: float) -> DeletedBody:
    """Retire at once, let running requests finish, abort those that take too long, free what no name needs."""
    async with context.lock(name):
        digests = {version.digest for version in context.registry.history(name)}
        record = await asyncio.to_thread(context.registry.retire, name)
        running = context.in_flight.count(name)
        idle = await context.in_flight.wait_idle(name, drain_timeout)
        aborted = 0 if idle else await context.abort(name)
        await _let_go(context, record)
        for digest in digests:
            if not context.registry.names_of(digest):
                await _free(context, digest)
        await asyncio.to_thread(context.registry.collect_garbage, context.in_flight.digests())
        context.in_flight.forget(name)
        context.metrics.forget(name)
        context.rate_limits.forget(name)
    return DeletedBody(name=name, drained=running - aborted, aborted=aborted)


async def _free(context: AppContext, digest: str) -> None:
    """Give back device and host memory. An engine that is away or busy with it forgets it by itself, later."""
    residency = context.engine.residency
    with suppress(AdapterMoveRefused, EngineUnavailable):
        if digest in (context.engine.merge_status.digest, context.engine.asked_to_merge):
            await context.engine.unmerge()
        needed = context.registry.names_of(digest)  # another name may have taken it up meanwhile
        if not needed and digest in (*residency.device, *residency.host, *residency.loading):
            await context.engine.move_adapter(digest, "disk")
