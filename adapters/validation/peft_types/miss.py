"""MiSS (https://arxiv.org/abs/2409.15371): inputs whose indices are equal modulo r are added up, and the r sums are
projected by a block `[r, out]`; the columns of a mini block are repeated."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adapters.errors import Problem
from adapters.peft.lora_tensors import problem
from adapters.validation.peft_types.base import Arrays, Factors, Layer, PeftTypeConfig, key_table


class Miss(PeftTypeConfig):
    """The delta's A is the fixed matrix of the sums, its B the transposed block."""

    peft_type = "MISS"
    keys = key_table(
        {"r", "mini_r", "layers_to_transform"},
        {"exclude_modules", "layers_pattern", "miss_dropout"},
        bias=("none",),
        init_weights=(True, "mini"),  # "bat" multiplies the block by the base's weights
    )
    kinds = frozenset({"miss_block"})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._r = self._rank("r", config.get("r", 64))
        mini_r = self._rank("mini_r", config.get("mini_r", 1))
        self._mini_r = mini_r if config.get("init_weights") == "mini" else None

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        return {"miss_block": (self._r, self._mini_r or layer.outputs)}

    def layer_problems(self, layers: Mapping[str, Layer]) -> Iterator[Problem]:
        for layer in layers.values():
            if self._mini_r and layer.outputs % self._mini_r:
                outputs = f"{layer.outputs} outputs"
                yield problem(layer.name, outputs, f"a multiple of {self._mini_r}", "shape_mismatch")

    def rank(self, layer: Layer) -> int:
        return self._r

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Factors:
        block = tensors["miss_block"]
        sums = np.tile(np.eye(self._r, dtype=np.float32), -(-layer.inputs // self._r))[:, : layer.inputs]
        return Factors(sums, np.tile(block, layer.outputs // block.shape[1]).T, 1.0)
