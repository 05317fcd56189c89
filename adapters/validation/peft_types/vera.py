"""VeRA (https://arxiv.org/abs/2310.11454): two random projections shared by all layers, scaled per layer.

The delta is `diag(lambda_b) B diag(lambda_d) A`, of which a layer uses the leading rows of B and columns of A.
"""

from collections.abc import Mapping
from typing import Any

from adapters.validation.peft_types.base import Arrays, Factors, Layer, PeftTypeConfig, key_table

_A, _B = "base_model.vera_A", "base_model.vera_B"
_PVERA_A, _PVERA_B = "base_model.pvera_A", "base_model.pvera_B"


class Vera(PeftTypeConfig):
    """Trained scales per layer, and the projections in the file."""

    peft_type = "VERA"
    keys = key_table(
        {"r", "save_projection", "layers_to_transform"},
        {"d_initial", "fan_in_fan_out", "init_weights", "layers_pattern", "projection_prng_key", "vera_dropout"},
        bias=("none",),
    )
    kinds = frozenset({"vera_lambda_b", "vera_lambda_d"})
    shared = frozenset({_A, _B})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._r = self._rank("r", config.get("r", 256))
        if config.get("save_projection", True) is not True:
            # A random generator on another machine may give other numbers.
            self._refuse(
                "save_projection", config["save_projection"], "true, with the projections saved", "unsupported_feature"
            )

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        return {"vera_lambda_b": (layer.outputs,), "vera_lambda_d": (self._r,)}

    def shared_shapes(self, layers: Mapping[str, Layer]) -> dict[str, tuple[int, ...]]:
        inputs, outputs = _largest(layers)
        return {_A: (self._r, inputs), _B: (outputs, self._r)}

    def rank(self, layer: Layer) -> int:
        return self._r

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Factors:
        b = tensors["vera_lambda_b"][:, None] * shared[_B][: layer.outputs] * tensors["vera_lambda_d"]
        return Factors(shared[_A][:, : layer.inputs], b, 1.0)


class PVera(Vera):
    """PVeRA (https://arxiv.org/abs/2512.07703): a VeRA whose hidden vector has a distribution. Its mean, the first half
    of `pvera_A` and `pvera_lambda_d`, is the result unless the config asks for samples."""

    peft_type = "PVERA"
    keys = key_table(
        {"r", "save_projection", "layers_to_transform"},
        {"d_initial", "fan_in_fan_out", "generator_seed", "init_weights", "layers_pattern"}
        | {"projection_prng_key", "pvera_dropout"},
        bias=("none",),
        sample_at_inference=(),
    )
    kinds = frozenset({"pvera_lambda_b", "pvera_lambda_d"})
    shared = frozenset({_PVERA_A, _PVERA_B})

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        return {"pvera_lambda_b": (layer.outputs,), "pvera_lambda_d": (2 * self._r,)}

    def shared_shapes(self, layers: Mapping[str, Layer]) -> dict[str, tuple[int, ...]]:
        inputs, outputs = _largest(layers)
        return {_PVERA_A: (2 * self._r, inputs), _PVERA_B: (outputs, self._r)}

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Factors:
        means = tensors["pvera_lambda_d"][: self._r]
        b = tensors["pvera_lambda_b"][:, None] * shared[_PVERA_B][: layer.outputs] * means
        return Factors(shared[_PVERA_A][: self._r, : layer.inputs], b, 1.0)


def _largest(layers: Mapping[str, Layer]) -> tuple[int, int]:
    inputs, outputs = zip(*((layer.inputs, layer.outputs) for layer in layers.values()), strict=True)
    return max(inputs), max(outputs)
