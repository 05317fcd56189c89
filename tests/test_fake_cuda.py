"""Steps on a GPU that is not there: nothing waits for the device, nothing mixes tensors of host and device, the number
of launches is known, and no kernel is compiled in a request's step."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from adapters.kernels.segments import Segments, SlotUse, build_segments
from adapters.residency.slots import Slot
from adapters.runtime.columns import RankColumns
from adapters.runtime.module_overrides import EmbeddingDelta, LowRank, TokenEmbedding, TokenLogits, replaced
from adapters.runtime.pack import PackedAdapter, pack
from adapters.weights import AdapterWeights, TokenRows
from server.model.batch import ForwardBatch, SequenceRows, build_batch
from server.model.sampling.sampler import start_sampling
from server.model.sampling.token_counts import TokenCounts
from server.model.warm_up import warm_up_steps
from server.request import SamplingParams
from server.sequence import ScheduledBatch, ScheduledSequence, Sequence
from tests.fixtures.fake_cuda import DEVICE, HostSync, Launches, fake_cuda, fake_runner
from tests.fixtures.triton_device import require_triton
from tests.test_architectures import ARCHITECTURES, SIZES, config_of

require_triton()

# Copying a module asks whether its tensors have memory.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
COLUMNS = {0: [(0, 16)], 1: [(16, 32)]}


@pytest.fixture
def cuda() -> Iterator[Launches]:
    with fake_cuda() as launches:
        yield launches


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_architecture_waits_for_the_device_or_mixes_devices(kind: str, cuda: Launches) -> None:
    found = fake_runner(config_of(kind))
    for batch in warm_up_steps(16, DEVICE):
        with cuda.step():
            logits = found.runner.run(batch)
        assert logits.device == DEVICE and logits.shape == (1, SIZES["vocab_size"])


def test_what_waits_or_mixes_is_found(cuda: Launches) -> None:
    """The checks above can fail."""
    x, mask, host = torch.empty(3, device=DEVICE), torch.empty(3, dtype=torch.bool, device=DEVICE), torch.empty(3)
    waits: list[Any] = [
        lambda: x.nonzero(),
        lambda: x[mask],
        lambda: x.sum().item(),
        lambda: x.to("cpu"),
        lambda: host.to(DEVICE),
        lambda: torch.tensor([1, 2], device=DEVICE),
    ]
    for wait in waits:
        with pytest.raises(HostSync), cuda.step():
            wait()
    with pytest.raises(RuntimeError, match="device"), cuda.step():
        _ = x + host
    with cuda.step():
        host.pin_memory().to(DEVICE, non_blocking=True)


def decode(rows: int, segments: Segments | None = None, tokens: int = 1) -> ForwardBatch:
    """`rows` sequences with so many new tokens each."""
    total = rows * tokens
    where = torch.empty(total, dtype=torch.int64, device=DEVICE)
    sequences = [SequenceRows(row * tokens, (row + 1) * tokens, 40, [0, 1, 2]) for row in range(rows)]
    samples = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    batch = ForwardBatch(where, where, where, samples, sequences, 16)
    if segments is not None:
        batch.token_segments = segments
        batch.head_segments = segments if tokens == 1 else of(*[0] * rows)
    return batch


def of(*slots: int) -> Segments:
    return build_segments((((SlotUse(slot),) if slot >= 0 else (), 1) for slot in slots), COLUMNS)


def kinds_of_overrides(runner: Any) -> dict[str, tuple[torch.nn.Module, ...]]:
    """One of each kind, on the host as `pack` leaves them."""
    bases, half = runner.bases, torch.bfloat16
    hidden, vocab = SIZES["hidden_size"], SIZES["vocab_size"]
    ids = torch.empty(2, dtype=torch.int64)
    norm = next(name for name in bases if name.endswith("norm"))
    return {
        "model.embed_tokens": (
            EmbeddingDelta(torch.empty(vocab, 4).to(half), torch.empty(4, hidden).to(half), torch.empty(hidden), None),
            TokenEmbedding(ids, torch.empty(2, hidden).to(half), None),
        ),
        "lm_head": (
            LowRank(torch.empty(4, hidden).to(half), torch.empty(vocab, 4).to(half)),
            TokenLogits(ids, torch.empty(2, hidden).to(half)),
        ),
        norm: (replaced(bases[norm], {"weight": torch.empty(hidden)}, half),),
    }


EXTRAS = ["vectors", "input_vectors", "module_overrides"]


@pytest.mark.parametrize("extra", EXTRAS)
def test_no_kind_of_adapter_waits_for_the_device_or_mixes_devices(extra: str, cuda: Launches) -> None:
    runner = fake_runner(LlamaConfig(**SIZES)).runner
    sizes = runner.pool.widths()
    given: dict[str, Any] = {
        "vectors": {name: torch.empty(2, out) for name, (_, out) in sizes.items()},
        "input_vectors": {name: torch.empty(2, inputs) for name, (inputs, _) in sizes.items()},
        "module_overrides": kinds_of_overrides(runner),
    }
    for slot in (0, 1):
        columns = RankColumns.zeros(16, sizes, torch.bfloat16)
        runner.pool.write(Slot(slot, "", [slot]), PackedAdapter(1, columns, 0, **{extra: given[extra]}))
    for rows in ([0], [0, 1], [0, 1, 0, 1, 0]):  # by ranges, and gathered
        with cuda.step():
            runner.run(decode(len(rows), of(*rows)))
    with cuda.step():
        runner.run(decode(2, build_segments([((SlotUse(0),), 20), ((SlotUse(1),), 20)], COLUMNS), tokens=20))


def test_trained_rows_of_a_scaled_embedding_are_packed_where_the_base_is_on_a_gpu(
    cuda: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma multiplies its rows by a number that is a buffer on the device; the adapter's rows are on the host."""
    runner = fake_runner(config_of("gemma2")).runner
    monkeypatch.setattr("adapters.runtime.pack._check_finite", lambda *_: None)
    monkeypatch.setattr("adapters.runtime.pack._is_finite", lambda *_: True)
    rows = TokenRows((3, 5), torch.empty(2, SIZES["hidden_size"]))
    weights = AdapterWeights("", 1, {}, 0, tokens={"model.embed_tokens": rows})
    packed = pack(weights, torch.bfloat16, runner.bases)
    (override,) = packed.module_overrides["model.embed_tokens"]
    assert isinstance(override, TokenEmbedding) and override.values.device.type == "cpu"


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.1},
    "all": {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "logprobs": 3, "seed": 7},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {3: 1.0}, "min_tokens": 2},
}


@pytest.mark.parametrize("sampling", [[name] for name in SAMPLING] + [list(SAMPLING)], ids=" ".join)
def test_sampling_does_not_wait_for_the_device(sampling: list[str], cuda: Launches) -> None:
    seqs = [
        Sequence(name, [1, 2, 3], SamplingParams(**{"max_tokens": 9, "temperature": 1.0, **SAMPLING[name]}))
        for name in sampling
    ]
    counts, logits = TokenCounts(DEVICE), torch.empty(len(seqs), 4000, dtype=torch.bfloat16, device=DEVICE)
    with cuda.step():
        start_sampling(logits, seqs, frozenset({2}), counts, [3999] * len(seqs))


def test_a_batch_is_put_together_without_waiting_for_the_device(cuda: Launches) -> None:
    running = Sequence("a", [1, 2, 3], SamplingParams(max_tokens=4), block_table=[1], num_computed_tokens=2)
    new = Sequence("b", [1] * 20, SamplingParams(max_tokens=4), block_table=[2, 3])
    late = ({running: 0}, torch.empty(1, dtype=torch.int64, device=DEVICE))
    with cuda.step():
        batch = build_batch(
            ScheduledBatch([ScheduledSequence(running, 1), ScheduledSequence(new, 20)]), 16, DEVICE, {}, late
        )
    assert batch.input_ids.device == DEVICE


def test_what_the_benchmark_records_does_not_wait_for_the_device(cuda: Launches) -> None:
    """A graph cannot record the choice of rows by a mask."""
    from load_tests.gpu import fused
    from load_tests.gpu.setting import TINY, smoke
    from server.model.fused import reference, triton_fused

    setting = replace(smoke(), device=DEVICE)
    for module in (reference, triton_fused):
        rope, norm, silu, _ = fused._consumers(module, TINY, 2, setting)
        widths = {
            rope: (TINY.heads + 2 * TINY.kv_heads) * TINY.head_dim,
            norm: TINY.hidden,
            silu: 2 * TINY.intermediate,
        }
        with cuda.step():
            for consumer, width in widths.items():
                consumer(torch.empty(2, width, dtype=setting.dtype, device=DEVICE), None)


def test_after_the_warm_up_no_step_compiles_a_kernel(cuda: Launches) -> None:
    """Graphs warm up for their numbers of rows themselves; what they leave is eager, mixed, or prefill."""
    runner = fake_runner(config_of("llama")).runner
    for batch in warm_up_steps(16, DEVICE):
        runner.run(batch)
    known = set(cuda.signatures)
    mixed = build_segments([((SlotUse(0),), 1), ((), 1), ((SlotUse(1), SlotUse(0, 0.5)), 1)], COLUMNS)
    long = build_segments([((SlotUse(0),), 300), ((), 300), ((SlotUse(1),), 300)], COLUMNS)
    for step in (decode(3, mixed), decode(3), decode(5, of(0, 1, 0, 1, -1)), decode(3, long, tokens=300), decode(1)):
        runner.run(step)
    assert cuda.signatures == known


# Of one layer, in a decode step without adapters: 37 for Llama's structure before it was fused.
LAUNCHES = {"llama": 11, "mistral-window": 11, "qwen2-biases": 11, "qwen3-norms": 24, "phi3-fused": 25, "gemma2": 61}


@pytest.mark.parametrize(("kind", "most"), LAUNCHES.items())
def test_a_layer_launches_no_more_kernels_than_it_did(kind: str, most: int, cuda: Launches) -> None:
    per_layer = launches_per_layer(kind, cuda, decode(4))
    assert per_layer <= most, (per_layer, cuda.counts())


def test_adapters_add_two_launches_per_group_of_linears(cuda: Launches) -> None:
    assert launches_per_layer("llama", cuda, decode(4, of(0, 1, -1, 0))) <= LAUNCHES["llama"] + 8, cuda.counts()


def launches_per_layer(kind: str, cuda: Launches, batch: ForwardBatch) -> float:
    """Return the difference between two numbers of layers, by layer."""
    counts = []
    for layers in (2, 4):
        config = config_of(kind)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        runner = fake_runner(config).runner
        batch.attention_plan = None
        with cuda.step():
            runner.run(batch)
        counts.append(len(cuda.names))
    return (counts[1] - counts[0]) / 2
