"""(c) LoRA kernels beside each other: all linears of a model with distinct weights, recorded as one graph per arm.

What a kernel costs is its arm less the base arm. Ours runs as the server runs it, one linear at a time, and with
sibling linears in the same launches ("stacked"), as the others do. Each arm's result is checked against float64 in the
same run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from adapters.kernels.triton_lora import TritonKernel
from load_tests.gpu import rivals
from load_tests.gpu.models import segments
from load_tests.gpu.rivals import Apply, Group
from load_tests.gpu.setting import Report, Setting, Shape
from load_tests.gpu.timing import captured, medians


@dataclass
class Stack:
    """Per layer the four groups of a Llama block, each with its weight, input, output and adapters."""

    weights: list[torch.Tensor]
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    groups: list[Group]


def run(report: Report, shape: Shape, wheels: Mapping[str, Path]) -> None:
    setting = report.setting
    for name in ("vllm", "sglang"):
        if name not in wheels:
            report.note(f"kernels of {name} are left out: --{name} FOLDER names its unpacked wheel")
    kernels = {
        name: (rivals.vllm_kernels if name == "vllm" else rivals.sglang_kernels)(wheels[name]) for name in wheels
    }
    stack = stacks(shape, setting)
    for rows in setting.rows:
        for adapters in sorted({count for count in (1, 8, rows) if count <= rows}):
            _compare(report, shape, stack, rows, adapters, kernels)


def stacks(shape: Shape, setting: Setting) -> Stack:
    kv = shape.kv_heads * shape.head_dim
    sizes = [
        (shape.hidden, [shape.heads * shape.head_dim, kv, kv]),
        (shape.heads * shape.head_dim, [shape.hidden]),
        (shape.hidden, [shape.intermediate, shape.intermediate]),
        (shape.intermediate, [shape.hidden]),
    ] * shape.layers
    options = {"dtype": setting.dtype, "device": setting.device}
    slots = max(setting.rows)
    return Stack(
        [torch.randn(sum(outputs), inputs, **options) * inputs**-0.5 for inputs, outputs in sizes],
        [torch.randn(slots, inputs, **options) for inputs, _ in sizes],
        [torch.zeros(slots, sum(outputs), **options) for _, outputs in sizes],
        [
            Group(
                torch.randn(slots, len(outputs), setting.rank, inputs, **options) * inputs**-0.5,
                [torch.randn(slots, size, setting.rank, **options) * 0.1 for size in outputs],
            )
            for inputs, outputs in sizes
        ],
    )


def _compare(
    report: Report, shape: Shape, stack: Stack, rows: int, adapters: int, kernels: Mapping[str, object]
) -> None:
    setting = report.setting
    slots = [row * adapters // rows for row in range(rows)]
    num_slots = max(setting.rows)
    makers: dict[str, Callable[[Group], Apply]] = {
        "ours": _ours(slots, adapters, setting),
        "stacked": _stacked(slots, adapters, setting),
    }
    if "vllm" in kernels:
        makers["vllm"] = rivals.vllm_arm(kernels["vllm"], slots, num_slots, setting.device)  # type: ignore[arg-type]
    if "sglang" in kernels:
        makers["sglang"] = rivals.sglang_arm(
            kernels["sglang"],
            slots,
            num_slots,
            setting.rank,
            setting.device,  # type: ignore[arg-type]
        )
    arms, errors = {"base": captured(partial(_forward, stack, rows, []), setting.device)}, {}
    for name, maker in makers.items():
        appliers = [maker(group) for group in stack.groups]
        errors[name] = _error(stack, appliers[0], slots)
        arms[name] = captured(partial(_forward, stack, rows, appliers), setting.device)
    seconds = medians(arms, setting.device, setting.repeats)
    for name in makers:
        own = seconds[name] - seconds["base"]
        report.add(
            "kernels", shape=shape.name, rows=rows, adapters=adapters, kernel=name, base_ms=seconds["base"] * 1e3,
            lora_ms=own * 1e3, overhead=own / seconds["base"], to_ours=own / (seconds["ours"] - seconds["base"]),
            largest_error=errors[name],
        )  # fmt: skip


def _ours(slots: list[int], adapters: int, setting: Setting) -> Callable[[Group], Apply]:
    kernel = TritonKernel(setting.device)
    plan = kernel.plan_segments(segments(len(slots), adapters, setting))

    def prepared(group: Group) -> Apply:
        a = [group.a[:, index].flatten(0, 1).contiguous() for index in range(len(group.b))]
        b = [weight.transpose(1, 2).flatten(0, 1).contiguous() for weight in group.b]
        sizes = [weight.shape[1] for weight in b]

        def apply(y: torch.Tensor, x: torch.Tensor) -> None:
            for part, own_a, own_b in zip(y.split(sizes, 1), a, b, strict=True):
                kernel.add_lora(part, x, own_a[None], own_b.flatten(), (own_b.shape[1],), plan)

        return apply

    return prepared


def _stacked(slots: list[int], adapters: int, setting: Setting) -> Callable[[Group], Apply]:
    kernel = TritonKernel(setting.device)
    plan = kernel.plan_segments(segments(len(slots), adapters, setting))

    def prepared(group: Group) -> Apply:
        a, b, sizes = stacked_group(group)
        return lambda y, x: kernel.add_lora(y, x, a, b, sizes, plan)

    return prepared


def stacked_group(group: Group) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """A, B and sizes as `add_lora` takes them for siblings."""
    a = group.a.transpose(0, 1).flatten(1, 2).contiguous()
    b = torch.cat([weight.transpose(1, 2).flatten() for weight in group.b])
    return a, b, tuple(weight.shape[1] for weight in group.b)


def _forward(stack: Stack, rows: int, appliers: list[Apply]) -> None:
    for index, (weight, x, y) in enumerate(zip(stack.weights, stack.inputs, stack.outputs, strict=True)):
        torch.mm(x[:rows], weight.T, out=y[:rows])
        if appliers:
            appliers[index](y[:rows], x[:rows])


def _error(stack: Stack, apply: Apply, slots: list[int]) -> float:
    """Largest difference of the first group from float64."""
    group, x = stack.groups[0], stack.inputs[0][: len(slots)]
    y = torch.zeros(len(slots), stack.outputs[0].shape[1], dtype=x.dtype, device=x.device)
    apply(y, x)
    exact = [
        torch.cat(
            [b[slot].double() @ (group.a[slot, index].double() @ x[row].double()) for index, b in enumerate(group.b)]
        )
        for row, slot in enumerate(slots)
    ]
    return (y.double() - torch.stack(exact)).abs().max().item()
