"""The config of a PEFT LoRA: every key is served, harmless or refused; any other key is an error. No torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapters.errors import Problem
from adapters.peft.config_keys import FEATURES, HARMLESS_KEYS, REFUSED_KEYS, SERVED_KEYS, WAYS_OUT
from adapters.peft.config_reader import ConfigReader, KeyTable, canonical, read_json
from adapters.peft.lora_forms import LN_TUNING, LoraForm, form_of
from adapters.peft.patterns import BadPattern, ModuleNames, ModulePatterns, is_literal, layer_of
from adapters.peft.targets import Targets
from adapters.traits import Traits

# Types of virtual tokens, which `adapters.validation.virtual_tokens` reads.
VIRTUAL_TOKEN_TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE")
# LORA, and the types that `adapters.validation.peft_types` converts.
SERVED_TYPES = (
    "LORA", "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "GRALORA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
    "MISS", "OFT", "PVERA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", *VIRTUAL_TOKEN_TYPES,
)  # fmt: skip
# Every other type of PEFT's, and why its effect is not served.
REFUSED_TYPES = {
    "ADAMSS": "clusters the base's weights anew wherever it is loaded",
    "ADAPTION_PROMPT": "adds attention over trained prompts inside the layers",
    "FOURIERFT": "draws the places of its frequencies from a random generator, and does not save them",
    "FROD": "decomposes the base's weights anew wherever it is loaded",
    "GLORA": "multiplies the entries of the base's weights",
    "HIRA": "multiplies the entries of the base's weights",
    "LILY": "mixes its factors by the mean over all tokens of a batch, so that rows change each other",
    "OSF": "replaces the base's weights by their decomposition",
    "PEANUT": "passes the base's weights through a network of its own",
    "POLY": "needs the id of a task with every prompt",
    "PSOFT": "decomposes the base's weights anew wherever it is loaded",
    "RANDLORA": "sums random factors to a delta of full rank",
    "SHADOW": "runs a second model beside the base",
    "SUPERTUNING": "has sparse entries and factors in one layer",
    "TINYLORA": "decomposes the base's weights anew wherever it is loaded",
    "WAVEFT": "draws the places of its coefficients from a random generator, and does not save them",
    "XLORA": "weights several adapters by a classifier, which reads a first run of the whole model",
}
LORA_KEYS = KeyTable(SERVED_KEYS, HARMLESS_KEYS, REFUSED_KEYS, WAYS_OUT)
MAX_NAMES = 4096  # maximum length of a list of modules, parameters or tokens
BIASES = ("none", "lora_only", "all")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Settings of a LoRA config that give its tensors their meaning.

    `target_modules` is None where it is not a list, `targets` where only the tensors show the targets, and `layers` is
    None where all layers are meant;
    `bias` is one of `BIASES`; with `ensures_tying`, settings for one end of a tied vocabulary apply to both;
    `token_indices` maps the ending of a module's name to the trained tokens, with "" for the input embedding;
    `qalora_group_size` is None without QA-LoRA; `invocation_tokens` activate an aLoRA. `features` are the names for the
    report; `canonical` is the canonical config that the digest covers. `form` is the type, where it is not LORA itself,
    and `whole_targets` choose the modules of LN_TUNING.
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
    targets: Targets | None
    exclude_modules: ModuleNames
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    target_parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    ensures_tying: bool
    token_indices: Mapping[str, tuple[int, ...]]
    qalora_group_size: int | None
    invocation_tokens: tuple[int, ...]
    features: tuple[str, ...]
    canonical: str
    form: LoraForm | None = None
    whole_targets: Targets | None = None

    def traits(self) -> Traits:
        """Return the traits that follow from the config alone; the tensors may add to them."""
        elsewhere = (
            self.form or self.modules_to_save or self.token_indices or self.target_parameters or self.invocation_tokens
        )
        changed = self.use_dora or self.lora_bias or self.bias != "none"
        return Traits(
            additive=not (elsewhere or changed),
            mergeable=not elsewhere,
            invocation_tokens=self.invocation_tokens,
        )

    def leaves_out(self, module: str) -> bool:
        """Return True if PEFT does not wrap `module` even when it is a target."""
        return module in self.exclude_modules or any(f".{name}." in f".{module}." for name in self.modules_to_save)

    def reaches(self, module: str) -> bool:
        """Return True if `layers_to_transform` includes the layer of `module`, or if `layers_pattern` has a regular
        expression: the tensors show which layers it matched."""
        if self.layers is None or not all(map(is_literal, self.layers_pattern)):
            return True
        return layer_of(module, self.layers_pattern) in self.layers

    def rank(self, module: str) -> int:
        """Return the rank that the config declares for `module`."""
        return int(self.rank_pattern.get(module, self.r))

    def scaling(self, module: str) -> float:
        """Return the factor of `B @ A` in `module`, as PEFT computes it."""
        alpha = self.alpha_pattern.get(module, self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_config(data: bytes) -> tuple[LoraSettings | None, list[Problem]]:
    """Read the bytes of an `adapter_config.json`; absent keys have PEFT's defaults.

    Returns the settings, or None where they cannot be used, and every problem found. Raises nothing.
    """
    config, problems = read_json(data)
    if config is None:
        return None, problems
    form = form_of(config)
    reader = _Reader(config if form is None else form.lora_config(config))
    settings = reader.settings(canonical(config))
    if form is not None:
        settings = _with_form(settings, form, config, reader)
    keys = LORA_KEYS if form is None else form.keys
    return (settings if reader.usable else None), reader.problems + keys.problems(config)


def _with_form(settings: LoraSettings, form: LoraForm, config: Mapping[str, Any], reader: ConfigReader) -> LoraSettings:
    """Return the settings of a type that is another form of a LORA."""
    settings = replace(settings, form=form, features=(form.peft_type.lower(),))
    if form is not LN_TUNING:
        return settings
    targets = Targets.of(config)
    if targets is None or (targets.names is None and targets.expression is None):
        found, expected = config.get("target_modules"), "a list of modules, or an expression that RE2 accepts"
        reader.refuse("target_modules", found, expected, "unsupported_feature")
    return replace(settings, whole_targets=targets)


class _Reader(ConfigReader):
    def settings(self, canonical: str) -> LoraSettings:
        peft_type = self._config.get("peft_type")
        if peft_type != "LORA":
            expected = '"LORA" here' if peft_type in SERVED_TYPES else f"one of {', '.join(SERVED_TYPES)}"
            if isinstance(peft_type, str) and peft_type in REFUSED_TYPES:
                expected += f"; {peft_type} {REFUSED_TYPES[peft_type]}"
            self._refuse("peft_type", peft_type, expected, "unsupported_feature")
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
            targets=Targets.of(self._config),
            exclude_modules=self._exclude_modules(),
            layers=self._layers(),
            layers_pattern=self._layers_pattern(),
            target_parameters=self._names("target_parameters"),
            modules_to_save=self._names("modules_to_save"),
            ensures_tying=self._switch("ensure_weight_tying"),
            token_indices=self._token_indices(),
            qalora_group_size=self._qalora_group_size(),
            invocation_tokens=self._tokens("alora_invocation_tokens", self._config.get("alora_invocation_tokens")),
            features=self._used(FEATURES),
            canonical=canonical,
        )

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

    def _exclude_modules(self) -> ModuleNames:
        """Read `exclude_modules`. An expression that RE2 does not accept excludes nothing: the adapter still has a
        tensor for every target, so there is no reason to refuse it."""
        value = self._config.get("exclude_modules")
        if isinstance(value, str):
            try:
                return ModuleNames(value)
            except BadPattern:
                return ModuleNames(())
        return ModuleNames(self._names("exclude_modules"))

    def _layers(self) -> frozenset[int] | None:
        value = self._config.get("layers_to_transform")
        layers = [value] if type(value) is int else value or []
        if isinstance(layers, list) and all(type(layer) is int for layer in layers):
            return frozenset(layers) or None
        self._refuse("layers_to_transform", value, "a whole number or a list of them", "malformed_file")
        return None

    def _layers_pattern(self) -> tuple[str, ...]:
        value = self._config.get("layers_pattern") or ()
        return (value,) if isinstance(value, str) else self._names("layers_pattern")

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
