"""`--watch-adapters DIR`: registers each subfolder with an adapter under its name, and again when it changes.

Removing a folder does not delete its adapter: the volume may be unmounted or the folder about to be rewritten, and
clients may be using the adapter. `DELETE /v1/adapters/{name}` deletes it.
"""

import asyncio
import logging
import os
import time
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from pathlib import Path

from adapters.errors import AdapterConflict, AdapterError, InvalidName, NoSpace
from adapters.names import check_name
from adapters.peft.files import FILES, TOKENIZER_FILES
from adapters.records import Inspected, PendingAdapter
from adapters.sources import copy_from
from server.api.adapters.publishing import examine, publish
from server.api.adapters.selftest import self_tested
from server.api.context import AppContext
from server.ipc.client import AdapterMoveRefused, EngineUnavailable

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0
Signature = tuple[tuple[str, int, int, int], ...]  # per file: name, inode, size in bytes, modification time in ns


class FolderWatcher:
    """Registers the adapters in the subfolders of `root`. Refuses symbolic links that lead out of it."""

    def __init__(self, context: AppContext, root: Path):
        self._context = context
        self._root = root.resolve()
        self._seen: dict[str, Signature] = {}  # at the last poll
        self._handled: dict[str, Signature] = {}  # registered or refused

    async def run(self) -> None:
        """Poll until cancelled."""
        try:
            while True:
                await self.poll()
                await asyncio.sleep(POLL_SECONDS)
        except Exception:
            log.exception("the folder %s is no longer watched", self._root)
            raise

    async def poll(self) -> None:
        """Register new and changed folders that are unchanged since the last poll, so that writes can complete."""
        try:
            found = await asyncio.to_thread(_signatures, self._root)
        except OSError as error:
            log.warning("the watched folder cannot be read: %s", error)
            found = {}
        before, self._seen = self._seen, found
        self._handled = {name: signature for name, signature in self._handled.items() if name in found}
        for name, signature in sorted(found.items()):
            if before.get(name) == signature != self._handled.get(name):
                await self._handle(name, signature)

    async def _handle(self, name: str, signature: Signature) -> None:
        try:
            if not await self._register(name, signature):
                return
        except (EngineUnavailable, NoSpace) as error:  # not a failure of the folder; the next poll retries
            log.warning("adapter %s of the watched folder is retried later: %s", name, error)
            return
        except (AdapterError, AdapterMoveRefused) as error:
            await self._report(name, str(error))
        self._handled[name] = signature

    async def _register(self, name: str, signature: Signature) -> bool:
        """Publish a folder as an upload would. Returns False if the folder changed meanwhile."""
        check_name(name)
        context, folder = self._context, self._root / name
        source, max_bytes = folder.as_uri(), context.config.max_upload_bytes
        with context.registry.store.stage() as staged:
            await asyncio.to_thread(copy_from, source, [self._root.as_uri()], staged, max_bytes=max_bytes)
            if await asyncio.to_thread(_signature, folder) != signature:
                return False
            inspected = await examine(context, staged, context.spec)
            if self._was_left(name, inspected.digest):
                return True
            replace = self._may_replace(name, source, inspected.digest)
            async with self._selftest(name, inspected, staged):
                await publish(context, name, inspected, staged, source=source, replace=replace, pinned=False)
        log.info("adapter %s is published from the watched folder", name)
        return True

    def _was_left(self, name: str, digest: str) -> bool:
        """Return whether an earlier process published this version and it was rolled back or replaced since. Such a
        version is not published again."""
        if name in self._handled or name not in self._context.registry:
            return False
        return any(v.digest == digest and not v.current for v in self._context.registry.history(name))

    def _may_replace(self, name: str, source: str, digest: str) -> bool:
        """Return False for a new name. Raises `AdapterConflict` if the name belongs to an adapter of another source."""
        registry = self._context.registry
        record = registry.record(name) if name in registry else None
        if name in self._context.fetching or (record and record.source != source and record.version.digest != digest):
            raise AdapterConflict(
                f"The name '{name}' already has an adapter from another source; delete it or rename the folder."
            )
        return record is not None

    def _selftest(self, name: str, inspected: Inspected, staged: Path) -> AbstractAsyncContextManager[None]:
        """Return the self-test of a version; none for a version that is published already."""
        known = name in self._context.registry.names_of(inspected.digest)
        return nullcontext() if known else self_tested(self._context, inspected, staged)

    async def _report(self, name: str, reason: str) -> None:
        """Log the failure, and store it in the adapter's record if there is one."""
        log.warning("adapter %s of the watched folder is refused: %s", name, reason)
        registry, source = self._context.registry, (self._root / name).as_uri()
        pending = registry.pending.get(name)
        if pending is None or pending.source == source:
            failed = PendingAdapter(name, source, replacing=True, pinned=False, created=int(time.time()), error=reason)
            with suppress(InvalidName, AdapterConflict):
                await asyncio.to_thread(registry.remember, failed)


def _signatures(root: Path) -> dict[str, Signature]:
    """Return the signatures of the subfolders that contain an adapter. Hidden folders are skipped, because tools use
    them for work in progress."""
    with os.scandir(root) as entries:
        found = {entry.name: _signature(Path(entry.path)) for entry in entries if not entry.name.startswith(".")}
    return {name: signature for name, signature in found.items() if signature}


def _signature(folder: Path) -> Signature:
    """Return the signature of a folder; empty unless it has both required files of an adapter."""
    found = []
    for name in (*FILES, *TOKENIZER_FILES):
        try:
            status = os.stat(folder / name)
        except OSError:
            if name in FILES:
                return ()
        else:
            found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)
