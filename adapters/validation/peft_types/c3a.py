"""C³A (https://arxiv.org/abs/2407.19342): the delta consists of circulant blocks, each given by one row."""

from collections.abc import Iterator, Mapping
from typing import Any

from adapters.errors import Problem
from adapters.peft.lora_tensors import problem
from adapters.validation.peft_types.base import Arrays, Circulant, Layer, PeftTypeConfig, key_table


class C3A(PeftTypeConfig):
    """A block of outputs is the sum over the blocks of inputs of their circular correlation with the kernel, divided by
    the number of inputs. The size of a layer's blocks is that of the last dimension of its kernel."""

    peft_type = "C3A"
    keys = key_table(
        {"block_size", "block_size_pattern", "layers_to_transform"},
        {"init_weights", "layers_pattern"},
        bias=("none",),
    )
    kinds = frozenset({"c3a_kernel"})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._block_size = self._rank("block_size", config.get("block_size", 256))
        self._sizes = self._patterns("block_size_pattern", self._rank)

    def _size_of(self, layer: Layer) -> int:
        return int(self._sizes.get(layer.name, self._block_size))

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        size = self._size_of(layer)
        return {"c3a_kernel": (layer.outputs // size, layer.inputs // size, size)}

    def layer_problems(self, layers: Mapping[str, Layer]) -> Iterator[Problem]:
        for layer in layers.values():
            size = self._size_of(layer)
            if layer.inputs % size or layer.outputs % size:
                sizes = f"a layer from {layer.inputs} to {layer.outputs}"
                yield problem(layer.name, sizes, f"multiples of the block size, {size}", "shape_mismatch")

    def rank(self, layer: Layer) -> int:
        return 0

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Circulant:
        return Circulant(tensors["c3a_kernel"])
