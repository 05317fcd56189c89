"""(b) One decode step and (d) one prefill step of the whole model: adapters against the own base and the byte floor."""

from functools import partial

from adapters.kernels.segments import NO_SEGMENTS, Segments
from load_tests.gpu.models import decode_batch, prefill_batch, segments, step_bytes
from load_tests.gpu.setting import Report, Shape
from load_tests.gpu.timing import Arm, medians
from server.model.batch import ForwardBatch
from server.model.graphs import DecodeGraphs
from server.model.runner import ModelRunner


def decode(report: Report, shape: Shape, runner: ModelRunner, graphs: DecodeGraphs) -> None:
    """Graph replays, with what it takes to fill their buffers."""
    setting = report.setting
    for rows in setting.rows:
        counts = [0, *sorted({count for count in (*setting.adapters, rows) if count <= rows})]
        batch = decode_batch(rows, setting)
        arms: dict[str, Arm] = {}
        for count in counts:
            own = segments(rows, count, setting) if count else NO_SEGMENTS
            arms[str(count)] = partial(_replay, graphs, batch, own)
        seconds = medians(arms, setting.device, setting.repeats)
        for count in counts:
            floor = step_bytes(runner, shape, rows, count, setting) / report.copy_bytes_per_second
            found = seconds[str(count)]
            report.add(
                "decode", shape=shape.name, rows=rows, adapters=count, ms=found * 1e3,
                to_base=found / seconds["0"], to_byte_floor=found / floor,
            )  # fmt: skip


def _replay(graphs: DecodeGraphs, batch: ForwardBatch, segments: Segments) -> None:
    assert graphs.run(with_adapters(batch, segments, segments)) is not None, graphs.skipped


def with_adapters(batch: ForwardBatch, tokens: Segments, head: Segments) -> ForwardBatch:
    batch.token_segments, batch.head_segments = tokens, head
    return batch


def prefill(report: Report, shape: Shape, runner: ModelRunner) -> None:
    """Eager steps over whole prompts."""
    setting = report.setting
    for tokens in setting.prefill_tokens:
        for sequences in (1, min(4, max(setting.rows))):
            batch = prefill_batch(tokens, sequences, setting)
            own = segments(sequences, sequences, setting, tokens // sequences)
            head = segments(sequences, sequences, setting)
            arms: dict[str, Arm] = {
                "base": lambda batch=batch: runner.run(with_adapters(batch, NO_SEGMENTS, NO_SEGMENTS)),
                "lora": lambda batch=batch, own=own, head=head: runner.run(with_adapters(batch, own, head)),
            }
            seconds = medians(arms, setting.device, max(setting.repeats // 3, 1))
            report.add(
                "prefill", shape=shape.name, tokens=tokens, adapters=sequences, base_ms=seconds["base"] * 1e3,
                lora_ms=seconds["lora"] * 1e3, to_base=seconds["lora"] / seconds["base"],
            )  # fmt: skip
