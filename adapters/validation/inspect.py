"""Validation of an adapter against this base model: every tensor and every key is applied exactly, or the adapter is
refused with the full list of reasons."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from adapters.errors import AdapterInvalid, Problem
from adapters.model_spec import ModelSpec
from adapters.peft.config_reader import MAX_CONFIG_BYTES, canonical, read_json
from adapters.peft.files import CONFIG_FILE, FILES, WEIGHTS_FILE
from adapters.peft.lora_config import LoraSettings, parse_config
from adapters.peft.lora_tensors import (
    LoraTensors,
    parameter_factors,
    rank_of,
    scaling_of,
    shares_weight,
    token_target,
)
from adapters.peft.safetensors_header import INDEX_BYTES, ITEM_BYTES, read_header
from adapters.peft.tokenizer_files import check_tokenizer, read_tokenizer_files
from adapters.peft.weights import AdapterWeights, LoraFactors, TensorKind, TokenRows, version_digest
from adapters.records import Inspected
from adapters.traits import Traits
from adapters.validation.lora_checks import LoraChecks
from adapters.validation.peft_types.convert import Converted, read_converted


def inspect(folder: Path, spec: ModelSpec) -> Inspected:
    """Validate the adapter in `folder` against the base model. Raises `AdapterInvalid` with every problem found."""
    converted = read_converted(folder, spec)
    inspected = _inspect_lora(folder, spec) if converted is None else _inspect_converted(converted, folder, spec)
    own = read_tokenizer_files(folder).features
    inspected.report["features"] += own
    if own:
        inspected.report["traits"] = {**inspected.report.get("traits", {}), **dict.fromkeys(own, True)}
    return inspected


def _inspect_lora(folder: Path, spec: ModelSpec) -> Inspected:
    tensors, settings = _checked(folder, spec, with_tokenizer=True)
    applied = {"modules": len(tensors.touched()), "tensors": len(tensors.infos)}
    report: dict[str, Any] = {"applied": applied, "features": _features(tensors, settings, spec)}
    if traits := _traits(tensors, settings, spec).described():
        report["traits"] = traits
    digest = version_digest(settings.canonical, tensors.infos, tensors.path)
    return Inspected(digest, _rank(tensors, settings, spec), _last_parts(tensors.adapted()), tensors.nbytes(), report)


def _inspect_converted(adapter: Converted, folder: Path, spec: ModelSpec) -> Inspected:
    adapter.check_values()
    if problems := check_tokenizer(folder, spec.vocab_size):
        raise AdapterInvalid(problems)
    applied = {"modules": len(adapter.layers), "tensors": len(adapter.tensors)}
    report: dict[str, Any] = {"applied": applied, "features": list(adapter.type_config.features)}
    if traits := adapter.type_config.traits().described():
        report["traits"] = traits
    return Inspected(adapter.digest(), adapter.rank, _last_parts(adapter.layers), adapter.nbytes(), report)


def _last_parts(modules: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({module.rpartition(".")[2] for module in modules}))


def digest_of(folder: Path) -> str:
    """Return the version digest of the adapter in `folder`, independent of the base model.

    Raises `AdapterInvalid` for files that are not an adapter, and `OSError` where one cannot be read.
    """
    with (folder / CONFIG_FILE).open("rb") as file:
        config, problems = read_json(file.read(MAX_CONFIG_BYTES + 1))
    if config is None:
        raise AdapterInvalid(problems)
    tensors = read_header(folder / WEIGHTS_FILE, {**ITEM_BYTES, **INDEX_BYTES}, allow_empty=True)
    return version_digest(canonical(config), tensors, folder / WEIGHTS_FILE)


def load(folder: Path, spec: ModelSpec, digest: str | None = None, *, verify: bool = True) -> AdapterWeights:
    """Validate the adapter in `folder` as `inspect` does, and read its tensors into memory.

    With `digest`, the content must have this digest, and its numbers are not checked again, because they were checked
    when the version was stored. Without `verify` the caller knows that the content has this digest. Raises
    `AdapterInvalid`.
    """
    converted = read_converted(folder, spec)
    if converted is not None:
        return converted.weights(digest if digest and not verify else _expected(digest, converted.digest()))
    tensors, settings = _checked(folder, spec, with_numbers=digest is None)
    if digest is None or verify:
        digest = _expected(digest, version_digest(settings.canonical, tensors.infos, tensors.path))
    reader = _Reader(load_file(tensors.path), tensors, settings, spec)
    return AdapterWeights(
        digest,
        _rank(tensors, settings, spec),
        reader.factors(),
        tensors.nbytes(),
        biases=reader.biases(),
        embeddings=reader.embeddings(),
        parameters=reader.parameters(),
        replaced=reader.replaced(),
        tokens=reader.tokens(),
        vocab_size=tensors.vocab_size(spec),
    )


def _expected(digest: str | None, found: str) -> str:
    if digest not in (None, found):
        raise AdapterInvalid([Problem(WEIGHTS_FILE, f"content {found[:12]}", f"{digest:.12}", "malformed_file")])
    return found


def _checked(
    folder: Path, spec: ModelSpec, *, with_tokenizer: bool = False, with_numbers: bool = True
) -> tuple[LoraTensors, LoraSettings]:
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        raise AdapterInvalid([Problem(name, "no file", "a file", "malformed_file") for name in absent])
    with (folder / CONFIG_FILE).open("rb") as file:
        settings, problems = parse_config(file.read(MAX_CONFIG_BYTES + 1))
    try:
        tensors = LoraTensors.read(folder / WEIGHTS_FILE, spec)
    except AdapterInvalid as error:
        raise AdapterInvalid(problems + error.problems) from None
    problems += LoraChecks(tensors, spec).problems(settings, with_numbers)
    if with_tokenizer:
        problems += check_tokenizer(folder, tensors.vocab_size(spec) or spec.vocab_size)
    if problems or settings is None:
        raise AdapterInvalid(problems)
    return tensors, settings


def _rank(tensors: LoraTensors, settings: LoraSettings, spec: ModelSpec) -> int:
    """Return the largest rank; 1 for an adapter without factors."""
    linears = [rank_of(module, settings, spec) for module in tensors.modules]
    embeddings = [settings.rank(module) for module in tensors.embeddings]
    parameters = [
        settings.rank(f"{module}.{parameter}")
        for module, depths in tensors.stacked.items()
        for parameter, _ in parameter_factors(module, depths, settings, spec)
    ]
    return max([*linears, *embeddings, *parameters], default=1)


def _features(tensors: LoraTensors, settings: LoraSettings, spec: ModelSpec) -> list[str]:
    found = {
        "embedding": bool(tensors.embeddings),
        "saved_weights": bool(tensors.saved) and not settings.modules_to_save,
        "vocabulary": tensors.vocab_size(spec) is not None,
    }
    return [*settings.features, *(name for name, used in found.items() if used)]


def _traits(tensors: LoraTensors, settings: LoraSettings, spec: ModelSpec) -> Traits:
    """Return the config's traits, completed by those that show only in the tensors."""
    more = bool(tensors.embeddings or tensors.stacked or tensors.saved or tensors.tokens)
    traits = settings.traits()
    vocab_size = tensors.vocab_size(spec)
    if more:
        traits = replace(traits, additive=False, mergeable=False)
    return replace(traits, vocab_size=vocab_size)


@dataclass(frozen=True, slots=True)
class _Reader:
    """The validated tensors, converted to the fields of `AdapterWeights`."""

    loaded: dict[str, Tensor]
    names: LoraTensors
    settings: LoraSettings
    spec: ModelSpec

    def factors(self) -> dict[str, LoraFactors]:
        found = {}
        for module, names in self.names.modules.items():
            inputs, _ = self.spec.modules[module]
            factors = self._factors(names, ("A", "B"), scaling_of(module, self.settings, self.spec))
            found[module] = replace(factors, a=_unpooled(factors.a, inputs))
        return found

    def embeddings(self) -> dict[str, LoraFactors]:
        kinds: tuple[TensorKind, TensorKind] = ("embedding_A", "embedding_B")
        embeddings = self.names.embeddings.items()
        return {module: self._factors(names, kinds, self.settings.scaling(module)) for module, names in embeddings}

    def parameters(self) -> dict[str, dict[str, LoraFactors]]:
        return {
            module: {
                parameter: self._factors(names, ("A", "B"), self.settings.scaling(f"{module}.{parameter}"))
                for parameter, names in parameter_factors(module, depths, self.settings, self.spec)
            }
            for module, depths in self.names.stacked.items()
        }

    def _factors(
        self, names: dict[TensorKind, str], kinds: tuple[TensorKind, TensorKind], scaling: float
    ) -> LoraFactors:
        a, b = (self.loaded[names[kind]] for kind in kinds)
        bias, magnitude = (self.loaded[names[k]] if k in names else None for k in ("lora_bias", "magnitude"))
        return LoraFactors(a, b, scaling, bias, magnitude)

    def biases(self) -> dict[str, Tensor]:
        trained = {module: self.loaded[name] for module, name in self.names.biases.items()}
        wrapped = {m: names["base_bias"] for m, names in self.names.modules.items() if "base_bias" in names}
        return trained | {module: self.loaded[name] for module, name in wrapped.items()}

    def replaced(self) -> dict[str, dict[str, Tensor]]:
        found = {m: {p: self.loaded[name] for p, name in names.items()} for m, names in self.names.saved.items()}
        if shares_weight(self.spec, self.settings):
            _share(found, self.spec)
        return found

    def tokens(self) -> dict[str, TokenRows]:
        found = {}
        for module, name in self.names.tokens.items():
            _, ids = token_target(module, self.settings, self.spec)
            found[module] = TokenRows(ids, self.loaded[name])
        if self.spec.tied and self.spec.embedding in found:
            _, ids = token_target(self.spec.head, self.settings, self.spec)
            if ids in ((), found[self.spec.embedding].ids):
                found.setdefault(self.spec.head, found[self.spec.embedding])
        return found


def _share(replaced: dict[str, dict[str, Tensor]], spec: ModelSpec) -> None:
    """Give both ends of a tied vocabulary the weight that is stored for only one of them."""
    ends = [end for end in (spec.embedding, spec.head) if "weight" in replaced.get(end, {})]
    if len(ends) == 1:
        weight = replaced[ends[0]]["weight"]
        for end in (spec.embedding, spec.head):
            replaced.setdefault(end, {})["weight"] = weight


def _unpooled(a: Tensor, inputs: int) -> Tensor:
    """Return A for the unpooled input. QA-LoRA's A acts on the groups' means times the number of groups (PEFT's
    `QALoraLinearVariant`); any other A is returned unchanged."""
    groups = a.shape[1]
    if groups == inputs:
        return a
    size = inputs // groups
    return a.float().repeat_interleave(size, dim=1) * (groups / size)
