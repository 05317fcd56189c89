"""`loraplex serve` on a free loopback port, for as long as it is needed."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STOP_S = 60


@contextmanager
def serving(data_dir: Path, *flags: str, checkout: Path | None = None) -> Iterator[str]:
    """The URL of a server that is ready, of another checkout if one is given; it is ended at exit. Raises
    `RuntimeError` when it does not start."""
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--data-dir", str(data_dir), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=checkout)
    try:
        yield _url_when_ready(process)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            assert process.stdout is not None
            process.stdout.close()


def _url_when_ready(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if "ready at" in line:
            return line.split("ready at ")[1].split()[0]
    raise RuntimeError(f"the server ended with status {process.wait()} and was never ready")
