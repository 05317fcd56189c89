"""Validation of an adapter against this base model: every tensor and every key is applied exactly, or the adapter is
refused with the full list of reasons."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.errors import AdapterInvalid, Problem
from adapters.model_spec import ModelSpec
from adapters.peft.config_reader import MAX_CONFIG_BYTES, read_json
from adapters.peft.digest import Scan, scan, structure_of
from adapters.peft.earlier_names import with_current_targets
from adapters.peft.files import CONFIG_FILE, FILES, WEIGHTS_FILE
from adapters.peft.foreign_files import foreign_weights
from adapters.peft.lora_config import LoraSettings, parse_config
from adapters.peft.lora_tensors import (
    LoraTensors,
    expert_ranks,
    parameter_factors,
    rank_of,
)
from adapters.peft.safetensors_header import FLOAT_BYTES, INDEX_BYTES, read_header
from adapters.peft.targets import target_notes
from adapters.peft.tokenizer_files import BaseTokens, examine_tokenizer, own_end, read_tokenizer_files
from adapters.records import Inspected
from adapters.traits import Traits
from adapters.validation.lora_checks import LoraChecks
from adapters.validation.peft_types.convert import Converted, read_converted, type_config_of
from adapters.validation.virtual_tokens import Virtual, read_virtual, virtual_config_of


def inspect(folder: Path, spec: ModelSpec, base: BaseTokens | None = None, *, with_tokenizer: bool = True) -> Inspected:
    """Validate the adapter in `folder` against the base model, whose tokenizer is `base`. Raises `AdapterInvalid` with
    every problem found. The tokenizer files of a stored version need not be checked again."""
    check = _TokenizerCheck(folder, base, with_tokenizer)
    if (converted := read_converted(folder, spec)) is not None:
        inspected = _inspect_converted(converted, spec, check)
    elif (virtual := read_virtual(folder, spec)) is not None:
        inspected = _inspect_virtual(virtual, spec, check)
    else:
        inspected = _inspect_lora(folder, spec, check)
    files = read_tokenizer_files(folder)
    own = files.features or (("eos_token",) if own_end(files, base) else ())
    inspected.report["features"] += own
    if own:
        inspected.report["traits"] = {**inspected.report.get("traits", {}), **dict.fromkeys(own, True)}
    return inspected


@dataclass(slots=True)
class _TokenizerCheck:
    """The check of the tokenizer beside an adapter; `notes` are sentences for the report."""

    folder: Path
    base: BaseTokens | None
    wanted: bool
    notes: list[str] = field(default_factory=list)

    def problems(self, vocab_size: int | None) -> list[Problem]:
        """Return the problems, and keep the notes."""
        if not self.wanted:
            return []
        problems, self.notes = examine_tokenizer(self.folder, vocab_size, self.base)
        return problems


def _inspect_lora(folder: Path, spec: ModelSpec, check: _TokenizerCheck) -> Inspected:
    checked = check_lora(folder, spec, check_tokenizer=check.problems)
    tensors, settings = checked.tensors, checked.settings
    applied = {"modules": len(tensors.touched()), "tensors": len(tensors.infos)}
    report: dict[str, Any] = {"applied": applied, "features": _features(tensors, settings, spec)}
    if notes := [*target_notes(LoraChecks(tensors, spec).unmatched(settings)), *tensors.notes, *check.notes]:
        report["notes"] = notes
    if traits := _traits(tensors, settings, spec).described():
        report["traits"] = traits
    numbers = checked.magnitudes.values()
    return Inspected(
        checked.digest,
        checked.rank,
        _last_parts(tensors.adapted()),
        tensors.nbytes(),
        report,
        structure_of(settings.canonical, tensors.infos),
        max(numbers, default=0.0),
        not all(numbers),
    )


def _inspect_converted(adapter: Converted, spec: ModelSpec, check: _TokenizerCheck) -> Inspected:
    adapter.check_values()
    if problems := check.problems(spec.vocab_size):
        raise AdapterInvalid(problems)
    applied = {"modules": len(adapter.layers), "tensors": len(adapter.tensors)}
    report: dict[str, Any] = {"applied": applied, "features": list(adapter.type_config.features)}
    if notes := [*adapter.notes(), *check.notes]:
        report["notes"] = notes
    traits = adapter.type_config.traits()
    if not traits.additive:
        traits = replace(traits, owned=_last_parts(adapter.layers), scalable=False)
    if described := traits.described():
        report["traits"] = described
    return Inspected(adapter.digest, adapter.rank, _last_parts(adapter.layers), adapter.nbytes(), report)


def _inspect_virtual(adapter: Virtual, spec: ModelSpec, check: _TokenizerCheck) -> Inspected:
    adapter.check_values()
    if problems := check.problems(spec.vocab_size):
        raise AdapterInvalid(problems)
    report: dict[str, Any] = {
        "applied": {"modules": 0, "tensors": len(adapter.tensors)},
        "features": [adapter.config.peft_type.lower()],
        "traits": adapter.config.traits().described(),
    }
    if notes := [*adapter.notes(), *check.notes]:
        report["notes"] = notes
    return Inspected(adapter.digest, 1, (), adapter.nbytes(), report)


def _last_parts(modules: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({module.rpartition(".")[2] for module in modules}))


def check_files(folder: Path) -> None:
    """Check what does not depend on the base model: the files, the config's keys and the header of the weights. Raises
    `AdapterInvalid` with every problem found, and `OSError` where a file cannot be read."""
    _require_files(folder)
    with (folder / CONFIG_FILE).open("rb") as file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    config, _ = read_json(text)
    type_config = None if config is None else type_config_of(config) or virtual_config_of(config)
    problems = parse_config(text)[1] if type_config is None else type_config.all_problems()
    try:
        read_header(folder / WEIGHTS_FILE, {**FLOAT_BYTES, **INDEX_BYTES}, allow_empty=True)
    except AdapterInvalid as error:
        problems += error.problems
    if problems:
        raise AdapterInvalid(problems)


def _require_files(folder: Path) -> None:
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        raise AdapterInvalid([_absent(folder, name) for name in absent])


def _absent(folder: Path, name: str) -> Problem:
    files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    other = foreign_weights(files) if name == WEIGHTS_FILE else None
    if other is not None:
        return Problem(name, f"no file, but {other[0]}, {other[1]}", f"safetensors: {other[2]}", "malformed_file")
    below = sorted(path.parent.name for path in folder.glob(f"*/{name}"))[:3] if name == CONFIG_FILE else []
    where = f", but one in {', '.join(below)} (a folder for each named adapter)" if below else ""
    return Problem(name, f"no file{where}", "a file", "malformed_file")


@dataclass(frozen=True, slots=True)
class CheckedLora:
    """A LoRA that fits the base model."""

    tensors: LoraTensors
    settings: LoraSettings
    digest: str
    spec: ModelSpec
    magnitudes: Mapping[str, float]  # of its tensors, if their numbers were checked

    @property
    def rank(self) -> int:
        """The largest rank; 1 for an adapter without factors."""
        tensors, settings, spec = self.tensors, self.settings, self.spec
        linears = [rank_of(module, settings, spec) for module in tensors.modules]
        embeddings = [settings.rank(module) for module in tensors.embeddings]
        parameters = [
            settings.rank(f"{module}.{parameter}")
            for module, depths in tensors.stacked.items()
            for parameter, _ in parameter_factors(module, depths, settings, spec)
        ]
        experts = expert_ranks(tensors, settings)
        return max([*linears, *embeddings, *parameters, *experts], default=1)


def check_lora(
    folder: Path,
    spec: ModelSpec,
    *,
    check_tokenizer: Callable[[int | None], list[Problem]] | None = None,
    with_numbers: bool = True,
    known_digest: str | None = None,
) -> CheckedLora:
    """Validate the LoRA in `folder` against the base model. Raises `AdapterInvalid`.

    Reads the weights once, for their digest and their numbers; not at all if the caller knows the digest.
    """
    _require_files(folder)
    with (folder / CONFIG_FILE).open("rb") as file:
        settings, problems = parse_config(file.read(MAX_CONFIG_BYTES + 1))
    if settings is not None:
        settings, more = with_current_targets(settings, spec)
        problems += more
    try:
        tensors = LoraTensors.read(folder / WEIGHTS_FILE, spec, settings.form if settings else None)
    except AdapterInvalid as error:
        raise AdapterInvalid(problems + error.problems) from None
    scanned = (
        Scan(known_digest, {})
        if known_digest
        else scan(settings.canonical if settings else "", tensors.infos, tensors.path)
    )
    magnitudes = scanned.magnitudes if with_numbers and not known_digest else None
    problems += LoraChecks(tensors, spec).problems(settings, magnitudes)
    if check_tokenizer is not None:
        problems += check_tokenizer(tensors.vocab_size(spec) or spec.vocab_size)
    if problems or settings is None:
        raise AdapterInvalid(problems)
    return CheckedLora(tensors, settings, scanned.digest, spec, scanned.magnitudes)


def _features(tensors: LoraTensors, settings: LoraSettings, spec: ModelSpec) -> list[str]:
    found = {
        "target_parameters": bool(tensors.experts) and "target_parameters" not in settings.features,
        "embedding": bool(tensors.embeddings),
        "saved_weights": bool(tensors.saved) and not settings.modules_to_save,
        "vocabulary": tensors.vocab_size(spec) is not None,
    }
    return [*settings.features, *(name for name, used in found.items() if used)]


def _traits(tensors: LoraTensors, settings: LoraSettings, spec: ModelSpec) -> Traits:
    """Return the config's traits, completed by those that show only in the tensors."""
    more = bool(tensors.embeddings or tensors.stacked or tensors.experts or tensors.saved or tensors.tokens)
    traits = settings.traits()
    vocab_size = tensors.vocab_size(spec)
    if more:
        traits = replace(traits, additive=False, mergeable=False)
    if not traits.additive:
        traits = replace(traits, owned=_owned(tensors, spec), scalable=_is_scalable(tensors))
    return replace(traits, vocab_size=vocab_size)


def _owned(tensors: LoraTensors, spec: ModelSpec) -> tuple[str, ...]:
    """Return the last parts of the names of modules in which the adapter does more than add `s·B A x`."""
    owned = {module for module, kinds in tensors.modules.items() if kinds.keys() - {"A", "B"}}
    owned.update(tensors.embeddings, tensors.stacked, tensors.saved, tensors.biases, tensors.tokens)
    if spec.tied and not owned.isdisjoint((spec.embedding, spec.head)):
        owned |= {spec.embedding, spec.head}
    return _last_parts(owned)


def _is_scalable(tensors: LoraTensors) -> bool:
    """Return True if PEFT scales nothing but A and B of linears: saved modules, tokens and trained biases have no
    scale. DoRA's norm depends on it."""
    scaled = {kind for kinds in tensors.modules.values() for kind in kinds} - {"A", "B", "base_bias"}
    return not (scaled or tensors.embeddings or tensors.stacked)
