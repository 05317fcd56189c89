"""Virtual tokens of adapters: the embeddings of rows at the head of a sequence, or the keys and values that are copied
into its KV blocks."""

from dataclasses import replace

import torch
from torch import Tensor

from adapters.weights import VirtualTokens


def pack_virtual(tokens: VirtualTokens, dtype: torch.dtype) -> VirtualTokens:
    """Return the tokens as the device keeps them: rounded once, and with the layers of a prefix outermost."""
    values = tokens.values.permute(1, 2, 0, 3, 4) if tokens.is_prefix else tokens.values
    return replace(tokens, values=values.to(dtype).contiguous())


class VirtualTable:
    """Virtual tokens by slot. Writes go to slots that no running sequence refers to, so they may happen in another
    thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_slot: dict[int, VirtualTokens] = {}

    def __getitem__(self, slot: int) -> Tensor:
        """Return the packed values of the slot's adapter."""
        return self._by_slot[slot].values

    def problem(self, slots: tuple[int, ...], number: int) -> str | None:
        """Return why a sequence with `number` virtual tokens cannot use the adapters in `slots`; None if it can."""
        found = sum(self._by_slot[slot].number for slot in slots if slot in self._by_slot)
        return None if found == number else f"the adapter has {found} virtual tokens, and the sequence {number}"

    def write(self, slot: int, tokens: VirtualTokens | None) -> None:
        if tokens is None:
            self.clear(slot)
        else:
            self._by_slot[slot] = replace(tokens, values=tokens.values.to(self._device))

    def clear(self, slot: int) -> None:
        """Release the tokens of `slot`."""
        self._by_slot.pop(slot, None)

    def tensors(self, slot: int) -> list[Tensor]:
        """Return the tensors that `slot` holds on the device."""
        return [self._by_slot[slot].values] if slot in self._by_slot else []

    def slots(self) -> set[int]:
        """Return the slots that hold virtual tokens."""
        return set(self._by_slot)
