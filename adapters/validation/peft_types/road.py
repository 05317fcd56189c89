"""RoAd (https://arxiv.org/abs/2409.00119): a linear's outputs are rotated and scaled in pairs of channels."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adapters.errors import Problem
from adapters.peft.lora_tensors import problem
from adapters.traits import Traits
from adapters.validation.peft_types.base import Array, Arrays, Layer, PairRotation, PeftTypeConfig, key_table

_SIZES = {"road_1": (1, 2), "road_2": (1, 1), "road_4": (2, 1)}  # parameters by outputs, as a fraction


class Road(PeftTypeConfig):
    """Channels of the first half of a group of `group_size` pair with those of the second: `y₁ ← c y₁ − s y₂`,
    `y₂ ← c y₂ + s y₁`, with `c = α cos θ` and `s = α sin θ`, of which the variants share some."""

    peft_type = "ROAD"
    keys = key_table({"variant", "group_size"}, {"init_weights"})
    kinds = frozenset({"road_theta", "road_alpha"})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._variant = config.get("variant", "road_1")
        if self._variant not in _SIZES:
            self._refuse("variant", self._variant, " or ".join(_SIZES), "unsupported_feature")
            self._variant = "road_1"
        self._group = self._rank("group_size", config.get("group_size", 64))
        if self._group % 2:
            self._refuse("group_size", self._group, "an even number", "malformed_file")

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        times, by = _SIZES[self._variant]
        size = layer.outputs * times // by
        return {"road_theta": (size,), "road_alpha": (size,)}

    def layer_problems(self, layers: Mapping[str, Layer]) -> Iterator[Problem]:
        for layer in layers.values():
            if layer.outputs % self._group:
                found, expected = f"{layer.outputs} outputs", f"a multiple of group_size, {self._group}"
                yield problem(layer.name, found, expected, "shape_mismatch")

    def rank(self, layer: Layer) -> int:
        return 0

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> PairRotation:
        (theta, theta_2), (alpha, alpha_2) = (self._sides(tensors[kind]) for kind in ("road_theta", "road_alpha"))
        return PairRotation(alpha * np.cos(theta), alpha_2 * np.sin(theta_2), self._group // 2)

    def _sides(self, values: Array) -> tuple[Array, Array]:
        """Return the parameters of the cosines and those of the sines, for every output."""
        if self._variant == "road_4":
            sides = values.reshape(-1, 2, self._group)
            return sides[:, 0].flatten(), sides[:, 1].flatten()
        if self._variant == "road_1":
            values = np.repeat(values.reshape(-1, self._group // 2), 2, axis=0).flatten()
        return values, values

    def traits(self) -> Traits:
        return Traits(additive=False)
