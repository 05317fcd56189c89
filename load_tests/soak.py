"""Long runs against what must never happen: `python -m load_tests.soak beacons` and `… operations`."""

import argparse
import tempfile
from pathlib import Path

from load_tests import beacons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    kinds = parser.add_subparsers(required=True)
    emit = kinds.add_parser("beacons", help="adapters that emit one token each, over few device slots")
    emit.add_argument("--beacons", type=int, default=200)
    emit.add_argument("--tokens", type=int, default=20_000)
    emit.set_defaults(run=run_beacons)
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


if __name__ == "__main__":
    main()
