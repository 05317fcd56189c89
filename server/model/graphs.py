"""Decode steps as CUDA graphs: one per number of rows (bucket), with adapters and without.

A graph repeats launches on the same memory, so a step is copied into the buffers that its graph reads. Whatever differs
from plain decoding runs eagerly instead, and is counted by its reason. A step without adapters replays a graph that
has no LoRA launches at all. Not yet run on a GPU: tests replay by calling the forward again over the same buffers.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    """The buffers of the graphs for up to `rows` rows, and the graphs by whether they have adapters."""

    rows: int
    batch: ForwardBatch
    plan: Any
    replays: dict[bool, Replay]


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
        self._pool = pool
        self._kernel = kernel
        # A graph reads the weights that it was recorded with, which a merge replaces.
        self._weights = [(group, _weight(group)) for group in groups]
        self._base_epoch, self._has_recorded_weights = pool.state.base_epoch, True
        self._buckets = [
            Bucket(rows, _static_batch(rows, rows * blocks_per_row, block_size, device), kernel.static_plan(rows), {})
            for rows in sizes
        ]
        self._capture(forward, capture)

    def _capture(self, forward: Forward, capture: Capture) -> None:
        """Capture the largest bucket first: the smaller graphs then fit into the memory of the larger ones."""
        for bucket in track(self._buckets[::-1], "Capturing CUDA graphs", console=Console(stderr=True)):
            for with_adapters in (False, True):
                with self._pool.recorded_step(bucket.plan if with_adapters else None):
                    bucket.replays[with_adapters] = capture(partial(forward, bucket.batch))

    def run(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Return the logits `[rows, vocab]` of a decode step, valid until the next step; None if no captured graph can
        compute the step."""
        rows, tokens = len(batch.input_ids), batch.token_segments
        unusual = self._unusual(batch)
        bucket = next((bucket for bucket in self._buckets if bucket.rows >= rows), None)
        if unusual or bucket is None or not self._fill(bucket, batch):
            self.skipped[unusual or "size"] += 1
            return None
        self.replayed += 1
        with self._pool.recorded_step(bucket.plan if tokens else None):
            return bucket.replays[bool(tokens)]()[:rows]

    def _unusual(self, batch: ForwardBatch) -> str:
        """Return the reason why the step is not plain decoding; empty if it is."""
        if len(batch.sequences) < len(batch.input_ids):
            return "prefill"
        if batch.virtual.embedded:
            return "virtual tokens"
        if len(batch.sample_rows) < len(batch.input_ids) or batch.head_segments.items != batch.token_segments.items:
            return "rows without a sample"
        if not self._pool.planner.have_only_lora(batch.token_segments.rows):
            return "more than A and B"
        return "" if self._are_recorded_weights() else "other base weights"

    def _are_recorded_weights(self) -> bool:
        """Return whether the base's weights are those that were recorded; they are compared once per epoch."""
        epoch = self._pool.state.base_epoch
        if epoch != self._base_epoch:
            self._has_recorded_weights = all(_weight(group) is recorded for group, recorded in self._weights)
            self._base_epoch = epoch
        return self._has_recorded_weights

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


def _weight(group: LoRAGroup) -> object:
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
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Adapters may be on their way in other threads: only this thread's calls are held to the rules of recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = forward()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


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
    except RuntimeError as error:  # torch's for everything that cannot be recorded
        log.warning("decode steps run without CUDA graphs: this model cannot be recorded", exc_info=error)
        return None, f"none: this model cannot be recorded ({error})"
    taken = (free - torch.cuda.mem_get_info(device)[0]) / (1 << 20)
    return graphs, f"{len(sizes)} batch sizes up to {max_rows}: {taken:.0f} MiB, {time.perf_counter() - started:.1f} s"
