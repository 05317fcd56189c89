"""The implementation of the linears of a 4-bit base model: `--nf4-policy`.

nf4        linears stay 4-bit. On a GPU of compute capability 9.0, the server's Triton kernel replaces those products
           for which bitsandbytes would dequantize the whole weight; bitsandbytes computes all others.
bf16-copy  linears are dequantized once into plain linears of the base model's dtype, which bitsandbytes also multiplies
           with beyond a few rows; takes 3.5 times the memory
auto       on a GPU the copy, if it takes at most a quarter of the free memory; on a CPU nf4
"""

from typing import Literal

import torch
from torch import nn

from adapters.runtime.dora import dense_weight, quant_state

Policy = Literal["auto", "nf4", "bf16-copy"]

SHARE = 4  # the copy may take this fraction (1 / SHARE) of the free memory
# (outputs, rows): from this many outputs on, bitsandbytes 0.50 has a fused kernel on compute capability 9.0 for up to
# this many rows. Beyond that, it writes the dequantized weight and reads it again.
_FUSED_ROWS = ((25344, 64), (16896, 48), (8448, 32), (4224, 16), (0, 7))


class NF4Linear(nn.Module):
    """A bitsandbytes linear that uses the server's kernel where bitsandbytes has no fused kernel for the rows."""

    def __init__(self, inner: nn.Module) -> None:
        from server.model.quantization.triton_nf4 import nf4_weight

        super().__init__()
        self.inner = inner
        self.in_features, self.out_features = int(inner.in_features), int(inner.out_features)  # type: ignore[arg-type]
        self._fused_rows = fused_rows(self.out_features)
        self._nf4 = nf4_weight(self.weight, quant_state(inner))

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.inner.bias  # type: ignore[return-value]

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.inner.compute_dtype  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from server.model.quantization.triton_nf4 import MAX_ROWS, nf4_matmul

        rows = x.numel() // self.in_features
        if not self._fused_rows < rows <= MAX_ROWS:
            given: torch.Tensor = self.inner(x)
            return given
        y = nf4_matmul(x.reshape(rows, self.in_features), self._nf4).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def fused_rows(out_features: int) -> int:
    """Return the largest number of rows for which bitsandbytes does not dequantize the whole weight."""
    return next(rows for outputs, rows in _FUSED_ROWS if out_features >= outputs)


def apply_policy(model: nn.Module, policy: Policy, dtype: torch.dtype, device: torch.device) -> str:
    """Replace the 4-bit linears of `model` according to `policy`, and return a description."""
    found = {name: module for name, module in model.named_modules() if _is_quantized(module)}
    if dtype is not torch.bfloat16:
        for module in found.values():
            multiply_as_asked(module)
    taken = sum(int(m.in_features) * int(m.out_features) for m in found.values()) * dtype.itemsize
    chosen, reason = (policy, "configured") if policy != "auto" else _chosen(taken, device)
    if chosen == "bf16-copy":
        for name, module in found.items():
            model.set_submodule(name, dense_linear(module, dtype))
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        for name, module in found.items():
            model.set_submodule(name, _with_our_kernel(module))
    return f"{chosen}: {reason}"


def multiply_as_asked(linear: nn.Module) -> None:
    """Disable bitsandbytes' kernel for processors with bf16 arithmetic, which rounds inputs and scales to bf16 even for
    float32. Without it, weights are dequantized and multiplied in the dtype of their input."""
    linear.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dense_linear(quantized: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Return a plain linear with the dequantized weight of a bitsandbytes linear, on its device."""
    weight = dense_weight(quantized).detach().to(dtype)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = quantized.bias  # type: ignore[assignment]
    return linear.eval()


def _is_quantized(module: nn.Module) -> bool:
    return "weight" in module._parameters and quant_state(module) is not None


def _chosen(taken: int, device: torch.device) -> tuple[Policy, str]:
    if device.type != "cuda":
        return "nf4", "on a CPU, 4 bits are mostly chosen to save memory"
    free, _ = torch.cuda.mem_get_info(device)
    mib = f"the copy takes {taken >> 20} of {free >> 20} MiB of free memory"
    return ("bf16-copy", mib) if taken * SHARE <= free else ("nf4", mib)


def _with_our_kernel(linear: nn.Module) -> nn.Module:
    """Return a linear that uses the server's kernel; `linear` itself if Triton is missing or the layout unsupported."""
    try:
        return NF4Linear(linear)
    except (ImportError, ValueError):
        return linear
