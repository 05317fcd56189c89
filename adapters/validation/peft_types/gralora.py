"""GraLoRA of PEFT: k × k blocks of the weight, each with factors of its own."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adapters.errors import Problem
from adapters.peft.lora_tensors import problem
from adapters.validation.peft_types.base import Arrays, Factors, Layer, PeftTypeConfig, key_table


class GraLora(PeftTypeConfig):
    """The delta of block (j, n) is `B[j, n] A[n, j]` of rank r/k; a LoRA has a rank for every block, r·k together, and
    `hybrid_r` more for the plain LoRA beside them."""

    peft_type = "GRALORA"
    keys = key_table(
        {"r", "alpha", "gralora_k", "hybrid_r", "layers_to_transform"},
        {"fan_in_fan_out", "gralora_dropout", "init_weights", "layers_pattern"},
        bias=("none",),
    )
    kinds = frozenset({"gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._r = self._rank("r", config.get("r", 32))
        self._k = self._rank("gralora_k", config.get("gralora_k", 2))
        self._hybrid = self._rank("hybrid_r", config["hybrid_r"]) if config.get("hybrid_r") else 0
        self._scaling = self._alpha("alpha", config.get("alpha", 64)) / (self._r + self._hybrid)
        if self._r % self._k:
            self._refuse("r", self._r, f"a multiple of gralora_k, which is {self._k}", "malformed_file")

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        k, r = self._k, self._r
        shapes: dict[str, tuple[int, ...]] = {
            "gralora_A": (k, layer.inputs // k, r),
            "gralora_B": (k, r, layer.outputs // k),
        }
        if self._hybrid:
            shapes["gralora_A_general.weight"] = (self._hybrid, layer.inputs)
            shapes["gralora_B_general.weight"] = (layer.outputs, self._hybrid)
        return shapes

    def layer_problems(self, layers: Mapping[str, Layer]) -> Iterator[Problem]:
        for layer in layers.values():
            if layer.inputs % self._k or layer.outputs % self._k:
                sizes = f"a layer from {layer.inputs} to {layer.outputs}"
                yield problem(layer.name, sizes, f"multiples of gralora_k, {self._k}", "shape_mismatch")

    def rank(self, layer: Layer) -> int:
        return self._r * self._k + self._hybrid

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Factors:
        k, sub = self._k, self._r // self._k
        of_a = tensors["gralora_A"].reshape(k, layer.inputs // k, k, sub)  # [n, i, j, s]
        of_b = tensors["gralora_B"].reshape(k, k, sub, layer.outputs // k)  # [j, n, s, o]
        blocks_a = np.zeros((k, k, sub, k, layer.inputs // k), np.float32)  # [n, j, s, n, i]
        blocks_b = np.zeros((k, layer.outputs // k, k, k, sub), np.float32)  # [j, o, n, j, s]
        for block in range(k):
            blocks_a[block, :, :, block] = of_a[block].transpose(1, 2, 0)
            blocks_b[block, :, :, block] = of_b[block].transpose(2, 0, 1)
        a, b = blocks_a.reshape(-1, layer.inputs), blocks_b.reshape(layer.outputs, -1)
        if self._hybrid:
            a = np.concatenate([a, tensors["gralora_A_general.weight"]])
            b = np.concatenate([b, tensors["gralora_B_general.weight"]], axis=1)
        return Factors(a, b, self._scaling)
