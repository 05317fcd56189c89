"""DeLoRA (https://arxiv.org/abs/2503.18225): a LoRA of normalised ranks, with a separately trained strength. Its
inputs are weighted by the norms of the base's columns, which are in the file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adapters.validation.peft_types.base import Arrays, Factors, Layer, PeftTypeConfig, key_table

_LEAST_NORM = 1e-4


class DeLora(PeftTypeConfig):
    """The delta is `B diag(strengths) A diag(w_norm)`, with strengths `lambda / r / (‖A's row‖ ‖B's column‖)`."""

    peft_type = "DELORA"
    keys = key_table(
        {"r", "rank_pattern", "layers_to_transform"},
        {"delora_lambda", "exclude_modules", "init_weights", "lambda_pattern", "layers_pattern", "module_dropout"},
        bias=("none",),
    )
    kinds = frozenset({"delora_A", "delora_B", "delora_lambda", "delora_w_norm"})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._r = self._rank("r", config.get("r", 8))
        self._ranks = self._patterns("rank_pattern", self._rank)

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        r = self.rank(layer)
        factors = {"delora_A": (r, layer.inputs), "delora_B": (layer.outputs, r)}
        return {**factors, "delora_lambda": (1,), "delora_w_norm": (layer.inputs,)}

    def rank(self, layer: Layer) -> int:
        return int(self._ranks.get(layer.name, self._r))

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Factors:
        a, b = tensors["delora_A"], tensors["delora_B"]
        norms = np.maximum(np.linalg.norm(a, axis=1), _LEAST_NORM) * np.maximum(np.linalg.norm(b, axis=0), _LEAST_NORM)
        strengths = tensors["delora_lambda"] / self.rank(layer) / norms
        return Factors(a * tensors["delora_w_norm"], b * strengths, 1.0)
