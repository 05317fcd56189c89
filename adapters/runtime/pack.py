"""Conversion of validated weights to the pool's layout, for one base model. Runs in a reader thread."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapters.errors import AdapterInvalid, Problem
from adapters.residency.slots import PAGE_COLUMNS, pages_of
from adapters.runtime.base_factors import with_base
from adapters.runtime.columns import RankColumns
from adapters.runtime.dora import dora_scale, output_vectors
from adapters.runtime.experts import ExpertFactors, is_gathered
from adapters.runtime.low_rank_weight import LowRankParameters, is_low_rank
from adapters.runtime.module_overrides import (
    EmbeddingDelta,
    LowRank,
    Replaced,
    TokenEmbedding,
    TokenLogits,
    nbytes,
    replaced,
)
from adapters.runtime.row_maps import RowMaps, row_maps_of
from adapters.runtime.virtual_tokens import pack_virtual
from adapters.weights import AdapterWeights, LoraFactors, VirtualTokens


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """A version in the pool's layout and dtype: the scaling (and DoRA's) is folded into the B of `columns` before
    rounding, and the columns are zero-padded to whole pages. `vectors` are output vectors by module, `input_vectors`
    the same for inputs, `row_maps` other functions of its rows, `module_overrides` all other changes to a module, in
    order of application, and `virtual` the tokens in front of every prompt. `nbytes` is the size in bytes,
    `extra_bytes` the part of it that is not in `columns`. `follows_from_shapes` tells that all of it was computed from
    the adapter and the shapes of the base model alone, not from the base's weights, and that it has a packed form
    (packed_format.py)."""

    num_pages: int
    columns: RankColumns
    nbytes: int
    vectors: dict[str, Tensor] = field(default_factory=dict)
    input_vectors: dict[str, Tensor] = field(default_factory=dict)
    module_overrides: dict[str, tuple[nn.Module, ...]] = field(default_factory=dict)
    vocab_size: int | None = None
    extra_bytes: int = 0
    follows_from_shapes: bool = False
    row_maps: dict[str, RowMaps] = field(default_factory=dict)
    virtual: VirtualTokens | None = None


def pack(
    weights: AdapterWeights, dtype: torch.dtype, bases: Mapping[str, nn.Module], *, pinned: bool = False
) -> PackedAdapter:
    """Convert validated weights for the modules in `bases` to the pool's layout and dtype; `pinned` selects pinned
    memory.

    Raises `AdapterInvalid` when a weight is finite in its own dtype but not in `dtype`.
    """
    given, weights = weights, with_base(weights, bases)
    num_pages = 0 if weights.virtual else pages_of(weights.rank)
    columns = RankColumns.zeros(num_pages * PAGE_COLUMNS, _widths(weights, bases), dtype, pinned=pinned)
    modules = columns.views()
    module_overrides = {
        name: tuple(own)
        for name in _overridden_modules(weights)
        if (own := [*_module_overrides(name, weights, dtype, bases)])
    }
    vectors = {}
    for name in weights.factors.keys() | weights.biases.keys() | weights.weight_scales.keys():
        factors = weights.factors.get(name)
        if _is_resized(factors, bases[name]):
            continue  # applied as a module override
        base = _effective(bases[name], module_overrides.get(name, ()))
        scale = weights.weight_scales.get(name) if factors is None else dora_scale(base, factors)
        if factors is not None:
            _fill(*modules[name], factors, scale)
        scale_shift = output_vectors(base, scale, factors, weights.biases.get(name))
        if scale_shift is not None:
            vectors[name] = scale_shift
            _check_finite(name, dtype, [scale_shift])
    if not _is_finite(columns.flat):
        for name, pair in modules.items():
            _check_finite(name, dtype, [*pair])
    for name, stack in module_overrides.items():
        _check_finite(name, dtype, [t for override in stack for t in (*override.parameters(), *override.buffers())])
    vectors |= _scaling_vectors(weights.output_scales)
    input_vectors = _scaling_vectors(weights.input_scales)
    row_maps = row_maps_of(weights)
    of_maps = [tensor for maps in row_maps.values() for tensor in maps.tensors()]
    virtual = None if weights.virtual is None else pack_virtual(weights.virtual, dtype)
    if virtual is not None:
        _check_finite("prompt_embeddings", dtype, [virtual.values])
    extra = sum(own.nbytes for own in (*vectors.values(), *input_vectors.values(), *of_maps))
    extra += nbytes(o for stack in module_overrides.values() for o in stack)
    extra += 0 if virtual is None else virtual.values.nbytes
    size = columns.flat.nbytes + extra
    return PackedAdapter(
        num_pages,
        columns,
        size,
        vectors,
        input_vectors,
        module_overrides,
        weights.vocab_size,
        extra,
        follows_from_shapes=not row_maps and _follows_from_shapes(given, module_overrides),
        row_maps=row_maps,
        virtual=virtual,
    )


def _follows_from_shapes(weights: AdapterWeights, module_overrides: Mapping[str, tuple[nn.Module, ...]]) -> bool:
    """Return True for plain factors and scales: all others use the base's weights, or are virtual tokens, whose file
    would repeat that of the adapter."""
    of_base = (weights.reflections, weights.projections, weights.added_biases, weights.biases, module_overrides)
    if weights.virtual or any(of_base) or _overridden_modules(weights) or weights.vocab_size is not None:
        return False
    return all(own.magnitude is None and own.bias is None for own in weights.factors.values())


def _scaling_vectors(scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scale and shift, `[2, channels]` in float32, by module."""
    return {name: torch.stack([scale, torch.zeros_like(scale)]) for name, scale in scales.items()}


def _overridden_modules(weights: AdapterWeights) -> set[str]:
    kinds = (weights.replaced, weights.parameters, weights.embeddings, weights.tokens)
    return set().union(*kinds)


def _module_overrides(
    name: str, weights: AdapterWeights, dtype: torch.dtype, bases: Mapping[str, nn.Module]
) -> Iterator[nn.Module]:
    base = bases[name]
    own = _changed(base, weights.replaced.get(name, {}), dtype)
    factors_of = weights.parameters.get(name, {})
    if own or not factors_of:
        own |= _with_factors(base, own, factors_of)
    elif is_gathered(base, factors_of):
        yield ExpertFactors(base.num_experts, factors_of, dtype)  # type: ignore[arg-type]
    elif is_low_rank(base, factors_of):
        yield LowRankParameters(base, factors_of, dtype)
    else:
        own = _with_factors(base, own, factors_of)
    if own:
        yield replaced(base, own, dtype)
    if _is_resized(factors := weights.factors.get(name), base):
        assert factors is not None
        yield LowRank(factors.a.to(dtype), (factors.b.float() * factors.scaling).to(dtype))
    if name in weights.embeddings:
        yield _embedding_delta(weights.embeddings[name], own.get("weight", base.weight), base, dtype)  # type: ignore[arg-type]
    if name in weights.tokens:
        ids, values = torch.tensor(weights.tokens[name].ids), weights.tokens[name].values.to(dtype)
        is_head = hasattr(base, "in_features")
        yield TokenLogits(ids, values) if is_head else TokenEmbedding(ids, values, _embedding_scale(base, dtype))


def _changed(base: nn.Module, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the parameters that differ from the base's. PEFT also stores the base's own weights beside an adapted
    embedding or head; these take no memory here."""
    rounded = {name: tensor.to(dtype) for name, tensor in parameters.items()}
    return {name: tensor for name, tensor in rounded.items() if not _same(tensor, getattr(base, name))}


def _same(tensor: Tensor, own: Tensor) -> bool:
    return tensor.shape == own.shape and tensor.dtype == own.dtype and torch.equal(tensor, own.cpu())


def _effective(base: nn.Module, module_overrides: tuple[nn.Module, ...]) -> nn.Module:
    """Return the module with the adapter's own weight, whose norm DoRA uses."""
    return module_overrides[0].module if module_overrides and isinstance(module_overrides[0], Replaced) else base


def _with_factors(base: nn.Module, own: Mapping[str, Tensor], factors: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """Return parameters with their factors added in float32. The layout of stacked factors is that of PEFT's
    `ParamWrapper`: A is `[experts, r, in]`, B `[out, r, experts]`."""
    found = {}
    for name, lora in factors.items():
        weight = own.get(name, getattr(base, name)).float()
        experts = weight.shape[0] if weight.dim() == 3 else 1
        a = lora.a.float().to(weight.device).reshape(experts, -1, lora.a.shape[1])
        b = lora.b.float().to(weight.device).reshape(lora.b.shape[0], -1, experts)
        order = "ore,eri->eio" if getattr(base, "is_transposed", False) else "ore,eri->eoi"
        delta = torch.einsum(order, b, a) * lora.scaling
        found[name] = weight + delta.reshape(weight.shape)
    return found


def _is_resized(factors: LoraFactors | None, base: nn.Module) -> bool:
    return factors is not None and factors.b.shape[0] != getattr(base, "out_features", factors.b.shape[0])


def _embedding_delta(factors: LoraFactors, weight: Tensor, base: nn.Module, dtype: torch.dtype) -> EmbeddingDelta:
    b = factors.b.float() * factors.scaling
    g = None
    if factors.magnitude is not None:  # PEFT's DoraEmbeddingLayer: the norm over the vocabulary
        norm = torch.linalg.vector_norm(torch.addmm(weight.T.float().cpu(), b, factors.a.float()), dim=1)
        g = factors.magnitude.float() / norm
        b = b * g[:, None]
    a, b = factors.a.T.to(dtype).contiguous(), b.T.to(dtype).contiguous()
    return EmbeddingDelta(a, b, g, _embedding_scale(base, dtype))


def _embedding_scale(base: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """Return the factor of the base's rows, on the host like the adapter's own tensors; None for 1."""
    scale = getattr(base, "embed_scale", None)
    return None if scale is None else torch.as_tensor(scale).to("cpu", dtype)


def _widths(weights: AdapterWeights, bases: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    factors = {name: own for name, own in weights.factors.items() if not _is_resized(own, bases[name])}
    return {name: (own.a.shape[1], own.b.shape[0]) for name, own in factors.items()}


def _fill(a: Tensor, b: Tensor, factors: LoraFactors, scale: Tensor | None) -> None:
    scaled = factors.b.float() * factors.scaling
    if scale is not None:
        scaled *= scale[:, None]
    rank = len(factors.a)
    a[:rank] = factors.a
    b[:rank] = scaled.to(b.dtype).T  # rounded first: a transposing copy is faster within one dtype


def _is_finite(flat: Tensor) -> bool:
    """Return whether all numbers are finite. `aminmax` propagates NaN, and is 20 times as fast as a sum of bf16."""
    return not flat.numel() or bool(torch.stack(torch.aminmax(flat)).isfinite().all())


def _check_finite(name: str, dtype: torch.dtype, tensors: list[Tensor]) -> None:
    if not all(tensor.to(dtype).isfinite().all() for tensor in tensors):
        raise AdapterInvalid(
            [Problem(name, f"weights beyond {dtype}", "a scaled B that the base's dtype can hold", "nonfinite")]
        )
