"""One server over several lives: killed and started again on the same port and data folder."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import psutil

from adapters.fault_points import VARIABLE
from tests.fixtures.timing import HANG_SECONDS, wait_for
from tests.fixtures.tiny_server import RunningServer, start_server, wait_until_ready

_CLOCK_SHIFT = Path(__file__).parent / "clock_shift.c"


class Lives:
    """`server` is always the same object, whose process changes with each life."""

    def __init__(self, data_dir: Path, folder: Path, flags: tuple[str, ...], environment: dict[str, str]):
        self._data_dir, self._flags = data_dir, flags
        self._environment = environment | _with_clock(folder)
        self._clock = folder / "clock"
        self._log: IO[str] = (folder / "server.log").open("w")
        self._port = _free_port()
        self.spec = ""  # of the fault points of this life
        self.number = 0
        self.server = self._start()

    def _start(self) -> RunningServer:
        environment = self._environment | {VARIABLE: self.spec}
        flags = ("--port", str(self._port), *self._flags)
        process = start_server(self._data_dir, *flags, environment=environment, log=self._log)
        self.number += 1
        return RunningServer(*wait_until_ready(process))

    def kill(self) -> None:
        """End both processes as a power cut would."""
        engine = self.server.engine_pid()
        for process in (self.server.process.pid, engine):
            os.kill(process, 9)
        self.server.process.wait()
        wait_for(lambda: not psutil.pid_exists(engine), "the end of the engine")

    def start_again(self, spec: str = "") -> float:
        """Start the next life, with these faults; returns how long that takes."""
        began = time.monotonic()
        if self.server.process.stdout is not None:
            self.server.process.stdout.close()
        self.spec = spec
        self.server.process = self._start().process
        return time.monotonic() - began

    def shift_clock(self, seconds: int) -> None:
        with self._clock.open("r+b") as file:
            file.write(seconds.to_bytes(8, "little", signed=True))

    def end(self) -> None:
        self.server.process.terminate()
        try:
            self.server.process.wait(HANG_SECONDS)
        finally:
            self.server.process.kill()
            self._log.close()
            if self.server.process.stdout is not None:
                self.server.process.stdout.close()

    def is_ready(self, client: httpx.Client) -> bool:
        try:
            return client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False


def _with_clock(folder: Path) -> dict[str, str]:
    """Compile the library that shifts the clock; the environment that loads it."""
    library, clock = folder / "clock_shift.so", folder / "clock"
    command = ["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(_CLOCK_SHIFT), "-ldl"]
    subprocess.run(command, check=True)
    clock.write_bytes(bytes(8))
    return {"LD_PRELOAD": str(library), "CLOCK_SHIFT_FILE": str(clock)}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[bool]:
    """A file system of that size in `folder`; False where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
