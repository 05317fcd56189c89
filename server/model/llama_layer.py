"""The parts of a decoder layer of Llama's structure."""

from dataclasses import dataclass

from torch import nn

from adapters.runtime.layers import LoRAGroup


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The parts of one layer. `groups` are query-key-value, output, gate-up and down; `norms` are those before
    attention and before the MLP. `index` is the layer's index in the KV cache; a window of None sees all keys."""

    index: int
    groups: tuple[LoRAGroup, LoRAGroup, LoRAGroup, LoRAGroup]
    norms: tuple[nn.Module, nn.Module]
    head_dim: int
    scale: float
    window: int | None
