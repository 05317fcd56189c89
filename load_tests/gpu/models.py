"""A runner over random weights at a real shape, its decode and prefill steps, and segments of any mix of adapters."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from adapters.kernels.segments import Segments, SlotUse, build_segments
from adapters.residency.slots import PAGE_COLUMNS
from load_tests.gpu.setting import Setting, Shape
from server.model.batch import ForwardBatch, SequenceRows
from server.model.graphs import CudaCapture, DecodeGraphs, StaticKernel
from server.model.loading.loader import described
from server.model.loading.probe import probe
from server.model.runner import ModelRunner
from server.model.warm_up import warm_up

PAGE = 16  # tokens of a KV block


def config(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=131072, tie_word_embeddings=False,
    )  # fmt: skip


def build_runner(shape: Shape, setting: Setting) -> ModelRunner:
    """As the server builds it: probed, siblings stacked, fused. Every adapter slot holds random columns; there is one
    for each row of the largest batch."""
    with torch.device(setting.device):
        model: Any = AutoModelForCausalLM.from_config(config(shape), dtype=setting.dtype)
    return runner_of(model.eval().requires_grad_(False), shape.name, setting)


def runner_of(model: Any, name: str, setting: Setting) -> ModelRunner:
    loaded = described(model, setting.device, max_model_len=0)
    cache, spec = probe(loaded, setting.rank)
    tokens = max(max(setting.rows) * setting.context, *setting.prefill_tokens)
    pages = max(setting.rows) * -(-setting.rank // PAGE_COLUMNS)
    runner = ModelRunner(loaded, cache, spec, num_blocks=2 * tokens // PAGE + 64, block_size=PAGE, num_pages=pages)
    runner.check_and_fuse(loaded)
    warm_up(runner.run, PAGE, setting.device)
    for a, b in runner.pool.buffers.values():
        a.normal_(std=a.shape[1] ** -0.5)
        b.normal_(std=0.01)
    return runner


def record(runner: ModelRunner, setting: Setting) -> DecodeGraphs:
    """Graphs for exactly the batches of the benchmark. On a CPU a replay is the forward itself."""
    kernel = runner.pool.kernel
    assert isinstance(kernel, StaticKernel)
    blocks = -(-(setting.context + setting.new_tokens) // PAGE) + 1
    capture = CudaCapture() if setting.device.type == "cuda" else lambda forward: forward
    sizes = sorted({*setting.rows, setting.streams})
    return DecodeGraphs(
        runner._forward, runner.pool, runner.groups(), kernel, sizes, blocks, PAGE, setting.device, capture
    )


def segments(rows: int, adapters: int, setting: Setting, tokens_per_row: int = 1) -> Segments:
    """`rows` sequences over the first `adapters` slots, sorted by slot as the scheduler sorts them."""
    width = -(-setting.rank // PAGE_COLUMNS) * PAGE_COLUMNS
    columns = {slot: [(slot * width, (slot + 1) * width)] for slot in range(adapters)}
    return build_segments((((SlotUse(row * adapters // rows),), tokens_per_row) for row in range(rows)), columns)


def decode_batch(rows: int, setting: Setting) -> ForwardBatch:
    blocks = -(-setting.context // PAGE)
    sequences = [
        SequenceRows(row, row + 1, setting.context, list(range(row * blocks, (row + 1) * blocks)))
        for row in range(rows)
    ]
    return _batch(sequences, [setting.context - 1] * rows, list(range(rows)), setting)


def prefill_batch(tokens: int, sequences: int, setting: Setting) -> ForwardBatch:
    """Whole prompts of `tokens` tokens together."""
    each = tokens // sequences
    blocks = -(-each // PAGE)
    spans = [
        SequenceRows(i * each, (i + 1) * each, each, list(range(i * blocks, (i + 1) * blocks)))
        for i in range(sequences)
    ]
    last = [span.end - 1 for span in spans]
    return _batch(spans, [position for _ in spans for position in range(each)], last, setting)


def _batch(sequences: list[SequenceRows], positions: list[int], samples: list[int], setting: Setting) -> ForwardBatch:
    device = setting.device
    slots = [
        seq.block_table[position // PAGE] * PAGE + position % PAGE
        for seq in sequences
        for position in range(seq.context_len - (seq.end - seq.start), seq.context_len)
    ]
    ids, where, kept, sampled = (
        torch.tensor(values, device=device) for values in ([1] * len(positions), positions, slots, samples)
    )
    return ForwardBatch(ids, where, kept, sampled, sequences, PAGE)


def step_bytes(runner: ModelRunner, shape: Shape, rows: int, adapters: int, setting: Setting) -> int:
    """What a decode step has to read at least: linears, head, the adapters in use, keys and values."""
    size = setting.dtype.itemsize
    pairs = [pair for name, pair in runner.pool.buffers.items() if name != "lm_head"]
    linears = sum(a.shape[1] * b.shape[1] for a, b in pairs)
    columns = sum(a.shape[1] + b.shape[1] for a, b in pairs)
    keys = 2 * shape.kv_heads * shape.head_dim * shape.layers * rows * setting.context
    return size * (linears + shape.hidden * shape.vocab + adapters * setting.rank * columns + keys)
