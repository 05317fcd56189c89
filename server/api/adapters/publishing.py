"""Publication and deletion of adapters: stage, fill, examine, self-test, publish; retire, drain, free."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapters.errors import AdapterInvalid, AdapterNotFound, NoSpace, Problem
from adapters.fault_points import fault_point
from adapters.model_spec import ModelSpec
from adapters.names import check_name
from adapters.peft.config_reader import MAX_CONFIG_BYTES, read_json
from adapters.peft.files import CONFIG_FILE
from adapters.peft.tokenizer_files import CONFIG, TEMPLATE, read_tokenizer_files
from adapters.records import Inspected
from adapters.registry.registry import AdapterRecord
from adapters.traits import Traits
from adapters.validation.inspect import inspect
from server.api.adapters import settings
from server.api.adapters.quotas import check_room
from server.api.adapters.running import check_switch, replace_running
from server.api.adapters.schemas import NO_CHANGES, DeletedBody, InFlight, RegisterRequest, Settings, UploadForm
from server.api.adapters.selftest import earlier_result, self_tested
from server.api.adapters.threads import finish_in_thread
from server.api.context import AppContext
from server.api.errors import ApiError, model_not_found, unavailable
from server.api.middleware.auth import ANYONE, Key
from server.api.text.template_sandbox import TemplateFailed
from server.ipc.client import AdapterMoveRefused
from server.ipc.supervisor import EngineUnavailable

log = logging.getLogger(__name__)

_MAX_NAMED = 200  # characters of a base model's name in the report
UPLOAD = "upload"  # the source of adapters that a client sent


def find(context: AppContext, key: Key, name: str) -> AdapterRecord:
    """Return the record of a name, even if damaged. Raises 404 if the name is unknown or the key may not see it, and
    409 for an alias."""
    if not key.sees(name):
        raise model_not_found(name)
    if name in context.registry.aliases:
        raise ApiError(409, f"'{name}' is an alias; apply this operation to its members.", code="conflict")
    try:
        return context.registry.record(name)
    except AdapterNotFound:
        raise model_not_found(name) from None


def check_writable(key: Key, name: str) -> None:
    """Raise an error unless `name` is a valid adapter name and the key may publish it."""
    check_name(name)
    if not key.sees(name):
        raise ApiError(403, "This API key may not publish under this name.", code="insufficient_scope")


@asynccontextmanager
async def place_for_client(context: AppContext) -> AsyncIterator[None]:
    """Hold a place for an upload or registration that a client waits for. Raises 503 when all places are taken: what is
    staged and tested at once is bounded."""
    if context.uploads.locked():
        raise unavailable("Too many adapters are being uploaded or registered; try again later.", "uploads_busy")
    async with context.uploads:
        yield


@dataclass(frozen=True, slots=True)
class Publication:
    """A request to publish the content of a folder under `name`; `source` is where the content comes from, and `key`
    whose quota it uses. A dry run ends after the self-test. `in_flight` is what becomes of running requests of the
    version that is replaced."""

    name: str
    source: str
    replace: bool = False
    pinned: bool = False
    dry_run: bool = False
    in_flight: InFlight = "finish"
    settings: Settings = NO_CHANGES
    key: Key = ANYONE

    @classmethod
    def of(cls, body: RegisterRequest | UploadForm, source: str, key: Key, *, dry_run: bool) -> "Publication":
        """Return what a client requests in `body`."""
        return cls(body.name, source, body.replace, body.pinned, dry_run, body.in_flight, body, key)


@dataclass(frozen=True, slots=True)
class Published:
    """The result of a publication under `name`. `record` is None for a dry run, and where the name was left as it is;
    `created` is False if the name pointed at this version already."""

    name: str
    inspected: Inspected
    record: AdapterRecord | None = None
    created: bool = False


def _as_asked(publication: Publication, _: Inspected) -> Publication:
    return publication


async def publish_from(
    context: AppContext,
    fill: Callable[[Path], Awaitable[Publication]],
    decide: Callable[[Publication, Inspected], Publication | None] = _as_asked,
) -> Published:
    """Publish an adapter; uploads, sources, the watched folder and the command line all use this function.

    `fill` writes the files into a staged folder and returns what to publish. `decide` may change that when the version
    is known, or return None to leave the name as it is. Raises an `AdapterError`, and `AdapterMoveRefused` if the
    engine refuses the pin.
    """
    spec = context.spec
    with context.registry.store.stage() as folder:
        publication = await fill(folder)
        fault_point("upload.received")
        check_name(publication.name)
        await settings.check(context, publication.settings)
        inspected = await _examined(context, publication, folder, spec)
        settings.check_tokens(context, publication.settings, Traits.of(inspected.report))
        decided = decide(publication, inspected)
        if decided is None:
            return Published(publication.name, inspected)
        await check_room(context, decided.key, decided.name, inspected)
        try:
            async with _tested(context, decided, inspected, folder):
                if decided.dry_run:
                    return Published(publication.name, inspected)
                published = await _publish(context, decided, inspected, folder)
                fault_point("publish.published")
        finally:
            collect_later(context)  # last, because it holds the registry's lock
        context.quarantine.forget(inspected.digest)
        await _forget_failure(context, inspected.digest)
        return published


def audit_publication(context: AppContext, who: str, published: Published) -> None:
    """Write a publication that no request made to the audit log; the middleware writes those of requests."""
    if context.audit is not None and published.created:
        version = f"sha256:{published.inspected.digest}"
        context.audit.changed(who, "publish", adapter=published.name, version=version)


async def _forget_failure(context: AppContext, digest: str) -> None:
    """Have the engine forget that it could not load the version: its stored files were compared with good ones."""
    if digest in context.engine.residency.failed:
        with suppress(AdapterMoveRefused, EngineUnavailable):
            await context.engine.move_adapter(digest, "disk")


async def _examined(context: AppContext, publication: Publication, folder: Path, spec: ModelSpec) -> Inspected:
    """Examine the folder while its weights are written to disk. A folder that is read again is usually unchanged, so
    its weights are not written before its version is known."""
    if publication.source != UPLOAD and publication.name in context.registry:
        return await examine(context, folder, spec)
    flushing = asyncio.create_task(asyncio.to_thread(context.registry.store.flush, folder))
    try:
        return await examine(context, folder, spec)
    finally:
        await flushing


def _tested(
    context: AppContext, publication: Publication, inspected: Inspected, folder: Path
) -> AbstractAsyncContextManager[None]:
    """Return the self-test; it is omitted for a version that passed it and has this name already."""
    result = earlier_result(context, publication.name, inspected.digest)
    if result is None or publication.dry_run:
        return self_tested(context, inspected, folder, always=publication.dry_run)
    inspected.report["selftest"] = result
    return nullcontext()


async def examine(context: AppContext, folder: Path, spec: ModelSpec) -> Inspected:
    """Run all static checks of an adapter. Raises `AdapterInvalid` with every problem found."""
    problems = await _template_problems(context, folder)
    try:
        inspected = await asyncio.to_thread(inspect, folder, spec, context.tokenizer.tokens)
    except AdapterInvalid as error:
        raise AdapterInvalid([*error.problems, *problems]) from None
    if problems:
        raise AdapterInvalid(problems)
    other = await asyncio.to_thread(_other_base, context, folder)
    if other is not None:
        inspected.report["trained_on"] = {"base_model_name_or_path": other, "served": context.base_model}
    return inspected


def _other_base(context: AppContext, folder: Path) -> str | None:
    """Return the base model that the adapter's config names, unless its last part is a name of the served model. This
    is no reason for a refusal: the same model has many names."""
    with (folder / CONFIG_FILE).open("rb") as file:
        config, _ = read_json(file.read(MAX_CONFIG_BYTES + 1))
    named = (config or {}).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    served = {_last_part(name) for name in (context.base_model, context.config.model)}
    return None if _last_part(named) in served else named[:_MAX_NAMED]


def _last_part(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()


async def _template_problems(context: AppContext, folder: Path) -> list[Problem]:
    """Compile the chat template in the sandbox, because compiling can be as expensive as rendering."""
    try:
        files = await asyncio.to_thread(read_tokenizer_files, folder)
        if files.chat_template is not None:
            await context.sandbox.check(files.chat_template)
    except AdapterInvalid:
        return []  # `inspect` reports these problems
    except TemplateFailed as failed:
        where = TEMPLATE if (folder / TEMPLATE).exists() else f"{CONFIG}: chat_template"
        return [Problem(where, str(failed), "a template that compiles", "malformed_file")]
    return []


async def _publish(context: AppContext, publication: Publication, inspected: Inspected, folder: Path) -> Published:
    """Point the name at the content and update the engine."""
    name, registry = publication.name, context.registry
    async with context.lock(name):
        old, changes = _current(context, name), publication.settings.changes()
        changed = settings.changed(settings.settings_of(context, name), changes)
        check_switch(old, inspected, publication.in_flight)
        write = partial(
            registry.publish,
            name,
            inspected,
            folder,
            source=publication.source,
            replace=publication.replace,
            settings=settings.as_json(changed) if changes else None,
        )
        record, created = await finish_in_thread(write)
        await replace_running(context, old, record, publication.in_flight)
        await follow(context, old, record)
        if publication.pinned and not record.pinned:
            record = await pin(context, record)
        return Published(name, inspected, record, created)


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
    """Pin a version in the engine after the registry has recorded the pin; in this order, a concurrent unpin of the
    same version under another name sees the pin. If the engine refuses, unpin the name and raise the refusal."""
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
    """Update the engine after a name has moved to another version: release the old version and move the pin. If the
    engine refuses the pin, the name becomes unpinned and the refusal is raised."""
    if old is None or old.version.digest == new.version.digest:
        return
    await _let_go(context, old)
    if new.pinned:
        await _hold(context, new)


def collect_later(context: AppContext) -> None:
    """Delete the versions that are no longer needed, in a thread that no response waits for."""

    def collect() -> None:
        try:
            context.registry.collect_garbage(in_use)
        except NoSpace as error:
            log.warning("versions that are not needed could not be deleted: %s", error)

    in_use = context.in_flight.digests()
    asyncio.get_running_loop().run_in_executor(None, collect)


async def _let_go(context: AppContext, old: AdapterRecord) -> None:
    """Release the version that the name no longer points at. A restarting engine loses it anyway."""
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
    """Retire a name at once, wait for its requests, abort those that exceed the timeout, and free unused versions."""
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
        context.metrics.remove_adapter(name)
        context.rate_limits.forget(name)
    return DeletedBody(name=name, drained=running - aborted, aborted=aborted)


async def _free(context: AppContext, digest: str) -> None:
    """Free the device and host memory of a version. An engine that is restarting or busy frees it later by itself."""
    residency = context.engine.residency
    with suppress(AdapterMoveRefused, EngineUnavailable):
        if digest in (context.engine.merge_status.digest, context.engine.requested_merge):
            await context.engine.unmerge()
        needed = context.registry.names_of(digest)  # another name may point at it meanwhile
        if not needed and digest in (*residency.device, *residency.host, *residency.loading):
            await context.engine.move_adapter(digest, "disk")
