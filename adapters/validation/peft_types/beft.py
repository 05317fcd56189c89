"""BEFT (https://arxiv.org/abs/2509.15974): a vector that is added to the outputs of a linear layer."""

from adapters.traits import Traits
from adapters.validation.peft_types.base import AddedBias, Arrays, Layer, PeftTypeConfig, key_table


class Beft(PeftTypeConfig):
    """One vector `beft_bias` per layer, added to the outputs beside the layer's own bias."""

    peft_type = "BEFT"
    keys = key_table(set(), {"init_weights"})
    kinds = frozenset({"beft_bias"})

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        return {"beft_bias": (1, layer.outputs)}

    def rank(self, layer: Layer) -> int:
        return 0

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> AddedBias:
        return AddedBias(tensors["beft_bias"].flatten())

    def traits(self) -> Traits:
        return Traits(additive=False)
