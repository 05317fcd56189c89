"""A decoder layer of Llama's structure, taken apart."""

from dataclasses import dataclass

from torch import nn

from adapters.runtime.layers import LoRAGroup


@dataclass(frozen=True, slots=True)
class LayerParts:
    """`groups` are query-key-value, output, gate-up and down; `norms` those before attention and before the MLP.
    `index` is the layer's in the KV cache; a window of None sees all keys."""

    index: int
    groups: tuple[LoRAGroup, LoRAGroup, LoRAGroup, LoRAGroup]
    norms: tuple[nn.Module, nn.Module]
    head_dim: int
    scale: float
    window: int | None
