"""IA³ (https://arxiv.org/abs/2205.05638): a vector that multiplies the inputs of feedforward layers, or the outputs
of other layers, together with their bias."""

from collections.abc import Mapping
from typing import Any

from adapters.traits import Traits
from adapters.validation.peft_types.base import Arrays, ChannelScale, Layer, PeftTypeConfig, key_table


class IA3(PeftTypeConfig):
    """One vector `ia3_l` per layer, for its inputs or its outputs."""

    peft_type = "IA3"
    keys = key_table({"feedforward_modules"}, {"exclude_modules", "fan_in_fan_out", "init_ia3_weights"})
    kinds = frozenset({"ia3_l"})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        value = config.get("feedforward_modules")
        listed = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if not (listed or value is None or isinstance(value, str)):
            self._refuse("feedforward_modules", value, "a list of module names", "malformed_file")
        self._feedforward: tuple[str, ...] | None = tuple(value) if listed and value is not None else None

    def _scales_input(self, layer: Layer) -> bool:
        """Return True for a layer of `feedforward_modules`, by the end of its name, as in PEFT. Where that is a
        regular expression, the tensor's shape decides."""
        if self._feedforward is None:
            return layer.shapes["ia3_l"][:1] == (1,)
        return layer.name.endswith(self._feedforward)

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        return {"ia3_l": (1, layer.inputs) if self._scales_input(layer) else (layer.outputs, 1)}

    def rank(self, layer: Layer) -> int:
        return 0

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> ChannelScale:
        return ChannelScale(tensors["ia3_l"].flatten(), self._scales_input(layer))

    def traits(self) -> Traits:
        return Traits(additive=False, mergeable=False)
