"""Every setting of `loraplex serve`, declared once: flags, environment names, file keys and the README's table all
derive from the fields of `ServeConfig`.

Precedence: flag, then environment (`LORAPLEX_…`), then `--config FILE` (TOML or YAML), then the default.
"""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

GIB = 1 << 30


class ConfigError(Exception):
    """A setting cannot be used; the message names it and says what would work."""


class StartFailed(Exception):
    """The server cannot start; the message is for the operator."""


def _setting(default: Any, help: str, **bounds: Any) -> Any:
    metadata = {"help": help, **bounds}
    if isinstance(default, tuple):
        return field(default=default, metadata={**metadata, "repeatable": True})
    return field(default=default, metadata=metadata)


def default_data_dir() -> Path:
    root = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(root) / "loraplex"


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Settings of one server. Immutable; what is derived from them lives where it was derived."""

    model: str = _setting("", "Folder, .gguf file or hub id of the base model; empty is the embedded SmolLM2-135M")
    served_model_name: str = _setting("", "Name of the base model in the API; empty derives it from --model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting("auto", "Precision of the base model")
    quantization: Literal["none", "nf4"] = _setting("none", "4-bit base through bitsandbytes, double quantization")
    nf4_policy: Literal["auto", "nf4", "bf16-copy"] = _setting(
        "auto", "4-bit linears: kept, or dequantised once at load; auto copies on a GPU with four times the memory free"
    )
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N")
    host: str = _setting("127.0.0.1", "Address to listen on; anything but loopback needs a key")
    port: int = _setting(8000, "Port to listen on; 0 takes a free one", ge=0, le=65535)
    data_dir: Path = _setting(Path(), "Registry, store and caches; empty is the XDG data folder")
    api_key: str = _setting("", "One key with all scopes", secret=True)
    keys_file: Path = _setting(Path(), "TOML file of keys with scopes and tenants")
    adapter_slots: int = _setting(64, "Adapters that can be on the device at once", ge=1, le=4096)
    adapter_device_bytes: int = _setting(
        0, "Device memory for the ranks of adapters; 0 is room for the largest rank in 16 slots", ge=0
    )
    adapter_max_concurrent: int = _setting(0, "Requests that may run for one adapter at once; 0 is no limit", ge=0)
    adapter_rpm: int = _setting(0, "Requests per minute for one adapter; 0 is no limit", ge=0)
    adapter_tpm: int = _setting(0, "Prompt and answer tokens per minute for one adapter; 0 is no limit", ge=0)
    max_adapter_rank: int = _setting(64, "Largest LoRA rank that is served", ge=1, le=512)
    adapter_host_bytes: int = _setting(2 * GIB, "Host memory for adapters that are off the device", ge=0)
    kv_cache_bytes: int = _setting(0, "Memory of the KV cache; 0 chooses by what is free", ge=0)
    max_num_seqs: int = _setting(64, "Sequences in one step", ge=1, le=4096)
    max_batch_tokens: int = _setting(512, "Token budget of one step, prefill and decode together", ge=16)
    max_model_len: int = _setting(0, "Longest prompt plus answer in tokens; 0 is the model's own limit", ge=0)
    max_queue: int = _setting(256, "Requests that may wait before new ones get 503", ge=1)
    scheduling_policy: Literal["fair", "fcfs"] = _setting(
        "fair", "fair serves tenants by their weights and knows priorities, fcfs is strictly by arrival"
    )
    max_wait_steps: int = _setting(256, "Steps a request may be passed over before later ones are held back", ge=1)
    max_upload_bytes: int = _setting(512 << 20, "Largest adapter upload", ge=1024)
    allow_source: tuple[str, ...] = _setting(
        (), "Where adapters may be registered from: file:///folder, hf://org or s3://bucket/prefix"
    )
    adapter: tuple[str, ...] = _setting((), "Adapter to register at start, as name=folder")
    watch_adapters: str = _setting("", "Folder whose sub-folders are registered as adapters, also when they change")
    merge: str = _setting("", "Adapter to merge into the base's weights at start")
    merge_policy: Literal["off", "auto"] = _setting(
        "off", "auto merges an adapter that has owned all traffic for a while"
    )
    merge_others: Literal["wait", "refuse"] = _setting(
        "wait", "Requests for other models end a merge that was asked for, or get 409; one by policy always ends"
    )
    merge_window: float = _setting(
        30.0, "Seconds that an adapter has to own all traffic to be merged by policy", ge=0.0
    )
    merge_min_requests: int = _setting(8, "Requests in those seconds without which it is not merged", ge=1)
    merge_cooldown: float = _setting(60.0, "Seconds between the end of a merge and the next one by policy", ge=0.0)
    hang_seconds: float = _setting(60.0, "An engine with work and no step for this long is restarted", ge=1.0)
    drain_delay: float = _setting(0.0, "Seconds between turning unready and refusing requests at shutdown", ge=0.0)
    drain_timeout: float = _setting(30.0, "Seconds that running requests get to finish at shutdown", ge=0.0)
    log_format: Literal["text", "json"] = _setting("text", "Format of log lines")
    threads: int = _setting(0, "CPU threads of the model; 0 takes all cores", ge=0)
    eager: bool = _setting(False, "Run decode steps without CUDA graphs (they are used on CUDA only)")
    in_process: bool = _setting(False, "Run the engine inside the API process (debugging)")
    demo: bool = _setting(False, "Register the demo adapters of examples/adapters at start")


HINTS: dict[str, Any] = get_type_hints(ServeConfig)


def env_name(name: str) -> str:
    return "LORAPLEX_" + name.upper()


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def load(flags: Mapping[str, Any], config_file: Path | None = None) -> ServeConfig:
    """Merge the four sources into one config. Raises `ConfigError` naming the first setting that cannot be used."""
    values: dict[str, Any] = {}
    for source, found in (("file", _from_file(config_file)), ("environment", _from_env()), ("flag", flags)):
        for name, value in found.items():
            if value is not None:
                values[name] = _convert(name, value, source)
    return ServeConfig(**values)


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        text = path.read_text()
        found = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path}: expected a table of settings")
    return {str(key).replace("-", "_"): value for key, value in found.items()}


def _from_env() -> dict[str, Any]:
    names = {env_name(name): name for name in HINTS}
    return {names[key]: value for key, value in os.environ.items() if key in names}


def _convert(name: str, value: Any, source: str) -> Any:
    if name not in HINTS:
        raise ConfigError(f"unknown setting '{name}' in the {source}")
    try:
        converted = _as_type(HINTS[name], value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{flag_name(name)} (from the {source}): {error}") from error
    _check_bounds(name, converted)
    return converted


def _as_type(hint: Any, value: Any) -> Any:
    if get_origin(hint) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        return tuple(str(item) for item in items)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"'{value}' is not one of {', '.join(map(str, get_args(hint)))}")
        return value
    if hint is bool and isinstance(value, str):
        if value.lower() not in ("1", "true", "yes", "0", "false", "no"):
            raise ValueError(f"'{value}' is not a truth value")
        return value.lower() in ("1", "true", "yes")
    return hint(value)


def _check_bounds(name: str, value: Any) -> None:
    metadata = _field(name).metadata
    if "ge" in metadata and not value >= metadata["ge"]:
        raise ConfigError(f"{flag_name(name)}: {value} is below {metadata['ge']}")
    if "le" in metadata and not value <= metadata["le"]:
        raise ConfigError(f"{flag_name(name)}: {value} is above {metadata['le']}")


def _field(name: str) -> "dataclasses.Field[Any]":
    return next(f for f in dataclasses.fields(ServeConfig) if f.name == name)


def to_dict(config: ServeConfig) -> dict[str, Any]:
    """Plain values that `load` turns into an equal config: how the engine process gets its settings."""
    values = {name: getattr(config, name) for name in HINTS}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def type_label(name: str) -> str:
    """How the README's table writes a setting's type."""
    hint = HINTS[name]
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "text, repeatable"
    return {str: "text", int: "integer", float: "number", bool: "switch", Path: "path"}[hint]


__all__ = [
    "HINTS",
    "ConfigError",
    "ServeConfig",
    "default_data_dir",
    "env_name",
    "flag_name",
    "load",
    "to_dict",
    "type_label",
]
