"""Adapters in memory: reads the tensors of a validated folder, converted to what the runtime applies."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from adapters.errors import AdapterInvalid, Problem
from adapters.model_spec import ModelSpec
from adapters.peft.earlier_names import ExpertTensor
from adapters.peft.files import WEIGHTS_FILE
from adapters.peft.lora_config import LoraSettings
from adapters.peft.lora_tensors import LoraTensors, parameter_factors, scaling_of, shares_weight, token_target
from adapters.peft.safetensors_header import TensorInfo
from adapters.peft.tensor_names import TensorKind
from adapters.validation.inspect import check_lora
from adapters.validation.peft_types import base as parts
from adapters.validation.peft_types.convert import Converted, read_converted
from adapters.validation.virtual_tokens import Virtual, read_virtual
from adapters.weights import (
    AdapterWeights,
    LoraFactors,
    PairRotation,
    Projection,
    SparseDelta,
    TokenRows,
    VirtualTokens,
)

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def load(folder: Path, spec: ModelSpec, digest: str | None = None, *, verify: bool = True) -> AdapterWeights:
    """Validate the adapter in `folder` as `inspect` does, and read its tensors into memory.

    With `digest`, the content must have this digest, and its numbers are not checked again, because they were checked
    when the version was stored. Without `verify` the caller knows that the content has this digest. Raises
    `AdapterInvalid`.
    """
    known = None if verify else digest
    converted = read_converted(folder, spec, known)
    if converted is not None:
        return _converted(converted, _expected(digest, converted.digest))
    virtual = read_virtual(folder, spec, known)
    if virtual is not None:
        return _virtual(virtual, _expected(digest, virtual.digest))
    checked = check_lora(folder, spec, with_numbers=digest is None, known_digest=known)
    found, tensors = _expected(digest, checked.digest), checked.tensors
    reader = _Reader(map_tensors(tensors.path, tensors.infos), tensors, checked.settings, spec)
    return AdapterWeights(
        found,
        checked.rank,
        reader.factors(),
        tensors.nbytes(),
        biases=reader.biases(),
        embeddings=reader.embeddings(),
        parameters=reader.parameters(),
        replaced=reader.replaced(),
        tokens=reader.tokens(),
        vocab_size=tensors.vocab_size(spec),
    )


def map_tensors(path: Path, infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Return the tensors of a file with this header as views of the mapped file; float64 is rounded to float32. (The
    `safe_open` of safetensors 0.8.0 leaks two Python objects for each tensor that it returns.)"""
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return {name: _view(mapped[info.start : info.end], info) for name, info in infos.items()}


def _view(stored: Tensor, info: TensorInfo) -> Tensor:
    dtype = _DTYPES[info.dtype]
    if stored.storage_offset() % dtype.itemsize:  # the format aligns headers, not what hand-written files have
        stored = stored.clone()
    tensor = stored.view(dtype).reshape(info.shape)
    return tensor.float() if dtype is torch.float64 else tensor


def _expected(digest: str | None, found: str) -> str:
    if digest not in (None, found):
        raise AdapterInvalid([Problem(WEIGHTS_FILE, f"content {found[:12]}", f"{digest:.12}", "malformed_file")])
    return found


def _converted(adapter: Converted, digest: str) -> AdapterWeights:
    """Return the weights of an adapter of a type other than LORA."""
    weights = AdapterWeights(digest, adapter.rank, {}, adapter.nbytes())
    for module, part in adapter.parts():
        _add(weights, module, part)
    return weights


def _add(weights: AdapterWeights, module: str, part: parts.Part) -> None:
    of = torch.from_numpy
    match part:
        case parts.Factors(a, b, scaling):
            weights.factors[module] = LoraFactors(of(a), of(b), scaling)
        case parts.ChannelScale(vector, of_input):
            (weights.input_scales if of_input else weights.output_scales)[module] = of(vector)
        case parts.AddedBias(vector):
            weights.added_biases[module] = of(vector)
        case parts.Reflections(vectors):
            weights.reflections[module] = of(vectors)
        case parts.Projection(left, right, filled):
            weights.projections[module] = Projection(of(left), of(right), of(filled))
        case parts.BlockRotation(blocks, scale):
            weights.block_rotations[module] = of(blocks)
            if scale is not None:
                weights.weight_scales[module] = of(scale)
        case parts.PairRotation(first, second, half):
            weights.pair_rotations[module] = PairRotation(of(first), of(second), half)
        case parts.SparseDelta(indices, values, shape):
            weights.sparse[module] = SparseDelta(of(indices), of(values), shape)
        case parts.Circulant(kernel):
            weights.circulant[module] = of(kernel)


def _virtual(adapter: Virtual, digest: str) -> AdapterWeights:
    """Return the weights of an adapter of virtual tokens, which has no factors."""
    config = adapter.config
    tokens = VirtualTokens(torch.from_numpy(adapter.values()), config.type.is_prefix, config.num_tokens)
    return AdapterWeights(digest, 1, {}, adapter.nbytes(), virtual=tokens)


@dataclass(frozen=True, slots=True)
class _Reader:
    """The validated tensors, converted to the fields of `AdapterWeights`."""

    loaded: dict[str, Tensor]
    tensors: LoraTensors
    settings: LoraSettings
    spec: ModelSpec

    def factors(self) -> dict[str, LoraFactors]:
        found = {}
        for module, names in self.tensors.modules.items():
            inputs, _ = self.spec.modules[module]
            factors = self._factors(names, ("A", "B"), scaling_of(module, self.settings, self.spec))
            found[module] = replace(factors, a=_unpooled(factors.a, inputs))
        return found

    def embeddings(self) -> dict[str, LoraFactors]:
        kinds: tuple[TensorKind, TensorKind] = ("embedding_A", "embedding_B")
        embeddings = self.tensors.embeddings.items()
        return {module: self._factors(names, kinds, self.settings.scaling(module)) for module, names in embeddings}

    def parameters(self) -> dict[str, dict[str, LoraFactors]]:
        experts = {
            module: {
                parameter: stacked_factors(
                    {place: self.loaded[name] for place, name in names.items()},
                    self.settings.scaling(f"{module}.{parameter}"),
                )
                for parameter, names in parameters.items()
            }
            for module, parameters in self.tensors.experts.items()
        }
        return experts | {
            module: {
                parameter: self._factors(names, ("A", "B"), self.settings.scaling(f"{module}.{parameter}"))
                for parameter, names in parameter_factors(module, depths, self.settings, self.spec)
            }
            for module, depths in self.tensors.stacked.items()
        }

    def _factors(
        self, names: dict[TensorKind, str], kinds: tuple[TensorKind, TensorKind], scaling: float
    ) -> LoraFactors:
        a, b = (self.loaded[names[kind]] for kind in kinds)
        bias, magnitude = (self.loaded[names[k]] if k in names else None for k in ("lora_bias", "magnitude"))
        return LoraFactors(a, b, scaling, bias, magnitude)

    def biases(self) -> dict[str, Tensor]:
        trained = {module: self.loaded[name] for module, name in self.tensors.biases.items()}
        wrapped = {m: names["base_bias"] for m, names in self.tensors.modules.items() if "base_bias" in names}
        return trained | {module: self.loaded[name] for module, name in wrapped.items()}

    def replaced(self) -> dict[str, dict[str, Tensor]]:
        found = {m: {p: self.loaded[name] for p, name in names.items()} for m, names in self.tensors.saved.items()}
        if shares_weight(self.spec, self.settings):
            _share(found, self.spec)
        return found

    def tokens(self) -> dict[str, TokenRows]:
        found = {}
        for module, name in self.tensors.tokens.items():
            _, ids = token_target(module, self.settings, self.spec)
            found[module] = TokenRows(ids, self.loaded[name])
        if self.spec.tied and self.spec.embedding in found:
            _, ids = token_target(self.spec.head, self.settings, self.spec)
            if ids in ((), found[self.spec.embedding].ids):
                found.setdefault(self.spec.head, found[self.spec.embedding])
        return found


def stacked_factors(tensors: Mapping[ExpertTensor, Tensor], scaling: float) -> LoraFactors:
    """Return the factors of a parameter as PEFT stacks those of single experts: the ranks of its parts side by side,
    so that B is block-diagonal."""
    parts: dict[tuple[str, int], list[tuple[int, Tensor]]] = {}
    for place, tensor in tensors.items():
        parts.setdefault((place.kind, place.part), []).append((place.expert, tensor))
    stacks = {key: torch.stack([t for _, t in sorted(own, key=itemgetter(0))]) for key, own in sorted(parts.items())}
    a = torch.cat([own for (kind, _), own in stacks.items() if kind == "A"], dim=1)
    blocks = [own for (kind, _), own in stacks.items() if kind == "B"]
    b = blocks[0].new_zeros(len(a), sum(own.shape[1] for own in blocks), a.shape[1])
    row = column = 0
    for own in blocks:
        b[:, row : row + own.shape[1], column : column + own.shape[2]] = own
        row, column = row + own.shape[1], column + own.shape[2]
    return LoraFactors(a.flatten(0, 1), b.permute(1, 2, 0).flatten(1), scaling)


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
