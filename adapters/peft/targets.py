"""The modules that PEFT wraps for a config, computed from the names of the base model as PEFT does. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.peft.config_reader import shown
from adapters.peft.patterns import BadPattern, ModuleNames, dotted_suffixes, is_literal, layer_of

_ALL_LINEAR = "all-linear"  # PEFT replaces it by names before it saves a config; other tools may not


@dataclass(frozen=True, slots=True)
class Targets:
    """The keys of a config that choose modules. `target_modules` is at most one of `names`, `expression` and
    `all_linear`; `layers` are None where all layers are meant. `moved` are last components of names that PEFT looks
    for among the parameters, and among the modules no more."""

    names: frozenset[str] | None
    expression: ModuleNames | None
    all_linear: bool
    excluded: ModuleNames
    saved: tuple[str, ...]
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    moved: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Targets | None":
        """Read the keys; None where only the tensors show which modules they choose: an expression that RE2 does not
        accept or that chooses layers, a value that is not of PEFT's, or EVA, which gives some targets no rank."""
        if config.get("init_lora_weights") == "eva" or config.get("eva_config"):
            return None
        targets = config.get("target_modules")
        all_linear = isinstance(targets, str) and targets.lower() == _ALL_LINEAR
        try:
            expression = ModuleNames(targets) if isinstance(targets, str) and not all_linear else None
            given = config.get("exclude_modules")
            excluded = ModuleNames(given if isinstance(given, str) else _texts(given))
            names = None if targets is None or isinstance(targets, str) else frozenset(_texts(targets))
            pattern = config.get("layers_pattern")
            patterns = (pattern,) if isinstance(pattern, str) and pattern else _texts(pattern)
            layers = _layers(config.get("layers_to_transform"))
            saved = _texts(config.get("modules_to_save"))
        except BadPattern:
            return None
        if layers is not None and not all(map(is_literal, patterns)):
            return None
        return cls(names, expression, all_linear, excluded, saved, layers, patterns)

    def wrapped(self, linears: Iterable[str], embedding: str, head: str) -> set[str]:
        """Return the modules among `linears` and `embedding` that PEFT wraps; `head` is the linear that "all-linear"
        leaves out."""
        found = set()
        for module in (*linears, embedding):
            if (
                self.has_moved(module)
                or module in self.excluded
                or any(f".{name}." in f".{module}." for name in self.saved)
            ):
                continue
            if self.all_linear:
                chosen = module not in (embedding, head)
            elif self.expression is not None:
                chosen = module in self.expression
            else:
                chosen = self.names is not None and self._is_named(module, self.names)
            if chosen:
                found.add(module)
        return found

    def has_moved(self, module: str) -> bool:
        """Return True for a module with the name of a target that has become a parameter."""
        return module.rpartition(".")[2] in self.moved

    def _is_named(self, module: str, names: frozenset[str]) -> bool:
        if module in names:  # PEFT applies `layers_to_transform` to endings of names alone
            return True
        in_layers = self.layers is None or layer_of(module, self.layers_pattern) in self.layers
        return in_layers and not names.isdisjoint(dotted_suffixes(module))


def _texts(value: Any) -> tuple[str, ...]:
    """Return a list of texts. Raises `BadPattern` for anything else that is not empty."""
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadPattern("a list of names")
    return tuple(value)


def _layers(value: Any) -> frozenset[int] | None:
    layers = [value] if type(value) is int else value or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise BadPattern("a whole number or a list of them")
    return frozenset(layers) or None


def unmatched(names: Iterable[str], modules: frozenset[str]) -> list[str]:
    """Return the targets that are no dotted ending of any of the base model's `modules`; none if `modules` is empty,
    because the base model is unknown."""
    if not modules:
        return []
    known = {suffix for module in modules for suffix in dotted_suffixes(module)}
    return sorted(set(names) - known)


def some_of(names: Iterable[str], limit: int = 3) -> str:
    """Render a list of names for a message: the first few, and how many more there are."""
    given = sorted(names)
    more = f" and {len(given) - limit} more" if len(given) > limit else ""
    return ", ".join(given[:limit]) + more


def target_notes(unmatched: list[str]) -> list[str]:
    """Return the sentence of the report about targets that match no module."""
    names = some_of(map(shown, unmatched), 10)
    return [f"target_modules: the base model has no module {names}; PEFT ignores such names, too"] if unmatched else []
