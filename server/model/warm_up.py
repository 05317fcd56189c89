"""Compilation of the Triton kernels at start: a kernel is compiled at its first launch, which takes seconds and must
not happen in a request's step. Graphs warm up for their numbers of rows themselves."""

from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track

from adapters.kernels.segments import Segment, Segments
from adapters.residency.slots import PAGE_COLUMNS
from server.model.batch import ForwardBatch, SequenceRows

PREFILL_TOKENS = 128  # of one sequence: enough for the kernels' forms for prefill


def warm_up(run: Callable[[ForwardBatch], torch.Tensor], block_size: int, device: torch.device) -> None:
    """Run each kind of step once on a GPU."""
    if device.type == "cuda":
        for batch in track(warm_up_steps(block_size, device), "Compiling kernels", console=Console(stderr=True)):
            run(batch)


def warm_up_steps(block_size: int, device: torch.device) -> list[ForwardBatch]:
    """Return a prefill and a decode step, each without adapters and with one. They store no keys and values, and read
    the first block of the cache and the first page of the pool."""
    return [
        _step(tokens, with_adapters, block_size, device)
        for tokens in (PREFILL_TOKENS, 1)
        for with_adapters in (False, True)
    ]


def _step(tokens: int, with_adapters: bool, block_size: int, device: torch.device) -> ForwardBatch:
    ids, positions = torch.zeros(tokens, dtype=torch.int64, device=device), torch.arange(tokens, device=device)
    nowhere, last = torch.full_like(ids, -1), positions[-1:]
    sequences = [SequenceRows(0, tokens, tokens, [0] * -(-tokens // block_size))]
    batch = ForwardBatch(ids, positions, nowhere, last, sequences, block_size)
    if with_adapters:
        batch.token_segments = Segments((Segment(0, tokens, 0, PAGE_COLUMNS),))
        batch.head_segments = Segments((Segment(0, 1, 0, PAGE_COLUMNS),))
    return batch
