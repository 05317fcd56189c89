"""Fault points: places where a test ends the process, raises an error or waits. A server where `LORAPLEX_FAULT` is not
set never arms one, and passing a point then costs one look at an empty tuple.

`LORAPLEX_FAULT=point[:when][=action]`, several separated by commas. `when` is the number of the passage at which the
fault happens, once (1 by default), `*` for every passage, or a share of them at random, as in `2%`. `action` is `kill`
(the default: the process ends at once, as by kill -9), `error`, `full` (the disk is full), `io` (the disk fails) or
`sleep-SECONDS`. Passages are counted in each process.
"""

import errno
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

VARIABLE = "LORAPLEX_FAULT"
POINTS = {
    "upload.received": "all files of an upload are in their staged folder",
    "store.flushed": "the weights of a staged folder were written to disk",
    "store.synced": "a staged folder is durable and not in its place",
    "store.renamed": "a folder was renamed to its place",
    "store.healing": "a damaged file was replaced by an upload's, and others were not",
    "store.deleting": "a folder was renamed out of its place to be deleted",
    "registry.writing": "a change of the database is in its transaction",
    "registry.committed": "a change is in the database and not in the journal",
    "publish.published": "a publication is durable and not acknowledged",
    "packed.written": "a packed copy was written and not renamed to its place",
    "packed.renamed": "a packed copy is in its place",
    "engine.load": "an adapter is about to be read for the device",
    "engine.step": "a step is about to be computed",
    "engine.start": "an engine process is about to load the model",
    "engine.message": "an engine process took messages of the API process",
    "ipc.to_engine": "the API process is about to send a message to the engine",
    "ipc.to_api": "the engine is about to send a message to the API process",
}
KILLED = 137  # the exit status of a process that was killed, as a shell reports it

_SPEC = re.compile(r"(?P<point>[a-z_.]+)(?::(?P<when>[1-9]\d*|\*|\d+(?:\.\d+)?%))?(?:=(?P<action>[\w.-]+))?")


@dataclass(slots=True)
class _Fault:
    point: str
    when: str
    act: Callable[[], None]
    _passages: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # atomic: threads share it

    def is_due(self) -> bool:
        if self.when.endswith("%"):
            return random.random() < float(self.when[:-1]) / 100
        return self.when == "*" or next(self._passages) == int(self.when)


_armed: tuple[_Fault, ...] = ()


def fault_point(name: str) -> None:
    """Let the armed faults of this point happen; without any, do nothing."""
    for fault in _armed:
        if fault.point == name and fault.is_due():
            fault.act()


def arm(spec: str) -> None:
    """Arm the faults of `spec`, in place of those armed before. Raises `ValueError` that names what is wrong."""
    global _armed
    _armed = tuple(_parse(part.strip()) for part in spec.split(",")) if spec else ()


def arm_from_environment() -> str:
    """Arm the faults of the environment and return what it has. Raises `ValueError`."""
    spec = os.environ.get(VARIABLE, "")
    arm(spec)
    return spec


def _parse(text: str) -> _Fault:
    found = _SPEC.fullmatch(text)
    if found is None or found["point"] not in POINTS:
        raise ValueError(f"{VARIABLE}: {text!r} is not point[:when][=action]; the points are {', '.join(POINTS)}")
    return _Fault(found["point"], found["when"] or "1", _action(found["action"] or "kill"))


def _action(name: str) -> Callable[[], None]:
    word, _, seconds = name.partition("-")
    if word == "sleep" and re.fullmatch(r"\d+(\.\d+)?", seconds):
        return lambda: time.sleep(float(seconds))
    if name not in _ACTIONS:
        raise ValueError(f"{VARIABLE}: the action {name!r} is not one of {', '.join(_ACTIONS)}, sleep-SECONDS")
    return _ACTIONS[name]


def _raise(error: Exception) -> None:
    raise error


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os._exit(KILLED),
    "error": lambda: _raise(RuntimeError(f"a fault that {VARIABLE} asked for")),
    "full": lambda: _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "io": lambda: _raise(OSError(errno.EIO, os.strerror(errno.EIO))),
}
