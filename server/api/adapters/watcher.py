"""`--watch-adapters DIR`: registers each subfolder with an adapter under its name, `name` or `org/name`, and again when
it changes.

Removing a folder does not delete its adapter: the volume may be unmounted or the folder about to be rewritten, and
clients may be using the adapter. `DELETE /v1/adapters/{name}` deletes it.
"""

import asyncio
import logging
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from adapters.errors import AdapterConflict, AdapterError, InvalidName, NoSpace, reraise_unless_foreign
from adapters.names import check_name
from adapters.peft.files import FILES, TOKENIZER_FILES
from adapters.peft.foreign_files import foreign_weights
from adapters.records import Inspected, PendingAdapter
from adapters.sources import NAMED_BY_OPERATOR, copy_from
from server.api.adapters.publishing import Publication, audit_publication, publish_from
from server.api.context import AppContext
from server.ipc.client import AdapterMoveRefused
from server.ipc.supervisor import EngineUnavailable

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0
FIRST_PASS_SECONDS = 1.0  # between the two polls of the first pass, for which the readiness of the server waits
Signature = tuple[tuple[str, int, int, int], ...]  # per file: name, inode, size in bytes, modification time in ns


class _FolderChanged(Exception):
    """The folder changed while it was copied."""


class FolderWatcher:
    """Registers the adapters in the subfolders of `root`. Symbolic links are followed wherever they lead, because the
    operator named the folder: the caches of the hub, DVC and Nix consist of links."""

    def __init__(self, context: AppContext, root: Path):
        self._context = context
        self._root = root.resolve()
        self._seen: dict[str, Signature] = {}  # at the last poll
        self._handled: dict[str, Signature] = {}  # registered or refused

    async def first_pass(self) -> None:
        """Register what is in the folder and does not change meanwhile."""
        await self.poll()
        if self._seen:
            await asyncio.sleep(FIRST_PASS_SECONDS)
            await self.poll()

    async def run(self) -> None:
        """Poll until cancelled."""
        try:
            while True:
                await asyncio.sleep(POLL_SECONDS)
                await self.poll()
        except BaseException as error:
            reraise_unless_foreign(error)
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
            await self._register(name, signature)
        except _FolderChanged:
            return
        except (EngineUnavailable, NoSpace) as error:  # not a failure of the folder; the next poll retries
            log.warning("adapter %s of the watched folder is retried later: %s", name, error)
            return
        except (AdapterError, AdapterMoveRefused) as error:
            await self._report(name, str(error))
        self._handled[name] = signature

    async def _register(self, name: str, signature: Signature) -> None:
        """Publish a folder. Raises `_FolderChanged` if it changed meanwhile."""
        check_name(name)
        folder, max_bytes = self._root / name, self._context.config.max_upload_bytes
        source = folder.as_uri()

        async def fill(staged: Path) -> Publication:
            await asyncio.to_thread(copy_from, source, NAMED_BY_OPERATOR, staged, max_bytes=max_bytes)
            if await asyncio.to_thread(_signature, folder) != signature:
                raise _FolderChanged
            return Publication(name, source)

        published = await publish_from(self._context, fill, self._decide)
        if published.record is not None:
            log.info("adapter %s is published from the watched folder", name)
            audit_publication(self._context, "watched folder", published)

    def _decide(self, publication: Publication, inspected: Inspected) -> Publication | None:
        name, digest = publication.name, inspected.digest
        if self._was_left(name, digest):
            return None
        return replace(publication, replace=self._may_replace(name, publication.source, digest))

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
    """Return the signatures of the subfolders that contain an adapter, and of those in subfolders that contain none,
    as `org/name`. Raises `OSError` if `root` cannot be read."""
    found: dict[str, Signature] = {}
    for name in _folders(root):
        if signature := _signature(root / name):
            found[name] = signature
        else:
            with suppress(OSError):
                below = {f"{name}/{inner}": _signature(root / name / inner) for inner in _folders(root / name)}
                found |= {inner: signature for inner, signature in below.items() if signature}
    return found


def _folders(root: Path) -> list[str]:
    """Return the names of the subfolders. Hidden ones are left out, because tools use them for work in progress."""
    with os.scandir(root) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


def _signature(folder: Path) -> Signature:
    """Return the signature of a folder; empty unless it has both required files of an adapter, or weights in another
    format, whose refusal says what they are."""
    names = [*FILES, *TOKENIZER_FILES]
    with suppress(OSError):
        if other := foreign_weights(os.listdir(folder)):
            names.append(other[0])
    found = []
    for name in names:
        with suppress(OSError):
            status = os.stat(folder / name)
            found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
    there = {name for name, *_ in found}
    return tuple(found) if there.issuperset(FILES) or there - {*FILES, *TOKENIZER_FILES} else ()
