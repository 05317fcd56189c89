"""Virtual tokens of adapters: the embeddings of rows at the head of a sequence, or the keys and values that are copied
into its KV blocks."""

import torch
from torch import Tensor

from adapters.weights import VirtualTokens


def pack_virtual(tokens: VirtualTokens, dtype: torch.dtype) -> VirtualTokens:
    """Return the tokens as the device keeps them: rounded once, and with the layers of a prefix outermost."""
    values = tokens.values.permute(1, 2, 0, 3, 4) if tokens.is_prefix else tokens.values
    return VirtualTokens(values.to(dtype).contiguous(), tokens.is_prefix)


class VirtualTable:
    """Virtual tokens by slot. Writes go to slots that no running sequence refers to, so they may happen in another
    thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_slot: dict[int, VirtualTokens] = {}

    def __getitem__(self, slot: int) -> Tensor:
        """Return the packed values of the slot's adapter."""
        return self._by_slot[slot].values

    def write(self, slot: int, tokens: VirtualTokens | None) -> None:
        if tokens is None:
            self.clear(slot)
        else:
            self._by_slot[slot] = VirtualTokens(tokens.values.to(self._device), tokens.is_prefix)

    def clear(self, slot: int) -> None:
        """Release the tokens of `slot`."""
        self._by_slot.pop(slot, None)

    def tensors(self, slot: int) -> list[Tensor]:
        """Return the tensors that `slot` holds on the device."""
        return [self._by_slot[slot].values] if slot in self._by_slot else []

    def slots(self) -> set[int]:
        """Return the slots that hold virtual tokens."""
        return set(self._by_slot)
