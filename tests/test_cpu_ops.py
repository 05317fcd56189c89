"""The model's C++ operations against torch, and that nothing of a row's result depends on its neighbours."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from server.model.attention import paged
from server.model.batch import ForwardBatch, SequenceRows
from server.model.cpu import attention
from server.model.cpu.argmax import argmax
from server.model.cpu.block_ops import NativeBlockOps
from server.model.cpu.linear import NativeLinear
from server.model.kv_cache import CacheShape, KVCache
from tests.fixtures.native_forms import form

__all__ = ["form"]
pytestmark = pytest.mark.usefixtures("form")
DTYPES = [torch.float32, torch.bfloat16]
BLOCK = 16
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("in_features", "out_features"), [(64, 200), (200, 576), (5, 7), (576, 16), (33, 33)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_linear_sums_in_float32_and_rounds_once(in_features: int, out_features: int, bias: bool) -> None:
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=torch.bfloat16)
    native = NativeLinear(linear)
    x = drawn(1, 29, in_features)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    torch.testing.assert_close(native(x).double(), exact, rtol=2**-8, atol=1e-5)  # half a step, and fp32's sums
    assert torch.equal(native.weight, linear.weight)
    assert native(x[None]).shape == (1, 29, out_features)


@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_a_row_of_a_linear_has_the_same_bits_in_any_batch(threads: int) -> None:
    native = NativeLinear(nn.Linear(200, 88, dtype=torch.bfloat16))
    x, before = drawn(2, 40, 200), torch.get_num_threads()
    together = native(x)
    torch.set_num_threads(threads)
    try:
        for start, end in [(0, 1), (3, 5), (7, 10), (10, 14), (14, 19), (20, 26), (26, 33), (1, 40)]:
            assert torch.equal(native(x[start:end]), together[start:end])
        assert torch.equal(native(drawn(2, 40, 300)[:, :200]), native(drawn(2, 40, 300)[:, :200].contiguous()))
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_bad_numbers_of_one_row_stay_in_it() -> None:
    native = NativeLinear(nn.Linear(64, 64, dtype=torch.bfloat16))
    x = drawn(3, 7, 64)
    before = native(x)
    x[2], x[4] = torch.nan, torch.inf
    after = native(x)
    assert torch.equal(after[[0, 1, 3, 5, 6]], before[[0, 1, 3, 5, 6]])
    assert after[2].isnan().all() and not after[4].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [576, 64, 50])
@torch.inference_mode()
def test_silu_is_that_of_torch(dtype: torch.dtype, size: int) -> None:
    ops = NativeBlockOps(dtype)
    x = 3 * drawn(5, 1, 19, size, dtype=dtype)
    gate_up = torch.cat([6 * x, x.flip(-1)], -1)
    gate_up[0, 0, :4] = torch.tensor([-200.0, 200.0, -90.0, 0.0])
    expected = nn.functional.silu(gate_up[..., :size]) * gate_up[..., size:]
    torch.testing.assert_close(ops.silu_mul(gate_up), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 50, 64, 576, 577, 4096, 16384])
@torch.inference_mode()
def test_a_norm_has_the_bits_of_transformers_own(dtype: torch.dtype, size: int) -> None:
    """Squares added in another order change 1 of 70,000 outputs or so in bf16, and nearly every one in fp32."""
    norm = LlamaRMSNorm(size).to(dtype)
    norm.weight.copy_(drawn(12, size))
    x = 20 * drawn(13, 300, size, dtype=dtype) * drawn(14, 300, 1, dtype=dtype)
    ops = NativeBlockOps(dtype)
    for rows in (x, x[:1], x[:3, None]):
        assert torch.equal(ops.rms_norm(rows, norm.weight, norm.variance_epsilon), norm(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 64, 999, 49152])
def test_the_likeliest_token_is_the_first_of_the_largest(dtype: torch.dtype, vocab: int) -> None:
    logits = drawn(15, 12, vocab, dtype=dtype)
    logits[1], logits[2], logits[3] = 0, -logits[2].abs() - 1, torch.finfo(dtype).min  # all tie; all are negative
    logits[4, vocab // 2 :] = 9
    logits[5, -1], logits[6, -1], logits[7, 0], logits[8, vocab // 2] = torch.nan, torch.inf, -torch.inf, torch.nan
    logits[9, -1], logits[10, 0] = 99, 99
    finite = torch.tensor([row not in (5, 6, 7, 8) for row in range(12)])
    assert torch.equal(argmax(logits), torch.where(finite, logits.float().argmax(-1), -1))
    assert torch.equal(argmax(logits[9:10]), torch.tensor([vocab - 1]))


SEQUENCES = [(1, 1), (1, 17), (5, 5), (1, 64), (21, 21), (7, 40), (1, 200), (16, 48)]  # new tokens, context


def batch_of(sequences: list[tuple[int, int]]) -> tuple[ForwardBatch, int]:
    """Blocks in no order, none of them block 0; and how many there are."""
    rows, free, slots = [], list(range(1, 80))[::-2] + list(range(2, 80, 2)), []
    for new, context in sequences:
        table, free = free[: -(-context // BLOCK)], free[-(-context // BLOCK) :]
        start = rows[-1].end if rows else 0
        rows.append(SequenceRows(start, start + new, context, [*table, 0]))
        slots += [table[p // BLOCK] * BLOCK + p % BLOCK for p in range(context - new, context)]
    every = torch.arange(len(slots))
    return ForwardBatch(every, every, torch.tensor(slots), every, rows, BLOCK), 80


def inputs(heads: tuple[int, int, int], rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    query_heads, kv_heads, dim = heads
    return [drawn(seed, n, rows, dim, dtype=dtype) for seed, n in ((6, query_heads), (7, kv_heads), (8, kv_heads))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 16), (8, 1, 20)], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 8}, {"window": 33, "softcap": 2.0}], ids=str)
def test_attention_is_the_reference_s(dtype: torch.dtype, heads: tuple[int, int, int], options: dict[str, Any]) -> None:
    batch, num_blocks = batch_of(SEQUENCES)
    options = {"scale": 0.2, "window": None, "softcap": None, **options}
    query, key, value = inputs(heads, len(batch.input_ids), dtype)
    caches = [KVCache(CacheShape((heads[1:],), dtype), num_blocks, BLOCK, torch.device("cpu")) for _ in range(2)]
    for cache in caches:
        cache.keys[0].copy_(drawn(9, *cache.keys[0].shape))
        cache.values[0].copy_(drawn(10, *cache.values[0].shape))
    expected = paged.paged_attention(0, query, key, value, copy.copy(batch), caches[0], **options)
    got = attention.paged_attention(0, query, key, value, batch, caches[1], **options)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(caches[0].keys[0], caches[1].keys[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_reads_nothing_past_a_sequence_and_is_the_same_alone(dtype: torch.dtype) -> None:
    heads = (9, 3, 64)
    batch, num_blocks = batch_of(SEQUENCES)
    query, key, value = inputs(heads, len(batch.input_ids), dtype)
    cache = KVCache(CacheShape((heads[1:],), dtype), num_blocks, BLOCK, torch.device("cpu"))
    clean = attention.paged_attention(0, query, key, value, batch, cache, 0.2, None, None)
    own = torch.zeros(num_blocks * BLOCK, dtype=torch.bool)
    for seq in batch.sequences:
        for position in range(seq.context_len):
            own[seq.block_table[position // BLOCK] * BLOCK + position % BLOCK] = True
    for tensor in (cache.keys[0], cache.values[0]):
        tensor.flatten(0, 1)[~own] = torch.nan
    batch.attention_plan = None
    assert torch.equal(attention.paged_attention(0, query, key, value, batch, cache, 0.2, None, None), clean)
    for seq in batch.sequences:
        rows = slice(seq.start, seq.end)
        alone = SequenceRows(0, seq.end - seq.start, seq.context_len, seq.block_table)
        part = ForwardBatch(*[batch.input_ids[rows]] * 2, batch.slot_mapping[rows], batch.sample_rows, [alone], BLOCK)
        got = attention.paged_attention(0, query[:, rows], key[:, rows], value[:, rows], part, cache, 0.2, None, None)
        assert torch.equal(got, clean[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_attention_is_rotation_then_attention(dtype: torch.dtype) -> None:
    heads = (6, 2, 32)
    batch, num_blocks = batch_of(SEQUENCES)
    query, key, value = inputs(heads, len(batch.input_ids), dtype)
    angles = torch.rand(len(batch.input_ids), 16, generator=torch.Generator().manual_seed(11)) * 6
    cos, sin = (torch.cat([f(angles)] * 2, 1).to(dtype) for f in (torch.cos, torch.sin))
    caches = [KVCache(CacheShape((heads[1:],), dtype), num_blocks, BLOCK, torch.device("cpu")) for _ in range(2)]
    rotated = apply_rotary_pos_emb(query[None], key[None], cos[None], sin[None])
    expected = attention.paged_attention(0, rotated[0][0], rotated[1][0], value, batch, caches[0], 0.2, 24, None)
    qkv = torch.cat([part.transpose(0, 1).flatten(1) for part in (query, key, value)], 1)
    got = NativeBlockOps(dtype).rope_attention(0, qkv, cos, sin, batch, caches[1], 0.2, 24)
    torch.testing.assert_close(got, expected.flatten(1), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(caches[1].keys[0], caches[0].keys[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(caches[1].values[0], caches[0].values[0])
