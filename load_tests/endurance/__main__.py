"""`python -m load_tests.endurance soak|chaos --minutes 30`: random operations on 64 adapters, each response judged.

A soak has no faults but clients that leave, uploads that are cut and adapters that must be refused. Chaos adds one
fault every few hundred operations: kills, stops, full and slow disks, clock jumps, resets, outages of a source, and
lives of the server with armed fault points. The run ends at the first wrong token, lost upload or unexplained error.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from transformers import AutoModelForCausalLM

from load_tests.endurance.clients import EnduringClient, hub_files
from load_tests.endurance.faults import HANG_SECONDS, Faults
from load_tests.endurance.lives import Lives, small_disk
from load_tests.endurance.report import report, write
from load_tests.endurance.samples import Sampler
from load_tests.invariants import Invariants
from load_tests.operations import run_round
from load_tests.right_answers import Answers, Name
from load_tests.world import Mismatch, World
from tests.fixtures import remote_servers
from tests.fixtures.adapter_factory import write_adapter
from tests.fixtures.tiny_server import BASE, write_tiny_model

ADAPTERS, VERSIONS, CLIENTS = 64, 24, 8
ROUND = {"soak": 500, "chaos": 200}  # operations between two looks at the invariants; of chaos, one fault in each
CASES = {"soak": "T70", "chaos": "T71"}
DISK_BYTES = 1200 << 20  # packed copies leave 1 GiB free
FLAGS = (
    *("--served-model-name", BASE, "--dtype", "float32", "--threads", "1", "--max-num-seqs", "12"),
    *("--kv-cache-bytes", str(512 << 10), "--adapter-slots", "4", "--adapter-host-bytes", str(2 << 20)),
    *("--hang-seconds", str(HANG_SECONDS), "--allow-source", "hf://org"),
)


@contextmanager
def world_of(folder: Path, seed: int, disk: Path | None) -> Iterator[tuple[World, Lives, Faults, str]]:
    """A server, the model of its right answers, and what can happen to it."""
    model = write_tiny_model(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(model)
    adapters = [
        write_adapter(base, folder / f"adapter-{i}", seed=i, r=2 + i, scale=0.3, target_modules="all-linear")
        for i in range(VERSIONS)
    ]
    broken = write_adapter(base, folder / "broken", seed=0, scale=float("inf"))
    (folder / "temporary").mkdir()
    with ExitStack() as stack:
        answers = Answers(model, folder / "answers", adapters)
        stack.callback(answers.close)
        remote = stack.enter_context(remote_servers.hub())
        remote.files = hub_files(adapters[0])
        environment = {"TMPDIR": str(folder / "temporary"), "HF_ENDPOINT": remote.url, "HF_HUB_OFFLINE": "0"}
        lives = Lives((disk or folder) / "data", folder, ("--model", str(model), *FLAGS), environment)
        stack.callback(lives.end)
        world = World(lives.server, answers, [Name(f"adapter-{i}") for i in range(ADAPTERS)], broken)
        registered = next(digest for digest, path in answers.folders.items() if path == adapters[0])
        yield world, lives, Faults(world, lives, remote, disk, random.Random(seed)), registered


def run(kind: str, minutes: float, seed: int, folder: Path, busy: str) -> None:
    with ExitStack() as stack:
        has_disk = kind == "chaos" and stack.enter_context(small_disk(folder / "disk", DISK_BYTES))
        disk = folder / "disk" if has_disk else None
        world, lives, faults, registered = stack.enter_context(world_of(folder, seed, disk))
        used = faults if kind == "chaos" else None
        clients = [EnduringClient(world, f"{seed}-{i}", registered, used) for i in range(CLIENTS)]
        invariants = Invariants(world, (disk or folder) / "data", folder / "temporary")
        sampler = Sampler(world, lives)
        began = time.monotonic()
        try:
            _go_on(kind, world, clients, invariants, began + 60 * minutes)
        except Mismatch as mismatch:
            sys.stderr.write("\n".join(world.log) + "\n" + (folder / "server.log").read_text()[-20_000:])
            raise SystemExit(f"seed {seed}, after {world.counts.total()} operations: {mismatch}") from mismatch
        finally:
            sampler.close()
            for client in clients:
                client.close()
            invariants.close()
        found = report(kind, world, sampler.samples, used, time.monotonic() - began)
    write(found, CASES[kind], busy)
    print({name: value for name, value in found.items() if name != "samples"})


def _go_on(kind: str, world: World, clients: list[EnduringClient], invariants: Invariants, until: float) -> None:
    size, first = ROUND[kind], 0
    while time.monotonic() < until:
        run_round(clients, range(first, first + size), size if kind == "chaos" else sys.maxsize)
        world.windows = [window for window in world.windows if window.until == float("inf")]
        invariants.check()
        first += size
        print(f"{first} operations, {sum(world.counts.values())} done", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=CASES)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--busy", action="store_true", help="note in the result that the machine had other work")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="endurance-") as folder:
        run(options.kind, options.minutes, options.seed, Path(folder), " on a busy machine" if options.busy else "")


if __name__ == "__main__":
    main()
