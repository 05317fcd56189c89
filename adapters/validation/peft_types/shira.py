"""SHiRA of PEFT: a few entries of the weight are changed, wherever they are."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.errors import AdapterInvalid
from adapters.peft.lora_tensors import problem
from adapters.validation.peft_types.base import Arrays, Layer, PeftTypeConfig, SparseDelta, key_table


class Shira(PeftTypeConfig):
    """As many entries as a LoRA of rank r has numbers, with their rows and columns in the file."""

    peft_type = "SHIRA"
    keys = key_table({"r"}, {"fan_in_fan_out", "init_weights", "mask_type", "random_seed"})
    indices = frozenset({"shira_indices"})
    kinds = indices | {"shira_weight"}

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._r = self._rank("r", config.get("r", 32))

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        count = self._r * (layer.inputs + layer.outputs)
        return {"shira_weight": (count,), "shira_indices": (2, count)}

    def rank(self, layer: Layer) -> int:
        return 0

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> SparseDelta:
        indices: NDArray[Any] = tensors["shira_indices"].astype(np.int64)
        limits = np.array([[layer.outputs], [layer.inputs]])
        if (indices < 0).any() or (indices >= limits).any():
            expected = f"rows below {layer.outputs} and columns below {layer.inputs}"
            raise AdapterInvalid([problem(layer.tensor("shira_indices"), "others", expected, "malformed_file")])
        return SparseDelta(indices, tensors["shira_weight"], (layer.outputs, layer.inputs))
