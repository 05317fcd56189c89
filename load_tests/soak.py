"""Long runs against what must never happen: `python -m load_tests.soak beacons` and `… operations`."""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from transformers import AutoModelForCausalLM

from load_tests import beacons
from load_tests.invariants import Invariants
from load_tests.operations import Client, run_round
from load_tests.right_answers import Answers, Name
from load_tests.world import SLOTS, Mismatch, World
from tests.fixtures.adapter_factory import write_adapter
from tests.fixtures.tiny_server import BASE, running_server, write_tiny_model

CHECK_EVERY = 100  # operations
VERSIONS = 10
NAMES = 8
# Little of everything, so that sequences are preempted and adapters evicted from both tiers.
FLAGS = (
    *("--served-model-name", BASE, "--dtype", "float32", "--threads", "1", "--max-num-seqs", "12"),
    *("--kv-cache-bytes", str(512 << 10), "--adapter-slots", str(SLOTS), "--adapter-host-bytes", str(300_000)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    kinds = parser.add_subparsers(required=True)
    emit = kinds.add_parser("beacons", help="adapters that emit one token each, over few device slots")
    emit.add_argument("--beacons", type=int, default=200)
    emit.add_argument("--tokens", type=int, default=20_000)
    emit.set_defaults(run=run_beacons)
    operate = kinds.add_parser("operations", help="random operations against a model of the right answers")
    operate.add_argument("--count", type=int, default=10_000)
    operate.add_argument("--clients", type=int, default=16)
    operate.add_argument("--crash-every", type=int, default=500, help="operations between two kills of the engine")
    operate.set_defaults(run=run_operations)
    for kind in kinds.choices.values():
        kind.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        options.run(options, Path(folder))


def run_beacons(options: argparse.Namespace, folder: Path) -> None:
    count = beacons.run(folder, beacons=options.beacons, tokens=options.tokens, seed=options.seed)
    print(f"{count.tokens} tokens of {options.beacons} beacons, {count.reassignments} slot reassignments, "
          f"{count.wrong} wrong tokens")  # fmt: skip
    if count.wrong:
        raise SystemExit(1)


def run_operations(options: argparse.Namespace, folder: Path) -> None:
    try:
        counts = operations(
            folder, count=options.count, clients=options.clients, seed=options.seed, crash_every=options.crash_every
        )
    except Mismatch as mismatch:
        raise SystemExit(str(mismatch)) from mismatch
    print(f"{options.count} operations of {options.clients} clients, seed {options.seed}: no difference")
    for outcome, number in sorted(counts.items()):
        print(f"  {outcome:24} {number}")


def operations(folder: Path, *, count: int, clients: int, seed: int, crash_every: int) -> Counter[str]:
    """Do them against a server of its own; returns how often each came to which status.

    Raises `Mismatch`, with the seed and the last operations, at the first answer or invariant that is not right.
    """
    model = write_tiny_model(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(model)
    adapters = [
        write_adapter(base, folder / f"adapter-{i}", seed=i, r=2 + 3 * i, scale=0.3, target_modules="all-linear")
        for i in range(VERSIONS)
    ]
    broken = write_adapter(base, folder / "broken", seed=0, scale=float("inf"))
    temporary = folder / "temporary"
    temporary.mkdir()
    answers = Answers(model, folder / "answers", adapters)
    flags = ("--model", str(model), *FLAGS)
    with running_server(folder / "data", *flags, environment={"TMPDIR": str(temporary)}) as server:
        world = World(server, answers, [Name(f"adapter-{i}") for i in range(NAMES)], broken)
        workers = [Client(world, f"{seed}-{i}") for i in range(clients)]
        invariants = Invariants(world, folder / "data", temporary)
        try:
            for first in range(0, count, CHECK_EVERY):
                run_round(workers, range(first, min(first + CHECK_EVERY, count)), crash_every)
                invariants.check()
                print(f"{first + CHECK_EVERY} operations", file=sys.stderr)
        except Mismatch as mismatch:
            log = "\n".join(world.log)
            raise Mismatch(f"{log}\nseed {seed}, within {first + CHECK_EVERY} operations: {mismatch}") from mismatch
        finally:
            for worker in workers:
                worker.close()
            invariants.close()
            answers.close()
    return world.counts


if __name__ == "__main__":
    main()
