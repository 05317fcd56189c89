"""Uni-LoRA (https://arxiv.org/abs/2506.00799): factors whose numbers are all taken from one vector."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.errors import AdapterInvalid
from adapters.peft.lora_tensors import problem
from adapters.validation.peft_types.base import Array, Arrays, Factors, Layer, PeftTypeConfig, key_table

_THETA = "base_model.unilora_theta_d"


class UniLora(PeftTypeConfig):
    """Each number of A and B is an entry of the shared vector, times a scale that is in the file as well."""

    peft_type = "UNILORA"
    keys = key_table(
        {"r", "theta_d_length", "save_indices", "layers_to_transform"},
        {"fan_in_fan_out", "init_theta_d_bound", "init_weights", "layers_pattern", "proj_seed", "unilora_dropout"},
        bias=("none",),
    )
    indices = frozenset({"unilora_indices_A", "unilora_indices_B"})
    kinds = indices | {"unilora_scales_A", "unilora_scales_B"}
    shared = frozenset({_THETA})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._r = self._rank("r", config.get("r", 4))
        self._length = self._rank("theta_d_length", config.get("theta_d_length", 256))
        if config.get("save_indices") is not True:
            # A random generator on another machine may give other numbers.
            expected = "true, with the indices and scales saved"
            self._refuse("save_indices", config.get("save_indices"), expected, "unsupported_feature")

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        of_a, of_b = (self._r, layer.inputs), (layer.outputs, self._r)
        return {
            "unilora_indices_A": of_a,
            "unilora_indices_B": of_b,
            "unilora_scales_A": of_a,
            "unilora_scales_B": of_b,
        }

    def shared_shapes(self, layers: Mapping[str, Layer]) -> dict[str, tuple[int, ...]]:
        return {_THETA: (self._length,)}

    def rank(self, layer: Layer) -> int:
        return self._r

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Factors:
        a, b = (self._chosen(layer, tensors, side, shared[_THETA]) for side in "AB")
        return Factors(a, b, 1.0)

    def _chosen(self, layer: Layer, tensors: Arrays, side: str, theta: Array) -> Array:
        indices: NDArray[Any] = tensors[f"unilora_indices_{side}"].astype(np.int64)
        if indices.min() < 0 or indices.max() >= self._length:
            expected = f"numbers from 0 to {self._length - 1}"
            raise AdapterInvalid(
                [problem(layer.tensor(f"unilora_indices_{side}"), "others", expected, "malformed_file")]
            )
        chosen: Array = theta[indices] * tensors[f"unilora_scales_{side}"]
        return chosen
