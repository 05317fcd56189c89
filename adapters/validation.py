"""Whether an adapter can be served by this base model: every tensor and every key is applied exactly, or the adapter is
refused with the full list of reasons."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters.errors import AdapterInvalid, Problem, ProblemCode
from adapters.format import (
    AdapterWeights,
    LoraFactors,
    TensorKind,
    parse_tensor_name,
    read_chunks,
    version_digest,
)
from adapters.peft_config import MAX_CONFIG_BYTES, LoraSettings, dotted_suffixes, parse_config, shown
from adapters.safetensors_header import read_header
from adapters.spec import ModelSpec
from adapters.store import CONFIG_FILE, FILES, WEIGHTS_FILE

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_KINDS: dict[str, str] = {
    "A": "lora_A",
    "B": "lora_B",
    "lora_bias": "bias of lora_B",
    "magnitude": "lora_magnitude_vector",
    "base_bias": "trained bias",
}
_FACTORS: tuple[TensorKind, ...] = ("A", "B")
_SCALED: tuple[TensorKind, ...] = ("B", "lora_bias")


@dataclass(frozen=True, slots=True)
class Inspected:
    """What is known of an adapter that passed: `rank` is the largest of its modules, `target_modules` the sorted last
    parts of their names, `nbytes` the size of its tensors in bytes, `report` what the API answers."""

    digest: str
    rank: int
    target_modules: tuple[str, ...]
    nbytes: int
    report: dict[str, Any]


def inspect(folder: Path, spec: ModelSpec) -> Inspected:
    """Check the adapter in `folder` against the base model. Raises `AdapterInvalid` with every problem found."""
    adapter, settings = _checked(folder, spec)
    targets = sorted({module.rpartition(".")[2] for module in adapter.modules})
    applied = {"modules": len(adapter.modules.keys() | adapter.biases.keys()), "tensors": len(adapter.tensors)}
    report: dict[str, Any] = {"applied": applied, "features": list(settings.features)}
    if traits := settings.traits().described():
        report["traits"] = traits
    digest = version_digest(settings.canonical, adapter.tensors, adapter.path)
    return Inspected(digest, adapter.rank(settings), tuple(targets), adapter.nbytes(), report)


def load(folder: Path, spec: ModelSpec, digest: str | None = None) -> AdapterWeights:
    """Check the adapter in `folder` as `inspect` does, and read its tensors into memory.

    With `digest`, the content must have it. Raises `AdapterInvalid`.
    """
    adapter, settings = _checked(folder, spec)
    found = version_digest(settings.canonical, adapter.tensors, adapter.path)
    if digest not in (None, found):
        raise AdapterInvalid([Problem(WEIGHTS_FILE, f"content {found[:12]}", f"{digest:.12}", "malformed_file")])
    tensors = load_file(adapter.path)
    factors = {module: _factors(tensors, names, settings.scaling(module)) for module, names in adapter.modules.items()}
    biases = {module: tensors[name] for module, name in adapter.biases.items()}
    biases |= {m: tensors[names["base_bias"]] for m, names in adapter.modules.items() if "base_bias" in names}
    return AdapterWeights(found, adapter.rank(settings), factors, adapter.nbytes(), biases)


def _factors(tensors: dict[str, Tensor], names: dict[TensorKind, str], scaling: float) -> LoraFactors:
    bias, magnitude = (tensors[names[kind]] if kind in names else None for kind in ("lora_bias", "magnitude"))
    return LoraFactors(tensors[names["A"]], tensors[names["B"]], scaling, bias, magnitude)


def _checked(folder: Path, spec: ModelSpec) -> tuple["_Candidate", LoraSettings]:
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        raise AdapterInvalid([Problem(name, "no file", "a file", "malformed_file") for name in absent])
    with (folder / CONFIG_FILE).open("rb") as file:
        settings, problems = parse_config(file.read(MAX_CONFIG_BYTES + 1))
    try:
        candidate = _Candidate(folder / WEIGHTS_FILE, spec)
    except AdapterInvalid as error:
        raise AdapterInvalid(problems + error.problems) from None
    problems += candidate.problems(settings)
    if problems or settings is None:
        raise AdapterInvalid(problems)
    return candidate, settings


class _Candidate:
    """The tensors of a weights file beside the modules of the base model.

    `modules` maps an adapted module to the names of its tensors, `{"A": …, "B": …}`, and `biases` a module that is not
    adapted to the name of its trained bias; after `problems` returned none, all are the base model's, every adapted
    one has both factors, and each has the vectors that the config declares.
    """

    def __init__(self, path: Path, spec: ModelSpec):
        self.path = path
        self.tensors = read_header(path)
        self.modules: dict[str, dict[TensorKind, str]] = {}
        self.biases: dict[str, str] = {}
        self._spec = spec
        self._misnamed = list(self._group())

    def rank(self, settings: LoraSettings) -> int:
        return max(map(settings.rank, self.modules))

    def nbytes(self) -> int:
        return sum(info.end - info.start for info in self.tensors.values())

    def problems(self, settings: LoraSettings | None) -> list[Problem]:
        """All of them; without settings, those that can be seen without."""
        found = [*self._misnamed, *self._module_problems()]
        if settings:
            found += [*self._target_problems(settings), *self._size_problems(settings)]
            found += [*self._vector_problems(settings), *self._bias_problems(settings)]
        return found + list(self._value_problems(settings))

    def _group(self) -> Iterator[Problem]:
        """Fill `modules` and `biases`; a tensor of no known kind, or the second of its kind, is a problem."""
        for name in self.tensors:
            parsed = parse_tensor_name(name)
            if parsed is None:
                yield _problem(name, "a tensor beyond plain LoRA", "lora_A.weight or lora_B.weight")
                continue
            module, kind = parsed
            if kind == "bias":
                self.biases[module] = name
            elif self.modules.setdefault(module, {}).setdefault(kind, name) != name:
                yield _problem(name, f"a second {_KINDS[kind]} of its module", "one", "malformed_file")

    def _module_problems(self) -> Iterator[Problem]:
        if self.modules.keys().isdisjoint(self._spec.modules):
            example = next(iter(self._spec.modules), "none")
            yield _problem(WEIGHTS_FILE, "no module of the base model", f"modules such as {example}", "no_target")
            return
        for module, names in self.modules.items():
            present = next(iter(names.values()))
            if module not in self._spec.modules:
                yield _problem(present, "a module the base model lacks", "one it has", "base_mismatch")
            missing = [_KINDS[kind] for kind in _FACTORS if kind not in names]
            if missing:
                yield _problem(present, f"no {' and no '.join(missing)} beside it", "both factors", "shape_mismatch")

    def _target_problems(self, settings: LoraSettings) -> Iterator[Problem]:
        """A declared target without a tensor, and a tensor that PEFT would drop because no target declares it."""
        if settings.target_modules is None:
            return
        declared = set(settings.target_modules)
        reached = set()
        for module, names in self.modules.items():
            suffixes = declared.intersection(dotted_suffixes(module))
            reached |= suffixes
            if not suffixes:
                expected = "only modules that target_modules names"
                yield _problem(next(iter(names.values())), "a module beyond them", expected, "no_target")
        for target in sorted(declared - reached):
            where = f"{CONFIG_FILE}: target_modules"
            yield _problem(where, f"{shown(target)} without a tensor", "tensors for every target", "no_target")

    def _size_problems(self, settings: LoraSettings) -> Iterator[Problem]:
        for module, names in self.modules.items():
            if module not in self._spec.modules:
                continue
            inputs, outputs = self._spec.modules[module]
            rank = settings.rank(module)
            if rank > self._spec.max_rank:
                where = f"{CONFIG_FILE}: rank of {module}"
                yield _problem(where, str(rank), f"at most {self._spec.max_rank}", "rank_too_large")
            matrices = {"A": (rank, inputs), "B": (outputs, rank)}
            for kind, name in names.items():
                yield from self._shape_problems(name, matrices.get(kind, (outputs,)))

    def _shape_problems(self, name: str, expected: tuple[int, ...]) -> Iterator[Problem]:
        shape = self.tensors[name].shape
        if shape != expected:
            yield _problem(name, str(list(shape)), str(list(expected)), "shape_mismatch")

    def _vector_problems(self, settings: LoraSettings) -> Iterator[Problem]:
        """An adapted module has exactly the vectors that the config declares."""
        for module, names in self.modules.items():
            if module not in self._spec.modules or not names.keys() & set(_FACTORS):
                continue
            has_bias = settings.bias != "none" and module in self._spec.biased
            declared = {"magnitude": settings.use_dora, "lora_bias": settings.lora_bias, "base_bias": has_bias}
            for kind, wanted in declared.items():
                if wanted and kind not in names:
                    present = next(iter(names.values()))
                    yield _problem(present, f"no {_KINDS[kind]} beside it", "all that is declared", "shape_mismatch")
                elif kind in names and not wanted:
                    yield _problem(names[kind], f"a {_KINDS[kind]}", "only what the config and the base model have")

    def _bias_problems(self, settings: LoraSettings) -> Iterator[Problem]:
        """With `bias="all"` every linear that is not adapted has its bias here too; nothing else may have one."""
        served = self._spec.biased - self.modules.keys() if settings.bias == "all" else frozenset()
        for module, name in self.biases.items():
            if module in served:
                yield from self._shape_problems(name, (self._spec.modules[module][1],))
            else:
                yield _problem(name, "a trained bias", 'with bias="all", those of linear layers that are served')
        for module in sorted(served - self.biases.keys()):
            yield _problem(f"{WEIGHTS_FILE}: {module}", "no bias", 'one, as bias="all" declares', "shape_mismatch")

    def _value_problems(self, settings: LoraSettings | None) -> Iterator[Problem]:
        """NaN and infinities, also those that would appear when B is multiplied by its scaling in its own dtype."""
        scalings = self._scalings(settings) if settings else {}
        for name, largest in self._magnitudes():
            if not math.isfinite(largest):
                yield _problem(name, "NaN or infinity", "finite numbers", "nonfinite")
            elif largest * scalings.get(name, 1.0) > torch.finfo(_DTYPES[self.tensors[name].dtype]).max:
                yield _problem(name, "infinity once scaled by alpha", "finite numbers", "nonfinite")

    def _scalings(self, settings: LoraSettings) -> dict[str, float]:
        """The scaling by the name of what is scaled."""
        return {
            names[kind]: settings.scaling(module)
            for module, names in self.modules.items()
            if module in self._spec.modules
            for kind in _SCALED
            if kind in names
        }

    def _magnitudes(self) -> Iterator[tuple[str, float]]:
        """The largest absolute value of each tensor; NaN or infinity where it holds one."""
        with self.path.open("rb") as file:
            for name, info in self.tensors.items():
                chunks = (torch.frombuffer(chunk, dtype=_DTYPES[info.dtype]) for chunk in read_chunks(file, info))
                # aminmax lets a NaN through to both ends and is several times as fast as isfinite.
                extremes = [torch.stack(torch.aminmax(chunk)) for chunk in chunks]
                yield name, float(torch.cat(extremes).abs().max())


def _problem(where: str, found: str, expected: str, code: ProblemCode = "unsupported_feature") -> Problem:
    return Problem(shown(where, 200), found, expected, code)
