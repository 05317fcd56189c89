"""Packed weights change the speed of a linear, not what it computes."""

import pytest
import torch
from torch import nn

from adapters.device.forms import NONE
from server.model.cpu.linear import NativeLinear
from server.model.packed_linear import PackedLinear, pack_linears, packed
from tests.fixtures.native_forms import form_or_none

__all__ = ["form_or_none"]
HAS_ONEDNN = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="oneDNN has no bf16 linears for this processor")
SHAPES = [(192, 576), (576, 960), (1536, 576)]


@needs_onednn
@pytest.mark.parametrize("rows", [1, 3, 8, 64, 513])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_linear_packed_for_onednn_gives_the_same_product(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    linear = nn.Linear(192, 576, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(1, rows, 192, generator=generator).bfloat16()
    packed = PackedLinear(linear)
    torch.testing.assert_close(packed(x), linear(x), rtol=2**-8, atol=2**-8)  # a step, where sums are ordered anew
    assert torch.equal(packed.weight, linear.weight)


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
@torch.inference_mode()
def test_a_row_has_the_same_bits_beside_any_others(form_or_none: str, in_features: int, out_features: int) -> None:
    linear = packed(nn.Linear(in_features, out_features, dtype=torch.bfloat16))
    if type(linear) is nn.Linear:
        pytest.skip("torch's own linear computes here, and promises no order of additions")
    x = torch.randn(70, in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    together = linear(x)
    for start, end in [(0, 1), (3, 5), (7, 10), (10, 18), (20, 52), (1, 70)]:
        assert torch.equal(linear(x[start:end]), together[start:end])


def test_plain_bf16_linears_and_no_others_are_packed(form_or_none: str) -> None:
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(64, 64, dtype=torch.bfloat16),
            "fp32": nn.Linear(64, 64),
            "special": Special(64, 64, dtype=torch.bfloat16),
        }
    )
    native = form_or_none != NONE
    assert pack_linears(model) == (native or HAS_ONEDNN)
    assert type(model["plain"]) is (NativeLinear if native else PackedLinear if HAS_ONEDNN else nn.Linear)
    assert type(model["fp32"]) is nn.Linear and type(model["special"]) is Special
