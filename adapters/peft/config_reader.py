"""Reader for a PEFT `adapter_config.json` of any type: JSON, numbers, switches, patterns and the table of keys.

The config is untrusted: it is never passed to PEFT, and its patterns are never run by Python's own `re`. No torch.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import Problem, ProblemCode
from adapters.peft.files import CONFIG_FILE
from adapters.peft.foreign_files import CONVERT, foreign
from adapters.peft.patterns import BadPattern, ModulePatterns
from adapters.peft.safetensors_header import unique_keys

MAX_CONFIG_BYTES = 256 << 10  # an AdaLoRA config has a line for every rank of every layer
MAX_ALPHA = 10_000
MAX_RANK = 1 << 16
KNOWN_PEFT = "0.21"  # the version whose keys are in the tables
# Keys that other tools, and PEFT before 0.3, add about the training or about their own loading.
_ANNOTATIONS = frozenset({"merge_weights", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "unsloth_fixed"})


def read_json(data: bytes) -> tuple[dict[str, Any] | None, list[Problem]]:
    """Parse the bytes of an `adapter_config.json`.

    Returns the config and no problems, or None and one `malformed_file` problem. Raises nothing.
    """
    if len(data) > MAX_CONFIG_BYTES:
        return None, [config_problem("", f"{len(data)} bytes", f"at most {MAX_CONFIG_BYTES}", "malformed_file")]
    try:
        config = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=unique_keys, parse_float=_finite, parse_constant=_finite
        )
        if not isinstance(config, dict):
            raise ValueError("no object")
        canonical(config)
    except (ValueError, RecursionError):
        other = ("something else", "a JSON object with finite numbers and no repeated key")
        found, expected = foreign(data) or other
        return None, [config_problem("", found, expected, "malformed_file")]
    if "lora_parameters" in config and "peft_type" not in config:
        return None, [config_problem("", "the config of an MLX adapter", f"PEFT's: {CONVERT}", "malformed_file")]
    return config, []


def canonical(config: Mapping[str, Any]) -> str:
    """Return the canonical JSON of the config, which is the input of the version digest. Keys inside a pattern keep
    their order, because the first match counts and the order is therefore part of the content."""
    return json.dumps(dict(sorted(config.items())), separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True)
class KeyTable:
    """Classification of every key of one PEFT type's config.

    `harmless` keys record how an adapter was trained or where it came from; `refused` keys change the base model or the
    arithmetic unless they have one of the listed values or an empty one; `ways_out` are workarounds for the adapter's
    owner, by key.
    """

    served: frozenset[str]
    harmless: frozenset[str]
    refused: Mapping[str, tuple[Any, ...]]
    ways_out: Mapping[str, str] = field(default_factory=dict)

    def problems(self, config: Mapping[str, Any]) -> list[Problem]:
        """Return a problem for every key that is refused or unknown, unless its value is empty."""
        problems = []
        for key, value in config.items():
            if key in self.served or key in self.harmless or _is_empty(value) or _is_annotation(key):
                continue
            if key not in self.refused:
                problems.append(config_problem(key, value, _known_keys(config), "unknown_key"))
            elif value not in self.refused[key]:
                expected = " or ".join(map(json.dumps, self.refused[key])) or "no value"
                problems.append(
                    config_problem(key, value, expected + self.ways_out.get(key, ""), "unsupported_feature")
                )
        return problems


class ConfigReader:
    """Reader for the served keys of a config; `usable` becomes false when a tensor's rank or scaling cannot be
    determined."""

    def __init__(self, config: Mapping[str, Any]):
        self.problems: list[Problem] = []
        self.usable = True
        self._config = config

    def _rank(self, key: str, value: Any) -> int:
        if type(value) is int and 1 <= value <= MAX_RANK:
            return value
        self._refuse(key, value, f"a whole number from 1 to {MAX_RANK}", "malformed_file")
        return 1

    def _alpha(self, key: str, value: Any) -> float:
        if type(value) in (int, float) and 0 < value <= MAX_ALPHA:
            return float(value)
        self._refuse(key, value, f"a number above 0 and up to {MAX_ALPHA}", "malformed_file")
        return 1.0

    def _switch(self, key: str) -> bool:
        value = self._config.get(key)
        if value is not None and not isinstance(value, bool):
            self._refuse(key, value, "true or false", "malformed_file")
        return value is True

    def _patterns(self, key: str, read: Callable[[str, Any], float]) -> ModulePatterns:
        patterns = self._config.get(key) or {}
        if not isinstance(patterns, dict):
            self._refuse(key, patterns, "an object of module names", "malformed_file")
            return ModulePatterns({})
        numbers = {pattern: read(f"{key}.{pattern}", value) for pattern, value in patterns.items()}
        try:
            return ModulePatterns(numbers)
        except BadPattern as error:
            self._refuse(key, patterns, str(error), "unsupported_feature")
            return ModulePatterns({})

    def _target_modules(self) -> tuple[str, ...] | None:
        """Return `target_modules` where it is a list. A string is a regular expression or a shorthand, and gives
        None: the tensors show which modules it matched."""
        value = self._config.get("target_modules")
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return tuple(value)
        if value is not None and not isinstance(value, str):
            self.problems.append(config_problem("target_modules", value, "a list of module names", "malformed_file"))
        return None

    def _used(self, features: Mapping[str, str]) -> tuple[str, ...]:
        """Return the names of those `features` (name by config key) that the config uses."""
        values = {key: self._config.get(key) for key in features}
        return tuple(features[key] for key, value in values.items() if not _is_empty(value) and value != "none")

    def refuse(self, key: str, found: Any, expected: str, code: ProblemCode) -> None:
        """Record a problem because of which the config cannot be used."""
        self._refuse(key, found, expected, code)

    def _refuse(self, key: str, found: Any, expected: str, code: ProblemCode) -> None:
        self.usable = False
        self.problems.append(config_problem(key, found, expected, code))


def config_problem(key: str, found: Any, expected: str, code: ProblemCode) -> Problem:
    """Build the problem of the config's `key`, or of the whole file for an empty key."""
    where = f"{CONFIG_FILE}: {shown(key)}" if key else CONFIG_FILE
    return Problem(where, shown(found), expected, code)


def shown(value: Any, limit: int = 80) -> str:
    """Render an untrusted value for a message: printable ASCII of at most `limit` characters."""
    if isinstance(value, str):
        return ascii(value)[1:-1][:limit]
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:limit]


def _is_annotation(key: str) -> bool:
    """Return True for a key that cannot change what the tensors mean: a comment, or the note of a tool."""
    return key.startswith("_") or key in _ANNOTATIONS


def _known_keys(config: Mapping[str, Any]) -> str:
    version = config.get("peft_version")
    written = f"; this config is of PEFT {shown(version, 20)}" if isinstance(version, str) else ""
    return f"a key of PEFT {KNOWN_PEFT} or earlier{written}"


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError("no finite number")
    return float(number)
