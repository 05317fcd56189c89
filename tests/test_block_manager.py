"""The books of the KV cache: who owns which block, and what is found again by its prefix."""

from functools import partial
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kv_blocks.block_manager import BlockManager
from server.engine.kv_blocks.sliding_blocks import SlidingBlocks
from server.request import SamplingParams, ScaledAdapter
from server.sequence import NO_BLOCK, Sequence
from tests.fixtures.engine_driver import plain

BLOCK = 4


def make_seq(tokens: list[int] | range, adapter: str | None = None, salt: str = "") -> Sequence:
    return Sequence("s", list(tokens), SamplingParams(max_tokens=8), plain(adapter), salt)


def compute(blocks: BlockManager, seq: Sequence, num_tokens: int | None = None) -> Sequence:
    """Admit `seq` with whatever is cached, and compute it up to `num_tokens` (all of it by default)."""
    end = seq.num_tokens if num_tokens is None else num_tokens
    blocks.admit(seq, blocks.match_prefix(seq))
    blocks.grow(seq, end)
    blocks.commit(seq, end)
    return seq


def test_a_sequence_takes_blocks_as_it_grows_and_gives_them_back() -> None:
    blocks = BlockManager(num_blocks=4, block_size=BLOCK)
    seq = make_seq(range(10))
    blocks.admit(seq, [])
    blocks.grow(seq, 3)
    assert (len(seq.block_table), blocks.num_used) == (1, 1)
    blocks.grow(seq, 4)
    assert len(seq.block_table) == 1  # a full block needs no second one
    blocks.grow(seq, 5)
    assert len(seq.block_table) == 2
    blocks.check_integrity([seq])
    blocks.free(seq)
    assert (seq.block_table, seq.num_computed_tokens, blocks.num_free) == ([], 0, 4)
    blocks.check_integrity([])


def test_growth_is_refused_when_the_blocks_are_gone() -> None:
    blocks = BlockManager(num_blocks=2, block_size=BLOCK)
    seq = make_seq(range(12))
    assert not blocks.can_admit(seq, [])
    blocks.admit(seq, [])
    assert blocks.to_grow(seq, 8) <= blocks.num_free
    assert blocks.to_grow(seq, 9) > blocks.num_free


def test_a_cached_prefix_is_shared_and_counted_by_reference() -> None:
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    first = compute(blocks, make_seq(range(10)))
    second = compute(blocks, make_seq([*range(8), 50, 51]))
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert blocks.num_used == 4
    blocks.check_integrity([first, second])
    blocks.free(first)
    assert blocks.num_used == 3  # the second still refers to the shared ones
    blocks.check_integrity([second])


def test_what_a_finished_sequence_computed_is_found_again() -> None:
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    first = compute(blocks, make_seq(range(10)))
    table = list(first.block_table)
    blocks.free(first)
    again = make_seq(range(10))
    assert blocks.match_prefix(again) == table[:2]
    assert blocks.num_free == 8  # matching takes nothing
    compute(blocks, again)
    assert (blocks.prefix_queries, blocks.prefix_hits) == (20, 8)


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 8, 9])
def test_the_last_token_is_never_matched(num_tokens: int) -> None:
    """Something must be computed to sample from, even when every block of the prompt is cached."""
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    blocks.free(compute(blocks, make_seq(range(12))))
    matched = blocks.match_prefix(make_seq(range(num_tokens)))
    assert len(matched) == (num_tokens - 1) // BLOCK


@pytest.mark.reliability("T53")
@pytest.mark.parametrize(
    ("adapter", "salt", "blocks_found"),
    [("a", "tenant", 2), (None, "tenant", 0), ("b", "tenant", 0), ("a", "other", 0), ("a", "", 0)],
)
def test_a_prefix_is_found_only_within_its_adapter_version_and_salt(
    adapter: str | None, salt: str, blocks_found: int
) -> None:
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    blocks.free(compute(blocks, make_seq(range(9), "a", "tenant")))
    assert len(blocks.match_prefix(make_seq(range(9), adapter, salt))) == blocks_found


def first_hash(adapters: tuple[ScaledAdapter, ...], salt: str, active_from: int = 0) -> bytes:
    seq = Sequence("s", [0] * (2 * BLOCK), SamplingParams(1), adapters, salt, active_from=active_from)
    BlockManager(num_blocks=2, block_size=BLOCK).match_prefix(seq)
    return seq.block_hashes[0]


@pytest.mark.reliability("T53")
def test_no_adapters_and_salt_can_be_mistaken_for_others() -> None:
    lists = [
        *((), (("a", 1.0),), (("ab", 1.0),), (("a", 0.5),), (("a", -1.0),), (("a", 1.0), ("b", 1.0))),
        *((("a", 1.0), ("b", 0.5)), (("a", 0.5), ("b", 1.0)), (("a,1.0", 1.0),), (('a",1.0],["b', 1.0),)),
    ]
    made = [tuple(ScaledAdapter(*one) for one in many) for many in lists]
    hashes = {first_hash(adapters, salt) for adapters in made for salt in ("", "a", "salt", "[]")}
    assert len(hashes) == 4 * len(lists)
    one, other = made[-4], made[-4][::-1]
    assert first_hash(one, "") == first_hash(other, "")  # the order of a composition means nothing


def activated(tokens: list[int] | range, active_from: int) -> Sequence:
    return Sequence("s", list(tokens), SamplingParams(max_tokens=8), plain("a"), active_from=active_from)


@pytest.mark.parametrize(("active_from", "shared"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (11, 2), (12, 3), (16, 3)])
def test_an_activated_adapter_shares_the_base_s_blocks_before_it(active_from: int, shared: int) -> None:
    """In both directions: who comes second finds what the first left."""
    made = partial(make_seq, range(16)), partial(activated, range(16), active_from)
    for giver, taker in permutations(made):
        blocks = BlockManager(num_blocks=16, block_size=BLOCK)
        blocks.free(compute(blocks, giver()))
        assert len(blocks.match_prefix(taker())) == shared


def test_where_in_its_block_an_adapter_begins_is_part_of_the_chain() -> None:
    blocks = BlockManager(num_blocks=16, block_size=BLOCK)
    blocks.free(compute(blocks, activated(range(16), 5)))
    assert len(blocks.match_prefix(activated(range(16), 6))) == 1
    assert len(blocks.match_prefix(activated(range(16), 5))) == 3


def test_only_full_blocks_are_published() -> None:
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    running = make_seq(range(12))
    compute(blocks, running, 7)
    assert blocks.match_prefix(make_seq(range(12))) == running.block_table[:1]
    blocks.grow(running, 8)
    blocks.commit(running, 8)
    assert blocks.match_prefix(make_seq(range(12))) == running.block_table[:2]


def test_a_block_in_the_middle_is_of_no_use_without_those_before_it() -> None:
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    blocks.free(compute(blocks, make_seq(range(9))))
    assert blocks.match_prefix(make_seq([99, *range(1, 9)])) == []


def test_tokens_are_compared_when_hashes_collide() -> None:
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    first = compute(blocks, make_seq(range(9)))
    impostor = make_seq(range(50, 59))
    impostor.block_hashes = list(first.block_hashes)
    assert blocks.match_prefix(impostor) == []
    compute(blocks, impostor)  # cannot publish under a hash that is taken, and must not disturb it
    assert blocks.match_prefix(make_seq(range(9))) == first.block_table[:2]
    blocks.check_integrity([first, impostor])


def test_the_least_recently_used_content_is_reused_first() -> None:
    blocks = BlockManager(num_blocks=4, block_size=BLOCK)
    old, new = compute(blocks, make_seq(range(8))), compute(blocks, make_seq(range(20, 28)))
    blocks.free(old)
    blocks.free(new)
    compute(blocks, make_seq(range(40, 44)))
    assert len(blocks.match_prefix(make_seq(range(20, 29)))) == 2
    assert len(blocks.match_prefix(make_seq(range(9)))) == 1  # its tail went first, its start is still of use


def test_content_that_was_used_again_outlives_what_was_not() -> None:
    blocks = BlockManager(num_blocks=4, block_size=BLOCK)
    for tokens in (range(5), range(20, 25), range(5)):
        blocks.free(compute(blocks, make_seq(tokens)))
    compute(blocks, make_seq(range(40, 52)))  # takes three of the four blocks
    assert len(blocks.match_prefix(make_seq(range(5)))) == 1
    assert blocks.match_prefix(make_seq(range(20, 25))) == []


def test_blocks_without_content_are_reused_before_any_with() -> None:
    blocks = BlockManager(num_blocks=3, block_size=BLOCK)
    blocks.free(compute(blocks, make_seq(range(6))))  # one full block, one half full
    compute(blocks, make_seq(range(40, 47)))
    assert len(blocks.match_prefix(make_seq(range(5)))) == 1


def test_admission_counts_idle_matches_as_taken() -> None:
    """A match that nobody else refers to occupies a free block as soon as it is taken."""
    blocks = BlockManager(num_blocks=3, block_size=BLOCK)
    blocks.free(compute(blocks, make_seq(range(9))))
    other = compute(blocks, make_seq(range(40, 43)))
    longer = make_seq(range(12))
    matched = blocks.match_prefix(longer)
    assert len(matched) == 2
    assert not blocks.can_admit(longer, matched)
    blocks.free(other)
    assert blocks.can_admit(longer, matched)


def test_disowned_blocks_are_never_found_again() -> None:
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    seq = compute(blocks, make_seq(range(10)))
    assert sorted(blocks.disown_unverified(seq)) == sorted(seq.block_table)
    assert blocks.match_prefix(make_seq(range(10))) == []
    blocks.free(seq)
    blocks.check_integrity([])


def test_shared_blocks_are_not_disowned() -> None:
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    first, second = compute(blocks, make_seq(range(10))), compute(blocks, make_seq(range(10)))
    assert blocks.disown_unverified(second) == second.block_table[2:]
    assert blocks.match_prefix(make_seq(range(10))) == first.block_table[:2]
    blocks.check_integrity([first, second])


def test_blocks_that_others_verified_stay_when_a_prefill_is_broken_off() -> None:
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    first = compute(blocks, make_seq(range(9)))
    blocks.verify(first, 9)
    blocks.free(first)
    broken = compute(blocks, make_seq(range(16)), 12)
    assert blocks.disown_unverified(broken) == broken.block_table[2:]
    blocks.free(broken)
    assert len(blocks.match_prefix(make_seq(range(16)))) == 2


def test_no_block_stays_of_a_sequence_whose_numbers_went_bad() -> None:
    """Its last user takes out those that it shared, although they were verified before."""
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    bad, beside = compute(blocks, make_seq(range(9))), compute(blocks, make_seq(range(9)))
    blocks.verify(bad, 9)
    bad.num_verified_tokens = -1
    assert blocks.disown_unverified(bad) == bad.block_table[2:]
    blocks.free(bad)
    assert blocks.disown_unverified(beside) == beside.block_table
    blocks.free(beside)
    assert blocks.match_prefix(make_seq(range(9))) == []


def test_blocks_are_shared_only_among_the_same_weights() -> None:
    blocks = BlockManager(num_blocks=20, block_size=BLOCK)
    plain_blocks = compute(blocks, make_seq(range(9), "a")).block_table[:2]
    waiting = make_seq(range(9), "a")
    assert blocks.match_prefix(waiting) == plain_blocks
    blocks.change_weights("a", [])
    assert blocks.match_prefix(waiting) == []
    merged_blocks = compute(blocks, waiting).block_table[:2]
    assert blocks.match_prefix(make_seq(range(9), "a")) == merged_blocks
    blocks.change_weights("b", [])
    assert blocks.match_prefix(make_seq(range(9), "a")) == []
    blocks.change_weights("", [])
    assert blocks.match_prefix(make_seq(range(9), "a")) == plain_blocks


@pytest.mark.parametrize("num_computed", [2, 4, 6, 8])
def test_a_merge_while_a_sequence_runs_divides_its_blocks(num_computed: int) -> None:
    """Full blocks from before are found as before; those after it only by nobody else."""
    blocks = BlockManager(num_blocks=20, block_size=BLOCK)
    running = compute(blocks, make_seq(range(16), "a"), num_computed)
    blocks.change_weights("a", [running])
    blocks.grow(running, 12)
    blocks.commit(running, 12)
    assert blocks.match_prefix(make_seq(range(16), "a")) == []
    blocks.change_weights("", [running])
    blocks.grow(running, 16)
    blocks.commit(running, 16)
    assert blocks.match_prefix(make_seq(range(17), "a")) == running.block_table[: num_computed // BLOCK]
    blocks.free(running)
    again = compute(blocks, running)  # preempted and admitted again
    assert (again.weight_changes, blocks.match_prefix(make_seq(range(17), "a"))) == ([], again.block_table)


@pytest.mark.reliability("T47")
def test_a_prompt_that_cannot_fit_is_refused_without_a_look_at_its_tokens() -> None:
    blocks = BlockManager(num_blocks=6, block_size=BLOCK)
    shared = compute(blocks, make_seq(range(9)))
    for length in range(1, 30):
        seq = make_seq(range(length))
        assert blocks.may_fit(seq) == blocks.can_admit(seq, blocks.match_prefix(seq))
    blocks.free(shared)
    for length in range(1, 30):
        seq = make_seq(range(length))
        assert blocks.may_fit(seq) == blocks.can_admit(seq, blocks.match_prefix(seq))


class Ledger:
    """A block manager beside a record of what was really written to each block."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        sizes = {"num_blocks": 9, "block_size": 2}
        self.blocks = SlidingBlocks(**sizes, window=window, max_step_tokens=3) if window else BlockManager(**sizes)
        self.running: list[Sequence] = []
        self.content: dict[int, tuple[Any, ...]] = {}
        self.weights: dict[int, list[str]] = {}  # by id of the running sequence, of each computed token
        self.keep: list[Sequence] = []  # so that no id is used twice

    def admit(self, pick: int) -> None:
        # Two tokens, two adapters, two salts: prefixes meet often.
        tokens = [(pick >> bit) & 1 for bit in range(1 + pick % 9)]
        seq = make_seq(tokens, (None, "a")[pick >> 9 & 1], ("", "t")[pick >> 10 & 1])
        matched = self.blocks.match_prefix(seq)
        num_tokens = len(matched) * self.blocks.block_size
        for index, block_id in enumerate(matched):
            if block_id == NO_BLOCK:
                assert self.window and (index + 1) * self.blocks.block_size <= num_tokens - self.window + 1
            else:
                assert self.content[block_id] == self.expected(seq, index)
        if self.blocks.can_admit(seq, matched):
            assert self.blocks.may_fit(seq)
            self.blocks.admit(seq, matched)
            self.running.append(seq)
            self.keep.append(seq)
            self.weights[id(seq)] = [self.blocks.merged] * seq.num_computed_tokens

    def expected(self, seq: Sequence, index: int) -> tuple[Any, ...]:
        """The block's content: its tokens, and with which weights each was computed."""
        end = (index + 1) * self.blocks.block_size
        return (seq.adapters, seq.cache_salt, *zip(seq.token_ids[:end], self.weights_of(seq), strict=False))

    def weights_of(self, seq: Sequence) -> list[str]:
        """The weights of each of its tokens; those that it will compute get the present ones."""
        known = self.weights.setdefault(id(seq), [])
        return known + [self.blocks.merged] * (seq.num_tokens - len(known))

    def compute(self, pick: int) -> None:
        seq = self.running[pick % len(self.running)]
        end = min(seq.num_tokens, seq.num_computed_tokens + 1 + pick % 3)
        if self.blocks.to_grow(seq, end) > self.blocks.num_free:
            return
        self.blocks.grow(seq, end)
        self.weights[id(seq)] = self.weights_of(seq)[:end]
        for position in range(seq.num_computed_tokens, end):
            index = position // self.blocks.block_size
            self.content[seq.block_table[index]] = self.expected(seq, index)
        self.blocks.commit(seq, end)
        if end == seq.num_tokens:
            seq.token_ids.append(pick % 2)

    def free(self, pick: int) -> None:
        self.blocks.free(self.running.pop(pick % len(self.running)))

    def verify(self, pick: int) -> None:
        seq = self.running[pick % len(self.running)]
        self.blocks.verify(seq, seq.num_computed_tokens)

    def release(self, pick: int) -> None:
        seq = self.running[pick % len(self.running)]
        for block_id in self.blocks.release_passed(seq, seq.num_computed_tokens):
            self.content.pop(block_id, None)

    def switch(self, pick: int) -> None:
        self.blocks.change_weights(("", "a", "b")[pick % 3], self.running)

    def disown(self, pick: int) -> None:
        for block_id in self.blocks.disown_unverified(self.running[pick % len(self.running)]):
            self.content.pop(block_id, None)
        self.free(pick)


OPERATIONS = st.tuples(
    st.sampled_from(["admit", "admit", *["compute"] * 3, "verify", "release", "free", "disown", "switch"]),
    st.integers(0, 2047),
)


@pytest.mark.reliability("T54")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(OPERATIONS, min_size=20, max_size=80), st.sampled_from([None, 1, 2, 3, 5]))
def test_after_any_operations_the_books_balance_and_every_match_is_true(
    operations: list[tuple[str, int]], window: int | None
) -> None:
    ledger = Ledger(window)
    for name, pick in operations:
        if ledger.running or name == "admit":
            getattr(ledger, name)(pick)
        ledger.blocks.check_integrity(ledger.running)
    for seq in ledger.running:
        ledger.blocks.free(seq)
    ledger.blocks.check_integrity([])
    assert ledger.blocks.num_free == ledger.blocks.num_blocks
