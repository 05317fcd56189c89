"""The part of a sequence's context that attention can see after its first blocks were released."""

from bisect import bisect_left

from server.sequence import NO_BLOCK

KEY_TILE = 64  # attention kernels divide a context into tiles of this length (or a part of it) from its start


def visible_context(table: list[int], num_tokens: int, block_size: int) -> tuple[int, list[int]]:
    """Return the length and the block table of a context without the blocks that were released, in whole tiles of keys
    so that the rest is computed with the same bits. The others of those blocks are replaced by the sequence's own first
    one: kernels may read masked keys, which must not be another's."""
    if not table or table[0] != NO_BLOCK:
        return num_tokens, table
    passed = bisect_left(table, True, key=lambda block_id: block_id != NO_BLOCK)
    skipped = passed * block_size // KEY_TILE * KEY_TILE // block_size
    return num_tokens - skipped * block_size, [table[passed]] * (passed - skipped) + table[passed:]
