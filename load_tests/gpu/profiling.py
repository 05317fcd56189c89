"""Which kernels a decode step's graph spends its time in: microseconds of one replay by name."""

import torch
from torch.profiler import ProfilerActivity, profile

from adapters.kernels.segments import NO_SEGMENTS
from load_tests.gpu.models import decode_batch, segments
from load_tests.gpu.setting import Report, Shape
from load_tests.gpu.steps import with_adapters
from server.model.graphs import DecodeGraphs

REPLAYS, ROWS, ADAPTERS, SHOWN = 5, 32, 8, 40


def run(report: Report, shape: Shape, graphs: DecodeGraphs) -> None:
    setting = report.setting
    for adapters in (0, ADAPTERS):
        own = segments(ROWS, adapters, setting) if adapters else NO_SEGMENTS
        batch = with_adapters(decode_batch(ROWS, setting), own, own)
        for _ in range(3):
            graphs.run(batch)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(REPLAYS):
                graphs.run(batch)
            torch.cuda.synchronize()
        events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
        for event in events[:SHOWN]:
            report.add(
                "profile", shape=shape.name, adapters=adapters, kernel=event.key[:100],
                us=event.self_device_time_total / REPLAYS, launches=event.count / REPLAYS,
            )  # fmt: skip
