"""How long a large upload takes, from the first byte sent to the response.

    python -m load_tests.upload_time [--megabytes 500] [--uploads 3] [--threads 1] [--other FOLDER]

A server over a small random model receives an adapter of random weights in float32, as PEFT writes them, several times
under new names; each time one tensor differs, so that each upload is another version. The parts are those that a
client sees: `send` until the last byte has been sent, `check` from then until the response. CPU seconds are those of
the API process and of the engine process during the whole upload. With `--other`, a server of another checkout
receives the same uploads in turn, so that both meet the same noise. All files are deleted at the end.
"""

import argparse
import http.client
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil
import torch
from safetensors.torch import save
from torch import Tensor

from tests.fixtures.tiny_server import RunningServer, running_server, write_tiny_model

_HIDDEN, _INTERMEDIATE = 512, 1024
_RANK = 256
_ITEM_BYTES = 4
_CHUNK_BYTES = 1 << 20
_BOUNDARY = "load-test-boundary"
_ATTENTION = {name: (_HIDDEN, _HIDDEN) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
_MLP = {
    "gate_proj": (_HIDDEN, _INTERMEDIATE),
    "up_proj": (_HIDDEN, _INTERMEDIATE),
    "down_proj": (_INTERMEDIATE, _HIDDEN),
}
_LAYER_BYTES = sum(map(sum, (*_ATTENTION.values(), *_MLP.values()))) * _RANK * _ITEM_BYTES


class Times(NamedTuple):
    """Seconds of one upload: two parts of elapsed time, and the CPU time of the two processes."""

    send: float
    check: float
    api_cpu: float
    engine_cpu: float

    def __str__(self) -> str:
        return (
            f"{self.send + self.check:6.2f} s = send {self.send:.2f} + check {self.check:.2f}; "
            f"CPU: API {self.api_cpu:.2f} s, engine {self.engine_cpu:.2f} s"
        )


class Adapter:
    """An adapter of random weights for every linear of `layers` decoder layers."""

    def __init__(self, layers: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tensors: dict[str, Tensor] = {}
        for layer in range(layers):
            for room, linears in (("self_attn", _ATTENTION), ("mlp", _MLP)):
                for name, (inputs, outputs) in linears.items():
                    prefix = f"base_model.model.model.layers.{layer}.{room}.{name}"
                    a = torch.empty(_RANK, inputs).uniform_(-0.04, 0.04, generator=generator)
                    b = torch.empty(outputs, _RANK).uniform_(-0.01, 0.01, generator=generator)
                    self._tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}

    def files(self, version: int) -> dict[str, bytes]:
        """Return the two files of a version."""
        next(iter(self._tensors.values())).fill_(0.01 * (version + 1))
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": _RANK,
            "lora_alpha": _RANK,
            "target_modules": [*_ATTENTION, *_MLP],
        }
        return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(self._tensors)}


def _parts(name: str, files: dict[str, bytes]) -> list[bytes]:
    """Return the body of an upload in pieces, so that no second copy of the files is made."""
    parts = [f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="name"\r\n\r\n{name}\r\n'.encode()]
    for file, data in files.items():
        disposition = f'content-disposition: form-data; name="{file}"; filename="{file}"'
        parts += [f"--{_BOUNDARY}\r\n{disposition}\r\n\r\n".encode(), data, b"\r\n"]
    return [*parts, f"--{_BOUNDARY}--\r\n".encode()]


def _chunks(parts: list[bytes]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _CHUNK_BYTES):
            yield view[start : start + _CHUNK_BYTES]


def _upload(server: RunningServer, name: str, files: dict[str, bytes]) -> Times:
    parts = _parts(name, files)
    processes = [psutil.Process(server.process.pid), psutil.Process(server.engine_pid())]
    before = [_cpu_seconds(process) for process in processes]
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    started = time.perf_counter()
    connection.putrequest("POST", "/v1/adapters")
    connection.putheader("content-type", f"multipart/form-data; boundary={_BOUNDARY}")
    connection.putheader("content-length", str(sum(map(len, parts))))
    connection.endheaders()
    for chunk in _chunks(parts):
        connection.send(chunk)
    sent = time.perf_counter()
    response = connection.getresponse()
    body = json.loads(response.read())
    ended = time.perf_counter()
    connection.close()
    if response.status != http.client.CREATED:
        raise RuntimeError(f"the upload was answered with {response.status}: {body}")
    api, engine = (_cpu_seconds(process) - was for process, was in zip(processes, before, strict=True))
    return Times(sent - started, ended - sent, api, engine)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(folder: Path, checkouts: list[Path], megabytes: int, uploads: int, threads: int) -> list[list[Times]]:
    """Start a server of each checkout, upload `uploads` versions to each in turn, and print and return the times. The
    first upload warms up and is not counted."""
    layers = max(1, round(megabytes * 1e6 / _LAYER_BYTES))
    sizes = {"hidden_size": _HIDDEN, "intermediate_size": _INTERMEDIATE, "num_hidden_layers": layers}
    model = write_tiny_model(folder / "model", **sizes, num_key_value_heads=4, initializer_range=0.02)
    flags = ["--model", str(model), "--dtype", "bfloat16", "--threads", str(threads), "--kv-cache-bytes", "200000000"]
    flags += ["--max-adapter-rank", str(_RANK), "--adapter-slots", "2", "--served-model-name", "tiny-base"]
    adapter, found = Adapter(layers), [list[Times]() for _ in checkouts]
    with ExitStack() as running:
        servers = [
            running.enter_context(running_server(folder / str(index), *flags, within=("env", "-C", str(checkout))))
            for index, checkout in enumerate(checkouts)
        ]
        for turn in range(uploads + 1):
            files = adapter.files(turn)
            for checkout, server, times in zip(checkouts, servers, found, strict=True):
                times.append(_upload_and_delete(server, f"upload-{turn}", files))
                size = sum(map(len, files.values())) / 1e6
                print(f"{checkout.name}, {size:.0f} MB, upload {turn or 'to warm up'}: {times[-1]}", flush=True)
    return [times[1:] for times in found]


def _upload_and_delete(server: RunningServer, name: str, files: dict[str, bytes]) -> Times:
    times = _upload(server, name, files)
    with server.client() as client:
        client.delete(f"/v1/adapters/{name}").raise_for_status()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load_tests.upload_time")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--uploads", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of the engine")
    parser.add_argument("--other", type=Path, help="folder of another checkout, to be compared")
    options = parser.parse_args()
    checkouts = [checkout.absolute() for checkout in (options.other, Path()) if checkout]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), checkouts, options.megabytes, options.uploads, options.threads)
    for checkout, times in zip(checkouts, found, strict=True):
        for what, choose in (("median", statistics.median), ("fastest", min)):
            print(
                f"{checkout.name}, {what} of each part: {Times(*(choose(part) for part in zip(*times, strict=True)))}"
            )


if __name__ == "__main__":
    main()
