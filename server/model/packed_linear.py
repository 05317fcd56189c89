"""bf16 linears on a CPU with weights stored in the kernel's layout.

The server's own kernel (linear.h) computes the product, in the form that suits the machine. Without native code, oneDNN
does if the processor has AVX-512: `nn.Linear` reorders its weight on every call, and reordering it once reduces decode
to about two thirds of the time. In either case a row's result does not depend on the other rows of the batch.
"""

from typing import TypeGuard

import torch
from torch import nn

from adapters.device.forms import processor_features
from server.model.cpu.library import why_unavailable
from server.model.cpu.linear import NativeLinear


class PackedLinear(nn.Module):
    """Replaces an `nn.Linear` and does not keep its weight tensor.

    oneDNN chooses a kernel, and with it an order of additions, by the number of rows. Products are therefore computed
    in blocks of a fixed number of rows, the last one padded, so that a row's result does not depend on other rows.
    Without bf16 arithmetic, eight rows at once take as long as eight products of one row.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._block = 8 if "avx512_bf16" in processor_features() else 1
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    @property
    def weight(self) -> torch.Tensor:
        """An exact, unpacked copy of the weight `[out_features, in_features]`."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        padded = nn.functional.pad(rows, (0, 0, 0, -len(rows) % self._block))
        products = [self._product(block) for block in torch.split(padded, self._block)]
        return torch.cat(products)[: len(rows)].view(*x.shape[:-1], self.out_features)

    def _product(self, block: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(block, self._packed, self.bias, "none", [], "")
        return y


def pack_linears(model: nn.Module) -> int:
    """Replace the packable linears of `model` in place, and return their number."""
    found = {name: packed(module) for name, module in model.named_modules() if _is_packable(module)}
    changed = {name: module for name, module in found.items() if type(module) is not nn.Linear}
    for name, linear in changed.items():
        model.set_submodule(name, linear)
    if any(isinstance(module, NativeLinear | PackedLinear) for module in model.modules()):
        _leave_file(model)
    return len(changed)


def _leave_file(model: nn.Module) -> None:
    """Copy what remains of the weights file once linears are packed or quantized: the bf16 tensors on a CPU. A single
    one of them would keep the whole file mapped, beside the packed copies."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def packed(linear: nn.Module) -> nn.Module:
    """Return the module that replaces `linear`: a packed one for a plain bf16 linear on a CPU, otherwise itself."""
    if not _is_packable(linear):
        return linear
    if why_unavailable(torch.bfloat16) is None:
        return NativeLinear(linear)
    return PackedLinear(linear) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else linear


def _is_packable(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether `module` can be packed. Excludes subclasses, because quantized linears store other weights."""
    return type(module) is nn.Linear and module.weight.dtype is torch.bfloat16 and module.weight.device.type == "cpu"
