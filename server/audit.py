"""The audit log: one JSON line for every change of the control plane and every refused access.

A line says who did what to which adapter, and the outcome. It never holds a secret, a prompt or a body. A thread writes
the lines, so that a slow disk delays no request, to a file that only the server's user may read.
"""

import json
import logging
import os
import queue
import time
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FILE = "audit.jsonl"
_FILE_BYTES = 16 << 20
_OLD_FILES = 4
_REFUSALS_PER_SECOND = 20  # more would rotate the changes out of the log
_LONGEST = 300  # characters of a value that a client chose


class AuditLog:
    """Writes the audit log of a data folder. `close` waits until everything is written."""

    def __init__(self, folder: Path):
        self._lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._queue = QueueHandler(self._lines)
        file = _PrivateFile(folder / FILE, maxBytes=_FILE_BYTES, backupCount=_OLD_FILES, encoding="utf-8", delay=True)
        self._listener = QueueListener(self._lines, file)
        self._listener.start()
        self._file = file
        self._second = 0
        self._refusals = 0
        self._left_out = 0

    def close(self) -> None:
        self._listener.stop()
        self._file.close()

    def changed(self, who: str, action: str, **details: Any) -> None:
        """Record a change of the control plane, or an attempt."""
        self._write("change", who, action, details)

    def refused(self, who: str, action: str, **details: Any) -> None:
        """Record a refused access. Of many in one second, some are counted in the next line instead."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._refusals = second, 0
        self._refusals += 1
        if self._refusals > _REFUSALS_PER_SECOND:
            self._left_out += 1
            return
        left_out, self._left_out = self._left_out, 0
        self._write("refusal", who, action, {**details, **({"left_out": left_out} if left_out else {})})

    def _write(self, kind: str, who: str, action: str, details: dict[str, Any]) -> None:
        now = time.time()
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        line = {"time": moment, "kind": kind, "who": who, "action": action, **details}
        shown = {name: _short(value) for name, value in line.items() if value is not None}
        record = logging.LogRecord(__name__, logging.INFO, "", 0, json.dumps(shown), None, None)
        self._queue.handle(record)


def _short(value: Any) -> Any:
    return value[:_LONGEST] if isinstance(value, str) else value


class _PrivateFile(RotatingFileHandler):
    """A rotated file for its owner alone. A full disk costs lines and no request."""

    _has_failed = False

    def _open(self) -> Any:
        return open(self.baseFilename, "a", encoding=self.encoding, opener=_open_privately)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._has_failed:
            log.exception("the audit log cannot be written; lines are lost")
        self._has_failed = True


def _open_privately(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
