"""Conversion of what an adapter has in terms of the base's weights to plain factors and biases, once, in float32."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from adapters.runtime.dora import dense_weight
from adapters.weights import AdapterWeights, LoraFactors, Projection


def with_base(weights: AdapterWeights, bases: Mapping[str, nn.Module]) -> AdapterWeights:
    """Return `weights` with reflections and projections as factors, and with added biases as whole ones."""
    factors = dict(weights.factors)
    for name, vectors in weights.reflections.items():
        factors[name] = _of_reflections(dense_weight(bases[name]), vectors)
    for name, projection in weights.projections.items():
        factors[name] = _of_projection(dense_weight(bases[name]), projection)
    biases = weights.biases | {name: _summed(bases[name], own) for name, own in weights.added_biases.items()}
    return replace(weights, factors=factors, biases=biases, reflections={}, projections={}, added_biases={})


def _of_reflections(weight: Tensor, vectors: Tensor) -> LoraFactors:
    """Return `W (H₁ … Hᵣ − I)` as factors. With `R = H₁ … Hₖ₋₁`, the next reflection adds `−2 (R u) uᵀ` to the product,
    so that A has the vectors u, and B is W times the columns `−2 R u`."""
    columns = torch.empty_like(vectors)
    for index, vector in enumerate(vectors):
        reflected = vector + columns[:index].T @ (vectors[:index] @ vector)  # R u
        columns[index] = -2 * reflected
    return LoraFactors(vectors, (weight.float() @ columns.T.to(weight.device)).cpu(), 1.0)


def _of_projection(weight: Tensor, projection: Projection) -> LoraFactors:
    removed = projection.right.T.to(weight.device) @ weight.float()
    return LoraFactors(projection.filled - removed.cpu(), projection.left, 1.0)


def _summed(base: nn.Module, added: Tensor) -> Tensor:
    own: Tensor | None = base.bias  # type: ignore[assignment]
    return added if own is None else own.float().cpu() + added
