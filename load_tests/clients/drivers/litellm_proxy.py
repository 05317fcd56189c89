"""LiteLLM's proxy in front of the server, asked by OpenAI's client."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai_client
from driver import KEY, MODEL, URL

READY_S = 300
MASTER_KEY = f"sk-{secrets.token_hex(32)}"


@contextmanager
def proxy(folder: Path) -> Iterator[str]:
    """Yield the URL of a proxy for `MODEL`, which ends with the context."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    route = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY}
    config = folder / "config.yaml"
    config.write_text(json.dumps({"model_list": [{"model_name": "through-the-proxy", "litellm_params": route}]}))
    command = [str(Path(sys.executable).with_name("litellm")), "--config", str(config), "--host", "127.0.0.1"]
    env = {**os.environ, "LITELLM_MASTER_KEY": MASTER_KEY}  # without which the proxy refuses to start
    process = subprocess.Popen([*command, "--port", str(port)], stdout=sys.stderr, env=env)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/health/liveliness", trust_env=False).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"the proxy is not ready (status {process.poll()})")


with tempfile.TemporaryDirectory() as temporary, proxy(Path(temporary)) as its_url:
    openai_client.report_all(its_url, "through-the-proxy", MASTER_KEY)
