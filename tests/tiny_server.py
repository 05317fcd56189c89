"""A whole server, as its user starts it, over a tiny model: for tests of what only processes show."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.adapter_factory import tiny_llama
from tests.api_server import fast_byte_tokenizer
from tests.timing import HANG_SECONDS

BASE = "tiny-base"


def write_tiny_model(folder: Path, **changes: Any) -> Path:
    """A tiny Llama with a tokenizer of one token per byte, so that its answers can be compared as text."""
    tokenizer = fast_byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "max_position_embeddings": 2048}
    model = tiny_llama(**{**sizes, **changes})
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class RunningServer:
    url: str
    process: "subprocess.Popen[str]"
    banner: str  # what it printed when it was ready

    def client(self, **options: Any) -> httpx.Client:
        """It lets go of idle connections well before the server does, or a request might meet the end of one."""
        limits = httpx.Limits(keepalive_expiry=1)
        return httpx.Client(base_url=self.url, timeout=HANG_SECONDS, limits=limits, **options)

    def engine_pid(self) -> int:
        children = psutil.Process(self.process.pid).children()
        engines = [child for child in children if "server.engine.worker" in " ".join(child.cmdline())]
        return int(engines[0].pid)

    def complete(self, client: httpx.Client, model: str, prompt: str, **options: Any) -> dict[str, Any]:
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 16, **options}
        answer = client.post("/v1/completions", json=body)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def upload(self, client: httpx.Client, name: str, folder: Path, **fields: str) -> httpx.Response:
        files = {
            file: (file, (folder / file).read_bytes()) for file in ("adapter_config.json", "adapter_model.safetensors")
        }
        return client.post("/v1/adapters", data={"name": name, **fields}, files=files)


@contextmanager
def running_server(
    data_dir: Path, *flags: str, environment: dict[str, str] | None = None, within: Sequence[str] = ()
) -> Iterator[RunningServer]:
    """`loraplex serve` on a free port, ready to answer; ended at exit. `within` is a command that becomes the one that
    follows it."""
    command = [*within, sys.executable, "-m", "server", "serve", "--port", "0", "--data-dir", str(data_dir), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
    try:
        yield RunningServer(*_wait_until_ready(process))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            if process.stdout is not None:
                process.stdout.close()


def _wait_until_ready(process: "subprocess.Popen[str]") -> tuple[str, "subprocess.Popen[str]", str]:
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Stop the server with Ctrl-C"):
            break
    else:
        raise RuntimeError(f"the server ended with status {process.wait()}")
    banner = "".join(lines)
    return banner.split("ready at ")[1].split()[0], process, banner


def sse_events(lines: Iterator[str]) -> Iterator[dict[str, Any] | None]:
    """Parsed `data:` frames; None for [DONE]."""
    for line in lines:
        if line.startswith("data: "):
            yield None if line == "data: [DONE]" else json.loads(line[6:])
