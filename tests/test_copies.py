"""An adapter crosses to the device in one piece, and arrives as it was."""

import pytest
import torch

from adapters.copies import CudaCopies, HostCopies, copies_for, in_one_piece, moved
from adapters.kernels.reference import ReferenceKernel
from adapters.pack import PackedAdapter
from adapters.pool import AdapterPool
from adapters.slots import Slot
from adapters.spec import ModelSpec

CPU = torch.device("cpu")
SPEC = ModelSpec({"q": (24, 40), "k": (24, 8), "o": (40, 24)}, 32)


def packed() -> PackedAdapter:
    generator = torch.Generator().manual_seed(0)
    modules = {
        name: tuple(torch.randn(32, size, generator=generator).bfloat16() for size in SPEC.modules[name])
        for name in ("q", "o")
    }
    return PackedAdapter(2, modules, 0, vectors={"o": torch.ones(2, 24)})  # type: ignore[arg-type]


def pool(device: torch.device) -> AdapterPool:
    return AdapterPool(SPEC, 5, torch.bfloat16, device, ReferenceKernel())


def filled(own: AdapterPool) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (a.cpu(), b.cpu()) for name, (a, b) in own.buffers.items()}


def test_one_piece_holds_every_tensor_of_an_adapter_and_nothing_else_changes() -> None:
    before = packed()
    after = in_one_piece(before)
    assert after.flat is not None and after.modules.keys() == before.modules.keys()
    for name, pair in before.modules.items():
        for own, old in zip(after.modules[name], pair, strict=True):
            assert torch.equal(own, old) and own.is_contiguous()
            assert own.untyped_storage().data_ptr() == after.flat.untyped_storage().data_ptr()
    assert after.flat.numel() == sum(t.numel() for pair in before.modules.values() for t in pair)
    assert (after.num_pages, after.vectors) == (before.num_pages, before.vectors)


def test_what_crosses_is_the_one_piece() -> None:
    staged = in_one_piece(packed())
    assert staged.flat is not None
    crossed = moved(staged, torch.device("meta"))
    assert crossed.flat is not None and crossed.flat.device.type == "meta"
    assert [(a.shape, b.shape) for a, b in crossed.modules.values()] == [
        (a.shape, b.shape) for a, b in staged.modules.values()
    ]
    assert all(
        t.untyped_storage()._cdata == crossed.flat.untyped_storage()._cdata for p in crossed.modules.values() for t in p
    )


def test_an_adapter_without_linears_is_left_as_it_is() -> None:
    bare = PackedAdapter(1, {}, 0)
    assert in_one_piece(bare) is bare and moved(bare, CPU) is bare


def test_a_pool_in_host_memory_is_written_directly() -> None:
    own, plain = pool(CPU), pool(CPU)
    copies = copies_for(own, CPU)
    assert isinstance(copies, HostCopies)
    before = packed()
    assert copies.stage(before) is before
    copies.write(Slot(1, "", [4, 2]), before)
    plain.write(Slot(1, "", [4, 2]), in_one_piece(before))
    for name, pair in filled(plain).items():
        assert all(torch.equal(*both) for both in zip(pair, filled(own)[name], strict=True))
    assert filled(own)["q"][0][64:80].any() and not filled(own)["k"][0].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_pool_on_a_gpu_holds_the_same_when_the_write_returns() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    own, plain = pool(device), pool(CPU)
    copies = copies_for(own, device)
    assert isinstance(copies, CudaCopies)
    staged = copies.stage(packed())
    assert staged.flat is not None and staged.flat.is_pinned()
    copies.write(Slot(1, "", [4, 2]), staged)
    plain.write(Slot(1, "", [4, 2]), packed())
    for name, pair in filled(plain).items():
        assert all(torch.equal(*both) for both in zip(pair, filled(own)[name], strict=True))
