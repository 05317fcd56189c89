"""(e) Linears with an NF4 weight: our kernel, bitsandbytes' (where installed), and the dense weight."""

import importlib.util
from functools import partial

import torch

from load_tests.gpu.setting import Report, Shape
from load_tests.gpu.timing import Arm, captured, medians
from server.model.quantization.triton_nf4 import CODE, NF4Weight, nf4_matmul

CACHE_BYTES = 128 << 20  # more dense weight than a cache holds is cycled through, as a model does


def run(report: Report, shape: Shape) -> None:
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    sizes = {
        "qkv": (shape.hidden, qkv),
        "o": (shape.heads * shape.head_dim, shape.hidden),
        "gate_up": (shape.hidden, 2 * shape.intermediate),
        "down": (shape.intermediate, shape.hidden),
    }
    for name, (inputs, outputs) in sizes.items():
        _compare(report, f"{shape.name} {name}", inputs, outputs)


def _compare(report: Report, name: str, inputs: int, outputs: int) -> None:
    setting = report.setting
    copies = 1 if setting.smoke else -(-CACHE_BYTES // (inputs * outputs * setting.dtype.itemsize)) + 1
    weights = [_random(inputs, outputs, setting.device) for _ in range(copies)]
    dense = [_dequantized(weight, setting.dtype) for weight in weights]
    theirs = _bitsandbytes(dense) if not setting.smoke else []
    for rows in setting.nf4_rows:
        x = torch.randn(rows, inputs, device=setting.device).to(setting.dtype)
        error = (nf4_matmul(x, weights[0]).double() - x.double() @ dense[0].double().T).abs().max().item()
        kinds = {"dense": dense, "nf4": weights, "bitsandbytes": theirs}
        arms: dict[str, Arm] = {
            kind: captured(partial(_all, kind, x, own), setting.device) for kind, own in kinds.items() if own
        }
        seconds = medians(arms, setting.device, setting.repeats)
        each = {f"{kind}_us": found / copies * 1e6 for kind, found in seconds.items()}
        speedup = seconds["dense"] / seconds["nf4"]
        report.add("nf4", linear=name, rows=rows, **each, nf4_speedup=speedup, largest_error=error)


def _all(kind: str, x: torch.Tensor, weights: list[object]) -> None:
    for weight in weights:
        if kind == "dense":
            assert isinstance(weight, torch.Tensor)
            torch.nn.functional.linear(x, weight)
        elif kind == "nf4":
            assert isinstance(weight, NF4Weight)
            nf4_matmul(x, weight)
        else:
            import bitsandbytes

            assert isinstance(weight, tuple)
            bitsandbytes.matmul_4bit(x, weight[0].t(), quant_state=weight[1])


def _random(inputs: int, outputs: int, device: torch.device) -> NF4Weight:
    packed = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    return NF4Weight(packed, torch.rand(outputs, inputs // 64, device=device) / inputs**0.5)


def _dequantized(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    code = torch.tensor(CODE, device=weight.packed.device)
    index = torch.stack([weight.packed >> 4, weight.packed & 15], 2).flatten(1).int()
    return (code[index] * weight.absmax.repeat_interleave(64, 1)).to(dtype)


def _bitsandbytes(dense: list[torch.Tensor]) -> list[object]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return []
    from bitsandbytes.functional import quantize_4bit

    return [quantize_4bit(weight, blocksize=64, quant_type="nf4") for weight in dense]
