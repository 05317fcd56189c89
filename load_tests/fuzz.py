"""Minutes of fuzzing, from the files of `tests/corpora`: `make fuzz`, or

    python -m load_tests.fuzz [--minutes 10] [--seed N] [--record] [TARGET …]

Each target gets its share of the time: headers, configs and tokenizers in a process of their own with a bound on its
memory, and raw bytes of HTTP against a server that listens. With atheris installed (`pip install atheris`), the first
three are guided by coverage; otherwise inputs are mutated at random. An input that fails is written beside the others
of its corpus, where `tests/test_fuzz.py` finds it from then on.
"""

import argparse
import hashlib
import importlib.util
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from docs.reliability import record
from tests.fixtures.api_server import listening
from tests.fixtures.fuzzing import CORPORA, SECONDS, TARGETS, mutated, seeds
from tests.fixtures.raw_http import exchange, is_answered
from tests.fixtures.reliability import machine

HTTP = "http"
MEMORY_BYTES = 8 << 30  # of address space, of which torch takes the most
CASES = {"safetensors": "T9", HTTP: "T28"}
GUIDED = importlib.util.find_spec("atheris") is not None


class Found(Exception):
    """An input that a target does not take as it must."""


def keep(target: str, data: bytes) -> Path:
    path = CORPORA / target / f"found-{hashlib.sha256(data).hexdigest()[:16]}"
    path.write_bytes(data)
    return path


def tried(target: str, data: bytes) -> None:
    """Raises `Found` when the target raises, or takes too long."""
    began = time.thread_time()
    try:
        TARGETS[target](data)
    except BaseException as error:
        raise Found(f"{keep(target, data)}: {error!r}") from error
    if time.thread_time() - began > SECONDS:
        raise Found(f"{keep(target, data)} took {time.thread_time() - began:.2f} s")


def at_random(target: str, seconds: float, seed: int) -> int:
    rng, known, count = random.Random(seed), seeds(target), 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        tried(target, mutated(rng, known))
        count += 1
    return count


def guided(target: str, seconds: float, seed: int) -> None:
    """Let atheris run the target; it ends this process."""
    import atheris

    with tempfile.TemporaryDirectory() as grown:
        options = [f"-max_total_time={int(seconds)}", f"-seed={seed}", "-max_len=65536", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, grown, str(CORPORA / target)], lambda data: tried(target, data))
        atheris.Fuzz()


def _in_process(
    target: str, seconds: float, seed: int, count: "multiprocessing.sharedctypes.Synchronized[int]"
) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if GUIDED:
        guided(target, seconds, seed)
    count.value = at_random(target, seconds, seed)


def apart(target: str, seconds: float, seed: int) -> int:
    """Try a target in a process of its own. Raises `SystemExit` if that finds something or dies."""
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)
    process = context.Process(target=_in_process, args=(target, seconds, seed, count))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{target}: the process ended with status {process.exitcode}; see above")
    return int(count.value)


def over_http(target: str, seconds: float, seed: int) -> int:
    rng, known, count = random.Random(seed), seeds(target), 0
    with tempfile.TemporaryDirectory() as folder, listening(Path(folder), max_upload_bytes=1 << 20) as server:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            request = mutated(rng, known)
            if not is_answered(exchange(server.url, request, patience=0.02)):
                raise SystemExit(f"{keep(target, request)} is answered by a server error")
            count += 1
        server.wait_idle()
        if list((server.context.config.data_dir / "data" / "store" / ".staging").iterdir()):
            raise SystemExit("staged folders are left over")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join((*TARGETS, HTTP))} (default: all)")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=time.time_ns() % (1 << 31))
    parser.add_argument("--record", action="store_true", help="write the result to docs/reliability_results.json")
    options = parser.parse_args()
    targets = options.targets or [*TARGETS, HTTP]
    seconds = 60 * options.minutes / len(targets)
    figures: dict[str, list[str]] = {}
    for target in targets:
        count = (over_http if target == HTTP else apart)(target, seconds, options.seed)
        told = f"{target}: {count:,} inputs in {seconds:.0f} s" if count else f"{target}: {seconds:.0f} s with atheris"
        print(f"{told}, seed {options.seed}: none failed", flush=True)
        figures.setdefault(CASES.get(target, "T9"), []).append(told)
    for case, lines in figures.items() if options.record else ():
        result = {"command": "make fuzz", "file": "load_tests/fuzz.py", "figures": ["; ".join(lines)]}
        record(case, "run", {**result, "date": time.strftime("%Y-%m-%d"), "machine": machine()})


if __name__ == "__main__":
    main()
