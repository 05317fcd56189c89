"""How long a probe takes while hostile requests come.

    python -m load_tests.probes_under_attack [--seconds 10] [--record]

A server of its own, on a tiny model with the embedded model's tokenizer, gets one kind of hostile request after the
other from a process of its own, as fast as that can send; meanwhile /livez is asked twenty times a second over
connections of its own. The measure is how long those probes take, beside those of a server that nobody attacks.
"""

import argparse
import json
import multiprocessing
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from docs.reliability import ROOT, record
from server.model.loading.default_model import prepare_default_model
from tests.fixtures.reliability import machine
from tests.fixtures.tiny_server import BASE, running_server, write_tiny_model

RESULT = ROOT / "load_tests" / "results" / "probes-under-attack.json"
FLAGS = ("--served-model-name", BASE, "--dtype", "float32", "--threads", "1", "--kv-cache-bytes", str(64 << 20))
CONTEXT = 8192
COMMAND = "python -m load_tests.probes_under_attack"
# The cases to which a kind of attack belongs, by a word of its name.
CASES = {"T21": ("lists", "numbers", "nesting"), "T22": ("chunks", "headers"), "T24": ("a text",)}
PROBES_PER_SECOND = 20
FORK = multiprocessing.get_context("fork")
HEAD = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def _with_length(path: str, body: bytes) -> bytes:
    return HEAD % path.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


def _prompt(text: str, path: str = "/tokenize") -> bytes:
    return _with_length(path, json.dumps({"model": BASE, "prompt": text}).encode())


def attacks() -> dict[str, bytes]:
    """The bytes of one request of each kind. Texts are as long as the server takes before it encodes them."""
    most = 15 * CONTEXT
    return {
        "4 MB of tiny lists": _with_length("/v1/completions", b'{"prompt":[' + b"[]," * 1_390_000 + b"[]]}"),
        "4 MB of numbers": _with_length("/v1/completions", b'{"prompt":[' + b"1," * 2_090_000 + b"1]}"),
        "as many numbers as are parsed": _with_length("/v1/completions", b'{"prompt":[' + b"1," * 190_000 + b"1]}"),
        "100,000 chunks of one byte": HEAD % b"/v1/completions"
        + b"transfer-encoding: chunked\r\n\r\n"
        + b"1\r\n \r\n" * 100_000
        + b"0\r\n\r\n",
        "nesting 100,000 deep": _with_length("/v1/completions", b'{"prompt":' + b"[" * 100_000),
        "a text of one letter": _prompt("a" * most),
        "a text of words": _prompt(("the quick brown fox jumps over " * most)[:most]),
        "a text of emoji": _prompt("👩‍👩‍👧‍👦" * (most // 7)),
        "a text of combining marks": _prompt("a" + "\u0301" * (most - 1)),
        "headers that are refused": b"GET /livez HTTP/1.1\r\n" + b"a: b\r\n" * 5000 + b"\r\n",
    }


def attack(host: str, port: int, request: bytes, until: float) -> None:
    while time.monotonic() < until:
        with suppress(OSError), socket.create_connection((host, port), timeout=30) as client:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass


def probe(host: str, port: int, until: float) -> list[float]:
    """Ask on schedule; a probe that is late delays the next one alone."""
    waits, due = [], time.monotonic()
    while due < until:
        time.sleep(max(0.0, due - time.monotonic()))
        began = time.monotonic()
        with socket.create_connection((host, port), timeout=30) as client:
            client.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            while client.recv(65536):
                pass
        waits.append(time.monotonic() - began)
        due = max(due + 1 / PROBES_PER_SECOND, time.monotonic())
    return waits


def measured(url: str, request: bytes | None, seconds: float) -> dict[str, float]:
    host, port = url.removeprefix("http://").split(":")
    until = time.monotonic() + seconds
    attacker = FORK.Process(target=attack, args=(host, int(port), request, until))
    if request:
        attacker.start()
    waits = probe(host, int(port), until)
    if request:
        attacker.join()
    p50, p99 = np.percentile(waits, [50, 99])
    return {name: round(1000 * float(value), 1) for name, value in (("p50", p50), ("p99", p99), ("max", max(waits)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--record", action="store_true", help="write the result to docs/reliability_results.json")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(prepare_default_model())
        model = write_tiny_model(Path(folder) / "model", vocab_size=len(tokenizer), max_position_embeddings=CONTEXT)
        tokenizer.save_pretrained(model)
        with running_server(Path(folder) / "data", "--model", str(model), *FLAGS) as server:
            for name, request in {"nothing": None, **attacks()}.items():
                found[name] = measured(server.url, request, options.seconds)
                print(f"{name:32} {json.dumps(found[name])}", flush=True)
    if options.record:
        write(found)


def write(found: dict[str, dict[str, float]]) -> None:
    date, here = time.strftime("%Y-%m-%d"), machine()
    RESULT.write_text(json.dumps({"date": date, "machine": here, "milliseconds": found}, indent=1) + "\n")
    for case, words in CASES.items():
        kinds = {name: times["p99"] for name, times in found.items() if any(word in name for word in words)}
        told = ", ".join(f"{name} {p99:g}" for name, p99 in kinds.items())
        figures = [f"p99 of probes in ms, on a machine with other work: {told}, unattacked {found['nothing']['p99']:g}"]
        result = {"command": COMMAND, "file": str(RESULT.relative_to(ROOT)), "figures": figures}
        record(case, "run", {**result, "date": date, "machine": here})


if __name__ == "__main__":
    main()
