"""vLLM's and SGLang's LoRA kernels, out of unpacked wheels of theirs, so that neither has to be installed.

Their kernel files are imported under their own names with empty parents; what those import from the rest of their
package is replaced by the few lines that the kernels need.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

Apply = Callable[[torch.Tensor, torch.Tensor], None]  # y, x: adds the LoRA product of all slices of a group


@dataclass(frozen=True, slots=True)
class Group:
    """Sibling linears over one input: `a` `[slots, slices, rank, in]`, `b` per slice `[slots, out, rank]`."""

    a: torch.Tensor
    b: list[torch.Tensor]


def vllm_kernels(root: Path) -> SimpleNamespace:
    """`root` is the folder that holds `vllm/`."""
    for name in ("vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops", "vllm.utils"):
        _stub(name)
    envs = _stub(
        "vllm.envs", VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=None, VLLM_LORA_ENABLE_DUAL_STREAM=False,
        VLLM_LORA_DISABLE_PDL=True,
    )  # fmt: skip
    sys.modules["vllm"].envs = envs  # type: ignore[attr-defined]
    _stub("vllm.logger", init_logger=lambda _name: _Silent())
    _stub("vllm.triton_utils", tl=tl, triton=triton)
    platform = SimpleNamespace(
        is_cuda=torch.cuda.is_available, is_cuda_alike=lambda: True, has_device_capability=lambda _capability: True
    )
    _stub("vllm.platforms", current_platform=platform)
    _stub("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2, round_up=lambda a, b: triton.cdiv(a, b) * b)
    _stub("vllm.utils.torch_utils", async_tensor_h2d=_tensor, direct_register_custom_op=_not_registered)
    files = ("kernel_utils", "utils", "lora_kernel_metadata", "lora_shrink_op", "lora_expand_op")
    loaded = {name: _load(root, "vllm.lora.ops.triton_ops." + name) for name in files}
    return SimpleNamespace(
        shrink=loaded["lora_shrink_op"]._lora_shrink,
        expand=loaded["lora_expand_op"]._lora_expand,
        Meta=loaded["lora_kernel_metadata"].LoRAKernelMeta,
    )


def vllm_arm(kernels: SimpleNamespace, slots: list[int], num_slots: int, device: torch.device) -> Callable[..., Apply]:
    rows = len(slots)
    meta = kernels.Meta.make(num_slots, rows, device)
    meta.prepare_tensors(torch.tensor(slots, dtype=torch.int32, device=device))
    arguments = meta.meta_args(rows, False)

    def prepared(group: Group) -> Apply:
        _, slices, rank, _ = group.a.shape
        a = [group.a[:, index : index + 1].contiguous() for index in range(slices)]
        b = [weight[:, None].contiguous() for weight in group.b]
        buffer = torch.empty(slices, rows, rank, dtype=torch.float32, device=device)

        def apply(y: torch.Tensor, x: torch.Tensor) -> None:
            kernels.shrink(x, a, buffer, *arguments, 1.0)
            kernels.expand(buffer, b, y, *arguments, add_inputs=True)

        return apply

    return prepared


def sglang_kernels(root: Path) -> SimpleNamespace:
    """`root` is the folder that holds `sglang/`; its default kernels (chunked SGMV)."""
    package = "sglang.kernels.ops.lora.dense"
    for name in ("sglang", "sglang.srt", "sglang.srt.lora", "sglang.kernels", "sglang.kernels.ops"):
        _stub(name)
    _stub("sglang.kernels.ops.lora"), _stub(package)
    switches = ("SGLANG_ENABLE_LORA_CSGMV_SPLIT_K", "SGLANG_ENABLE_DETERMINISTIC_INFERENCE", "SGLANG_LORA_CONFIG_DIR")
    off = {name: SimpleNamespace(get=lambda: None) for name in switches}
    _stub("sglang.srt.environ", envs=SimpleNamespace(**off))
    _stub("sglang.srt.lora.utils", LoRABatchInfo=object)
    _stub(
        "sglang.srt.utils", cached_triton_kernel=lambda _key: lambda kernel: kernel,
        get_device_name=lambda *_: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        is_cuda=torch.cuda.is_available,
    )  # fmt: skip
    _load(root, f"{package}.lora_tuning_config")
    shrink, expand = (_load(root, f"{package}.chunked_sgmv_{half}") for half in ("shrink", "expand"))
    return SimpleNamespace(
        shrink=shrink.chunked_sgmv_lora_shrink_forward, expand=expand.chunked_sgmv_lora_expand_forward
    )


def sglang_arm(
    kernels: SimpleNamespace, slots: list[int], num_slots: int, rank: int, device: torch.device
) -> Callable[..., Apply]:
    """`slots` ascend and name an adapter in every row."""
    chunks = _chunks(slots, 16)
    info = SimpleNamespace(
        max_len=16, num_segments=len(chunks), use_cuda_graph=False,
        seg_indptr=_tensor([start for start, _, _ in chunks] + [len(slots)], torch.int32, device),
        weight_indices=_tensor([slot for _, _, slot in chunks], torch.int32, device),
        lora_ranks=_tensor([rank] * num_slots, torch.int32, device), scalings=torch.ones(num_slots, device=device),
        permutation=torch.arange(len(slots), dtype=torch.int32, device=device),
    )  # fmt: skip

    def prepared(group: Group) -> Apply:
        sizes = [weight.shape[1] for weight in group.b]
        on_cpu = torch.tensor([sum(sizes[:index]) for index in range(len(sizes) + 1)], dtype=torch.int32)
        a, b, offsets = group.a.flatten(1, 2).contiguous(), torch.cat(group.b, 1), on_cpu.to(device)

        def apply(y: torch.Tensor, x: torch.Tensor) -> None:
            v = kernels.shrink(x, a, info, len(sizes))
            kernels.expand(v, b, info, offsets, max(sizes), y, slice_offsets_cpu=on_cpu)

        return apply

    return prepared


def _chunks(slots: list[int], most: int) -> list[tuple[int, int, int]]:
    """Runs of one slot, of at most `most` rows: (start, end, slot)."""
    chunks: list[tuple[int, int, int]] = []
    for row, slot in enumerate(slots):
        if chunks and chunks[-1][2] == slot and row - chunks[-1][0] < most:
            chunks[-1] = (chunks[-1][0], row + 1, slot)
        else:
            chunks.append((row, row + 1, slot))
    return chunks


def _stub(name: str, **attributes: Any) -> ModuleType:
    module = sys.modules.setdefault(name, ModuleType(name))
    module.__path__ = []
    module.__dict__.update(attributes)
    return module


def _load(root: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, root / (name.replace(".", "/") + ".py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tensor(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _not_registered(*_: Any, **__: Any) -> None:
    raise AttributeError("custom operators are not registered outside vLLM")  # its modules expect this error


class _Silent:
    """A logger."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_, **__: None
