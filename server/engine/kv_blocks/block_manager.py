"""Ownership of the blocks of the KV cache. Does not use torch: the tensors are in server/model/kv_cache.py.

Every block is in exactly one of three states:

    free list, unhashed     contains nothing useful
    free list, hashed       content of a finished sequence, found by its prefix hash until the block is reused
    block tables            referenced by `ref_count` running sequences; full blocks are hashed as well, before their
                            content is verified, so that sequences with the same prompt compute it once

The free list is in order of release, so the least recently used content is reused first.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from server.engine.kv_blocks.block_hashes import extend_hashes, tokens_of
from server.engine.kv_blocks.prompt_scores import max_cached_tokens
from server.sequence import NO_BLOCK, Sequence


@dataclass(slots=True)
class Block:
    block_id: int
    ref_count: int = 0
    block_hash: bytes | None = None
    token_ids: tuple[int, ...] = ()  # compared on a hit, so that a hash collision cannot return wrong keys and values
    verified: bool = False  # finite logits were computed from its content


@dataclass(slots=True)
class BlockManager:
    """Free list, refcounts and prefix cache over `num_blocks` blocks of `block_size` tokens."""

    num_blocks: int
    block_size: int
    prefix_queries: int = 0  # prompt tokens looked up, in total
    prefix_hits: int = 0  # prompt tokens found, in total
    merged: str = ""  # the version merged into the base model's weights
    copies: list[tuple[int, int]] = field(default_factory=list)  # blocks to copy before the next step: from, to
    _blocks: list[Block] = field(init=False)
    _free: "OrderedDict[int, None]" = field(init=False)
    _cached: dict[bytes, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._blocks = [Block(i) for i in range(self.num_blocks)]
        self._free = OrderedDict((i, None) for i in range(self.num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: Sequence) -> list[int]:
        """Return the cached blocks with the longest prefix of `seq`, in order, without referencing them.

        The last token is never matched, because sampling needs its logits.
        """
        matched: list[int] = []
        for index in range(len(self._prefix_hashes(seq))):
            block_id = self._find(seq, index)
            if block_id == NO_BLOCK:
                break
            matched.append(block_id)
        return matched

    def _find(self, seq: Sequence, index: int) -> int:
        block_id = self._cached.get(seq.block_hashes[index], NO_BLOCK)
        is_same = block_id != NO_BLOCK and self._blocks[block_id].token_ids == tokens_of(seq, index, self.block_size)
        return block_id if is_same else NO_BLOCK

    def _prefix_hashes(self, seq: Sequence) -> list[bytes]:
        """Return the hashes of the blocks of a waiting sequence that may be matched."""
        if seq.chain_merged != self.merged or seq.weight_changes:  # hashed for other weights
            seq.block_hashes, seq.chain_merged, seq.weight_changes = [], self.merged, []
        num_blocks = max_cached_tokens(seq) // self.block_size
        extend_hashes(seq, num_blocks, self.block_size)
        return seq.block_hashes[:num_blocks]

    def may_fit(self, seq: Sequence) -> bool:
        """Return False if `can_admit` would surely refuse `seq`. Does not compare tokens, so that a long prompt may ask
        in every step."""
        missing = self.blocks_for(seq.num_tokens) - self.num_free
        for block_hash in self._prefix_hashes(seq) if missing > 0 else ():
            block_id = self._cached.get(block_hash, -1)
            if block_id < 0 or missing <= 0:
                break
            missing -= self._blocks[block_id].ref_count > 0  # shared with a running sequence: takes no free block
        return missing <= 0

    def being_computed(self, seq: Sequence, num_matched: int, other: Sequence) -> int:
        """Return how many blocks of `seq` after its first `num_matched` the running sequence `other` will compute."""
        mine, others = seq.block_hashes, other.block_hashes
        if other.num_computed_tokens // self.block_size > num_matched:
            return 0
        known = range(num_matched, min(len(mine), len(others)))
        return bisect_left(known, True, key=lambda index: mine[index] != others[index])

    def can_admit(self, seq: Sequence, matched: list[int]) -> bool:
        """Return whether the whole of `seq` fits beside the running sequences, given the cached blocks it shares."""
        held = (self._blocks[block_id] for block_id in matched if block_id != NO_BLOCK)
        idle_matches = sum(1 for block in held if block.ref_count == 0)
        return self.blocks_wanted(seq, matched) <= self.num_free - idle_matches

    def blocks_wanted(self, seq: Sequence, matched: list[int]) -> int:
        """Return how many blocks `seq` takes beside its cached prefix."""
        return self.blocks_for(seq.num_tokens) - len(matched)

    def admit(self, seq: Sequence, matched: list[int]) -> None:
        """Give `seq` its cached prefix; `grow` adds the other blocks as needed."""
        assert not seq.block_table
        for block in (self._blocks[block_id] for block_id in matched if block_id != NO_BLOCK):
            if block.ref_count == 0:
                del self._free[block.block_id]
            block.ref_count += 1
        seq.block_table = list(matched)
        seq.num_computed_tokens = len(matched) * self.block_size
        self.prefix_queries += seq.num_tokens
        self.prefix_hits += seq.num_computed_tokens

    def to_grow(self, seq: Sequence, num_tokens: int) -> int:
        """Return how many blocks `seq` needs beyond its own to cover `num_tokens`."""
        return max(0, self.blocks_for(num_tokens) - len(seq.block_table))

    def grow(self, seq: Sequence, num_tokens: int) -> None:
        """Extend the block table of `seq` to cover `num_tokens`. The caller checks that `to_grow` blocks are free."""
        for _ in range(self.to_grow(seq, num_tokens)):
            block_id, _ = self._free.popitem(last=False)
            block = self._blocks[block_id]
            self._forget(block)
            block.ref_count = 1
            seq.block_table.append(block_id)

    def commit(self, seq: Sequence, num_computed_tokens: int) -> None:
        """Record that tokens up to `num_computed_tokens` are in the cache, and publish the blocks that became full."""
        full_before, full_now = seq.num_computed_tokens // self.block_size, num_computed_tokens // self.block_size
        extend_hashes(seq, full_now, self.block_size)
        for index in range(full_before, full_now):
            self._publish(seq, index)
        seq.num_computed_tokens = num_computed_tokens

    def verify(self, seq: Sequence, num_tokens: int) -> None:
        """Record that finite logits were computed from the first `num_tokens` tokens of `seq`."""
        for index in range(seq.num_verified_tokens // self.block_size, num_tokens // self.block_size):
            self._blocks[seq.block_table[index]].verified = True
        seq.num_verified_tokens = num_tokens

    def change_weights(self, merged: str, running: Iterable[Sequence]) -> None:
        """Record that `merged` ("": none) is now merged into the weights. From here on, blocks of `running` sequences
        are shared with none that other weights computed."""
        self.merged = merged
        for seq in running:
            del seq.block_hashes[seq.num_computed_tokens // self.block_size :]
            seq.weight_changes.append((seq.num_computed_tokens, merged))

    def forget_prefixes(self) -> None:
        """Empty the prefix cache. Blocks of running sequences stay theirs and are found by no later one."""
        for block_id in list(self._cached.values()):
            self._forget(self._blocks[block_id])

    def free(self, seq: Sequence) -> None:
        """Release the references of `seq`. Later blocks are freed first, so prefixes stay cached longest."""
        for block_id in reversed(seq.block_table):
            if block_id != NO_BLOCK:
                self._drop(self._blocks[block_id])
        seq.block_table = []
        seq.num_computed_tokens = 0

    def _drop(self, block: Block) -> None:
        block.ref_count -= 1
        if block.ref_count == 0:
            self._free[block.block_id] = None
            if block.block_hash is None:
                self._free.move_to_end(block.block_id, last=False)

    def num_passed(self, num_tokens: int) -> int:
        """Return how many of a sequence's first blocks no token from `num_tokens` on can see (sliding_blocks.py)."""
        return 0

    def release_passed(self, seq: Sequence, num_tokens: int) -> list[int]:
        """Release those blocks. Returns the ones that may contain NaN."""
        return []

    def disown_unverified(self, seq: Sequence) -> list[int]:
        """Remove blocks of `seq` alone whose content never led to finite logits from the prefix cache, and return them.

        They may contain NaN (of an overflowing adapter, for example), which their next owner must not read. Blocks that
        led another sequence to finite logits stay, unless the logits of `seq` were not finite.
        """
        if seq.num_verified_tokens >= max(seq.num_computed_tokens, seq.num_launched_tokens):
            return []
        return self._disown(seq, seq.block_table[max(seq.num_verified_tokens, 0) // self.block_size :])

    def _disown(self, seq: Sequence, suspect: list[int]) -> list[int]:
        if seq.num_verified_tokens < 0:
            for block_id in suspect:
                self._blocks[block_id].verified = False
        blocks = (self._blocks[block_id] for block_id in suspect)
        own = [block.block_id for block in blocks if block.ref_count == 1 and not block.verified]
        for block_id in own:
            self._forget(self._blocks[block_id])
        return own

    def check_integrity(self, running: list[Sequence]) -> None:
        """Raise AssertionError if the accounting is inconsistent; tests call this after every operation."""
        references = [0] * self.num_blocks
        for seq in running:
            for index, block_id in enumerate(seq.block_table):
                assert block_id != NO_BLOCK or index < self.num_passed(seq.num_computed_tokens)
                references[block_id] += block_id != NO_BLOCK
        for block in self._blocks:
            assert block.ref_count == references[block.block_id], block
            assert (block.ref_count == 0) == (block.block_id in self._free), block
        for block_hash, block_id in self._cached.items():
            assert self._blocks[block_id].block_hash == block_hash

    def _publish(self, seq: Sequence, index: int) -> None:
        block = self._blocks[seq.block_table[index]]
        block_hash = seq.block_hashes[index]
        if block.block_hash is None and block_hash not in self._cached:
            block.block_hash, block.token_ids = block_hash, tokens_of(seq, index, self.block_size)
            self._cached[block_hash] = block.block_id

    def _forget(self, block: Block) -> None:
        block.verified = False
        if block.block_hash is not None:
            del self._cached[block.block_hash]
            block.block_hash, block.token_ids = None, ()
