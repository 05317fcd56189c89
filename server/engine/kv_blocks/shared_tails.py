"""The end of a prompt that two sequences have: its last block is not full, so it is copied and not shared. Does not use
torch."""

from server.engine.kv_blocks.block_hashes import chain_of
from server.engine.kv_blocks.block_manager import BlockManager
from server.engine.kv_blocks.prompt_scores import max_cached_tokens
from server.sequence import NO_BLOCK, Sequence


def tail_in(other: Sequence, seq: Sequence, num_matched: int, block_size: int) -> int:
    """Return how many tokens of `seq` behind its first `num_matched` blocks the running sequence `other` has computed,
    or is computing, in its block at the same place."""
    first = num_matched * block_size
    end = min(max_cached_tokens(seq), other.num_computed_tokens, first + block_size)
    if end <= first or seq.token_ids[first] != other.token_ids[first] or seq.adapters != other.adapters:
        return 0  # almost always, so this comes before the hashes
    if seq.num_virtual_tokens > first or other.block_table[num_matched] == NO_BLOCK:
        return 0
    if chain_of(seq, num_matched, block_size) != chain_of(other, num_matched, block_size):
        return 0
    pairs = enumerate(zip(seq.token_ids[first:end], other.token_ids[first:end], strict=True))
    return next((index for index, (mine, others) in pairs if mine != others), end - first)


def copy_tail(blocks: BlockManager, seq: Sequence, running: list[Sequence]) -> None:
    """Give `seq`, which was just admitted, a copy of the longest end of its prompt that a running sequence has."""
    num_matched = len(seq.block_table)
    tails = [_verified_tail_in(other, seq, num_matched, blocks.block_size) for other in running]
    if not any(tails):
        return
    longest = max(tails)
    source = running[tails.index(longest)].block_table[num_matched]
    seq.num_computed_tokens += longest
    blocks.prefix_hits += longest
    blocks.grow(seq, seq.num_computed_tokens)
    blocks.copies.append((source, seq.block_table[-1]))


def _verified_tail_in(other: Sequence, seq: Sequence, num_matched: int, block_size: int) -> int:
    """Return how many of those tokens led to finite logits, so that `seq` may copy them."""
    verified = other.num_verified_tokens - num_matched * block_size
    return min(tail_in(other, seq, num_matched, block_size), verified) if verified > 0 else 0


def is_being_verified(other: Sequence) -> bool:
    """Return whether the first token of `other` is being sampled, after which its prompt is verified."""
    return other.num_verified_tokens < other.num_prompt_tokens <= other.num_computed_tokens
