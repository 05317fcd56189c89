"""Background check of the stored adapters: compares the files of each version with its digest, at a bounded rate."""

import asyncio
import errno
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from adapters.errors import AdapterInvalid, reraise_unless_foreign
from adapters.peft.digest import digest_of
from server.api.context import AppContext

log = logging.getLogger(__name__)

DAY_SECONDS = 86_400  # each version is checked once in this time, if the rate allows
ROUND_SECONDS = 60.0  # between two looks for versions that are due, and before the first
CPU_SHARE = 0.02  # of a core, at most; for small versions, recording a check takes longer than reading the files
_BUSY_SECONDS = 0.2  # between two looks whether requests still wait
_MIB = 1 << 20


class _Stopped(Exception):
    """The server shuts down."""


class Scrubber:
    """Checks the versions of all names, the one with the oldest check first. A damaged version is marked in the
    registry and not served from then on; publishing the same content again ends the mark.

    Files are read in a thread of its own, a piece at a time, with sleeps that keep the rate and, between two versions,
    the share of a core. Nothing is read while requests wait in the engine's queue.
    """

    def __init__(self, context: AppContext, mb_per_second: float):
        self._context = context
        self._bytes_per_second = mb_per_second * _MIB
        self._stop = threading.Event()

    async def run(self) -> None:
        """Check until cancelled. A failed round is logged and does not end the checks."""
        thread = ThreadPoolExecutor(1, "scrub")
        loop = asyncio.get_running_loop()
        try:
            while True:
                await asyncio.sleep(ROUND_SECONDS)
                try:
                    await loop.run_in_executor(thread, self.check_due)
                except BaseException as error:
                    reraise_unless_foreign(error)
                    log.exception("the check of stored adapters failed and is tried again")
        finally:
            self._stop.set()
            await asyncio.to_thread(thread.shutdown)  # the registry is closed afterwards

    def check_due(self) -> None:
        """Check all versions that are due."""
        try:
            for digest in self._context.registry.unchecked(int(time.time()) - DAY_SECONDS):
                began, cpu = time.monotonic(), time.thread_time()
                self._check(digest)
                self._wait((time.thread_time() - cpu) / CPU_SHARE - (time.monotonic() - began))
        except _Stopped:
            return

    def _check(self, digest: str) -> None:
        registry = self._context.registry
        names = registry.names_of(digest)
        signature = registry.store.signature(digest)
        try:
            damage = self._damage_of(digest)
            if damage is not None:  # read again: a fault that passes is no damage
                damage = self._damage_of(digest)
        except OSError as error:
            log.warning("the stored files of version %s could not be checked: %s", digest[:12], error.strerror)
            return
        was_damaged = any(name in registry.damaged for name in names)
        if not registry.note_check(digest, damage, signature):
            return  # deleted or replaced meanwhile
        self._context.metrics.store_checks.labels("ok" if damage is None else "damaged").inc()
        if damage is not None and not was_damaged:
            log.error(
                "version %s is damaged and no longer served (adapters: %s): %s. Publish it again to repair it",
                digest[:12],
                ", ".join(names) or "none, an earlier version",
                damage,
            )

    def _damage_of(self, digest: str) -> str | None:
        """Return what is wrong with the stored files, or None. Raises `OSError` for a fault that is not the files'."""
        try:
            found = digest_of(self._context.registry.store.path(digest), self._pace)
        except AdapterInvalid as error:
            return f"its stored files are damaged ({error})"
        except FileNotFoundError:
            return "its files are missing from the store"
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return "its stored files cannot be read from the disk"
        return None if found == digest else f"its stored files are damaged (their content is {found[:12]})"

    def _pace(self, nbytes: int) -> None:
        """Wait after a read of `nbytes` bytes."""
        self._wait(nbytes / self._bytes_per_second)

    def _wait(self, seconds: float) -> None:
        """Wait, and longer while requests wait. Raises `_Stopped` at shutdown."""
        seconds = max(seconds, 0.0)
        while self._stop.wait(seconds) is False and self._context.engine.stats.waiting:
            seconds = _BUSY_SECONDS
        if self._stop.is_set():
            raise _Stopped
