"""Decode steps as CUDA graphs: one per number of rows (bucket), with adapters and without.

A graph repeats launches on the same memory, so a step is copied into the buffers that its graph reads. Whatever differs
from plain decoding runs eagerly instead, and is counted by its reason. A step without adapters replays a graph that
has no LoRA launches at all. A graph also reads the weights that it was recorded with: after a merge, or after its end
where the base's weights have moved, graphs are recorded again as steps need them. Not yet run on a GPU: tests replay by
calling the forward again over the same buffers.
"""

import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console
from rich.progress import track

from adapters.kernels.contract import LoRAKernel
from adapters.kernels.segments import Segments
from adapters.runtime.layers import LoRAGroup
from adapters.runtime.pool import AdapterPool
from adapters.runtime.stacked_linear import StackedLinear
from server.model import attention
from server.model.attention import triton_layout
from server.model.batch import ForwardBatch

log = logging.getLogger(__name__)

Forward = Callable[[ForwardBatch], torch.Tensor]
Replay = Callable[[], torch.Tensor]
Capture = Callable[[Replay], Replay]


@runtime_checkable
class StaticKernel(LoRAKernel, Protocol):
    """A LoRA kernel that can overwrite a plan in place."""

    def static_plan(self, rows: int) -> Any: ...

    def refill(self, plan: Any, segments: Segments) -> bool: ...


@dataclass(frozen=True, slots=True)
class Bucket:
    """The buffers of the graphs for up to `rows` rows."""

    rows: int
    batch: ForwardBatch
    plan: Any


@dataclass(slots=True)
class Recording:
    """The graphs over one set of weights, by rows and whether they have adapters. The weights may leave the device:
    their memory is then used otherwise, and the graphs must not be replayed. `failed`: over these weights, no more
    graphs are recorded."""

    weights: list["weakref.ref[Any]"]
    replays: dict[tuple[int, bool], Replay] = field(default_factory=dict)
    failed: bool = False

    def is_over(self, weights: list[Any]) -> bool:
        return all(own() is weight for own, weight in zip(self.weights, weights, strict=True))

    def is_alive(self) -> bool:
        return all(own() is not None for own in self.weights)


def bucket_sizes(max_rows: int) -> list[int]:
    """Return ascending numbers of rows: close together where a row costs most, at most an eighth apart from 64 on."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows, 32)]
    return [*(size for size in sizes if size < max_rows), max_rows]


class DecodeGraphs:
    """The captured decode steps of a model. `replayed` counts the steps that ran as graphs, `skipped` the others by
    reason."""

    def __init__(
        self,
        forward: Forward,
        pool: AdapterPool,
        groups: Iterable[LoRAGroup],
        kernel: StaticKernel,
        sizes: list[int],
        blocks_per_row: int,
        block_size: int,
        device: torch.device,
        capture: Capture,
    ) -> None:
        self.replayed = 0
        self.skipped: Counter[str] = Counter()
        self._forward, self._record = forward, capture
        self._pool = pool
        self._kernel = kernel
        self._groups = list(groups)
        self._recordings: list[Recording] = []
        self._base_epoch, self._recording = pool.state.base_epoch, self._recording_of_weights()
        self._buckets = [
            Bucket(rows, _static_batch(rows, rows * blocks_per_row, block_size, device), kernel.static_plan(rows))
            for rows in sizes
        ]
        # The largest bucket first: the smaller graphs then fit into the memory of the larger ones.
        for bucket in track(self._buckets[::-1], "Capturing CUDA graphs", console=Console(stderr=True)):
            for with_adapters in (False, True):
                self._replay(bucket, with_adapters)

    def _replay(self, bucket: Bucket, with_adapters: bool) -> Replay:
        """Return the bucket's graph over the present weights, recorded now if there is none."""
        replays, key = self._recording.replays, (bucket.rows, with_adapters)
        if key not in replays:
            with self._pool.recorded_step(bucket.plan if with_adapters else None):
                replays[key] = self._record(partial(self._forward, bucket.batch))
        return replays[key]

    def _replay_or_none(self, bucket: Bucket, with_adapters: bool) -> Replay | None:
        """Return the bucket's graph; None if it is missing and cannot be recorded, for lack of memory for example."""
        recording = self._recording
        if recording.failed:
            return recording.replays.get((bucket.rows, with_adapters))
        try:
            return self._replay(bucket, with_adapters)
        except attention.launch_errors() as error:
            log.warning("decode steps run without new CUDA graphs until the weights change", exc_info=error)
            recording.failed = True
            return None

    def run(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Return the logits `[rows, vocab]` of a decode step, valid until the next step; None if no captured graph can
        compute the step."""
        rows, tokens = len(batch.input_ids), batch.token_segments
        unusual = self._unusual(batch)
        bucket = next((bucket for bucket in self._buckets if bucket.rows >= rows), None)
        if unusual or bucket is None or not self._fill(bucket, batch):
            self.skipped[unusual or "size"] += 1
            return None
        self._follow_weights()
        replay = self._replay_or_none(bucket, bool(tokens))
        if replay is None:
            self.skipped["not recorded"] += 1
            return None
        self.replayed += 1
        with self._pool.recorded_step(bucket.plan if tokens else None):
            return replay()[:rows]

    def _unusual(self, batch: ForwardBatch) -> str:
        """Return the reason why the step is not plain decoding; empty if it is."""
        if len(batch.sequences) < len(batch.input_ids):
            return "prefill"
        if batch.pooled_rows:
            return "embeddings"
        if batch.virtual.embedded:
            return "virtual tokens"
        if len(batch.sample_rows) < len(batch.input_ids) or batch.head_segments.items != batch.token_segments.items:
            return "rows without a sample"
        return "" if self._pool.planner.have_only_lora(batch.token_segments.rows) else "more than A and B"

    def _follow_weights(self) -> None:
        """Use the graphs over the base's present weights; weights are compared once per epoch."""
        if self._base_epoch != self._pool.state.base_epoch:
            self._recordings = [recording for recording in self._recordings if recording.is_alive()]
            self._recording = self._recording_of_weights()
            self._base_epoch = self._pool.state.base_epoch

    def _recording_of_weights(self) -> Recording:
        weights = [_weight(group) for group in self._groups]
        known = next((recording for recording in self._recordings if recording.is_over(weights)), None)
        if known is None:
            known = Recording([weakref.ref(weight) for weight in weights])
            self._recordings.append(known)
        return known

    def _fill(self, bucket: Bucket, batch: ForwardBatch) -> bool:
        """Copy the step into the bucket's buffers; return False when its rank columns or its context do not fit."""
        if batch.token_segments and not self._kernel.refill(bucket.plan, batch.token_segments):
            return False
        if not triton_layout.refill(bucket.batch.attention_plan, batch.sequences, batch.block_size):
            return False
        rows, static = len(batch.input_ids), bucket.batch
        static.input_ids[:rows].copy_(batch.input_ids)
        static.positions[:rows].copy_(batch.positions)
        static.slot_mapping[:rows].copy_(batch.slot_mapping)
        static.slot_mapping[rows:].fill_(-1)  # padding rows are computed, and kept nowhere
        return True


def _weight(group: LoRAGroup) -> Any:
    """Return the tensor that the group's base computes with, or the module that has one in another form."""
    base = group.base.inner if isinstance(group.base, StackedLinear) else group.base
    return base._parameters.get("weight", base)


def _static_batch(rows: int, num_blocks: int, block_size: int, device: torch.device) -> ForwardBatch:
    ids, positions = torch.zeros(2, rows, dtype=torch.int64, device=device)
    nowhere = torch.full((rows,), -1, dtype=torch.int64, device=device)
    every = torch.arange(rows, device=device)
    layout = triton_layout.static_layout(rows, num_blocks, device)
    return ForwardBatch(ids, positions, nowhere, every, [], block_size, layout)


class CudaCapture:
    """Records a forward into a CUDA graph. All graphs share one memory pool, because they never run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def __call__(self, forward: Replay) -> Replay:
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()  # compiles kernels and makes the libraries' workspaces, which must not happen while recording
            with _syncs_refused():
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Adapters may be on their way in other threads: only this thread's calls are held to the rules of recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = forward()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


@contextmanager
def _syncs_refused() -> Iterator[None]:
    """Raise RuntimeError where torch waits for the device. Recording such a forward fails as well, but only after its
    end, and leaves torch's allocator in the state of a recording."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def capture_decode_graphs(
    forward: Forward,
    pool: AdapterPool,
    groups: Iterable[LoRAGroup],
    max_rows: int,
    max_model_len: int,
    block_size: int,
    device: torch.device,
) -> tuple[DecodeGraphs | None, str]:
    """Capture decode steps of up to `max_rows` rows; return None if that is impossible, and a description for the
    log."""
    kernel = pool.kernel
    if device.type != "cuda" or not isinstance(kernel, StaticKernel):
        return None, "none: they need CUDA and the Triton kernels"
    started, free = time.perf_counter(), torch.cuda.mem_get_info(device)[0]
    blocks_per_row = -(-max_model_len // block_size)
    sizes = bucket_sizes(max_rows)
    try:
        graphs = DecodeGraphs(forward, pool, groups, kernel, sizes, blocks_per_row, block_size, device, CudaCapture())
    except attention.launch_errors() as error:  # torch's for all that cannot be recorded, and Triton's
        log.warning("decode steps run without CUDA graphs: this model cannot be recorded", exc_info=error)
        return None, f"none: this model cannot be recorded ({error})"
    taken = (free - torch.cuda.mem_get_info(device)[0]) / (1 << 20)
    return graphs, f"{len(sizes)} batch sizes up to {max_rows}: {taken:.0f} MiB, {time.perf_counter() - started:.1f} s"
