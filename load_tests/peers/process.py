"""A peer in a process group of its own, which runs only while it is measured: an idle engine may spin."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

STOP_S = 30
SHOWN = 12  # lines of a log, in an error


class PeerFailed(Exception):
    """It could not be set up, did not start, or answered wrongly."""


class Group:
    """The processes of one command. What they print goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, *, talks: bool = False):
        self._log = log
        pipe = subprocess.PIPE if talks else None
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or out,
                stderr=out,
                text=True,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def wait_for(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Raises `PeerFailed` when the process ends first, or the time does."""
        until = time.monotonic() + timeout_s
        while not ready():
            if self.process.poll() is not None or time.monotonic() > until:
                raise PeerFailed(f"it did not start: {self.said()}")
            time.sleep(0.2)

    def said(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-SHOWN:])

    def stop(self) -> None:
        if self.process.poll() is None:
            self.resume()
            self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
