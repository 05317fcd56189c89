"""(g) What follows a block's linears (RoPE and the KV write, SiLU, the norms), in plain torch and fused; and with
adapters: is expanding inside of those, and shrinking on a side stream, faster than the LoRA kernels by themselves?

All linears of a model with distinct weights and their consumers, recorded as one graph per arm:

  torch      linears and consumers in plain torch, no adapters
  base       the same with the fused consumers
  expand     adapters by the LoRA kernels, between linear and fused consumer: what the server does
  fused      shrunk before the linear, expanded in its consumer
  side       the same, shrunk on a second stream beside the linear
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from adapters.kernels.triton_lora import Delta, TritonKernel, TritonPlan
from load_tests.gpu.kernels import Stack, stacked_group, stacks
from load_tests.gpu.models import PAGE, segments
from load_tests.gpu.setting import Report, Setting, Shape
from load_tests.gpu.timing import captured, medians
from server.model.fused import reference, triton_fused

Consumer = Callable[[torch.Tensor, Any], Any]  # of a linear's output and what adapters add to it
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], None]  # input, weight, output, index of the linear


def run(report: Report, shape: Shape) -> None:
    setting = report.setting
    stack = stacks(shape, setting)
    groups = [stacked_group(group) for group in stack.groups]
    side: Any = torch.cuda.Stream() if setting.device.type == "cuda" else None  # one, made before any recording
    for rows in setting.rows:
        plain, own = (_consumers(module, shape, rows, setting) for module in (reference, triton_fused))
        arms = {
            "torch": captured(partial(_forward, stack, rows, partial(_base, plain)), setting.device),
            "base": captured(partial(_forward, stack, rows, partial(_base, own)), setting.device),
        }
        counts = sorted({count for count in (1, 8, rows) if count <= rows})
        for count in counts:
            kernel = TritonKernel(setting.device)
            plan = kernel.plan_segments(segments(rows, count, setting))
            lora = _Lora(kernel, plan, groups, own, side)
            for name, step in (("expand", lora.expanded), ("fused", lora.fused), ("side", lora.beside)):
                arms[f"{name} {count}"] = captured(partial(_forward, stack, rows, step), setting.device)
        seconds = medians(arms, setting.device, setting.repeats)
        for name, found in seconds.items():
            kind, _, adapters = name.partition(" ")
            report.add(
                "fused", shape=shape.name, rows=rows, adapters=int(adapters or 0), arm=kind, ms=found * 1e3,
                to_base=found / seconds["base"],
            )  # fmt: skip


def _forward(stack: Stack, rows: int, step: Step) -> None:
    for index, (weight, x, y) in enumerate(zip(stack.weights, stack.inputs, stack.outputs, strict=True)):
        step(x[:rows], weight, y[:rows], index)


def _base(consumers: list[Consumer], x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, index: int) -> None:
    torch.mm(x, weight.T, out=y)
    consumers[index % 4](y, None)


class _Lora:
    """The three ways of having adapters; each is a step over one linear."""

    def __init__(
        self, kernel: TritonKernel, plan: TritonPlan, groups: list[Any], consumers: list[Consumer], side: Any
    ) -> None:
        self._kernel, self._plan, self._groups, self._consumers, self._side = kernel, plan, groups, consumers, side

    def expanded(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, index: int) -> None:
        torch.mm(x, weight.T, out=y)
        self._kernel.add_lora(y, x, *self._groups[index], self._plan)
        self._consumers[index % 4](y, None)

    def fused(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, index: int) -> None:
        delta = self._shrunk(x, index)
        torch.mm(x, weight.T, out=y)
        self._consumers[index % 4](y, delta)

    def beside(self, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, index: int) -> None:
        """The side stream waits for the main one first, so what it reuses of freed memory is no longer read."""
        if self._side is None:
            self.fused(x, weight, y, index)
            return
        main = torch.cuda.current_stream()
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            delta = self._shrunk(x, index)
        torch.mm(x, weight.T, out=y)
        main.wait_stream(self._side)
        self._consumers[index % 4](y, delta)

    def _shrunk(self, x: torch.Tensor, index: int) -> Delta:
        return self._kernel.shrink(x, *self._groups[index], self._plan)


def _consumers(module: Any, shape: Shape, rows: int, setting: Setting) -> list[Consumer]:
    """Of the outputs of qkv, o, gate and up, down."""
    options: dict[str, Any] = {"dtype": setting.dtype, "device": setting.device}
    blocks = -(-rows // PAGE)
    keys, values = torch.zeros(2, blocks, PAGE, shape.kv_heads, shape.head_dim, **options)
    slots = torch.arange(rows, device=setting.device)
    angles = torch.rand(rows, shape.head_dim, device=setting.device)
    cos, sin = angles.cos().to(setting.dtype), angles.sin().to(setting.dtype)
    residual, weight = torch.randn(rows, shape.hidden, **options), torch.ones(shape.hidden, **options)

    def given(delta: Any) -> Any:
        return delta if module is triton_fused else 0

    def rope(y: torch.Tensor, delta: Any) -> Any:
        if module is reference:
            return _plain_rope(y, cos, sin, keys, values, slots)
        return module.rope_kv_write(y, cos, sin, keys, values, slots, given(delta))

    def norm(y: torch.Tensor, delta: Any) -> Any:
        return module.add_rms_norm(y, residual, weight, 1e-5, given(delta))

    def silu(y: torch.Tensor, delta: Any) -> Any:
        return module.silu_mul(y, given(delta))

    return [rope, norm, silu, norm]


def _plain_rope(
    y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """What `reference.rope_kv_write` computes where every row is stored. The reference selects rows by a mask, whose
    size the host would have to know; a graph cannot record that."""
    kv_heads, head_dim = keys.shape[2:]
    heads = y.view(len(y), -1, head_dim)
    turned = reference.rotated(heads[:, :-kv_heads].float(), cos, sin).to(y.dtype)
    keys.flatten(0, 1).index_copy_(0, slots, turned[:, -kv_heads:])
    values.flatten(0, 1).index_copy_(0, slots, heads[:, -kv_heads:])
    return turned[:, :-kv_heads]
