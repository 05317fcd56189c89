"""Packed weights change the speed of a linear, not what it computes."""

import pytest
import torch
from torch import nn

from server.model import packed_linear
from server.model.cpu.library import multiplies_bf16, why_unavailable
from server.model.cpu.linear import NativeLinear
from server.model.packed_linear import PackedLinear, pack_linears

HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not HAS_BF16, reason="this processor has no bf16 arithmetic")
@pytest.mark.parametrize("rows", [1, 3, 8, 64, 513])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_packed_linear_gives_the_same_product(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    linear = nn.Linear(192, 576, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(1, rows, 192, generator=generator).bfloat16()
    packed = PackedLinear(linear)
    torch.testing.assert_close(packed(x), linear(x), rtol=2**-8, atol=2**-8)  # a step, where sums are ordered anew
    assert torch.equal(packed.weight, linear.weight)


@pytest.mark.parametrize("compiler", [True, False])
def test_only_plain_bf16_linears_are_packed(compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler:
        monkeypatch.setattr(packed_linear, "why_unavailable", lambda _: "no C++ compiler was found")
    elif missing := why_unavailable(torch.bfloat16):
        assert "no C++ compiler" in missing
        pytest.skip(missing)

    class Special(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(64, 64, dtype=torch.bfloat16),
            "fp32": nn.Linear(64, 64),
            "special": Special(64, 64, dtype=torch.bfloat16),
        }
    )
    ours = compiler and (multiplies_bf16() or not HAS_BF16)
    assert pack_linears(model) == (ours or HAS_BF16)
    assert type(model["plain"]) is (NativeLinear if ours else PackedLinear if HAS_BF16 else nn.Linear)
    assert type(model["fp32"]) is nn.Linear and type(model["special"]) is Special
