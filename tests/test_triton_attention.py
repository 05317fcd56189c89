"""Triton's paged attention against float64, and against the torch one on the same batches: grouped heads, windows,
soft-capping, prefill and decode mixed, long contexts shared out. In the interpreter, or (`make test-gpu`) on a GPU."""

import random
from dataclasses import dataclass

import pytest
import torch

from server.model.attention import paged
from server.model.batch import ForwardBatch, SequenceRows
from server.model.kv_cache import CacheShape, KVCache
from tests.fixtures.triton_device import DEVICE, DTYPES, EPSILON, require_triton

require_triton()

from server.model.attention import triton_layout, triton_paged

PAGE = 16
# Rows of a tile beyond its tokens see no key; numpy, in the interpreter, warns of their 0 / 0.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")


@dataclass
class Step:
    """A step over sequences of `(context, new tokens)`, with a cache that is NaN wherever no sequence has a token."""

    contexts: list[tuple[int, int]]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        blocks = [-(-context // PAGE) for context, _ in self.contexts]
        order = list(range(sum(blocks) + 2))
        random.Random(self.seed).shuffle(order)
        self.cache = KVCache(CacheShape(((self.kv_heads, self.head_dim),), self.dtype), len(order), PAGE, DEVICE)
        self.cache.keys[0][:], self.cache.values[0][:] = torch.nan, torch.nan
        self.sequences: list[SequenceRows] = []
        self.context: list[tuple[torch.Tensor, torch.Tensor]] = []
        slots, row = [], 0
        for (length, new), count in zip(self.contexts, blocks, strict=True):
            table, order = order[:count], order[count:]
            own = torch.tensor([table[i // PAGE] * PAGE + i % PAGE for i in range(length)])
            k, v = (torch.randn(length, self.kv_heads, self.head_dim, generator=generator).to(self.dtype) for _ in "kv")
            old = own[: length - new].to(DEVICE)
            self.cache.keys[0].flatten(0, 1)[old] = k[: length - new].to(DEVICE)
            self.cache.values[0].flatten(0, 1)[old] = v[: length - new].to(DEVICE)
            self.sequences.append(SequenceRows(row, row + new, length, table))
            self.context.append((k, v))
            slots.append(own[length - new :])
            row += new
        self.query = torch.randn(self.heads, row, self.head_dim, generator=generator).to(self.dtype)
        self.slot_mapping = torch.cat(slots).to(DEVICE)

    def batch(self) -> ForwardBatch:
        none = torch.zeros(self.query.shape[1], dtype=torch.int64, device=DEVICE)
        return ForwardBatch(none, none, self.slot_mapping, none, self.sequences, PAGE)

    def new(self, which: int) -> torch.Tensor:
        """New keys (0) or values (1) `[kv_heads, rows, head_dim]`, with a transposed memory as in the models."""
        rows = [pair[which][-new:] for pair, (_, new) in zip(self.context, self.contexts, strict=True)]
        return torch.cat(rows).to(DEVICE).transpose(0, 1)

    def triton(self, window: int | None, softcap: float | None, batch: ForwardBatch | None = None) -> torch.Tensor:
        query = self.query.transpose(0, 1).contiguous().transpose(0, 1).to(DEVICE)
        scale = self.head_dim**-0.5
        out = triton_paged.paged_attention(
            0, query, self.new(0), self.new(1), batch or self.batch(), self.cache, scale, window, softcap
        )
        return out.cpu()

    def plain(self, window: int | None, softcap: float | None) -> torch.Tensor:
        """The torch implementation, which needs a cache without NaN."""
        cache = KVCache(CacheShape(((self.kv_heads, self.head_dim),), self.dtype), 1, PAGE, DEVICE)
        cache.keys, cache.values = ([t.nan_to_num() for t in kind] for kind in (self.cache.keys, self.cache.values))
        scale = self.head_dim**-0.5
        return paged.paged_attention(
            0, self.query.to(DEVICE), self.new(0), self.new(1), self.batch(), cache, scale, window, softcap
        ).cpu()

    def exact(self, window: int | None, softcap: float | None) -> torch.Tensor:
        out = []
        group = self.heads // self.kv_heads
        for seq, (k, v), (length, new) in zip(self.sequences, self.context, self.contexts, strict=True):
            q = self.query[:, seq.start : seq.end].double()
            keys, values = (t.double().transpose(0, 1).repeat_interleave(group, 0) for t in (k, v))
            scores = q @ keys.transpose(1, 2) * self.head_dim**-0.5
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            distance = torch.arange(length - new, length)[:, None] - torch.arange(length)[None]
            hidden = (distance < 0) | (distance >= (window or length + 1))
            out.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
        return torch.cat(out)


MIXED = [(5, 5), (40, 1), (33, 17), (1, 1), (90, 3), (65, 1)]
SHAPES = [(4, 4, 16), (8, 2, 80), (7, 1, 128), (4, 2, 8), (19, 1, 16)]
CASES = [((9, 3, 64), dtype) for dtype in DTYPES] + [(shape, torch.bfloat16) for shape in SHAPES]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_prefill_and_decode_in_one_call(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    step = Step(MIXED, *shape, dtype)
    expected = step.exact(None, None)
    tolerance = EPSILON[dtype]
    torch.testing.assert_close(step.triton(None, None).double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(step.plain(None, None).double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("group", [1, 3, 5, 7, 8, 9, 12, 48, 71])
@pytest.mark.parametrize("tokens", [1, triton_layout.TILE_TOKENS])
def test_a_tile_has_a_bounded_number_of_rows_for_any_number_of_heads(group: int, tokens: int) -> None:
    """A model with one key head (StarCoder) had tiles of 1,024 rows, which no GPU has the shared memory for."""
    for head_dim in (64, 128, 256):
        parts, tile = triton_paged.tile_shape(tokens, group, head_dim, 2)
        assert tile["ROWS"] <= triton_paged.MAX_ROWS and tile["ROWS"] * head_dim <= triton_paged.MAX_ROWS * 128
        assert tile["ROWS"] >= tokens * tile["SHARE"] and (parts - 1) * tile["SHARE"] < group <= parts * tile["SHARE"]
        assert tile["num_warps"] == 8 or tile["ROWS"] < 128


@pytest.mark.parametrize(("window", "softcap"), [(None, 3.0), (1, None), (7, 3.0), (16, None), (50, 3.0)])
def test_windows_and_soft_capping(window: int | None, softcap: float | None) -> None:
    step = Step(MIXED, 4, 2, 32, torch.float32, seed=1)
    got, expected = step.triton(window, softcap), step.exact(window, softcap)
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(got, step.plain(window, softcap), atol=4e-5, rtol=4e-5)


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_contexts_are_shared_out_and_merged(dtype: torch.dtype, window: int | None) -> None:
    """Contexts on both sides of what one program takes, up to more than all of them take at least."""
    least = triton_paged.MIN_SPLIT
    lengths = [least - 1, least, least + 1, 3 * least + 5, triton_paged.SPLITS * least + 100]
    step = Step([(length, 1) for length in lengths], 2, 1, 16, dtype, seed=2)
    expected = step.exact(window, None)
    torch.testing.assert_close(step.triton(window, None).double(), expected, atol=EPSILON[dtype], rtol=EPSILON[dtype])


def test_keys_and_values_are_written_where_they_belong_and_nowhere_else() -> None:
    step = Step([(20, 4), (33, 1)], 4, 2, 24, torch.bfloat16, seed=3)
    kinds = (step.cache.keys[0], step.cache.values[0])
    before = [kind.clone() for kind in kinds]
    step.triton(None, None)
    for which, (kind, old) in enumerate(zip(kinds, before, strict=True)):
        want = old.flatten(0, 1).clone()
        want[step.slot_mapping] = step.new(which).transpose(0, 1)
        assert torch.equal(kind.flatten(0, 1).view(torch.uint8), want.view(torch.uint8))


def test_a_row_s_bits_do_not_depend_on_its_batch() -> None:
    contexts = [(300, 1), (40, 1), (600, 1), (33, 17), (1, 1)]
    together = Step(contexts, 6, 2, 16, torch.bfloat16, seed=4)
    out = together.triton(None, None)
    for index, seq in enumerate(together.sequences):
        alone = Step([contexts[index]], 6, 2, 16, torch.bfloat16)
        alone.context = [together.context[index]]
        alone.query = together.query[:, seq.start : seq.end]
        table = torch.tensor(alone.sequences[0].block_table)
        for mine, theirs in ((alone.cache.keys, together.cache.keys), (alone.cache.values, together.cache.values)):
            mine[0][table] = theirs[0][torch.tensor(seq.block_table)]
        assert torch.equal(alone.triton(None, None), out[seq.start : seq.end])


def test_numbers_that_are_not_finite_show_in_their_own_sequence_only() -> None:
    step = Step([(300, 1), (40, 1), (20, 5)], 4, 2, 16, torch.float32, seed=5)
    before = step.triton(None, None)
    block = step.sequences[0].block_table[2]
    step.cache.values[0][block, 3] = torch.nan
    after = step.triton(None, None)
    assert after[0].isnan().all() and torch.equal(after[1:], before[1:])


def test_a_static_layout_serves_one_step_after_another() -> None:
    """A captured graph's step: rows beyond the step are finite and are not written to the cache."""
    layout = triton_layout.static_layout(4, 40, DEVICE)
    for contexts in ([(40, 1), (300, 1)], [(1, 1)], [(17, 1), (16, 1), (90, 1), (33, 1)]):
        step = Step(contexts, 4, 2, 16, torch.float32, seed=6)
        rows = len(contexts)
        step.cache.keys[0].nan_to_num_(), step.cache.values[0].nan_to_num_()
        expected = step.exact(None, None)
        assert triton_layout.refill(layout, step.sequences, PAGE)
        batch = step.batch()
        batch.attention_plan = layout
        batch.slot_mapping = torch.full((4,), -1, dtype=torch.int64, device=DEVICE)
        batch.slot_mapping[:rows] = step.slot_mapping
        step.query = torch.cat([step.query, torch.ones(4, 4 - rows, 16)], 1)
        padded = [
            torch.cat([step.new(which), torch.full((2, 4 - rows, 16), 9.0, device=DEVICE)], 1) for which in (0, 1)
        ]
        out = triton_paged.paged_attention(0, step.query.to(DEVICE), *padded, batch, step.cache, 0.25, None, None).cpu()
        torch.testing.assert_close(out[:rows].double(), expected, atol=2e-5, rtol=2e-5)
        assert out.isfinite().all() and not (step.cache.keys[0] == 9).any()


def test_a_step_beyond_a_static_layout_is_refused_and_leaves_it_as_it_was() -> None:
    layout = triton_layout.static_layout(2, 4, DEVICE)
    assert triton_layout.refill(layout, [SequenceRows(0, 1, 20, [3, 5])], PAGE)
    before = layout.metadata.clone()
    one = SequenceRows(0, 1, 20, [3, 5])
    assert not triton_layout.refill(layout, [one, one, one], PAGE)  # rows
    assert not triton_layout.refill(layout, [SequenceRows(0, 1, 80, [1, 2, 3, 4, 5])], PAGE)  # blocks
    assert not triton_layout.refill(layout, [SequenceRows(0, 2, 20, [3, 5])], PAGE)  # not a decode step
    assert torch.equal(layout.metadata, before)
