"""An adapter is transferred to the device in one copy, unchanged."""

import pytest
import torch

from adapters.kernels.reference import ReferenceKernel
from adapters.model_spec import ModelSpec
from adapters.residency.slots import Slot
from adapters.runtime.columns import RankColumns
from adapters.runtime.copies import writer
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.pool import AdapterPool

CPU = torch.device("cpu")
SPEC = ModelSpec({"q": (24, 40), "k": (24, 8), "o": (40, 24)}, 32)


def packed(pinned: bool = False) -> PackedAdapter:
    widths = {name: SPEC.modules[name] for name in ("q", "o")}
    columns = RankColumns.zeros(32, widths, torch.bfloat16, pinned=pinned)
    columns.flat.normal_(generator=torch.Generator().manual_seed(0))
    return PackedAdapter(2, columns, 0, vectors={"o": torch.ones(2, 24)})


def pool(device: torch.device) -> AdapterPool:
    return AdapterPool(SPEC, 5, torch.bfloat16, device, ReferenceKernel())


def filled(own: AdapterPool) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (a.cpu(), b.cpu()) for name, (a, b) in own.buffers.items()}


def test_the_views_of_the_flat_tensor_cover_it_without_overlap() -> None:
    columns = RankColumns.zeros(32, SPEC.modules, torch.bfloat16)
    for number, tensor in enumerate(tensor for pair in columns.views().values() for tensor in pair):
        assert tensor.is_contiguous() and not tensor.any()
        tensor.fill_(number + 1)
    assert columns.flat.unique().tolist() == [1, 2, 3, 4, 5, 6]
    assert {name: (a.shape, b.shape) for name, (a, b) in columns.views().items()} == {
        name: ((32, a), (32, b)) for name, (a, b) in SPEC.modules.items()
    }


def test_the_whole_tensor_is_transferred_in_one_copy() -> None:
    crossed = packed().columns.to(torch.device("meta"))
    assert crossed.flat.device.type == "meta"
    for pair in crossed.views().values():
        assert all(tensor.untyped_storage()._cdata == crossed.flat.untyped_storage()._cdata for tensor in pair)


def test_a_pool_in_host_memory_is_written_directly() -> None:
    own = pool(CPU)
    assert writer(own, CPU) == own.write
    own.write(Slot(1, "", [4, 2]), before := packed())
    (a, b), (pool_a, pool_b) = before.columns.views()["q"], filled(own)["q"]
    assert torch.equal(torch.cat([pool_a[64:80], pool_a[32:48]]), a)
    assert torch.equal(torch.cat([pool_b[64:80], pool_b[32:48]]), b)
    assert a.any() and not filled(own)["k"][0].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_pool_on_a_gpu_holds_the_same_when_the_write_returns() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    own, plain = pool(device), pool(CPU)
    before = packed(pinned=True)
    assert before.columns.flat.is_pinned()
    writer(own, device)(Slot(1, "", [4, 2]), before)
    plain.write(Slot(1, "", [4, 2]), packed())
    for name, pair in filled(plain).items():
        assert all(torch.equal(*both) for both in zip(pair, filled(own)[name], strict=True))
