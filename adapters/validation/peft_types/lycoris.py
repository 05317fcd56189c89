"""LoHa and LoKr (https://arxiv.org/abs/2309.14859): products of small matrices, converted to LoRAs of a larger rank."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adapters.validation.peft_types.base import Array, Arrays, Factors, Layer, PeftTypeConfig, key_table

_SERVED = {"r", "alpha", "rank_pattern", "alpha_pattern", "layers_to_transform"}
_TRAINING = {"init_weights", "module_dropout", "rank_dropout"}
_HARMLESS = {"exclude_modules", "layers_pattern", "use_effective_conv2d"} | _TRAINING


class _Lycoris(PeftTypeConfig):
    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._r = self._rank("r", config.get("r", 8))
        self._default_alpha = self._alpha("alpha", config.get("alpha", 8))
        self._ranks = self._patterns("rank_pattern", self._rank)
        self._alphas = self._patterns("alpha_pattern", self._alpha)

    def _r_of(self, layer: Layer) -> int:
        return int(self._ranks.get(layer.name, self._r))

    def _scaling(self, layer: Layer) -> float:
        return self._alphas.get(layer.name, self._default_alpha) / self._r_of(layer)


class LoHa(_Lycoris):
    """The delta is `(W1a W1b) ⊙ (W2a W2b)`: each product of a column of W1a and a column of W2a is a column of B,
    and each product of a row of W1b and a row of W2b is a row of A."""

    peft_type = "LOHA"
    keys = key_table(_SERVED, _HARMLESS)
    kinds = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        r = self._r_of(layer)
        of_a, of_b = (layer.outputs, r), (r, layer.inputs)
        return {"hada_w1_a": of_a, "hada_w1_b": of_b, "hada_w2_a": of_a, "hada_w2_b": of_b}

    def rank(self, layer: Layer) -> int:
        return self._r_of(layer) ** 2

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Factors:
        a = tensors["hada_w1_b"][:, None, :] * tensors["hada_w2_b"][None, :, :]
        b = tensors["hada_w1_a"][:, :, None] * tensors["hada_w2_a"][:, None, :]
        return Factors(a.reshape(-1, layer.inputs), b.reshape(layer.outputs, -1), self._scaling(layer))


class LoKr(_Lycoris):
    """The delta is `W1 ⊗ W2`. With `W = L R`, where one factor is the identity if W is stored whole, the delta is
    `(L1 ⊗ L2) (R1 ⊗ R2)`, and its rank is the product of the two inner sizes."""

    peft_type = "LOKR"
    keys = key_table(_SERVED | {"decompose_both", "decompose_factor"}, _HARMLESS | {"rank_dropout_scale"})
    kinds = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._both = self._switch("decompose_both")
        self._factor = config.get("decompose_factor", -1)
        if type(self._factor) is not int:
            self._refuse("decompose_factor", self._factor, "a whole number", "malformed_file")

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, rows, columns, inner in self._matrices(layer):
            if inner is None:
                shapes[name] = (rows, columns)
            else:
                shapes |= {f"{name}_a": (rows, inner), f"{name}_b": (inner, columns)}
        return shapes

    def _matrices(self, layer: Layer) -> Iterator[tuple[str, int, int, int | None]]:
        """Yield name, rows and columns of W1 and W2, and the inner size of a matrix stored as a product, else None."""
        outputs, inputs = _factorised(layer.outputs, self._factor), _factorised(layer.inputs, self._factor)
        r = self._r_of(layer)
        for name, rows, columns, may in zip(("lokr_w1", "lokr_w2"), outputs, inputs, (self._both, True), strict=True):
            yield name, rows, columns, r if may and r < max(rows, columns) / 2 else None

    def rank(self, layer: Layer) -> int:
        return math.prod(min(rows, columns, inner or rows) for _, rows, columns, inner in self._matrices(layer))

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Factors:
        (left1, right1), (left2, right2) = (_halves(tensors, name) for name in ("lokr_w1", "lokr_w2"))
        return Factors(np.kron(right1, right2), np.kron(left1, left2), self._scaling(layer))


def _factorised(size: int, factor: int) -> tuple[int, int]:
    """Return PEFT's two factors of `size`: `factor` and the quotient where it divides `size`, else the largest
    divisor up to the square root, and up to `factor` unless that is -1, and its quotient."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(math.isqrt(size), factor)
    divisor = next((d for d in range(limit, 0, -1) if size % d == 0), 1)
    return divisor, size // divisor


def _halves(tensors: Arrays, name: str) -> tuple[Array, Array]:
    """Return W as a product `[rows, k] [k, columns]` of the least k that its shape allows."""
    whole = tensors.get(name)
    if whole is None:
        left, right = tensors[f"{name}_a"], tensors[f"{name}_b"]
        if left.shape[1] <= min(left.shape[0], right.shape[1]):
            return left, right
        whole = left @ right
    rows, columns = whole.shape
    return (np.eye(rows, dtype=np.float32), whole) if rows <= columns else (whole, np.eye(columns, dtype=np.float32))
