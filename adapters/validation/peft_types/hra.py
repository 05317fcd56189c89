"""HRA (https://arxiv.org/abs/2405.17484): inputs are reflected along r vectors before they meet the base's weight."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adapters.traits import Traits
from adapters.validation.peft_types.base import Array, Arrays, Layer, PeftTypeConfig, Reflections, key_table


class Hra(PeftTypeConfig):
    """The weight is `W H₁ … Hᵣ` with `H = I − 2 u uᵀ`, u the columns of `hra_u` at unit length; with `apply_GS`, the
    columns are made orthogonal first. The difference to W is a LoRA whose B is computed with W."""

    peft_type = "HRA"
    keys = key_table(
        {"r", "apply_GS", "layers_to_transform"},
        {"exclude_modules", "init_weights", "layers_pattern"},
        bias=("none",),
    )
    kinds = frozenset({"hra_u"})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._r = self._rank("r", config.get("r", 8))
        self._orthogonal = self._switch("apply_GS")

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        return {"hra_u": (layer.inputs, self._r)}

    def rank(self, layer: Layer) -> int:
        return self._r

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Reflections:
        vectors = np.ascontiguousarray(tensors["hra_u"].T)
        if self._orthogonal:
            _orthogonalise(vectors)
        return Reflections(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    def traits(self) -> Traits:
        return Traits(additive=False)


def _orthogonalise(vectors: Array) -> None:
    """Make the rows orthogonal in place, by Gram and Schmidt's procedure in PEFT's order."""
    for index in range(len(vectors)):
        for before in vectors[:index]:
            vectors[index] -= (before @ vectors[index]) * before
        vectors[index] /= np.linalg.norm(vectors[index])
