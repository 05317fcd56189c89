"""VB-LoRA (https://arxiv.org/abs/2405.15179): the factors of a LoRA, tiled from a bank of vectors shared by all layers.

A tile is a mixture of the `topk` vectors with the largest logits, weighted by their softmax. The file has the logits,
or the vectors' indices with all weights but the last, which is 1 minus their sum.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.errors import AdapterInvalid, Problem
from adapters.peft.lora_tensors import problem
from adapters.validation.peft_types.base import Array, Arrays, Factors, Layer, PeftTypeConfig, key_table

_BANK = "base_model.vblora_vector_bank"
_LOGITS = ("vblora_logits_A", "vblora_logits_B")
_MAX_TOPK = 256  # bounds the work: a mixture costs topk additions


class VBLora(PeftTypeConfig):
    """Factors that are mixtures of the vectors in `vblora_vector_bank`."""

    peft_type = "VBLORA"
    keys = key_table(
        {"r", "num_vectors", "vector_length", "topk", "save_only_topk_weights", "layers_to_transform"},
        {"exclude_modules", "fan_in_fan_out", "layers_pattern"}
        | {"init_logits_std", "init_vector_bank_bound", "vblora_dropout"},
        bias=("none",),
    )
    indices = frozenset(f"{kind}_topk_indices" for kind in _LOGITS)
    kinds = frozenset(_LOGITS) | indices | {f"{kind}_topk_weights" for kind in _LOGITS}
    shared = frozenset({_BANK})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._r = self._rank("r", config.get("r", 4))
        self._num_vectors = self._rank("num_vectors", config.get("num_vectors", 256))
        self._vector_length = self._rank("vector_length", config.get("vector_length", 256))
        self._topk = self._rank("topk", config.get("topk", 2))
        self._topk_only = self._switch("save_only_topk_weights")
        if self._topk > min(self._num_vectors, _MAX_TOPK):
            expected = f"at most {_MAX_TOPK}, and no more than num_vectors"
            self._refuse("topk", self._topk, expected, "unsupported_feature")

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        length = self._vector_length
        tiles = (self._r, layer.inputs // length), (layer.outputs // length, self._r)
        shapes: dict[str, tuple[int, ...]] = {}
        for kind, shape in zip(_LOGITS, tiles, strict=True):
            if self._topk_only:
                shapes[f"{kind}_topk_indices"] = (*shape, self._topk)
                shapes[f"{kind}_topk_weights"] = (*shape, self._topk - 1)
            else:
                shapes[kind] = (*shape, self._num_vectors)
        return shapes

    def shared_shapes(self, layers: Mapping[str, Layer]) -> dict[str, tuple[int, ...]]:
        return {_BANK: (self._num_vectors, self._vector_length)}

    def layer_problems(self, layers: Mapping[str, Layer]) -> Iterator[Problem]:
        for layer in layers.values():
            if layer.inputs % self._vector_length or layer.outputs % self._vector_length:
                sizes = f"a layer from {layer.inputs} to {layer.outputs}"
                yield problem(layer.name, sizes, f"multiples of {self._vector_length}", "shape_mismatch")

    def rank(self, layer: Layer) -> int:
        return self._r

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Factors:
        a, b = (self._mixed(layer, tensors, kind, shared[_BANK]) for kind in _LOGITS)
        return Factors(a.reshape(self._r, -1), b.swapaxes(1, 2).reshape(-1, self._r), 1.0)

    def _mixed(self, layer: Layer, tensors: Arrays, kind: str, bank: Array) -> Array:
        """Return the tiles of one factor, `[*tiles, vector_length]`."""
        if self._topk_only:
            indices = self._indices(layer, tensors[f"{kind}_topk_indices"], kind)
            weights = tensors[f"{kind}_topk_weights"]
            # As in PEFT, where a weight below 0 also gives NaN.
            logits = np.log(np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], axis=-1))
        else:
            indices = np.argsort(-tensors[kind], axis=-1, kind="stable")[..., : self._topk]
            logits = np.take_along_axis(tensors[kind], indices, axis=-1)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        tiles = np.zeros((*indices.shape[:2], self._vector_length), np.float32)
        for chosen, weight in zip(np.moveaxis(indices, -1, 0), np.moveaxis(weights, -1, 0), strict=True):
            tiles += weight[..., None] * bank[chosen]
        return tiles

    def _indices(self, layer: Layer, stored: NDArray[Any], kind: str) -> NDArray[Any]:
        indices = stored.astype(np.int64)
        repeated = (np.diff(np.sort(indices, axis=-1), axis=-1) == 0).any()
        if repeated or indices.min() < 0 or indices.max() >= self._num_vectors:
            name = layer.tensor(f"{kind}_topk_indices")
            expected = f"different numbers from 0 to {self._num_vectors - 1} for each tile"
            raise AdapterInvalid([problem(name, "others", expected, "malformed_file")])
        return indices
