"""Row maps: changes of a linear that are neither A and B nor vectors, as functions of the adapter's rows.

A map before the base takes the adapter's rows of the input and returns those that the base sees (OFT); a map after it
takes its rows of the output and returns others (RoAd); an added one takes those of the input and returns what is added
to the output (SHiRA, C³A). All are computed in float32 and rounded once.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.kernels.segments import SlotRows
from adapters.weights import AdapterWeights, PairRotation, SparseDelta

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # a product with dense rows is stable


class RotatedBlocks(nn.Module):
    """`x @ block` for every block of neighbouring channels: `blocks [n, b, b]`, or one for all."""

    blocks: Tensor

    def __init__(self, blocks: Tensor) -> None:
        super().__init__()
        self.register_buffer("blocks", blocks.float())

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.unflatten(x.float(), -1, (-1, self.blocks.shape[-1])).transpose(0, 1)
        return torch.matmul(parts, self.blocks).transpose(0, 1).reshape_as(x).to(x.dtype)


class RotatedPairs(nn.Module):
    """`first ⊙ y + second ⊙ (−y₂, y₁)`; see `PairRotation`."""

    first: Tensor
    second: Tensor

    def __init__(self, rotation: PairRotation) -> None:
        super().__init__()
        self._half = rotation.half
        self.register_buffer("first", rotation.first.float())
        signs = torch.tensor([-1.0, 1.0])[:, None].expand(2, rotation.half)
        second = rotation.second.float().view(-1, 2, rotation.half) * signs
        self.register_buffer("second", second.flatten())

    def forward(self, y: Tensor) -> Tensor:
        wide = y.float()
        swapped = torch.unflatten(wide, -1, (-1, 2, self._half)).flip(2).reshape_as(wide)
        return torch.addcmul(wide * self.first, swapped, self.second).to(y.dtype)


class Sparse(nn.Module):
    """`x Sᵀ` for a sparse delta S `[out, in]`."""

    starts: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, delta: SparseDelta) -> None:
        super().__init__()
        summed = torch.sparse_coo_tensor(
            delta.indices, delta.values.float(), delta.shape, check_invariants=True
        ).coalesce()
        rows, columns = summed.indices()
        starts = torch.searchsorted(rows, torch.arange(delta.shape[0] + 1))
        self._shape = delta.shape
        self.register_buffer("starts", starts.int())
        self.register_buffer("columns", columns.int())
        self.register_buffer("values", summed.values())

    def forward(self, x: Tensor) -> Tensor:
        delta: Tensor = torch.sparse_csr_tensor(
            self.starts, self.columns, self.values, self._shape, check_invariants=False
        )
        y: Tensor = delta @ x.float().T
        return y.T


class Circulant(nn.Module):
    """`x Dᵀ` for a delta D of circulant blocks, a product in the frequencies of the blocks."""

    spectrum: Tensor  # [frequency, in / b, out / b]

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        self._size = kernel.shape[2]
        spectrum = torch.fft.rfft(kernel.float()).conj() / (kernel.shape[1] * self._size)
        self.register_buffer("spectrum", spectrum.permute(2, 1, 0).contiguous().resolve_conj())

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.fft.rfft(torch.unflatten(x.float(), -1, (-1, self._size))).permute(2, 0, 1)
        y: Tensor = torch.fft.irfft((parts @ self.spectrum).permute(1, 2, 0), n=self._size)
        return y.reshape(len(x), -1)


@dataclass(frozen=True, slots=True)
class RowMaps:
    """The maps of one linear; None for none."""

    before: nn.Module | None = None
    after: nn.Module | None = None
    added: nn.Module | None = None

    def modules(self) -> list[nn.Module]:
        """Return those that there are."""
        return [module for module in (self.before, self.after, self.added) if module is not None]

    def tensors(self) -> list[Tensor]:
        """Return the tensors of all maps."""
        return [tensor for module in self.modules() for tensor in module.buffers()]

    def to(self, device: torch.device) -> "RowMaps":
        """Return maps on `device`; on a CPU, these."""
        return (
            self
            if device.type == "cpu"
            else RowMaps(*(_on(own, device) for own in (self.before, self.after, self.added)))
        )


def _on(module: nn.Module | None, device: torch.device) -> nn.Module | None:
    """Return a copy, because `Module.to` would move the host's tensors."""
    return None if module is None else copy.deepcopy(module).to(device)


def row_maps_of(weights: AdapterWeights) -> dict[str, RowMaps]:
    """Return the row maps of an adapter by module."""
    found = {name: RowMaps(before=RotatedBlocks(blocks)) for name, blocks in weights.block_rotations.items()}
    found |= {name: RowMaps(after=RotatedPairs(rotation)) for name, rotation in weights.pair_rotations.items()}
    found |= {name: RowMaps(added=Circulant(kernel)) for name, kernel in weights.circulant.items()}
    return found | {name: RowMaps(added=Sparse(delta)) for name, delta in weights.sparse.items()}


@dataclass(frozen=True, slots=True)
class RowMapPlan:
    """The adapters of a step that have row maps: their rows, and their maps by module."""

    owners: tuple[tuple[SlotRows, Mapping[str, RowMaps]], ...]

    def inputs(self, x: Tensor, names: Iterable[str]) -> list[tuple[int, SlotRows, Tensor]]:
        """Return the rows of `x [rows, in]` that the base sees changed: the index of the linear in `names`, the rows'
        place, and what takes their place."""
        return [
            (index, rows, before(x[rows.start : rows.end]))
            for index, name in enumerate(names)
            for rows, maps in self.owners
            if name in maps and (before := maps[name].before) is not None
        ]

    def apply(self, y: Tensor, x: Tensor, name: str) -> None:
        """Change the owners' rows of the output `y [rows, out]` of a linear in place, given its input. In a
        composition, what is added comes after what changes the base's output."""
        owned = [(rows, maps) for rows, by_module in self.owners if (maps := by_module.get(name)) is not None]
        for rows, maps in owned:
            if maps.after is not None:
                y[rows.start : rows.end] = maps.after(y[rows.start : rows.end])
        for rows, maps in owned:
            if maps.added is not None:
                added = maps.added(x[rows.start : rows.end]).to(y.dtype)
                y[rows.start : rows.end].add_(added, alpha=rows.scale)


class RowMapTable:
    """Row maps by slot. Writes go to slots that no running sequence refers to, so they may happen in another thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_slot: dict[int, Mapping[str, RowMaps]] = {}

    def __contains__(self, slot: int) -> bool:
        """Return True if the slot's adapter has row maps."""
        return slot in self._by_slot

    def write(self, slot: int, maps: Mapping[str, RowMaps]) -> None:
        if maps:
            self._by_slot[slot] = {name: own.to(self._device) for name, own in maps.items()}
        else:
            self.clear(slot)

    def clear(self, slot: int) -> None:
        """Release the maps of `slot`."""
        self._by_slot.pop(slot, None)

    def tensors(self, slot: int) -> list[Tensor]:
        """Return the tensors that `slot` holds on the device."""
        return [tensor for maps in self._by_slot.get(slot, {}).values() for tensor in maps.tensors()]

    def slots(self) -> set[int]:
        """Return the slots that hold maps."""
        return set(self._by_slot)

    def plan_rows(self, rows: Iterable[SlotRows]) -> RowMapPlan | None:
        """Return the plan of a step's rows; None when no adapter of the step has row maps."""
        owners = tuple((r, self._by_slot[r.slot]) for r in rows if r.slot in self._by_slot)
        return RowMapPlan(owners) if owners else None
