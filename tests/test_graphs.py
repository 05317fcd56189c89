"""Which decode steps replay a graph, what they find in its buffers, and why the others do not. Recording is left out:
here a replay is the forward, called again over the same buffers."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.kernels.segments import NO_SEGMENTS, Segments, SlotUse, build_segments
from adapters.model_spec import ModelSpec
from adapters.residency.slots import Slot
from adapters.runtime.columns import RankColumns
from adapters.runtime.layers import LoRAGroup
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.pool import AdapterPool
from adapters.runtime.row_maps import RowMaps
from server.model import graphs
from server.model.attention import launch_errors, triton_layout
from server.model.batch import ForwardBatch, SequenceRows
from server.model.graphs import CudaCapture, DecodeGraphs, StaticKernel, bucket_sizes, capture_decode_graphs
from server.model.virtual_tokens import VirtualRows, VirtualSpan

CPU = torch.device("cpu")
COLUMNS = {0: [(0, 16)], 1: [(16, 32)]}


class Kernel:
    """A plan is a list of the segments; `room` says how many fit."""

    name = "fake"
    room = 2

    def plan_segments(self, segments: Segments) -> Any:
        return "the step's own"

    def add_lora(self, *_: Any) -> None: ...

    def static_plan(self, rows: int) -> list[Any]:
        return []

    def refill(self, plan: list[Any], segments: Segments) -> bool:
        if len(segments.items) > self.room:
            return False
        plan[:] = segments.items
        return True


class Recorded:
    """Graphs over a forward that notes what it finds: the logits of a row are its token and position."""

    def __init__(self, sizes: list[int]) -> None:
        kernel = Kernel()
        assert isinstance(kernel, StaticKernel)
        self.pool = AdapterPool(ModelSpec({"m": (4, 4)}, 16), 2, torch.float32, CPU, kernel)
        self.captured: list[tuple[int, bool]] = []
        self.seen: tuple[list[int], list[Any] | None] | None = None
        self.group = LoRAGroup(["m"], torch.nn.Linear(4, 4), self.pool, self.pool.state.tokens)
        self.graphs = DecodeGraphs(self._forward, self.pool, [self.group], kernel, sizes, 4, 16, CPU, self._capture)

    def run(self, batch: ForwardBatch, tokens: Segments = NO_SEGMENTS, head: Segments | None = None) -> Any:
        head = tokens if head is None else head
        batch.token_segments, batch.head_segments = tokens, head
        return self.graphs.run(batch)

    def _forward(self, batch: ForwardBatch) -> torch.Tensor:
        plan = self.pool.token_plan
        assert (self.pool.head_plan.kernel_plan, plan.active) == (plan.kernel_plan, plan.kernel_plan is not None)
        self.seen = batch.slot_mapping.tolist(), plan.kernel_plan and list(plan.kernel_plan)
        return torch.stack([batch.input_ids, batch.positions], 1)

    def _capture(self, forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.captured.append((len(forward()), self.pool.token_plan.active))
        return forward


def decode(rows: int, **changes: Any) -> ForwardBatch:
    row = torch.arange(rows)
    sequences = [SequenceRows(index, index + 1, 20 + index, [index, index + 1]) for index in range(rows)]
    fields = {"sample_rows": row, "sequences": sequences, **changes}
    return ForwardBatch(input_ids=row + 5, positions=row + 19, slot_mapping=row + 300, block_size=16, **fields)


def adapters(*slots: int) -> Segments:
    return build_segments((((SlotUse(slot),) if slot >= 0 else (), 1) for slot in slots), COLUMNS)


def test_buckets_lie_close_and_end_at_the_largest_batch() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(20) == [1, 2, 4, 8, 16, 20]
    large = bucket_sizes(300)
    assert large[-1] == 300 and large == sorted(set(large))
    assert all(b - a <= max(a // 4, 8) for a, b in pairwise(large))


def test_every_bucket_is_recorded_without_and_with_adapters_largest_first() -> None:
    recorded = Recorded([1, 4])
    assert recorded.captured == [(4, False), (4, True), (1, False), (1, True)]
    assert not recorded.pool.token_plan.active


def test_a_decode_step_replays_the_smallest_bucket_that_holds_it() -> None:
    recorded = Recorded([1, 4])
    logits = recorded.run(decode(2))
    assert logits is not None and logits.tolist() == [[5, 19], [6, 20]]
    assert recorded.seen == ([300, 301, -1, -1], None)
    recorded.run(decode(4), adapters(0, 0, -1, 1))
    assert recorded.seen == ([300, 301, 302, 303], list(adapters(0, 0, -1, 1).items))
    recorded.run(decode(1))
    assert recorded.seen == ([300], None)
    recorded.run(decode(3))
    assert recorded.seen == ([300, 301, 302, -1], None)  # nothing is left of the step of four rows
    assert (recorded.graphs.replayed, recorded.graphs.skipped) == (4, Counter())


PREFILL = [SequenceRows(0, 2, 20, [0, 1])]
LONG = [SequenceRows(0, 1, 20, [0, 1]), SequenceRows(1, 2, 160, list(range(10)))]


@pytest.mark.parametrize(
    ("batch", "tokens", "head", "reason"),
    [
        (decode(2, sequences=PREFILL), NO_SEGMENTS, NO_SEGMENTS, "prefill"),
        (decode(2, virtual=VirtualRows([(VirtualSpan(0, 4, 5), 1)])), NO_SEGMENTS, NO_SEGMENTS, "virtual tokens"),
        (decode(2, pooled_rows=[(0, 1)]), NO_SEGMENTS, NO_SEGMENTS, "embeddings"),
        (decode(2, sample_rows=torch.tensor([1])), NO_SEGMENTS, NO_SEGMENTS, "rows without a sample"),
        (decode(2), adapters(0, 1), adapters(0), "rows without a sample"),
        (decode(5), NO_SEGMENTS, NO_SEGMENTS, "size"),
        (decode(4), adapters(0, 1, 0, 1), adapters(0, 1, 0, 1), "size"),
        (decode(2, sequences=LONG), NO_SEGMENTS, NO_SEGMENTS, "size"),
    ],
)
def test_other_steps_are_left_to_eager_execution_and_counted(
    batch: ForwardBatch, tokens: Segments, head: Segments, reason: str
) -> None:
    recorded = Recorded([2, 4])
    recorded.seen = None
    assert recorded.run(batch, tokens, head) is None
    assert recorded.graphs.skipped == {reason: 1} and recorded.graphs.replayed == 0
    assert recorded.seen is None


def test_a_merge_is_recorded_as_steps_need_it_and_the_base_s_graphs_stay() -> None:
    recorded = Recorded([1, 2])
    own, merged = recorded.group.base, torch.nn.Linear(4, 4)
    del recorded.captured[:]
    recorded.group.replace_base(merged)
    for _ in range(2):
        assert recorded.run(decode(2)) is not None
    assert recorded.captured == [(2, False)]
    recorded.group.replace_base(own)
    assert recorded.run(decode(2)) is not None and recorded.run(decode(2), adapters(0, 1)) is not None
    assert recorded.captured == [(2, False)] and not recorded.graphs.skipped


def test_graphs_over_weights_that_left_the_device_are_forgotten_and_recorded_again() -> None:
    """A merge without room for both moves the base's weights to the host and back, into other memory."""
    recorded = Recorded([2])
    own = recorded.group.base
    del recorded.captured[:]
    recorded.group.replace_base(torch.nn.Linear(4, 4))
    own.weight = torch.nn.Parameter(torch.zeros(4, 4))
    recorded.run(decode(2))
    recorded.group.replace_base(own)
    recorded.run(decode(2), adapters(0, 1))
    assert recorded.captured == [(2, False), (2, True)]
    assert len(recorded.graphs._recordings) == 1  # neither the merged weights' nor the old memory's


def test_a_recording_that_fails_under_traffic_leaves_its_steps_to_eager_execution() -> None:
    recorded = Recorded([2])
    own = recorded.group.base

    def capture(_: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise torch.OutOfMemoryError("the device is full")

    recorded.graphs._record = capture
    recorded.group.replace_base(torch.nn.Linear(4, 4))
    assert recorded.run(decode(2)) is None and recorded.run(decode(2)) is None
    assert recorded.graphs.skipped == {"not recorded": 2}
    recorded.group.replace_base(own)
    assert recorded.run(decode(2)) is not None


EXTRAS: dict[str, dict[str, Any]] = {
    "output vectors": {"vectors": {"m": torch.ones(2, 4)}},
    "input vectors": {"input_vectors": {"m": torch.ones(2, 4)}},
    "module overrides": {"module_overrides": {"m": (torch.nn.Identity(),)}},
    "row maps": {"row_maps": {"m": RowMaps(before=torch.nn.Identity())}},
}


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_an_adapter_with_more_than_a_and_b_runs_eagerly(extras: dict[str, Any]) -> None:
    recorded = Recorded([2])
    recorded.pool.write(Slot(1, "", [1]), PackedAdapter(1, RankColumns.zeros(16, {}, torch.float32), 0, **extras))
    assert recorded.run(decode(2), adapters(0, 0)) is not None
    assert recorded.run(decode(2), adapters(0, 1)) is None
    assert recorded.graphs.skipped == {"more than A and B": 1}


def test_there_are_no_graphs_without_cuda() -> None:
    pool = AdapterPool(ModelSpec({"m": (4, 4)}, 16), 1, torch.float32, CPU, Kernel())
    graphs, done = capture_decode_graphs(lambda batch: torch.zeros(1), pool, [], 4, 64, 16, CPU)
    assert graphs is None and "CUDA" in done


class _Graph:
    """Stands in for `torch.cuda` in `CudaCapture`: notes in which order the forward is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sync_mode, self.calls, self.recording = 0, [], False
        self.stream = nullcontext()
        replacements: dict[str, Any] = {
            "graph_pool_handle": lambda: 1,
            "Stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
            "stream": lambda _: nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "graph": lambda *_, **__: self._recorded(),
            "get_sync_debug_mode": lambda: self.sync_mode,
            "set_sync_debug_mode": self._set,
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)

    def _set(self, mode: str | int) -> None:
        self.sync_mode = mode  # type: ignore[assignment]

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        self.recording = True
        yield
        self.recording = False

    def forward(self) -> torch.Tensor:
        self.calls.append("recorded" if self.recording else self.sync_mode)
        return torch.zeros(1)


def test_a_forward_is_recorded_after_one_in_which_every_wait_for_the_device_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failed recording would leave torch's allocator in a state in which it releases no memory."""
    fake = _Graph(monkeypatch)
    CudaCapture()(fake.forward)()
    assert fake.calls == [0, "error", "recorded"] and fake.sync_mode == 0

    def waits() -> torch.Tensor:
        if fake.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return fake.forward()

    with pytest.raises(RuntimeError, match="synchronizing"):
        CudaCapture()(waits)
    assert fake.calls[-1] == 0 and fake.sync_mode == 0


@pytest.mark.parametrize("error", launch_errors())
def test_a_model_whose_kernels_do_not_fit_is_served_without_graphs(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    _Graph(monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
    monkeypatch.setattr(triton_layout, "static_layout", lambda *_: None)
    monkeypatch.setattr(graphs, "_static_batch", lambda *_: decode(1))
    pool = AdapterPool(ModelSpec({"m": (4, 4)}, 16), 1, torch.float32, CPU, Kernel())

    def forward(_: ForwardBatch) -> torch.Tensor:
        raise error("out of resource: shared memory")

    made, done = capture_decode_graphs(forward, pool, [], 4, 64, 16, torch.device("cuda"))
    assert made is None and "out of resource" in done
