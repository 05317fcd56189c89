"""A probe prompt with one adapter: through the serving path, and through the reference arithmetic."""

import torch

from adapters.kernels.segments import NO_SEGMENTS, SlotUse, build_segments, column_runs
from adapters.residency.slots import PAGE_COLUMNS, Slot
from adapters.runtime.reference import ReferenceAdapter
from server.model.batch import ForwardBatch, build_batch
from server.model.kv_cache import KVCache
from server.model.runner import ModelRunner
from server.model.virtual_tokens import VirtualRows
from server.request import SamplingParams
from server.sequence import ScheduledBatch, ScheduledSequence, Sequence

TRIAL_TOKENS = 16


def try_adapter(runner: ModelRunner, slot: Slot, reference: ReferenceAdapter) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[TRIAL_TOKENS, vocab]` in float32 by both ways, over the adapter's own vocabulary."""
    vocab_size = runner.vocab_size((slot.index,))
    batch = _probe_batch(runner, min(vocab_size, runner.vocab_size(())), slot.index, reference)
    rows = ((SlotUse(slot.index, 1.0),), TRIAL_TOKENS)
    own = build_segments([rows], {slot.index: column_runs(slot.pages, PAGE_COLUMNS)})
    batch.token_segments = batch.head_segments = own
    # A cache of its own: the engine's blocks belong to sequences.
    served = runner.run(batch, _scratch(runner, reference))
    batch.token_segments = batch.head_segments = NO_SEGMENTS
    batch.virtual = VirtualRows()
    cache = _scratch(runner, reference)
    with torch.inference_mode(), reference.active(), reference.in_front(runner.embedding, cache.keys, cache.values):
        expected = runner.run(batch, cache)
    return served[:, :vocab_size].float(), expected[:, :vocab_size].float()


def _scratch(runner: ModelRunner, reference: ReferenceAdapter) -> KVCache:
    return KVCache(runner.cache_shape, _num_blocks(reference), TRIAL_TOKENS, runner.device)


def _num_blocks(reference: ReferenceAdapter) -> int:
    return -(-(reference.num_virtual + TRIAL_TOKENS) // TRIAL_TOKENS)


def _probe_batch(runner: ModelRunner, vocab_size: int, slot: int, reference: ReferenceAdapter) -> ForwardBatch:
    """Tokens from all over the vocabulary behind the adapter's virtual ones; the logits of each token are wanted."""
    generator = torch.Generator().manual_seed(0)
    ids = [0] * reference.num_virtual + torch.randint(0, vocab_size, (TRIAL_TOKENS,), generator=generator).tolist()
    seq = Sequence("selftest", ids, SamplingParams(max_tokens=1), block_table=[*range(_num_blocks(reference))])
    seq.slots, seq.num_virtual_tokens = (slot,), reference.num_virtual
    seq.num_copied_tokens = reference.num_virtual if reference.has_prefix else 0
    scheduled = ScheduledSequence(seq, seq.num_tokens - seq.num_copied_tokens)
    batch = build_batch(ScheduledBatch([scheduled]), TRIAL_TOKENS, runner.device)
    batch.sample_rows = torch.arange(scheduled.num_new_tokens, device=runner.device)[-TRIAL_TOKENS:]
    return batch
