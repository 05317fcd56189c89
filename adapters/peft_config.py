"""A PEFT `adapter_config.json`: every key is served, harmless or refused, and nothing else is.

The config is a stranger's text: it is never handed to PEFT, and its patterns are never run by Python's own `re`.
No torch.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.config_keys import FEATURES, HARMLESS_KEYS, REFUSED_KEYS, SERVED_KEYS, WAYS_OUT
from adapters.errors import Problem, ProblemCode
from adapters.patterns import BadPattern, ModulePatterns
from adapters.safetensors_header import unique_keys
from adapters.store import CONFIG_FILE
from adapters.traits import Traits

MAX_CONFIG_BYTES = 64 << 10
MAX_ALPHA = 10_000
MAX_RANK = 1 << 16
MAX_NAMES = 4096  # in a list of modules, parameters or tokens
BIASES = ("none", "lora_only", "all")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What a config says of the tensors beside it.

    `target_modules` is None where the config leaves the choice to the tensors; `bias` is one of `BIASES`;
    with `ensures_tying` what is said of one end of a tied vocabulary is meant of both; `token_indices` maps a module's
    ending to the tokens that are trained, "" being the input embedding; `qalora_group_size` is None without QA-LoRA;
    `invocation_tokens` switch an aLoRA on. `features` are named in the report; `canonical` is the config as the digest
    sees it.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    bias: str
    rank_pattern: ModulePatterns
    alpha_pattern: ModulePatterns
    target_modules: tuple[str, ...] | None
    target_parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    ensures_tying: bool
    token_indices: Mapping[str, tuple[int, ...]]
    qalora_group_size: int | None
    invocation_tokens: tuple[int, ...]
    features: tuple[str, ...]
    canonical: str

    def traits(self) -> Traits:
        """What the config alone tells; the tensors may add to it."""
        elsewhere = self.modules_to_save or self.token_indices or self.target_parameters or self.invocation_tokens
        changed = self.use_dora or self.lora_bias or self.bias != "none"
        return Traits(
            additive=not (elsewhere or changed),
            mergeable=not elsewhere,
            invocation_tokens=self.invocation_tokens,
        )

    def rank(self, module: str) -> int:
        return int(self.rank_pattern.get(module, self.r))

    def scaling(self, module: str) -> float:
        """The factor of `B @ A` in `module`, as PEFT computes it."""
        alpha = self.alpha_pattern.get(module, self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_config(data: bytes) -> tuple[LoraSettings | None, list[Problem]]:
    """Read the bytes of an `adapter_config.json`; absent keys have PEFT's defaults.

    Returns the settings, None where they cannot be used, and every problem found. Raises nothing.
    """
    if len(data) > MAX_CONFIG_BYTES:
        return None, [_problem("", f"{len(data)} bytes", f"at most {MAX_CONFIG_BYTES}", "malformed_file")]
    try:
        config = json.loads(data.decode(), object_pairs_hook=unique_keys, parse_float=_finite, parse_constant=_finite)
        if not isinstance(config, dict):
            raise ValueError("no object")
        # Keys inside a pattern keep their order: the first that matches counts, so it is part of the content.
        canonical = json.dumps(dict(sorted(config.items())), separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError):
        expected = "a JSON object with finite numbers and no repeated key"
        return None, [_problem("", "something else", expected, "malformed_file")]
    reader = _Reader(config)
    settings = reader.settings(canonical)
    return (settings if reader.usable else None), reader.problems + _features_off(config)


class _Reader:
    """Reads the served keys of a config; `usable` turns false when a tensor's rank or scaling cannot be known."""

    def __init__(self, config: dict[str, Any]):
        self.problems: list[Problem] = []
        self.usable = True
        self._config = config

    def settings(self, canonical: str) -> LoraSettings:
        if self._config.get("peft_type") != "LORA":
            self._refuse("peft_type", self._config.get("peft_type"), '"LORA"', "unsupported_feature")
        return LoraSettings(
            r=self._rank("r", self._config.get("r", 8)),
            lora_alpha=self._alpha("lora_alpha", self._config.get("lora_alpha", 8)),
            use_rslora=self._switch("use_rslora"),
            use_dora=self._switch("use_dora"),
            lora_bias=self._lora_bias(),
            bias=self._bias(),
            rank_pattern=self._patterns("rank_pattern", self._rank),
            alpha_pattern=self._patterns("alpha_pattern", self._alpha),
            target_modules=self._target_modules(),
            target_parameters=self._names("target_parameters"),
            modules_to_save=self._names("modules_to_save"),
            ensures_tying=self._switch("ensure_weight_tying"),
            token_indices=self._token_indices(),
            qalora_group_size=self._qalora_group_size(),
            invocation_tokens=self._tokens("alora_invocation_tokens", self._config.get("alora_invocation_tokens")),
            features=tuple(name for key, name in FEATURES.items() if _is_used(self._config.get(key))),
            canonical=canonical,
        )

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

    def _lora_bias(self) -> bool:
        used = self._switch("lora_bias")
        if used and self._config.get("use_dora") is True:
            self._refuse("lora_bias", True, "one of lora_bias and use_dora, as in PEFT", "unsupported_feature")
        return used

    def _bias(self) -> str:
        value = self._config.get("bias")
        if value is not None and value not in BIASES:
            self._refuse("bias", value, " or ".join(map(json.dumps, BIASES)), "unsupported_feature")
        return value if value in BIASES else "none"

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
            self.problems.append(_problem("target_modules", value, "a list of module names", "malformed_file"))
        return None

    def _names(self, key: str) -> tuple[str, ...]:
        value = self._config.get(key) or []
        if isinstance(value, list) and len(value) <= MAX_NAMES and all(isinstance(name, str) for name in value):
            return tuple(value)
        self._refuse(key, value, f"a list of up to {MAX_NAMES} names", "malformed_file")
        return ()

    def _tokens(self, key: str, value: Any) -> tuple[int, ...]:
        tokens = value or []
        short = isinstance(tokens, list) and len(tokens) <= MAX_NAMES
        if short and all(type(token) is int and 0 <= token < 1 << 31 for token in tokens):
            return tuple(tokens)
        self._refuse(key, value, f"a list of up to {MAX_NAMES} token ids", "malformed_file")
        return ()

    def _token_indices(self) -> dict[str, tuple[int, ...]]:
        key = "trainable_token_indices"
        value = self._config.get(key) or {}
        by_module = value if isinstance(value, dict) else {"": value}
        if len(by_module) > MAX_NAMES:
            self._refuse(key, value, f"at most {MAX_NAMES} modules", "malformed_file")
            return {}
        return {module: self._tokens(key, tokens) for module, tokens in by_module.items()}

    def _qalora_group_size(self) -> int | None:
        if not self._switch("use_qalora"):
            return None
        size = self._config.get("qalora_group_size", 16)
        if type(size) is int and size >= 1:
            return size
        self._refuse("qalora_group_size", size, "a whole number from 1", "malformed_file")
        return None

    def _refuse(self, key: str, found: Any, expected: str, code: ProblemCode) -> None:
        self.usable = False
        self.problems.append(_problem(key, found, expected, code))


def _features_off(config: dict[str, Any]) -> list[Problem]:
    """Problems with keys that are refused or unknown, unless their value is empty."""
    problems = []
    for key, value in config.items():
        if key in SERVED_KEYS or key in HARMLESS_KEYS or _is_empty(value):
            continue
        if key not in REFUSED_KEYS:
            problems.append(_problem(key, value, "no such key", "unknown_key"))
        elif value not in REFUSED_KEYS[key]:
            expected = " or ".join(map(json.dumps, REFUSED_KEYS[key])) or "no value"
            problems.append(_problem(key, value, expected + WAYS_OUT.get(key, ""), "unsupported_feature"))
    return problems


def _problem(key: str, found: Any, expected: str, code: ProblemCode) -> Problem:
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


def _is_used(value: Any) -> bool:
    return not _is_empty(value) and value != "none"


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError("no finite number")
    return float(number)
