"""(a) What this GPU can do at best: what everything else is compared with."""

import torch
import triton
import triton.language as tl

from load_tests.gpu.setting import Report
from load_tests.gpu.timing import captured, medians

LAUNCHES = 256  # in the graph of kernels that do nothing


def run(report: Report) -> None:
    setting = report.setting
    size = 1 << (16 if setting.smoke else 30)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=setting.device)  # zeros would be compressed
    target = torch.empty_like(source)
    side = 64 if setting.smoke else 8192
    left, right = torch.randn(2, side, side, device=setting.device).to(setting.dtype)
    blocks = 1 << (4 if setting.smoke else 20)
    product, one = torch.empty_like(left), torch.zeros(1, device=setting.device)

    def nothing() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    arms = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(left, right, out=product),
        "launches": captured(nothing, setting.device),
        "blocks": captured(lambda: _leave_at_once[(blocks,)](one), setting.device),
    }
    seconds = medians(arms, setting.device, setting.repeats)
    report.copy_bytes_per_second = 2 * size / seconds["copy"]  # read and written
    report.add("ceilings", what="copy", gb_per_s=report.copy_bytes_per_second / 1e9)
    report.add("ceilings", what=f"{setting.dtype} matmul", tflop_per_s=2 * side**3 / seconds["matmul"] / 1e12)
    report.add("ceilings", what="tiny kernel in a graph", us=seconds["launches"] / LAUNCHES * 1e6)
    report.add("ceilings", what="empty block", ns=seconds["blocks"] / blocks * 1e9)


@triton.jit
def _leave_at_once(zero):  # type: ignore[no-untyped-def]
    """What a block beyond a step's tiles does: it reads how many rows it has, and has none."""
    if tl.load(zero) < 0:
        tl.store(zero, 0.0)
