"""DEFT of PEFT: a part of the weight's output space is removed, and filled anew."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adapters.traits import Traits
from adapters.validation.peft_types.base import Arrays, Layer, PeftTypeConfig, Projection, key_table


class Deft(PeftTypeConfig):
    """The delta is `Q (s·R − Mᵀ W)` with Q = P and M = relu(P), or with Q = M the orthogonal factor of P ("qr"). With
    `para`, there is no R. The difference to W is a LoRA whose A is computed with W."""

    peft_type = "DEFT"
    keys = key_table(
        {"r", "alpha", "decomposition_method", "para", "layers_to_transform"},
        {"deft_dropout", "exclude_modules", "fan_in_fan_out", "init_scale", "init_weights", "layers_pattern"},
        bias=("none",),
    )
    kinds = frozenset({"deft_P", "deft_R"})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._r = self._rank("r", config.get("r", 8))
        self._own_alpha = self._alpha("alpha", config["alpha"]) if config.get("alpha") else None
        self._para = self._switch("para")
        self._method = config.get("decomposition_method", "relu")
        if self._method not in ("relu", "qr"):
            self._refuse("decomposition_method", self._method, '"relu" or "qr"', "unsupported_feature")

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        r = self.rank(layer)
        projection: dict[str, tuple[int, ...]] = {"deft_P": (layer.outputs, r)}
        return projection if self._para else {**projection, "deft_R": (r, layer.inputs)}

    def rank(self, layer: Layer) -> int:
        return min(self._r, layer.outputs)

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Projection:
        p = tensors["deft_P"]
        left = p if self._method == "relu" else np.linalg.qr(p)[0].astype(np.float32)
        right = np.maximum(p, 0) if self._method == "relu" else left
        scaling = np.float32(1 if self._own_alpha is None else self._own_alpha / self.rank(layer))
        filled = np.zeros((self.rank(layer), layer.inputs), np.float32) if self._para else tensors["deft_R"] * scaling
        return Projection(left, right, filled)

    def traits(self) -> Traits:
        return Traits(additive=False)
