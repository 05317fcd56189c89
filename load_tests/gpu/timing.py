"""Medians of interleaved arms: whatever disturbs the machine disturbs them all."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Arm = Callable[[], Any]


def captured(arm: Arm, device: torch.device) -> Arm:
    """The arm as a CUDA graph, so that only the GPU's time counts; on a CPU, the arm."""
    if device.type != "cuda":
        return arm
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        arm()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        arm()
    return graph.replay


def medians(arms: Mapping[str, Arm], device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds per call of each arm, after three calls to warm up."""
    for arm in arms.values():
        for _ in range(3 if device.type == "cuda" else 1):
            arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            seconds[name].append(_seconds(arm, device))
    return {name: statistics.median(found) for name, found in seconds.items()}


def _seconds(arm: Arm, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        arm()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    arm()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
