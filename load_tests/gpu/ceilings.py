"""(a) What this GPU can do at best: what everything else is compared with."""

import torch

from load_tests.gpu.setting import Report
from load_tests.gpu.timing import captured, medians

LAUNCHES = 256  # in the graph of kernels that do nothing


def run(report: Report) -> None:
    setting = report.setting
    size = 1 << (16 if setting.smoke else 30)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=setting.device)
    side = 64 if setting.smoke else 8192
    left, right = torch.randn(2, side, side, device=setting.device).to(setting.dtype)
    product, one = torch.empty_like(left), torch.zeros(1, device=setting.device)

    def nothing() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    arms = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(left, right, out=product),
        "launches": captured(nothing, setting.device),
    }
    seconds = medians(arms, setting.device, setting.repeats)
    report.copy_bytes_per_second = 2 * size / seconds["copy"]  # read and written
    report.add("ceilings", what="copy", gb_per_s=report.copy_bytes_per_second / 1e9)
    report.add("ceilings", what=f"{setting.dtype} matmul", tflop_per_s=2 * side**3 / seconds["matmul"] / 1e12)
    report.add("ceilings", what="tiny kernel in a graph", us=seconds["launches"] / LAUNCHES * 1e6)
