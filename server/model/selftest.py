"""A probe prompt with one adapter: through the serving path, and through the reference arithmetic."""

import torch

from adapters.kernels.segments import NO_SEGMENTS, SlotUse, build_segments, column_runs
from adapters.residency.slots import PAGE_COLUMNS, Slot
from adapters.runtime.reference import ReferenceAdapter
from server.model.batch import ForwardBatch, build_batch
from server.model.kv_cache import KVCache
from server.model.runner import ModelRunner
from server.sequence import SamplingParams, ScheduledBatch, ScheduledSequence, Sequence

TRIAL_TOKENS = 16


def try_adapter(runner: ModelRunner, slot: Slot, reference: ReferenceAdapter) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[TRIAL_TOKENS, vocab]` in float32 by both ways, over the adapter's own vocabulary."""
    vocab_size = runner.vocab_size((slot.index,))
    batch = _probe_batch(runner, min(vocab_size, runner.vocab_size(())))
    rows = ((SlotUse(slot.index, 1.0),), TRIAL_TOKENS)
    own = build_segments([rows], {slot.index: column_runs(slot.pages, PAGE_COLUMNS)})
    # A cache of its own: the engine's blocks belong to sequences.
    batch.token_segments = batch.head_segments = own
    served = runner.run(batch, _scratch(runner))
    batch.token_segments = batch.head_segments = NO_SEGMENTS
    with torch.inference_mode(), reference.active():
        expected = runner.run(batch, _scratch(runner))
    return served[:, :vocab_size].float(), expected[:, :vocab_size].float()


def _scratch(runner: ModelRunner) -> KVCache:
    return KVCache(runner.cache_shape, 1, TRIAL_TOKENS, runner.device)


def _probe_batch(runner: ModelRunner, vocab_size: int) -> ForwardBatch:
    """Tokens from all over the vocabulary, the logits of each wanted."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (TRIAL_TOKENS,), generator=generator).tolist()
    seq = Sequence("selftest", ids, SamplingParams(max_tokens=1), block_table=[0])
    batch = build_batch(ScheduledBatch([ScheduledSequence(seq, TRIAL_TOKENS)]), TRIAL_TOKENS, runner.device)
    batch.sample_rows = torch.arange(TRIAL_TOKENS, device=runner.device)
    return batch
