"""Probing of a loaded model with a short prompt.

Nothing depends on a model's name: the shapes of its KV cache, the linears that see every token, and whether the paged
attention reproduces the logits of the stock one are all observed. A model that fails is refused at startup.
"""

import logging
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from adapters.model_spec import MAX_SIBLINGS, ModelSpec
from adapters.runtime.experts import is_gathered
from server.model import attention
from server.model.batch import build_batch
from server.model.fusion import BlockOps, fuse
from server.model.kv_cache import CacheShape, KVCache
from server.model.loading.conversions import conversion_of
from server.model.loading.loader import LoadedModel, ModelRefused
from server.request import SamplingParams
from server.sequence import ScheduledBatch, ScheduledSequence, Sequence

log = logging.getLogger(__name__)

PROBE_TOKENS = 24
PROBE_CHUNKS = (13, 10, 1)  # a first chunk, a second one that reads the cache, a decode step
_RECORDER = "loraplex_recorder"
# Largest RMS error allowed, relative to the spread of the logits: about three times what stock attention
# implementations differ by among themselves. A wrong mask or scale is off by much more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 3e-2}


@dataclass(slots=True)
class Observation:
    """Observations of one forward pass: `kv[layer]` is (heads, head_dim), `windows[layer]` the layer's window."""

    kv: dict[int, tuple[int, int]] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)
    softcaps: dict[int, float | None] = field(default_factory=dict)
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # by module: first argument of each call

    def plain_windows(self) -> dict[int, int | None]:
        """Return the windows of the layers without a soft cap on their scores."""
        return {layer: window for layer, window in self.windows.items() if self.softcaps[layer] is None}

    def largest_window(self) -> int | None:
        """Return the number of latest keys beyond which no layer looks; None if a layer looks at all."""
        windows = [window for window in self.windows.values() if window]
        return max(windows) if windows and len(windows) == len(self.windows) else None


def probe(loaded: LoadedModel, max_rank: int) -> tuple[CacheShape, ModelSpec]:
    """Return the shape of the model's KV cache, and its adaptable modules. Raises `ModelRefused`.

    A module is adaptable if it receives exactly the step's rows (the head: the sampled rows) in one call, because only
    then do the segments of the step describe its input.
    """
    seen = _observe(loaded)
    _check_windows(loaded.config, seen)
    if sorted(seen.kv) != list(range(len(seen.kv))) or not seen.kv:
        raise ModelRefused(
            "its attention layers do not use transformers' attention interface, which the paged attention needs"
        )
    layers = tuple(seen.kv[layer] for layer in range(len(seen.kv)))
    shape = CacheShape(layers, loaded.dtype, seen.plain_windows(), seen.largest_window())
    return shape, _spec(loaded, seen, layers, max_rank)


def _spec(loaded: LoadedModel, seen: Observation, kv: tuple[tuple[int, int], ...], max_rank: int) -> ModelSpec:
    model: Any = loaded.model
    by_rows = {
        name: model.get_submodule(name)
        for name, calls in seen.inputs.items()
        if len(calls) == 1 and _has_rows(calls[0].shape, 1 if name == loaded.head else PROBE_TOKENS)
    }
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    linears = {name: dims for name, dims in loaded.linears.items() if name in by_rows}
    return ModelSpec(
        modules=linears,
        max_rank=max_rank,
        biased=frozenset(name for name in linears if by_rows[name].bias is not None),
        parameters={name: _shapes(module) for name, module in by_rows.items()},
        transposed=frozenset(name for name, module in by_rows.items() if getattr(module, "is_transposed", False)),
        embedding=embedding,
        head=loaded.head,
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        siblings=_siblings(seen, linears),
        names=frozenset(name for name, _ in model.named_modules() if name),
        gathered=frozenset(name for name, module in by_rows.items() if is_gathered(module)),
        conversion=conversion_of(model),
        kv=kv,
        rereads_tokens=_rereads_tokens(loaded, seen, embedding),
    )


def _rereads_tokens(loaded: LoadedModel, seen: Observation, embedding: str) -> bool:
    """Return True if a module other than the input embedding was given the tokens."""
    tokens = _tokens(loaded)
    if tokens.is_meta:  # planned without weights, for no adapter
        return False
    others = (calls for name, calls in seen.inputs.items() if name != embedding)
    return any(torch.equal(call, tokens) for calls in others for call in calls if call.dtype == tokens.dtype)


def _siblings(seen: Observation, linears: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """Return groups of linears of one parent that received the same tensor, in the order of their calls."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, calls in seen.inputs.items():  # `seen` keeps the tensors alive, so their ids are unique
        if name in linears:
            groups.setdefault((name.rpartition(".")[0], id(calls[0])), []).append(name)
    return tuple(tuple(names) for names in groups.values() if 1 < len(names) <= MAX_SIBLINGS)


def _has_rows(size: torch.Size, rows: int) -> bool:
    return size[:2] == (1, rows) or size[0] == rows


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's own parameters, without quantized weights, of which PEFT stores no copies."""
    parameters = module.named_parameters(recurse=False)
    return {name: tuple(parameter.shape) for name, parameter in parameters if parameter.is_floating_point()}


def _tokens(loaded: LoadedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocab = loaded.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return torch.randint(0, vocab, (1, PROBE_TOKENS), generator=generator).to(loaded.device)


@torch.inference_mode()
def _observe(loaded: LoadedModel) -> Observation:
    seen = Observation()

    def record(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        if key.shape != value.shape:
            raise ModelRefused("its keys and values differ in shape, which the KV cache does not support")
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        seen.kv[layer] = (key.shape[1], key.shape[3])
        seen.windows[layer] = options.get("sliding_window")
        seen.softcaps[layer] = options.get("softcap")
        return query.transpose(1, 2), None

    hooks = [
        module.register_forward_hook(
            lambda _module, args, _output, name=name: seen.inputs.setdefault(name, []).append(args[0])
        )
        for name, module in loaded.model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    AttentionInterface.register(_RECORDER, record)
    try:
        _forward(loaded, _RECORDER, logits_to_keep=torch.tensor([PROBE_TOKENS - 1]))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _forward(loaded: LoadedModel, implementation: str, **options: Any) -> torch.Tensor:
    model: Any = loaded.model
    model.set_attn_implementation(implementation)
    ids = _tokens(loaded)
    positions = torch.arange(PROBE_TOKENS, device=loaded.device)[None]
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False, **options).logits[0]
    return logits


def _check_windows(config: Any, seen: Observation) -> None:
    """Raise `ModelRefused` if a sliding layer does not pass its window to the attention function."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        sliding = [layer for layer, kind in enumerate(layer_types) if kind == "sliding_attention"]
    elif getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        sliding = list(seen.windows)
    else:
        sliding = []
    lost = [layer for layer in sliding if seen.windows.get(layer) is None]
    if lost:
        raise ModelRefused(f"layers {lost} use a sliding window but do not pass it to the attention interface")


@torch.inference_mode()
def check_paged_attention(loaded: LoadedModel, shape: CacheShape, block_size: int) -> torch.Tensor:
    """Compare the paged attention with the stock one; return its logits and leave the model on it. Raises
    `ModelRefused`.

    Call it after the linears are wrapped and packed, so that the comparison covers them."""
    expected = _forward(loaded, "eager").float()
    try:
        paged = _paged_logits(loaded, shape, block_size).float()
    except attention.launch_errors() as failed:
        raise ModelRefused(f"{loaded.config.model_type} cannot be served on this device: {failed}") from failed
    rows = [sum(PROBE_CHUNKS[: n + 1]) - 1 for n in range(len(PROBE_CHUNKS))]
    error = relative_error(paged, expected[rows])
    if not error < TOLERANCE[loaded.dtype]:
        raise ModelRefused(
            f"{loaded.config.model_type} cannot be served exactly: the paged attention differs from the stock one "
            f"by {error:.2g} of the logits' spread"
        )
    return paged


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the RMS difference relative to the spread of `expected`; NaN if either is not finite."""
    return float((logits - expected).square().mean().sqrt() / expected.std().clamp(min=1e-6))


@torch.inference_mode()
def fuse_if_equal(
    loaded: LoadedModel, shape: CacheShape, block_size: int, ops: BlockOps | None, before: torch.Tensor
) -> int:
    """Fuse the blocks of the model, whose linears must be wrapped, unless that changes its logits `before`. Returns the
    number of fused modules."""
    if ops is None:
        return 0
    unexpected: tuple[type[Exception], ...] = (AssertionError, TypeError, *attention.launch_errors())
    fused, undo = fuse(loaded.model, ops, shape.windows)
    try:
        error = relative_error(_paged_logits(loaded, shape, block_size).float(), before)
    except unexpected:  # such a block is called in an unexpected way
        log.exception("the fused blocks cannot run")
        error = math.nan
    if error < TOLERANCE[loaded.dtype]:
        return fused
    log.warning("fused blocks are disabled: their logits differ by %.2g of the logits' spread", error)
    undo()
    return 0


def _paged_logits(loaded: LoadedModel, shape: CacheShape, block_size: int) -> torch.Tensor:
    """Return the logits after each of `PROBE_CHUNKS`, computed like the engine."""
    model: Any = loaded.model
    attention.register()
    model.set_attn_implementation(attention.IMPLEMENTATION)
    num_blocks = -(-PROBE_TOKENS // block_size)
    cache = KVCache(shape, num_blocks, block_size, loaded.device)
    seq = Sequence("probe", [], SamplingParams(max_tokens=1), block_table=list(range(num_blocks))[::-1])
    ids = _tokens(loaded)[0].tolist()
    logits = []
    for num_new_tokens in PROBE_CHUNKS:
        seq.token_ids = ids[: seq.num_computed_tokens + num_new_tokens]
        batch = build_batch(ScheduledBatch([ScheduledSequence(seq, num_new_tokens)]), block_size, loaded.device)
        output = model(
            input_ids=batch.input_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=batch.sample_rows,
            batch=batch,
            kv_cache=cache,
        )
        logits.append(output.logits[0])
        seq.num_computed_tokens += num_new_tokens
    return torch.cat(logits)
