"""Startup of `loraplex serve`: imports only what starting the engine process needs. The engine process then loads torch
and the model while this process imports the API."""

import dataclasses
import logging
import subprocess
from contextlib import closing
from pathlib import Path

from adapters.fault_points import VARIABLE, arm_from_environment
from server.config import ConfigError, ServeConfig, StartFailed, default_data_dir
from server.data_folder import prepare
from server.ipc.process_transport import ProcessTransport
from server.model.loading.default_model import (
    DEFAULT_MODEL,
    DefaultModelMissing,
    prepare_in_child,
    prepared_default_model,
)
from server.writable import use_writable_folders

log = logging.getLogger(__name__)


def launch(config: ServeConfig) -> None:
    """Serve until a signal ends the server. Raises `ConfigError` or `StartFailed`."""
    config = complete(config)
    _arm_faults()
    prepare(config.data_dir)
    transport = None if config.in_process else ProcessTransport(config)
    if transport is not None:
        transport.spawn()
    try:
        _serve(config, transport)
    finally:
        if transport is not None:
            transport.abandon()


def _arm_faults() -> None:
    try:
        spec = arm_from_environment()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if spec:
        log.warning("%s=%s: this server fails on purpose, for tests alone; unset it to serve", VARIABLE, spec)


def _serve(config: ServeConfig, transport: ProcessTransport | None) -> None:
    from server.start_checks import check_merge, check_start, open_registry

    check_start(config)
    with closing(open_registry(config)) as registry:
        check_merge(config, registry)
        from server.serve import run  # importing the API takes most of a second, in which the engine's process starts

        run(config, registry, transport)


def complete(config: ServeConfig) -> ServeConfig:
    """Fill in derived settings: data folder, embedded model, served name. Also ensures that temporary files and caches
    have writable folders."""
    data_dir = (default_data_dir() if config.data_dir == Path() else config.data_dir).absolute()
    prepared = (
        prepared_default_model()
    )  # before the cache folder moves: a container image may contain the prepared model
    use_writable_folders(data_dir)
    model, name = config.model, config.served_model_name
    if not model:
        try:
            model, name = str(prepared or prepare_in_child()), name or DEFAULT_MODEL
        except DefaultModelMissing as missing:
            raise ConfigError(str(missing)) from missing
        except subprocess.CalledProcessError as error:
            raise StartFailed("the embedded model could not be prepared; the error is above") from error
    return dataclasses.replace(
        config, model=model, served_model_name=name or Path(model).name.removesuffix(".gguf").lower(), data_dir=data_dir
    )
