"""OFT (https://arxiv.org/abs/2306.07280) and BOFT (https://arxiv.org/abs/2311.06243): a linear's inputs are rotated, in
blocks of neighbouring channels, before they meet the base's weight."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adapters.errors import Problem
from adapters.peft.lora_tensors import problem
from adapters.traits import Traits
from adapters.validation.peft_types.base import Array, Arrays, BlockRotation, Layer, PeftTypeConfig, key_table

_MAX_TERMS = 64  # bounds the work
_SINCE = "one of PEFT 0.14 or later, where OFT has another form than before"


class Oft(PeftTypeConfig):
    """The inputs `x [blocks, b]` become `x R`, with R by Cayley's transform of a skew-symmetric matrix: exactly, or by
    the first terms of its Neumann series. The file has the matrices' upper triangles."""

    peft_type = "OFT"
    keys = key_table(
        {"r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"}
        | {"layers_to_transform"},
        {"exclude_modules", "fan_in_fan_out", "init_weights", "layers_pattern", "module_dropout"},
        bias=("none",),
    )
    kinds = frozenset({"oft_R.weight"})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._blocks = self._rank("r", config["r"]) if config.get("r") else 0
        size = config.get("oft_block_size")
        self._size = self._rank("oft_block_size", size) if size else 0
        if size is None or bool(self._blocks) == bool(self._size):
            expected = f"one of r and oft_block_size, the other 0; an adapter is {_SINCE}"
            self._refuse("oft_block_size", size, expected, "malformed_file")
        self._shared = self._switch("block_share")
        self._eps = self._alpha("eps", config.get("eps", 6e-5)) if self._switch("coft") else None
        terms = self._rank("num_cayley_neumann_terms", config.get("num_cayley_neumann_terms", 5))
        if terms > _MAX_TERMS:
            self._refuse("num_cayley_neumann_terms", terms, f"at most {_MAX_TERMS}", "unsupported_feature")
        self._terms = terms if config.get("use_cayley_neumann", True) is not False else None

    def _block_size(self, layer: Layer) -> int:
        if self._size:
            return _divisor_near(layer.inputs, self._size)
        return layer.inputs // _divisor_near(layer.inputs, self._blocks)

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        size = self._block_size(layer)
        return {"oft_R.weight": (1 if self._shared else layer.inputs // size, size * (size - 1) // 2)}

    def rank(self, layer: Layer) -> int:
        return 0

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> BlockRotation:
        skew = _skew(tensors["oft_R.weight"], self._block_size(layer))
        if self._eps is not None:
            skew = _bounded(skew, self._eps)
        blocks = _cayley(skew) if self._terms is None else _neumann(skew, self._terms)
        return BlockRotation(blocks.astype(np.float32), None)

    def traits(self) -> Traits:
        return Traits(additive=False)


class Boft(PeftTypeConfig):
    """The inputs become `x R`, with R by Cayley's transform of a block's skew-symmetric part; then the products with
    the weight, without the bias, are multiplied by `boft_s`. More than one butterfly factor is refused: PEFT has them
    with an extension for CUDA alone, and ignores the key without it."""

    peft_type = "BOFT"
    keys = key_table(
        {"boft_block_size", "boft_block_num", "layers_to_transform"},
        {"boft_dropout", "boft_n_butterfly_factor", "exclude_modules", "fan_in_fan_out", "init_weights"}
        | {"layers_pattern"},
        bias=("none",),
    )
    kinds = frozenset({"boft_R", "boft_s"})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        size, blocks = config.get("boft_block_size", 4), config.get("boft_block_num", 0)
        self._size = self._rank("boft_block_size", size) if size else 0
        self._blocks = self._rank("boft_block_num", blocks) if blocks else 0
        if bool(self._size) == bool(self._blocks):
            expected = "one of boft_block_size and boft_block_num, the other 0"
            self._refuse("boft_block_size", size, expected, "malformed_file")

    def _block_size(self, layer: Layer) -> int:
        return self._size or layer.inputs // self._blocks

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        size = self._block_size(layer)
        blocks = layer.inputs // size if size else 0
        return {"boft_R": (1, blocks, size, size), "boft_s": (layer.outputs, 1)}

    def layer_problems(self, layers: Mapping[str, Layer]) -> Iterator[Problem]:
        for layer in layers.values():
            divisor = self._size or self._blocks
            if layer.inputs % divisor:
                yield problem(layer.name, f"{layer.inputs} inputs", f"a multiple of {divisor}", "shape_mismatch")

    def rank(self, layer: Layer) -> int:
        return 0

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> BlockRotation:
        data = tensors["boft_R"][0]
        blocks = _cayley(0.5 * (data - data.transpose(0, 2, 1)))
        return BlockRotation(blocks.astype(np.float32), tensors["boft_s"].flatten())

    def traits(self) -> Traits:
        return Traits(additive=False)


def _divisor_near(inputs: int, wanted: int) -> int:
    """Return the divisor of `inputs` that PEFT takes for `wanted`: the nearest, and of two the smaller one."""
    if wanted >= inputs:
        return inputs
    higher = next(d for d in range(wanted, inputs + 1) if inputs % d == 0)
    lower = next(d for d in range(wanted, 0, -1) if inputs % d == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _skew(triangles: Array, size: int) -> Array:
    skew = np.zeros((len(triangles), size, size), np.float32)
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns] = triangles
    return skew - skew.transpose(0, 2, 1)


def _bounded(skew: Array, eps: float) -> Array:
    """Return the matrices with norms of at most `eps` by the square root of their number, as COFT does."""
    limit = np.float32(eps / np.sqrt(len(skew)))
    norms = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
    return np.where(norms <= limit, skew, skew * (limit / np.maximum(norms, limit))).astype(np.float32)


def _cayley(skew: Array) -> Array:
    """Return `(I − Q)(I + Q)⁻¹`."""
    one = np.eye(skew.shape[-1])
    solved: Array = np.linalg.solve((one + skew).transpose(0, 2, 1), (one - skew).transpose(0, 2, 1))
    return solved.transpose(0, 2, 1)


def _neumann(skew: Array, terms: int) -> Array:
    """Return `I + 2Q + 2Q² + …` as PEFT ends it, with the last power once. PEFT computes four terms as three."""
    total = np.broadcast_to(np.eye(skew.shape[-1], dtype=np.float32), skew.shape).copy()
    if terms > 1:
        total += 2 * skew
    if terms > 2:
        power = skew @ skew
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total += 2 * power
        total += power @ skew
    return total
