"""Whether an adapter can be served by this base model: every tensor and every key is applied exactly, or the adapter is
refused with the full list of reasons."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from adapters.errors import AdapterInvalid, Problem, ProblemCode
from adapters.format import AdapterWeights, LoraFactors, parse_tensor_name, read_chunks, version_digest
from adapters.peft_config import MAX_CONFIG_BYTES, LoraSettings, dotted_suffixes, parse_config, shown
from adapters.safetensors_header import read_header
from adapters.spec import ModelSpec
from adapters.store import CONFIG_FILE, FILES, WEIGHTS_FILE

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


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
    applied = {"modules": len(adapter.modules), "tensors": len(adapter.tensors)}
    report = {"applied": applied, "features": list(settings.features)}
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
    factors = {
        module: LoraFactors(tensors[names["A"]], tensors[names["B"]], settings.scaling(module))
        for module, names in adapter.modules.items()
    }
    return AdapterWeights(found, adapter.rank(settings), factors, adapter.nbytes())


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

    `modules` maps a module to the names of its tensors, `{"A": …, "B": …}`; after `problems` returned none, every
    module has both and is one of the base model's.
    """

    def __init__(self, path: Path, spec: ModelSpec):
        self.path = path
        self.tensors = read_header(path)
        self.modules: dict[str, dict[str, str]] = {}
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
        return found + list(self._value_problems(settings))

    def _group(self) -> Iterator[Problem]:
        """Fill `modules`; a tensor that is no LoRA factor, or the second of its kind, is a problem."""
        for name in self.tensors:
            parsed = parse_tensor_name(name)
            if parsed is None:
                yield _problem(name, "a tensor beyond plain LoRA", "lora_A.weight or lora_B.weight")
                continue
            module, factor = parsed
            if self.modules.setdefault(module, {}).setdefault(factor, name) != name:
                yield _problem(name, f"a second lora_{factor} of its module", "one", "malformed_file")

    def _module_problems(self) -> Iterator[Problem]:
        if self.modules.keys().isdisjoint(self._spec.modules):
            example = next(iter(self._spec.modules), "none")
            yield _problem(WEIGHTS_FILE, "no module of the base model", f"modules such as {example}", "no_target")
            return
        for module, names in self.modules.items():
            present = next(iter(names.values()))
            if module not in self._spec.modules:
                yield _problem(present, "a module the base model lacks", "one it has", "base_mismatch")
            if len(names) == 1:
                partner = "lora_B" if "A" in names else "lora_A"
                yield _problem(present, f"no {partner} beside it", "both factors", "shape_mismatch")

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
            expected = {"A": (rank, inputs), "B": (outputs, rank)}
            for factor, name in names.items():
                shape = self.tensors[name].shape
                if shape != expected[factor]:
                    yield _problem(name, str(list(shape)), str(list(expected[factor])), "shape_mismatch")

    def _value_problems(self, settings: LoraSettings | None) -> Iterator[Problem]:
        """NaN and infinities, also those that would appear when B is multiplied by its scaling in its own dtype."""
        scalings = self._scalings(settings) if settings else {}
        for name, largest in self._magnitudes():
            if not math.isfinite(largest):
                yield _problem(name, "NaN or infinity", "finite numbers", "nonfinite")
            elif largest * scalings.get(name, 1.0) > torch.finfo(_DTYPES[self.tensors[name].dtype]).max:
                yield _problem(name, "infinity once scaled by alpha", "finite numbers", "nonfinite")

    def _scalings(self, settings: LoraSettings) -> dict[str, float]:
        """The scaling by the name of the B tensor."""
        known = self.modules.keys() & self._spec.modules.keys()
        return {self.modules[m]["B"]: settings.scaling(m) for m in known if "B" in self.modules[m]}

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
