"""Blocks of models whose layers all attend to a sliding window. Blocks that no later token can see are released while
their sequence runs; `NO_BLOCK` takes their place in its table. A prefix is found by the blocks of its last window."""

from dataclasses import dataclass

from server.engine.kv_blocks.block_manager import BlockManager
from server.sequence import NO_BLOCK, Sequence


@dataclass(slots=True, kw_only=True)
class SlidingBlocks(BlockManager):
    window: int  # the largest of the layers': latest keys, its own included, that a token sees
    max_step_tokens: int  # of one sequence in one step

    def num_passed(self, num_tokens: int) -> int:
        return max(num_tokens - self.window + 1, 0) // self.block_size

    def match_prefix(self, seq: Sequence) -> list[int]:
        """Return the longest prefix of `seq` of which all blocks that later tokens see are cached."""
        hashes = self._prefix_hashes(seq)
        end, found = len(hashes), list[int]()  # the blocks before `end`, backwards
        for index in reversed(range(len(hashes))):
            if index < self.num_passed(end * self.block_size):
                break
            found.append(self._find(seq, index))
            if found[-1] == NO_BLOCK:
                end, found = index, []
        return [NO_BLOCK] * (end - len(found)) + found[::-1]

    def may_fit(self, seq: Sequence) -> bool:
        return True  # a match compares the tokens of one window only

    def blocks_wanted(self, seq: Sequence, matched: list[int]) -> int:
        """Return how many blocks `seq` takes at most at a time: two steps may be in flight before the blocks that the
        first one passed are released. A prefix is copied within one step."""
        held = len(matched) - matched.count(NO_BLOCK)
        most = self.blocks_for(seq.num_copied_tokens + self.window + 2 * self.max_step_tokens) + 1
        return min(BlockManager.blocks_wanted(self, seq, matched), most - held)

    def verify(self, seq: Sequence, num_tokens: int) -> None:
        """Record that finite logits were computed from the tokens that the last of the first `num_tokens` sees."""
        first = seq.num_verified_tokens // self.block_size
        if seq.num_verified_tokens < num_tokens - self.window:
            first = self.blocks_for(num_tokens - self.window)
        for block_id in seq.block_table[first : num_tokens // self.block_size]:
            self._blocks[block_id].verified = True
        seq.num_verified_tokens = num_tokens

    def release_passed(self, seq: Sequence, num_tokens: int) -> list[int]:
        """Release the blocks of `seq` that no token from `num_tokens` on can see. Returns those whose content never led
        to finite logits: they are in no cache, and their next owner must not read them."""
        table, suspect = seq.block_table, list[int]()
        for index in reversed(range(min(self.num_passed(num_tokens), len(table)))):
            if table[index] == NO_BLOCK:
                break
            block = self._blocks[table[index]]
            if block.ref_count == 1 and not block.verified:
                suspect.append(block.block_id)
                self._forget(block)
            self._drop(block)
            table[index] = NO_BLOCK
        return suspect

    def disown_unverified(self, seq: Sequence) -> list[int]:
        """Remove all blocks of `seq` alone that led to no finite logits: its last token did not see each of them."""
        return self._disown(seq, [block_id for block_id in seq.block_table if block_id != NO_BLOCK])
