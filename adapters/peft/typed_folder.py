"""The folder of an adapter whose PEFT type is validated by classes of its own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from adapters.errors import AdapterInvalid, Problem
from adapters.peft.config_reader import MAX_CONFIG_BYTES, canonical, read_json
from adapters.peft.files import CONFIG_FILE, FILES, WEIGHTS_FILE


class TypedConfig(Protocol):
    def all_problems(self) -> list[Problem]: ...


class TypedAdapter(Protocol):
    def problems(self) -> list[Problem]: ...


Config = TypeVar("Config", bound=TypedConfig)
Adapter = TypeVar("Adapter", bound=TypedAdapter)


def read_typed(
    folder: Path,
    config_of: Callable[[Mapping[str, Any]], Config | None],
    open_adapter: Callable[[Path, Config, str], Adapter],
) -> Adapter | None:
    """Return the adapter in `folder`, validated against the base model; None where `config_of` finds another type.

    `open_adapter` takes the weights file, the parsed config and its canonical text. Raises `AdapterInvalid` with every
    problem of both files.
    """
    if not all((folder / name).is_file() for name in FILES):
        return None
    with (folder / CONFIG_FILE).open("rb") as file:
        values, _ = read_json(file.read(MAX_CONFIG_BYTES + 1))
    config = None if values is None else config_of(values)
    if values is None or config is None:
        return None
    problems = config.all_problems()
    try:
        adapter = open_adapter(folder / WEIGHTS_FILE, config, canonical(values))
    except AdapterInvalid as error:
        raise AdapterInvalid(problems + error.problems) from None
    problems += adapter.problems()
    if problems:
        raise AdapterInvalid(problems)
    return adapter
