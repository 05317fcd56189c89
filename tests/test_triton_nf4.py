"""The NF4 product against bitsandbytes' own dequantisation, and the packing against it bit for bit."""

import pytest
import torch

from tests.fixtures.triton_device import DEVICE, DTYPES, EPSILON, require_triton

require_triton()

from server.model.quantization.triton_nf4 import CODE, MAX_ROWS, NF4Weight, nf4_matmul, nf4_weight


def random_weight(out_features: int, in_features: int, seed: int = 0) -> tuple[NF4Weight, torch.Tensor]:
    """A weight in NF4 and the same in float64, without bitsandbytes."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 16, (out_features, in_features), generator=generator)
    absmax = (torch.rand(out_features, in_features // 64, generator=generator) + 0.5) / in_features**0.5
    packed = ((index[:, 0::2] << 4) | index[:, 1::2]).to(torch.uint8)
    exact = torch.tensor(CODE, dtype=torch.float64)[index] * absmax.double().repeat_interleave(64, 1)
    return NF4Weight(packed.to(DEVICE), absmax.to(DEVICE)), exact


@pytest.mark.parametrize("rows", [1, 5, 16, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_is_that_of_the_dequantised_weight(dtype: torch.dtype, rows: int) -> None:
    for out_features, in_features in ((96, 64), (200, 576), (40, 1088)):
        weight, exact = random_weight(out_features, in_features, rows)
        x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
        got = nf4_matmul(x.to(DEVICE), weight).cpu()
        assert got.dtype is dtype
        torch.testing.assert_close(got.double(), x.double() @ exact.T, atol=EPSILON[dtype], rtol=EPSILON[dtype])


def test_rows_do_not_depend_on_each_other() -> None:
    weight, _ = random_weight(70, 2048)
    x = torch.randn(9, 2048, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    together = nf4_matmul(x, weight)
    assert all(torch.equal(nf4_matmul(x[row : row + 1], weight)[0], together[row]) for row in range(9))
    x[3] = torch.nan
    spoiled = nf4_matmul(x, weight)
    assert spoiled[3].isnan().all() and torch.equal(spoiled[4:], together[4:])


def test_more_rows_than_a_decode_batch_are_a_mistake() -> None:
    weight, _ = random_weight(16, 64)
    with pytest.raises(AssertionError):
        nf4_matmul(torch.zeros(MAX_ROWS + 1, 64, device=DEVICE), weight)


@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
def test_bitsandbytes_weights_are_read_as_it_reads_them(nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    dense = torch.randn(96, 192, generator=torch.Generator().manual_seed(2)).to(DEVICE) * 0.1
    packed, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=nested)
    weight = nf4_weight(packed, state)
    x = torch.randn(7, 192, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    expected = x.double() @ functional.dequantize_4bit(packed, state).double().T
    torch.testing.assert_close(nf4_matmul(x, weight).double(), expected, atol=1e-5, rtol=1e-5)
    half, close = x.bfloat16(), EPSILON[torch.bfloat16]
    torch.testing.assert_close(nf4_matmul(half, weight).double(), expected, atol=close, rtol=close)


def test_layouts_that_the_kernel_does_not_know_are_refused() -> None:
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    dense = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for options in ({"quant_type": "fp4"}, {"quant_type": "nf4", "blocksize": 128}):
        packed, state = functional.quantize_4bit(dense, **{"blocksize": 64, **options})
        with pytest.raises(ValueError, match="in blocks of"):
            nf4_weight(packed, state)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_linear_takes_our_kernel_where_bitsandbytes_would_dequantise(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from adapters.runtime.dora import dense_weight
    from server.model.quantization import nf4, triton_nf4

    linear = bitsandbytes.nn.Linear4bit(128, 96, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    linear = linear.eval().requires_grad_(False).to(DEVICE)
    nf4.multiply_as_asked(linear)
    weight = dense_weight(linear).double()
    taken: list[int] = []
    ours = triton_nf4.nf4_matmul
    monkeypatch.setattr(triton_nf4, "nf4_matmul", lambda x, own: (taken.append(len(x)), ours(x, own))[1])
    wrapped = nf4.NF4Linear(linear)
    for rows in (1, 7, 8, 64, 65):
        x = torch.randn(1, rows, 128, generator=torch.Generator().manual_seed(rows)).to(DEVICE)
        want = x.double() @ weight.T + (0 if linear.bias is None else linear.bias.double())
        torch.testing.assert_close(wrapped(x).double(), want, atol=1e-4, rtol=1e-4)
    assert taken == [8, 64]
    assert wrapped.weight is linear.weight and wrapped.bias is linear.bias
    assert (wrapped.in_features, wrapped.out_features) == (128, 96)
