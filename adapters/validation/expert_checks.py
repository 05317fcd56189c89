"""Checks of targeted parameters, and of the factors of single experts, which earlier transformers had as modules."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from adapters.errors import Problem
from adapters.model_spec import ModelSpec
from adapters.peft.earlier_names import ExpertTensor
from adapters.peft.lora_config import LoraSettings
from adapters.peft.lora_tensors import (
    ExpertNames,
    LoraTensors,
    factor_shapes,
    lost_modules,
    names_module,
    parameter_names,
    problem,
    rank_of_module,
    targeted_parameters,
)

_FACTORS: tuple[Literal["A", "B"], ...] = ("A", "B")


@dataclass(frozen=True, slots=True)
class ExpertChecks:
    """The checks of one file: PEFT stacks the factors of single experts, so all experts must have theirs."""

    tensors: LoraTensors
    spec: ModelSpec
    settings: LoraSettings

    def problems(self) -> Iterator[Problem]:
        """Yield every problem."""
        for module, parameters in self.tensors.experts.items():
            for parameter, names in parameters.items():
                yield from self._misplaced(module, parameter, names) or self._stack(module, parameter, names)
        yield from self._lost()

    def _misplaced(self, module: str, parameter: str, names: ExpertNames) -> list[Problem]:
        first = next(iter(names.values()))
        if len(self.spec.parameters.get(module, {}).get(parameter, ())) != 3:
            return [problem(first, "an expert the base model lacks", "one it has", "base_mismatch")]
        if module in self.tensors.stacked:
            return [problem(first, "an expert's factor beside those of all experts", "one of both", "malformed_file")]
        if self.settings.use_dora or self.settings.lora_bias:
            return [problem(first, "DoRA or lora_bias on experts", "plain factors, as in PEFT")]
        if parameter not in targeted_parameters(module, self.settings, self.spec):
            return [problem(first, "a module beyond them", "only targeted modules", "no_target")]
        return []

    def _stack(self, module: str, parameter: str, names: ExpertNames) -> Iterator[Problem]:
        full, parts = f"{module}.{parameter}", next(iter(names)).parts
        rank, experts = self.settings.rank(full) // parts, self.spec.parameters[module][parameter][0]
        if rank > self.spec.max_rank:
            yield problem(rank_of_module(full), str(rank), f"at most {self.spec.max_rank}", "rank_too_large")
        wanted = {
            ExpertTensor(module, parameter, kind, parts, part, expert)
            for kind, part, expert in product(_FACTORS, range(parts), range(experts))
        }
        for place in sorted(names.keys() - wanted, key=names.__getitem__):
            yield problem(names[place], "an expert the base model lacks", f"{experts} experts", "base_mismatch")
        if missing := wanted - names.keys():
            found = f"{len(missing)} of {len(wanted)} factors missing"
            yield problem(full, found, "both factors of every expert, which PEFT stacks", "shape_mismatch")
        yield from self._shapes(module, parameter, {place: names[place] for place in names if place in wanted}, rank)

    def _shapes(self, module: str, parameter: str, names: ExpertNames, rank: int) -> Iterator[Problem]:
        a, b = factor_shapes(module, parameter, rank, self.spec) or ((0, 0), (0, 0))
        experts = self.spec.parameters[module][parameter][0]
        for place, name in names.items():
            expected = (a[0] // experts, a[1]) if place.kind == "A" else (b[0] // place.parts, b[1] // experts)
            if (shape := self.tensors.infos[name].shape) != expected:
                yield problem(name, str(list(shape)), str(list(expected)), "shape_mismatch")

    def _lost(self) -> Iterator[Problem]:
        """Yield one problem for each targeted parameter that PEFT wraps in modules of which the file has no tensors,
        while it has those of others."""
        tensors = self.tensors
        for target in self.settings.target_parameters:
            name = target.rpartition(".")[2]
            every = {m for m in self.spec.parameters if names_module(target, f"{m}.{name}") and self._has(m, name)}
            experts = {module for module, own in tensors.experts.items() if name in own}
            present = every & (experts | tensors.stacked.keys() | tensors.modules.keys())
            lost = {module for module in every - present if self.settings.reaches(module)}
            if present and lost:
                yield lost_modules(lost)

    def _has(self, module: str, parameter: str) -> bool:
        return parameter in parameter_names(module, self.spec)
