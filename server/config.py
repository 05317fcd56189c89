"""Every setting of `loraplex serve`, declared once: flags, environment variables, file keys and the reference table
are derived from the fields of `ServeConfig`.

Precedence: flag, then environment (`LORAPLEX_…`), then `--config FILE` (TOML or YAML), then the default.
"""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

GIB = 1 << 30


class ConfigError(Exception):
    """A setting is unusable; the message names the setting and says what would work."""


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
    """The settings of one server, immutable. Derived values are kept by the code that derives them."""

    model: str = _setting("", "Folder, .gguf file or hub id of the base model; empty uses the embedded SmolLM2-135M")
    served_model_name: str = _setting("", "Name of the base model in the API; empty derives it from --model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting("auto", "Precision of the base model")
    quantization: Literal["none", "nf4"] = _setting("none", "Quantize the base model to 4 bits with bitsandbytes")
    nf4_policy: Literal["auto", "nf4", "bf16-copy"] = _setting(
        "auto",
        "How 4-bit layers are computed: from 4 bits, or from a bf16 copy; auto copies if a GPU has 4x the memory free",
    )
    device: str = _setting("auto", "Device of the model: auto, cpu, cuda or cuda:N")
    host: str = _setting("127.0.0.1", "Address to listen on; an address other than loopback requires an API key")
    port: int = _setting(8000, "Port to listen on; 0 chooses a free port", ge=0, le=65535)
    data_dir: Path = _setting(Path(), "Folder of the registry, store and caches; empty uses the XDG data folder")
    api_key: str = _setting("", "One API key with all scopes", secret=True)
    keys_file: Path = _setting(
        Path(),
        "TOML file of API keys with scopes and tenants, written by `loraplex keys` and read again when it changes",
    )
    allowed_host: tuple[str, ...] = _setting(
        (),
        "Host name under which the server may be addressed, besides loopback names and --host. Without it, a server "
        "with API keys accepts every name",
    )
    adapter_slots: int = _setting(64, "Maximum number of adapters on the device at once", ge=1, le=4096)
    adapter_device_bytes: int = _setting(
        0, "Device memory for adapter weights; 0 reserves room for 16 adapters of the largest rank", ge=0
    )
    adapter_override_bytes: int = _setting(
        0,
        "Device memory for adapters' own copies of whole weights, their vectors and virtual tokens; 0 chooses it by "
        "the model",
        ge=0,
    )
    adapter_max_concurrent: int = _setting(
        0, "Maximum number of concurrent requests per adapter; 0 means no limit", ge=0
    )
    adapter_rpm: int = _setting(0, "Maximum number of requests per minute and adapter; 0 means no limit", ge=0)
    adapter_tpm: int = _setting(
        0, "Maximum number of prompt and output tokens per minute and adapter; 0 means no limit", ge=0
    )
    max_adapter_rank: int = _setting(
        0, "Largest LoRA rank that the server accepts; 0 means 128, or 64 where the memory is too small", ge=0, le=512
    )
    adapter_host_bytes: int = _setting(2 * GIB, "Host memory that caches adapters which are not on the device", ge=0)
    adapter_packed_bytes: int = _setting(
        20 * GIB,
        "Disk space in --data-dir for packed copies of adapters, which load in a fraction of the time; 0 keeps none",
        ge=0,
    )
    adapter_store_bytes: int = _setting(
        0, "Disk space in --data-dir for the weights of all adapter versions; 0 means no limit", ge=0
    )
    kv_cache_bytes: int = _setting(0, "Memory of the KV cache; 0 chooses it by the memory that is free", ge=0)
    gpu_memory_utilization: float = _setting(
        1.0, "Share of a GPU's memory that this server may take, beside what other programs have", ge=0.05, le=1.0
    )
    max_num_seqs: int = _setting(64, "Maximum number of sequences in one step", ge=1, le=4096)
    max_batch_tokens: int = _setting(512, "Maximum number of tokens in one step, prefill and decode together", ge=16)
    max_step_ms: float = _setting(
        0.0,
        "Target duration in milliseconds of a step that decodes and prefills: prompts are cut so that running streams "
        "get their tokens this often. 0 chooses 150 on a CPU and 100 on CUDA, and more if decoding alone takes over "
        "half of that; inf uses --max-batch-tokens alone",
        ge=0.0,
    )
    max_model_len: int = _setting(
        0, "Maximum number of tokens in prompt and output together; 0 uses the model's limit", ge=0
    )
    cors_origin: tuple[str, ...] = _setting(
        (), "Origin whose web pages may call the API from a browser, such as https://chat.example.com; * allows all"
    )
    strict_requests: bool = _setting(
        False, "Refuse requests with unknown fields, which are otherwise named in the header x-loraplex-ignored"
    )
    max_queue: int = _setting(
        256,
        "Maximum number of sequences that wait for their first token, where each prompt and choice is one. Further "
        "requests get 503, or 429 if their tenant holds its share of the queue",
        ge=1,
    )
    max_queue_tokens: int = _setting(
        1 << 20, "Maximum number of prompt tokens of the waiting sequences, shared by tenants like --max-queue", ge=1
    )
    request_timeout: float = _setting(
        0.0, "Seconds after which a request is ended with 504, also while it waits; 0 means no limit", ge=0.0
    )
    scheduling_policy: Literal["fair", "fcfs"] = _setting(
        "fair",
        "fair shares the device among tenants by weight and honors priorities; fcfs runs requests in order of arrival",
    )
    max_wait_steps: int = _setting(
        256, "Steps that a request may be passed over before later requests are held back", ge=1
    )
    max_upload_bytes: int = _setting(512 << 20, "Largest adapter upload in bytes", ge=1024)
    allow_source: tuple[str, ...] = _setting(
        (),
        "Source that adapters may be registered from: file:///folder, hf://org or s3://bucket/prefix; "
        "hf://org/repo@refs%2Fpr%2F1 for a pull request, https://host for a host that a hub may redirect to",
    )
    adapter: tuple[str, ...] = _setting((), "Adapter to register at startup, as name=folder")
    adapter_errors: Literal["fail", "warn"] = _setting(
        "fail",
        "What an --adapter that cannot be registered does: `fail` ends the start, `warn` logs it and starts without it",
    )
    watch_adapters: str = _setting(
        "", "Folder whose subfolders, `name` or `org/name`, are registered as adapters, now and whenever they change"
    )
    scrub_mb_per_second: float = _setting(
        8.0,
        "Rate in MiB per second at which stored adapters are read in the background and compared with their digests, "
        "each once a day; 0 turns this off",
        ge=0.0,
    )
    merge: str = _setting("", "Adapter to merge into the base model at startup")
    merge_policy: Literal["off", "auto"] = _setting(
        "off", "auto merges an adapter that has received all traffic for a while"
    )
    merge_others: Literal["wait", "refuse"] = _setting(
        "wait",
        "What happens to a manual merge when another model is requested: `wait` unmerges, `refuse` answers 409. "
        "Automatic merges always unmerge.",
    )
    merge_window: float = _setting(
        30.0, "Seconds that an adapter must receive all traffic before it is merged automatically", ge=0.0
    )
    merge_min_requests: int = _setting(8, "Minimum number of requests in the merge window for an automatic merge", ge=1)
    merge_cooldown: float = _setting(60.0, "Seconds between the end of a merge and the next automatic merge", ge=0.0)
    hang_seconds: float = _setting(
        60.0,
        "Restart the engine if it has work but makes no progress for this long: neither a step nor a layer of one",
        ge=1.0,
    )
    drain_delay: float = _setting(0.0, "Seconds at shutdown between becoming unready and refusing requests", ge=0.0)
    drain_timeout: float = _setting(30.0, "Seconds at shutdown for running requests to finish", ge=0.0)
    log_format: Literal["text", "json"] = _setting("text", "Format of log lines")
    threads: int = _setting(0, "CPU threads of the model; 0 uses all cores", ge=0)
    eager: bool = _setting(False, "Run decode steps without CUDA graphs, which are used on CUDA only")
    in_process: bool = _setting(False, "Run the engine inside the API process, for debugging")
    demo: bool = _setting(False, "Register three demo adapters at startup, and offer to fetch the embedded model")


HINTS: dict[str, Any] = get_type_hints(ServeConfig)


def env_name(name: str) -> str:
    return "LORAPLEX_" + name.upper()


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def load(flags: Mapping[str, Any], config_file: Path | None = None) -> ServeConfig:
    """Combine the four sources into one config. Raises `ConfigError` that names the first unusable setting."""
    values: dict[str, Any] = {}
    for source, found in (("file", _from_file(config_file)), ("environment", _from_env()), ("flag", flags)):
        for name, value in found.items():
            if value is not None:
                values[name] = _convert(name, value, source)
    return ServeConfig(**values)


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml  # imported here because every command imports this module

    try:
        text = path.read_text()
        found = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path} must contain a table of settings")
    return {str(key).replace("-", "_"): value for key, value in found.items()}


def _from_env() -> dict[str, Any]:
    names = {env_name(name): name for name in HINTS}
    return {names[key]: value for key, value in os.environ.items() if key in names}


def _convert(name: str, value: Any, source: str) -> Any:
    if name not in HINTS:
        raise ConfigError(f"unknown setting '{name}' in the {source}; `loraplex serve --help` lists all settings")
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
            raise ValueError(f"'{value}' is not a boolean; use true or false")
        return value.lower() in ("1", "true", "yes")
    return hint(value)


def _check_bounds(name: str, value: Any) -> None:
    metadata = _field(name).metadata
    if "ge" in metadata and not value >= metadata["ge"]:
        raise ConfigError(f"{flag_name(name)}: {value} is below the minimum of {metadata['ge']}")
    if "le" in metadata and not value <= metadata["le"]:
        raise ConfigError(f"{flag_name(name)}: {value} is above the maximum of {metadata['le']}")


def _field(name: str) -> "dataclasses.Field[Any]":
    return next(f for f in dataclasses.fields(ServeConfig) if f.name == name)


def to_dict(config: ServeConfig) -> dict[str, Any]:
    """Return plain values that `load` turns into an equal config; the engine process receives its settings so."""
    values = {name: getattr(config, name) for name in HINTS}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def type_label(name: str) -> str:
    """Return the type of a setting as the reference table shows it."""
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
