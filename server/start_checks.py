"""Checks of a start that need neither the engine nor the API, so that a start that cannot succeed is refused within a
second."""

from pathlib import Path

from adapters.errors import AdapterError, SourceNotAllowed
from adapters.registry.registry import AdapterRegistry
from adapters.sources import check_allow_source
from adapters.validation.inspect import check_files
from server.config import ConfigError, ServeConfig, StartFailed

DEMO_ADAPTERS = Path(__file__).parent.parent / "examples" / "adapters"


def check_start(config: ServeConfig) -> None:
    """Check the sources and the adapters of the command line. Raises `ConfigError` or `StartFailed`."""
    for entry in config.allow_source:
        try:
            check_allow_source(entry)
        except SourceNotAllowed as error:
            raise ConfigError(f"--allow-source {entry} is not usable: {error}") from error
    if config.watch_adapters and not Path(config.watch_adapters).is_dir():
        raise ConfigError(f"--watch-adapters {config.watch_adapters} does not exist or is not a folder")
    for name, folder in named_adapters(config):
        try:
            check_files(folder)
        except (AdapterError, OSError) as error:
            raise StartFailed(f"the adapter '{name}' of the command line cannot be registered: {error}") from error


def named_adapters(config: ServeConfig) -> list[tuple[str, Path]]:
    """Return the names and folders of the adapters of the command line."""
    named = []
    for entry in config.adapter:
        name, _, folder = entry.partition("=")
        if not folder:
            raise ConfigError(f"--adapter {entry} must have the form name=folder")
        named.append((name, Path(folder).absolute()))
    if config.demo:
        named += sorted((folder.name, folder) for folder in DEMO_ADAPTERS.iterdir())
    return named


def open_registry(config: ServeConfig) -> AdapterRegistry:
    """Open the registry of the data folder, which only one server may use. Raises `StartFailed`."""
    try:
        return AdapterRegistry(config.data_dir, reserved=[config.served_model_name])
    except AdapterError as error:
        raise StartFailed(str(error)) from error
