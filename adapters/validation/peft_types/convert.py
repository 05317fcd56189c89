"""Adapters of types other than LORA: validated as a LoRA is, then converted layer by layer."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from adapters.errors import AdapterInvalid, Problem
from adapters.model_spec import ModelSpec
from adapters.peft.config_reader import shown
from adapters.peft.digest import Scan, scan
from adapters.peft.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.peft.foreign_files import GATHERED
from adapters.peft.lora_tensors import lost_modules, problem, rank_of_module, rounding_notes
from adapters.peft.patterns import dotted_suffixes
from adapters.peft.safetensors_header import FLOAT_BYTES, INDEX_BYTES, read_header, stored_bytes
from adapters.peft.spellings import peft_names, repeated
from adapters.peft.targets import target_notes, unmatched
from adapters.peft.tensor_bytes import largest_finite, read_array
from adapters.peft.typed_folder import read_typed
from adapters.validation.peft_types.adalora import AdaLora
from adapters.validation.peft_types.base import PREFIX, Layer, Part, PeftTypeConfig, arrays_of
from adapters.validation.peft_types.beft import Beft
from adapters.validation.peft_types.c3a import C3A
from adapters.validation.peft_types.deft import Deft
from adapters.validation.peft_types.delora import DeLora
from adapters.validation.peft_types.gralora import GraLora
from adapters.validation.peft_types.hra import Hra
from adapters.validation.peft_types.ia3 import IA3
from adapters.validation.peft_types.lycoris import LoHa, LoKr
from adapters.validation.peft_types.miss import Miss
from adapters.validation.peft_types.oft import Boft, Oft
from adapters.validation.peft_types.road import Road
from adapters.validation.peft_types.shira import Shira
from adapters.validation.peft_types.unilora import UniLora
from adapters.validation.peft_types.vblora import VBLora
from adapters.validation.peft_types.vera import PVera, Vera

_TYPES: tuple[type[PeftTypeConfig], ...] = (
    AdaLora, Beft, Boft, C3A, Deft, DeLora, GraLora, Hra, IA3, LoHa, LoKr, Miss, Oft, PVera, Road, Shira, UniLora,
    VBLora, Vera,
)  # fmt: skip
PEFT_TYPES = {config_class.peft_type: config_class for config_class in _TYPES}


def read_converted(folder: Path, spec: ModelSpec, known_digest: str | None = None) -> "Converted | None":
    """Return the adapter in `folder`, validated against the base model; None when its type is not one of `PEFT_TYPES`.

    Raises `AdapterInvalid` with every problem that can be found without the conversion. With `known_digest`, the
    weights are not read, and their numbers not checked.
    """
    return read_typed(folder, type_config_of, partial(Converted, spec=spec, known_digest=known_digest))


def type_config_of(config: Mapping[str, Any]) -> PeftTypeConfig | None:
    """Return the parsed config of an adapter; None when its type is not one of `PEFT_TYPES`."""
    peft_type = config.get("peft_type")
    return PEFT_TYPES[peft_type](config) if isinstance(peft_type, str) and peft_type in PEFT_TYPES else None


class Converted:
    """The tensors of a weights file for the layers of the base model; `layers` are those that both have."""

    def __init__(
        self, path: Path, type_config: PeftTypeConfig, config: str, spec: ModelSpec, known_digest: str | None = None
    ):
        self.type_config = type_config
        stored = read_header(path, {**FLOAT_BYTES, **INDEX_BYTES}, allow_empty=True)
        self._scanned = Scan(known_digest, {}) if known_digest else scan(config, stored, path)
        self._path, self._spec = path, spec
        self._misnamed: list[str] = []
        own = {*type_config.kinds, *(name.rpartition(".")[2] for name in type_config.shared)}
        spellings = peft_names(stored, spec.modules.keys() | spec.parameters.keys(), own)
        self._repeated = repeated(spellings.names)
        self._reading_notes = [*spellings.notes, *rounding_notes(stored)]
        self._dtypes = {name: info.dtype for name, info in stored.items()}
        self.tensors = {spellings.names[name]: info for name, info in stored.items()}
        shapes = self._shapes_by_module()
        self._unknown = shapes.keys() - spec.modules.keys()
        self.layers = {
            module: Layer(module, *spec.modules[module], kinds)
            for module, kinds in shapes.items()
            if module in spec.modules
        }

    def _shapes_by_module(self) -> dict[str, dict[str, tuple[int, ...]]]:
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, info in self.tensors.items():
            module, kind = self._split(name)
            if module:
                found.setdefault(module, {})[kind] = info.shape
            elif name not in self.type_config.shared:
                self._misnamed.append(name)
        return found

    def _split(self, name: str) -> tuple[str, str]:
        """Return the module and the kind of a tensor; no module for a name that the type does not have."""
        parts = name.removeprefix(PREFIX).split(".") if name.startswith(PREFIX) else []
        for length in (1, 2):
            if len(parts) > length and (kind := ".".join(parts[-length:])) in self.type_config.kinds:
                return ".".join(parts[:-length]), kind
        return "", ""

    @property
    def rank(self) -> int:
        """The largest rank; 1 for an adapter without factors."""
        return max(1, *map(self.type_config.rank, self.layers.values()))

    @property
    def digest(self) -> str:
        """The version digest."""
        return self._scanned.digest

    def nbytes(self) -> int:
        """Return the size of all tensors in bytes, once they are loaded."""
        return sum(map(stored_bytes, self.tensors.values()))

    # -- checks ------------------------------------------------------------------------------------------------------

    def problems(self) -> list[Problem]:
        """Return every problem that can be found without the conversion."""
        expected = f"those of {self.type_config.peft_type} on linear layers"
        found = [problem(name, "a tensor of another kind", expected) for name in self._misnamed]
        found += [
            problem(name, f"another spelling of {shown(first, 200)}", "each tensor once", "malformed_file")
            for name, first in self._repeated.items()
        ]
        found += [*self._module_problems(), *self._dtype_problems()]
        if self.type_config.usable and self.layers:
            found += [
                *self._target_problems(),
                *self._shape_problems(),
                *self._rank_problems(),
                *self.type_config.layer_problems(self.layers),
            ]
        return found + list(self._value_problems())

    def _module_problems(self) -> Iterator[Problem]:
        if not self.layers:
            example = next(iter(self._spec.modules), "none")
            yield problem(WEIGHTS_FILE, "no module of the base model", f"modules such as {example}", "no_target")
            return
        for module in sorted(self._unknown):
            yield problem(PREFIX + module, "a module the base model lacks", "one it has", "base_mismatch")

    def _target_problems(self) -> Iterator[Problem]:
        """Yield every declared target without a tensor, and every tensor that PEFT would drop because no target
        declares it."""
        missing = self._untouched()
        if missing and self.layers:
            yield lost_modules(missing)
        if self.type_config.target_modules is None:
            return
        declared = set(self.type_config.target_modules)
        reached = {layer: declared.intersection(dotted_suffixes(layer)) for layer in self.layers}
        for layer in (self.layers[name] for name, suffixes in reached.items() if not suffixes):
            present, expected = layer.tensor(next(iter(layer.shapes))), "only modules that target_modules names"
            yield problem(present, "a module beyond them", expected, "no_target")
        untouched = declared.difference(*reached.values())
        for target in sorted(untouched - set(self.unmatched if untouched else ())):
            where = f"{CONFIG_FILE}: target_modules"
            yield problem(where, f"{shown(target)} without a tensor", "tensors for every target", "no_target")

    def _untouched(self) -> set[str]:
        """Return the modules that PEFT wraps and the file has no tensor for, without those whose name in
        `target_modules` has no tensor at all."""
        targets = self.type_config.targets
        if targets is None:
            return set()
        missing = targets.wrapped(self._spec.modules, "", self._spec.head) - self.layers.keys()
        if targets.names is None:
            return missing
        present = {suffix for layer in self.layers for suffix in dotted_suffixes(layer)} & targets.names
        return {module for module in missing if not present.isdisjoint(dotted_suffixes(module))}

    @property
    def unmatched(self) -> list[str]:
        """The targets that no module of the base model has."""
        return unmatched(self.type_config.target_modules or (), self._spec.names)

    def notes(self) -> list[str]:
        """Return sentences for the report about what was read in another way than it was written."""
        return [*target_notes(self.unmatched), *self._reading_notes]

    def _dtype_problems(self) -> Iterator[Problem]:
        for name, info in self.tensors.items():
            wanted = INDEX_BYTES if name.rpartition(".")[2] in self.type_config.indices else FLOAT_BYTES
            if info.dtype not in wanted:
                yield problem(name, info.dtype, " or ".join(wanted), "malformed_file")

    def _shape_problems(self) -> Iterator[Problem]:
        expected = self.type_config.shared_shapes(self.layers)
        for layer in self.layers.values():
            expected |= {layer.tensor(kind): shape for kind, shape in self.type_config.shapes(layer).items()}
            for kind in layer.shapes.keys() - self.type_config.shapes(layer).keys():
                yield problem(layer.tensor(kind), "a tensor", "none of its kind, by config and layer")
        for name, shape in expected.items():
            info = self.tensors.get(name)
            if info is None or info.shape != shape:
                found = "no tensor" if info is None else str(list(info.shape))
                is_empty = info is not None and 0 in info.shape and 0 not in shape
                expected_shape = f"{list(shape)}, or {GATHERED}" if is_empty else str(list(shape))
                yield problem(name, found, expected_shape, "shape_mismatch")

    def _rank_problems(self) -> Iterator[Problem]:
        for layer in self.layers.values():
            rank = self.type_config.rank(layer)
            if rank > self._spec.max_rank:
                where, found = rank_of_module(layer.name), f"{rank} as a LoRA"
                yield problem(where, found, f"at most {self._spec.max_rank}", "rank_too_large")

    def _value_problems(self) -> Iterator[Problem]:
        for name, largest in self._scanned.magnitudes.items():
            if not largest <= largest_finite(self._dtypes[name]):
                yield problem(name, "NaN or infinity", "finite numbers", "nonfinite")

    # -- conversion --------------------------------------------------------------------------------------------------

    def check_values(self) -> None:
        """Convert one layer after the other and discard the results. Raises `AdapterInvalid`."""
        for _ in self.parts():
            pass

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Convert one layer after the other. Raises `AdapterInvalid` with all problems after the last."""
        problems = []
        shared = {name: read_array(self._path, self.tensors[name]) for name in self.type_config.shared}
        for layer in self.layers.values():
            tensors = {kind: read_array(self._path, self.tensors[layer.tensor(kind)]) for kind in layer.shapes}
            try:
                with np.errstate(all="ignore"):  # what is not finite is a problem, not a warning
                    part = self.type_config.convert(layer, tensors, shared)
                    _check_finite(layer, part)
                yield layer.name, part
            except AdapterInvalid as error:
                problems += error.problems
        if problems:
            raise AdapterInvalid(problems)


def _check_finite(layer: Layer, part: Part) -> None:
    if not all(np.isfinite(array).all() for array in arrays_of(part)):
        found, expected = "NaN or infinity once multiplied out", "finite numbers"
        raise AdapterInvalid([problem(PREFIX + layer.name, found, expected, "nonfinite")])
