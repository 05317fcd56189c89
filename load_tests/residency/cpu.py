"""CPU time of an engine for Zipf traffic over few slots, beside the same requests with all their adapters resident.

On a machine that is shared with other work, throughput follows the others; the CPU time of a token does not. One thread
computes, so that no thread spins. Three engines run in turn: without packed copies, with them, and all resident.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from load_tests.engine_bench import EngineBench
from load_tests.residency.filling import fill, template, variants
from load_tests.residency.traffic import drawn
from server.ipc.messages import MoveAdapter, StepOutputs, Submit
from server.request import SamplingParams, ScaledAdapter


class Setting(msgspec.Struct, frozen=True):
    adapters: int = 300
    slots: int = 32
    streams: int = 16
    rank: int = 16
    requests: int = 96
    rounds: int = 3
    host_bytes: int = 2 << 30


def run(setting: Setting) -> bool:
    """Print CPU milliseconds per output token and their ratios; whether the target is met."""
    with tempfile.TemporaryDirectory() as folder:
        versions = variants(template(Path(folder), setting.rank), Path(folder) / "versions", setting.adapters)
        digests = list(versions)
        costs = {}
        for kind in ("resident", "packed copies", "own files"):
            data = Path(folder) / kind
            fill(data, versions)
            costs[kind] = _measure(setting, data, digests, kind)
            print(f"{kind}: {' '.join(f'{cost:.2f}' for cost in costs[kind])} ms of CPU per token", flush=True)
    ratios = {kind: float(np.median(np.array(costs["resident"]) / np.array(costs[kind]))) for kind in costs}
    print(
        f"{setting.adapters} adapters on {setting.slots} slots, of the tokens per CPU second of all resident: "
        f"{ratios['packed copies']:.3f} with packed copies, {ratios['own files']:.3f} without (target 0.9)"
    )
    return ratios["packed copies"] >= 0.9


def _measure(setting: Setting, data: Path, digests: list[str], kind: str) -> list[float]:
    slots = setting.adapters if kind == "resident" else setting.slots
    options: dict[str, Any] = {"adapter_packed_bytes": 0} if kind == "own files" else {}
    bench = EngineBench(
        data,
        1,
        adapter_slots=slots,
        adapter_device_bytes=slots * (10 << 20),
        max_adapter_rank=16,
        adapter_host_bytes=setting.host_bytes,
        threads=1,
        **options,
    )
    if kind == "packed copies":
        for digest in digests:
            bench.engine.residency._keep(digest, bench.engine.residency._read(digest))
    costs = []
    for number in range(setting.rounds):
        wanted = drawn(digests, setting.requests * (number + 1))[-setting.requests :]
        if kind == "resident":
            for digest in dict.fromkeys(wanted):
                bench.switch(MoveAdapter(0, digest, "device"))
        elif number == 0:
            for digest in dict.fromkeys(drawn(digests, 600)[-400:]):  # what earlier traffic left in host memory
                bench.switch(MoveAdapter(0, digest, "host"))
        started = time.process_time()
        tokens = _closed_loop(bench, wanted, setting.streams, number)
        costs.append((time.process_time() - started) * 1000 / tokens)
    bench.engine.close()
    return costs


def _closed_loop(bench: EngineBench, digests: list[str], streams: int, number: int) -> int:
    """The output tokens of a request for each of `digests`, so many at a time."""
    lengths = np.random.default_rng(number)
    upcoming = iter(enumerate(digests))
    running, tokens = 0, 0
    while True:
        while running < streams and (request := next(upcoming, None)):
            index, digest = request
            prompt = lengths.integers(100, 40_000, int(np.clip(lengths.lognormal(np.log(96), 0.6), 8, 512))).tolist()
            most = int(np.clip(lengths.lognormal(np.log(32), 0.6), 4, 128))
            params = SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True)
            bench.engine.handle(Submit(f"{number}-{index}", prompt, params, (ScaledAdapter(digest),)))
            running += 1
        if not running:
            return tokens
        step = bench.engine.step()[0]
        assert isinstance(step, StepOutputs)
        for output in step.outputs:
            tokens += len(output.token_ids)
            if output.finish_reason is not None:
                assert output.finish_reason == "length", output
                running -= 1
        if not step.stats.batch_tokens:
            time.sleep(0.002)
