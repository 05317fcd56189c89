"""What the API's process costs, and how soon the server and the command line respond.

    python -m load_tests.control_plane [--rounds 3] [--out FILE]

Each round starts `loraplex serve --demo` on a data folder of its own and measures, in seconds from the start of the
command: the first response of /livez, readiness, and the end of the first completion of one token; then the resident
memory of the API's process, `loraplex adapters ls`, and starts that must be refused. The embedded model must have been
prepared before.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from load_tests.peers.setting import machine
from server.model.loading.default_model import DEFAULT_MODEL, prepare_default_model

LORAPLEX = [sys.executable, "-m", "server"]
POLL_SECONDS = 0.02
START_SECONDS = 120.0


def start_times(url: str) -> dict[str, float]:
    """Return when the server that has just been started was alive, ready, and done with its first completion."""
    started = time.perf_counter()
    body = {"model": DEFAULT_MODEL, "prompt": "The capital of France is", "max_tokens": 1}
    with httpx.Client(base_url=url, timeout=START_SECONDS) as client:
        times = {"livez": _when(client, "/livez", started), "ready": _when(client, "/readyz", started)}
        client.post("/v1/completions", json=body).raise_for_status()
        return {**times, "first_completion": time.perf_counter() - started}


def _when(client: httpx.Client, path: str, started: float) -> float:
    while (now := time.perf_counter()) - started < START_SECONDS:
        try:
            if client.get(path).is_success:
                return time.perf_counter() - started
        except httpx.TransportError:  # nothing listens yet
            pass
        time.sleep(max(0.0, POLL_SECONDS - (time.perf_counter() - now)))
    raise TimeoutError(f"{path} did not succeed within {START_SECONDS:g} s")


def seconds_of(*arguments: str, status: int, **environment: str) -> float:
    """Run a command of `loraplex` that must end with `status`."""
    started = time.perf_counter()
    done = subprocess.run([*LORAPLEX, *arguments], capture_output=True, text=True, env={**os.environ, **environment})
    seconds = time.perf_counter() - started
    assert done.returncode == status, done.stdout + done.stderr
    return seconds


def one_round(folder: Path, port: int) -> dict[str, float]:
    data, url = str(folder / "data"), f"http://127.0.0.1:{port}"
    flags = ["serve", "--demo", "--port", str(port), "--data-dir", data]
    server = subprocess.Popen([*LORAPLEX, *flags], stdout=subprocess.DEVNULL)
    try:
        times = start_times(url)
        times["resident_mib"] = psutil.Process(server.pid).memory_info().rss / (1 << 20)
        times["adapters_ls"] = seconds_of("adapters", "ls", status=0, LORAPLEX_URL=url)
        times["second_server"] = seconds_of(*flags, status=2)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    (folder / "empty").mkdir()
    other = ["serve", "--port", "0", "--data-dir", str(folder / "other")]
    times["bad_flag"] = seconds_of("serve", "--port", "x", status=2)
    times["bad_adapter"] = seconds_of(*other, "--adapter", f"a={folder / 'empty'}", status=2)
    return times


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(measured[name] for measured in rounds), 2) for name in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=18500)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    prepare_default_model()
    rounds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(one_round(Path(folder), options.port))
        print(json.dumps({name: round(value, 2) for name, value in rounds[-1].items()}), flush=True)
    print("median", json.dumps(medians(rounds)))
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "rounds": rounds}, indent=2))


if __name__ == "__main__":
    main()
