"""Checks of a start that need neither the engine nor the API, so that a start that cannot succeed is refused within a
second."""

from collections import Counter
from pathlib import Path

from adapters.errors import AdapterError, AdapterInvalid, InvalidName, SourceNotAllowed
from adapters.names import check_name
from adapters.peft.files import FILES, TOKENIZER_FILES, WEIGHTS_FILE
from adapters.registry.registry import AdapterRegistry
from adapters.sources import check_allow_source
from adapters.validation.inspect import check_files
from server.config import ConfigError, ServeConfig, StartFailed

_OF_THE_WHEEL = Path(__file__).with_name("demo_adapters")
DEMO_ADAPTERS = _OF_THE_WHEEL if _OF_THE_WHEEL.is_dir() else Path(__file__).parent.parent / "examples" / "adapters"

_FILES = (*FILES, *TOKENIZER_FILES)


def check_start(config: ServeConfig) -> None:
    """Check the sources and the adapters of the command line. Raises `ConfigError` or `StartFailed`."""
    for entry in config.allow_source:
        try:
            check_allow_source(entry)
        except SourceNotAllowed as error:
            raise ConfigError(f"--allow-source {entry} is not usable: {error}") from error
    if config.watch_adapters and not Path(config.watch_adapters).is_dir():
        raise ConfigError(f"--watch-adapters {config.watch_adapters} does not exist or is not a folder")
    refuse_failed([failed for name, folder in named_adapters(config) if (failed := _failure(name, folder))], config)


def _failure(name: str, folder: Path) -> str | None:
    """Return what is wrong with an adapter, as far as it does not depend on the base model."""
    try:
        check_files(folder)
    except (AdapterError, OSError) as error:
        return describe_failure(name, folder, error)
    return None


def describe_failure(name: str, folder: Path, error: Exception) -> str:
    """Return the name, folder, file and reason in one line."""
    is_tensor = isinstance(error, AdapterInvalid) and not error.problems[0].where.startswith(_FILES)
    return f"'{name}' ({folder}): {f'{WEIGHTS_FILE}: ' if is_tensor else ''}{error}"


def refuse_failed(failures: list[str], config: ServeConfig) -> None:
    """Raise `StartFailed` that names every adapter of the command line which cannot be registered, unless
    --adapter-errors is `warn`."""
    if failures and config.adapter_errors == "fail":
        raise StartFailed(
            "\n  ".join(["these adapters of the command line cannot be registered:", *failures])
            + "\n--adapter-errors warn starts without them"
        )


def named_adapters(config: ServeConfig) -> list[tuple[str, Path]]:
    """Return the names and folders of the adapters of the command line. Raises `ConfigError`."""
    named = []
    for entry in config.adapter:
        name, _, folder = entry.partition("=")
        if not folder:
            raise ConfigError(f"--adapter {entry} must have the form name=folder")
        named.append((name, Path(folder).expanduser().absolute()))
    if config.demo:
        named += sorted((folder.name, folder) for folder in DEMO_ADAPTERS.iterdir())
    _check_names([name for name, _ in named], config)
    return named


def _check_names(names: list[str], config: ServeConfig) -> None:
    for name in names:
        try:
            check_name(name)
        except InvalidName as error:
            raise ConfigError(f"--adapter {name[:80]!r}: {error}") from error
    if config.served_model_name in names:
        raise ConfigError(f"--adapter {config.served_model_name}: the name is the base model's")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"--adapter {twice[0]} is given more than once")


def check_merge(config: ServeConfig, registry: AdapterRegistry) -> None:
    """Raise `ConfigError` if --merge names an adapter that this start cannot have."""
    name, coming = config.merge.partition("@")[0], {name for name, _ in named_adapters(config)}
    if name and name not in registry and name not in coming and not config.watch_adapters:
        raise ConfigError(f"--merge {config.merge}: there is no adapter of this name; give its folder with --adapter")


def open_registry(config: ServeConfig) -> AdapterRegistry:
    """Open the registry of the data folder, which only one server may use. Raises `StartFailed`."""
    try:
        return AdapterRegistry(config.data_dir, reserved=[config.served_model_name])
    except AdapterError as error:
        raise StartFailed(str(error)) from error
