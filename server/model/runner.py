"""Runs the base model over one step's flattened tokens, with the adapters of the step on top."""

from typing import Any

import torch

from adapters.kernels import choose_kernel
from adapters.model_spec import ModelSpec
from adapters.runtime.hooks import ModuleOverrideHooks
from adapters.runtime.layers import LoRAGroup, attach, wrapped
from adapters.runtime.pool import AdapterPool
from server.model.batch import ForwardBatch
from server.model.fusion import block_ops
from server.model.graphs import DecodeGraphs, capture_decode_graphs
from server.model.kv_cache import CacheShape, KVCache
from server.model.loading.loader import LoadedModel
from server.model.loading.probe import check_paged_attention, fuse_if_equal
from server.model.packed_linear import pack_linears, packed
from server.model.pooling import pooling


class ModelRunner:
    """The model with its two additions: attention reads `kv_cache`, the wrapped linears read `pool`."""

    def __init__(
        self,
        loaded: LoadedModel,
        shape: CacheShape,
        spec: ModelSpec,
        *,
        num_blocks: int,
        block_size: int,
        num_pages: int,
    ) -> None:
        self._model: Any = loaded.model
        self.embedding: torch.nn.Module = loaded.model.get_input_embeddings()  # type: ignore[operator]
        self.device = loaded.device
        self.cache_shape = shape
        self.kv_cache = KVCache(shape, num_blocks, block_size, loaded.device)
        kernel, self.kernel_reason = choose_kernel(loaded.device, loaded.dtype)
        self.pool = AdapterPool(spec, num_pages, loaded.dtype, loaded.device, kernel)
        self.bases = attach(self._model, spec, self.pool, loaded.head, packed)
        self._hooks = ModuleOverrideHooks(self.bases, self.pool, loaded.head)
        pack_linears(self._model)  # what is not adaptable
        self.layers = wrapped(self._model)
        self.fused = 0  # modules that compute through fused operations
        self.graphs: DecodeGraphs | None = None
        self._vocab_size = spec.vocab_size or 0
        self.is_routed = bool(spec.gathered)

    def check_and_fuse(self, loaded: LoadedModel) -> None:
        """Compare the model as it now computes with the stock one, then fuse its blocks where that changes nothing.
        Raises `ModelRefused`."""
        shape, size = self.cache_shape, self.kv_cache.block_size
        logits = check_paged_attention(loaded, shape, size)
        self.fused = fuse_if_equal(loaded, shape, size, block_ops(loaded.device, loaded.dtype), logits)

    def vocab_size(self, slots: tuple[int, ...]) -> int:
        """Return the vocabulary size of the adapters in `slots`, or of the base model."""
        return max((self.pool.vocab_size(slot) or 0 for slot in slots), default=0) or self._vocab_size

    def groups(self) -> list[LoRAGroup]:
        return list(dict.fromkeys(layer.group for layer in self.layers.values()))

    def capture_graphs(self, max_rows: int, max_model_len: int) -> str:
        """Record decode steps where that is possible; return a description for the log."""
        self.graphs, done = capture_decode_graphs(
            self._forward,
            self.pool,
            self.groups(),
            max_rows,
            max_model_len,
            self.kv_cache.block_size,
            self.device,
        )
        return done

    @torch.inference_mode()
    def run(
        self,
        batch: ForwardBatch,
        kv_cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Compute the logits `[samples, vocab]` of the batch's sample rows. `vocab` is the largest vocabulary among
        them; logits beyond a row's own vocabulary are meaningless."""
        self._hooks.install()
        batch.virtual.copy(self.pool.virtual, kv_cache or self.kv_cache)
        recorded = self.graphs.run(batch) if self.graphs is not None and kv_cache is None else None
        if recorded is not None:
            return recorded
        tokens, head = batch.token_segments, batch.head_segments
        step = self.pool.step(tokens, head, num_tokens=len(batch.input_ids), num_head=len(batch.sample_rows))
        with step, pooling(self._model, batch):
            return self._forward(batch, kv_cache)

    def _forward(self, batch: ForwardBatch, kv_cache: KVCache | None = None) -> torch.Tensor:
        logits: torch.Tensor = self._model(
            **batch.virtual.model_input(batch.input_ids, self.pool.virtual, self.embedding),
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=batch.sample_rows,
            batch=batch,
            kv_cache=kv_cache or self.kv_cache,
        ).logits[0]
        return logits
