"""`python -m load_tests.residency traffic` and `… gaps`."""

import argparse
from types import ModuleType

import msgspec

from load_tests.residency import gaps, traffic

KINDS: dict[str, ModuleType] = {"traffic": traffic, "gaps": gaps}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load_tests.residency")
    kinds = parser.add_subparsers(required=True)
    for name, module in KINDS.items():
        assert module.__doc__ is not None
        kind = kinds.add_parser(name, help=module.__doc__.splitlines()[0])
        kind.set_defaults(module=module)
        for field in msgspec.structs.fields(module.Setting):
            kind.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    options = vars(parser.parse_args())
    module = options.pop("module")
    if not module.run(module.Setting(**options)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
