"""(f) The engine in this process, end to end: many streams over many adapters."""

import time
from typing import NoReturn

from adapters.residency.host_cache import HostCache
from adapters.residency.residency import Residency
from adapters.residency.slots import PAGE_COLUMNS, SlotTable
from adapters.runtime.columns import RankColumns
from adapters.runtime.pack import PackedAdapter
from load_tests.gpu.models import PAGE
from load_tests.gpu.setting import Report, Shape
from server.engine.constraints import Constraints
from server.engine.engine import Engine
from server.engine.grammars import Grammars
from server.engine.kv_blocks.block_manager import BlockManager
from server.engine.merging import Merging
from server.engine.scheduling.scheduler import Scheduler
from server.engine.selftest import SelfTests
from server.engine.weights_reader import WeightsReader
from server.ipc.messages import StepOutputs, Submit
from server.model.graphs import DecodeGraphs
from server.model.runner import ModelRunner
from server.request import SamplingParams, ScaledAdapter


def run(report: Report, shape: Shape, runner: ModelRunner, graphs: DecodeGraphs) -> None:
    setting = report.setting
    runner.graphs = graphs
    try:
        for adapters in sorted({0, 1, min(8, setting.streams), setting.streams}):
            engine = _engine(runner, report)
            _tokens_per_second(engine, report, adapters, "warm")  # brings the adapters to the device
            for engine.overlap in (False, True):
                speed = _tokens_per_second(engine, report, adapters, f"run {engine.overlap}")
                about = {"shape": shape.name, "streams": setting.streams, "adapters": adapters}
                report.add("streams", **about, overlap=engine.overlap, tokens_per_s=speed)
            engine.close()
    finally:
        runner.graphs = None


def _engine(runner: ModelRunner, report: Report) -> Engine:
    setting = report.setting
    slots = max(setting.rows)
    pages = -(-setting.rank // PAGE_COLUMNS)
    packed = PackedAdapter(pages, RankColumns.zeros(pages * PAGE_COLUMNS, runner.pool.widths(), setting.dtype), 1)
    residency = Residency(SlotTable(slots, slots * pages), HostCache(1 << 20), lambda _: packed, runner.pool.write)
    blocks = BlockManager(len(runner.kv_cache.keys[0]), PAGE)
    scheduler = Scheduler(blocks, residency, setting.streams, max_batch_tokens=2048, max_wait_steps=256)
    selftests = SelfTests(runner, residency, WeightsReader(_nobody_asks), scheduler.gate, lambda: None)
    merging = Merging(scheduler, _nobody_asks)
    parts = runner, scheduler, residency, selftests, merging, Constraints(Grammars(_nobody_asks, frozenset()))
    return Engine(*parts, frozenset(), setting.context + setting.new_tokens)


def _nobody_asks(*_: object) -> NoReturn:
    raise AssertionError("nobody asks for a trial or a merge")


def _tokens_per_second(engine: Engine, report: Report, adapters: int, name: str) -> float:
    setting = report.setting
    params = SamplingParams(max_tokens=setting.new_tokens, temperature=0.0, ignore_eos=True)
    for stream in range(setting.streams):
        own = (ScaledAdapter(f"adapter-{stream % adapters}"),) if adapters else ()
        prompt = [stream % 100 + 1, *range(1, setting.context // 8)]
        engine.handle(Submit(f"{name}-{stream}", prompt, params, own))
    started, tokens = time.perf_counter(), 0
    while engine.has_work():
        for message in engine.step():
            for output in message.outputs if isinstance(message, StepOutputs) else ():
                assert output.error is None, output.error
                tokens += len(output.token_ids)
    assert tokens == setting.streams * setting.new_tokens, tokens
    return tokens / (time.perf_counter() - started)
