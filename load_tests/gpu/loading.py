"""(h) Decode steps while a thread loads one adapter after another: what the longest of them takes, to the median of
those without loads."""

import statistics
import threading
import time

import torch

from adapters.residency.slots import PAGE_COLUMNS, Slot
from adapters.runtime.columns import RankColumns
from adapters.runtime.copies import writer
from adapters.runtime.pack import PackedAdapter
from load_tests.gpu.models import decode_batch
from load_tests.gpu.setting import Report, Setting, Shape
from server.model.batch import ForwardBatch
from server.model.graphs import DecodeGraphs
from server.model.runner import ModelRunner

LOADS = 5


def run(report: Report, shape: Shape, runner: ModelRunner, graphs: DecodeGraphs) -> None:
    setting = report.setting
    batch = decode_batch(max(setting.rows), setting)
    write = writer(runner.pool, setting.device)
    packed = _random(runner, setting)
    quiet = [_step(graphs, batch, setting) for _ in range(5 + setting.repeats)][5:]
    seconds: list[float] = []

    def load() -> None:
        for _ in range(1 if setting.smoke else LOADS):
            started = time.perf_counter()
            write(Slot(0, "", [*range(packed.num_pages)]), packed)
            seconds.append(time.perf_counter() - started)

    thread = threading.Thread(target=load)
    thread.start()
    busy = [_step(graphs, batch, setting)]
    while thread.is_alive():
        busy.append(_step(graphs, batch, setting))
    thread.join()
    median = statistics.median(quiet)
    report.add(
        "loading", shape=shape.name, mb=packed.columns.flat.nbytes / 1e6, load_ms=statistics.median(seconds) * 1e3,
        step_ms=median * 1e3, longest_quiet=max(quiet) / median, longest_loading=max(busy) / median,
        steps_meanwhile=len(busy),
    )  # fmt: skip


def _step(graphs: DecodeGraphs, batch: ForwardBatch, setting: Setting) -> float:
    started = time.perf_counter()
    assert graphs.run(batch) is not None, graphs.skipped
    if setting.device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    return time.perf_counter() - started


def _random(runner: ModelRunner, setting: Setting) -> PackedAdapter:
    columns = -(-setting.rank // PAGE_COLUMNS) * PAGE_COLUMNS
    pinned = setting.device.type == "cuda"
    packed = RankColumns.zeros(columns, runner.pool.widths(), setting.dtype, pinned=pinned)
    packed.flat.normal_(std=0.01)
    return PackedAdapter(columns // PAGE_COLUMNS, packed, 0)
