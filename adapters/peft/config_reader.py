"""Reading a PEFT `adapter_config.json`, whatever its type: JSON, numbers, switches, patterns and the table of keys.

The config is a stranger's text: it is never handed to PEFT, and its patterns are never run by Python's own `re`.
No torch.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import Problem, ProblemCode
from adapters.peft.files import CONFIG_FILE
from adapters.peft.patterns import BadPattern, ModulePatterns
from adapters.peft.safetensors_header import unique_keys

MAX_CONFIG_BYTES = 256 << 10  # AdaLoRA's has a line for every rank of every layer
MAX_ALPHA = 10_000
MAX_RANK = 1 << 16


def read_json(data: bytes) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The config in the bytes of an `adapter_config.json`, or None and the problem. Raises nothing."""
    if len(data) > MAX_CONFIG_BYTES:
        return None, [config_problem("", f"{len(data)} bytes", f"at most {MAX_CONFIG_BYTES}", "malformed_file")]
    try:
        config = json.loads(data.decode(), object_pairs_hook=unique_keys, parse_float=_finite, parse_constant=_finite)
        if not isinstance(config, dict):
            raise ValueError("no object")
        canonical(config)
    except (ValueError, RecursionError):
        expected = "a JSON object with finite numbers and no repeated key"
        return None, [config_problem("", "something else", expected, "malformed_file")]
    return config, []


def canonical(config: Mapping[str, Any]) -> str:
    """The config as the digest sees it. Keys inside a pattern keep their order: the first that matches counts, so it is
    part of the content."""
    return json.dumps(dict(sorted(config.items())), separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True)
class KeyTable:
    """What is made of every key of one type's config. `harmless` ones say how an adapter was made or where it came
    from; `refused` ones change the base model or the arithmetic unless they have a listed value or an empty one, and
    `ways_out` says what their owner may do."""

    served: frozenset[str]
    harmless: frozenset[str]
    refused: Mapping[str, tuple[Any, ...]]
    ways_out: Mapping[str, str] = field(default_factory=dict)

    def problems(self, config: Mapping[str, Any]) -> list[Problem]:
        """With keys that are refused or unknown, unless their value is empty."""
        problems = []
        for key, value in config.items():
            if key in self.served or key in self.harmless or _is_empty(value):
                continue
            if key not in self.refused:
                problems.append(config_problem(key, value, "no such key", "unknown_key"))
            elif value not in self.refused[key]:
                expected = " or ".join(map(json.dumps, self.refused[key])) or "no value"
                problems.append(
                    config_problem(key, value, expected + self.ways_out.get(key, ""), "unsupported_feature")
                )
        return problems


class ConfigReader:
    """Reads the served keys of a config; `usable` turns false when a tensor's rank or scaling cannot be known."""

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
        """Names only: a text is a regular expression or a shorthand, and the tensors tell what it matched."""
        value = self._config.get("target_modules")
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return tuple(value)
        if value is not None and not isinstance(value, str):
            self.problems.append(config_problem("target_modules", value, "a list of module names", "malformed_file"))
        return None

    def _used(self, features: Mapping[str, str]) -> tuple[str, ...]:
        """Those of `features`, names by key, that the config makes use of."""
        values = {key: self._config.get(key) for key in features}
        return tuple(features[key] for key, value in values.items() if not _is_empty(value) and value != "none")

    def _refuse(self, key: str, found: Any, expected: str, code: ProblemCode) -> None:
        self.usable = False
        self.problems.append(config_problem(key, found, expected, code))


def config_problem(key: str, found: Any, expected: str, code: ProblemCode) -> Problem:
    where = f"{CONFIG_FILE}: {shown(key)}" if key else CONFIG_FILE
    return Problem(where, shown(found), expected, code)


def shown(value: Any, limit: int = 80) -> str:
    """A stranger's value for a message: printable ASCII of at most `limit` characters."""
    if isinstance(value, str):
        return ascii(value)[1:-1][:limit]
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:limit]


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError("no finite number")
    return float(number)
