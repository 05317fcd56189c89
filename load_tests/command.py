"""`python -m load_tests.MODULE KIND`: a command line of several measurements, with a flag for every setting."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec


class Kind(NamedTuple):
    """`run` takes a `setting` (of whole numbers) and tells whether the target was met."""

    run: Callable[[Any], bool]
    setting: type[msgspec.Struct]
    help: str


def run_kind(prog: str, kinds: Mapping[str, Kind]) -> None:
    """Run the kind that the command line names. Raises `SystemExit(1)` when its target was missed."""
    parser = argparse.ArgumentParser(prog=prog)
    subparsers = parser.add_subparsers(required=True)
    for name, kind in kinds.items():
        own = subparsers.add_parser(name, help=kind.help)
        own.set_defaults(kind=kind)
        for field in msgspec.structs.fields(kind.setting):
            own.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    options = vars(parser.parse_args())
    chosen: Kind = options.pop("kind")
    if not chosen.run(chosen.setting(**options)):
        raise SystemExit(1)
