"""Names of tensors and targets from before transformers renamed modules and fused experts, read as PEFT reads them.

The rules come from PEFT's and transformers' own tables, with the base model (`ModelSpec.conversion`). A name that the
base model has keeps its meaning. No torch.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from adapters.errors import Problem
from adapters.model_spec import ModelSpec, NameConversion, Renaming
from adapters.peft.files import CONFIG_FILE
from adapters.peft.lora_config import LoraSettings
from adapters.peft.patterns import ModulePatterns
from adapters.peft.spellings import PREFIX
from adapters.peft.tensor_names import parse_tensor_name

MAX_LENGTH = 256  # of a name that the expressions see: their time grows with its square
_EXPERT = re.compile(r"\.([0-9]{1,6})(?=\.)")


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """The place of one expert's factor: part `part` of `parameter` of the experts `module`."""

    module: str
    parameter: str
    kind: Literal["A", "B"]
    parts: int
    part: int
    expert: int


class EarlierNames:
    """The rules of one base model. Names that the base model has, and names longer than `MAX_LENGTH`, are kept."""

    def __init__(self, spec: ModelSpec) -> None:
        self._known = spec.modules.keys() | spec.parameters.keys()
        conversion = spec.conversion or NameConversion(())
        self._renamings = [_Rule(renaming) for renaming in conversion.renamings]
        self._fusions = [(fusion, _Rule(fusion.renaming)) for fusion in conversion.fusions]

    def current(self, own: str) -> str | ExpertTensor:
        """Return the name that PEFT reads the tensor `own` as, or the place of one expert's factor."""
        if not self._renamings or ".lora_" not in own or len(own) > MAX_LENGTH or self._is_known(own):
            return own
        key = own.removeprefix(PREFIX)
        for rule in self._renamings:
            key = rule.applied(key)[0]
        for fusion, rule in self._fusions:
            module, match, part = rule.applied(key)
            if match:
                expert = _EXPERT.findall(match)
                place = (module, fusion.parameter, fusion.kind, fusion.parts, part)
                return ExpertTensor(*place, int(expert[0])) if len(expert) == 1 else own
        return own if own.endswith(key) else PREFIX + key

    def _is_known(self, own: str) -> bool:
        parsed = parse_tensor_name(own)
        return parsed is not None and parsed[0].replace(".base_layer", "") in self._known


class _Rule:
    def __init__(self, renaming: Renaming) -> None:
        self._pattern = re.compile(renaming.pattern)
        self._target = renaming.target
        self._scopes = renaming.scopes

    def applied(self, key: str) -> tuple[str, str, int]:
        """Return the new name, the text that was replaced, and the number of the alternative that matched it; the name
        as it is and an empty text where the rule does not apply."""
        scope = next(filter(key.startswith, self._scopes), None) if self._scopes else ""
        match = None if scope is None else self._pattern.search(key.removeprefix(scope))
        if scope is None or match is None:
            return key, "", 0
        name = next(name for name, value in match.groupdict().items() if value is not None)
        target = self._target
        if r"\1" in target:
            target = target.replace(r"\1", match[self._pattern.groupindex[name] + 1])
        return scope + key.removeprefix(scope).replace(match[0], target, 1), match[0], int(name.removeprefix("g"))


# -- targets -----------------------------------------------------------------------------------------------------------


def with_current_targets(settings: LoraSettings, spec: ModelSpec) -> tuple[LoraSettings, list[Problem]]:
    """Return the settings with experts and routers among `target_parameters`, where PEFT looks for them, and the
    problems that PEFT has with them."""
    conversion = spec.conversion
    if conversion is None or not conversion.targets or not conversion.fused:
        return settings, []
    moved = _moved(settings, conversion, spec)
    if not moved:
        return settings, []
    problems = list(_incomplete(moved, conversion))
    new = {dict(conversion.targets)[name] for name in moved.values()}
    ranks, alphas = dict(settings.rank_pattern.values), dict(settings.alpha_pattern.values)
    for parameter, together in conversion.fused:
        if parameter in new and len(together) > 1:  # the ranks of the parts add up, and the scaling stays
            ranks.setdefault(parameter, settings.r * len(together))
            alphas.setdefault(parameter, settings.lora_alpha * len(together))
    names = None if settings.target_modules is None else tuple(n for n in settings.target_modules if n not in moved)
    targets = settings.targets and replace(
        settings.targets, names=None if names is None else frozenset(names), moved=frozenset(moved.values())
    )
    return replace(
        settings,
        target_modules=names,
        targets=targets,
        target_parameters=tuple(sorted({*settings.target_parameters, *new})),
        rank_pattern=ModulePatterns(ranks),
        alpha_pattern=ModulePatterns(alphas),
    ), problems


def _moved(settings: LoraSettings, conversion: NameConversion, spec: ModelSpec) -> dict[str, str]:
    """Return the targets that name experts and routers, each with its last component."""
    earlier = [name for name, _ in conversion.targets]
    if settings.target_modules is not None:
        ends = {target: target.rpartition(".")[2] for target in settings.target_modules}
        return {target: end for target, end in ends.items() if end in earlier}
    if settings.targets is None or settings.targets.names is not None:
        return {}
    if settings.targets.all_linear:
        return {name: name for name in earlier}
    return {name: name for name in _matched(settings, conversion, spec)}


def _matched(settings: LoraSettings, conversion: NameConversion, spec: ModelSpec) -> Iterator[str]:
    """Yield the names that an expression of targets matches: in the base model, or in the place of the parameter that
    they have become."""
    expression = settings.targets.expression if settings.targets else None
    if expression is None:
        return
    full = [f"{module}.{name}" for module, shapes in spec.parameters.items() for name in shapes]
    ends = {name.rpartition(".")[2] for name in (*spec.names, *full) if name in expression}
    for earlier, parameter in conversion.targets:
        places = (name.removesuffix(f".{parameter}") for name in full if name.endswith(f".{parameter}"))
        if earlier in ends or any(f"{place}.{earlier}" in expression for place in places):
            yield earlier


def _incomplete(moved: dict[str, str], conversion: NameConversion) -> Iterator[Problem]:
    for parameter, together in conversion.fused:
        present = [name for name in together if name in moved.values()]
        if 0 < len(present) < len(together):
            missing = ", ".join(name for name in together if name not in present)
            expected = f"{missing} as well, because they are fused into {parameter}; PEFT requires it, too"
            yield Problem(f"{CONFIG_FILE}: target_modules", ", ".join(present), expected, "unsupported_feature")
