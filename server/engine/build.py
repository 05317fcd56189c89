"""Composition of an engine: config → model → cache and pool → scheduler → engine."""

import logging
import os
from collections.abc import Callable

import torch

from adapters.host_cache import HostCache
from adapters.pack import PackedAdapter, pack
from adapters.residency import Residency
from adapters.selftest import Reference
from adapters.slots import PAGE_COLUMNS, SlotTable
from adapters.spec import ModelSpec
from adapters.store import AdapterStore
from adapters.validation import load
from server.config import GIB, ServeConfig
from server.engine.block_manager import BlockManager
from server.engine.engine import Engine
from server.engine.messages import EngineInfo
from server.engine.scheduler import Scheduler
from server.engine.trials import Trials
from server.model.kv_cache import CacheShape
from server.model.loader import LoadedModel, ModelRefused, load_model
from server.model.probe import probe
from server.model.runner import ModelRunner

log = logging.getLogger(__name__)

BLOCK_SIZE = 16


def build_engine(config: ServeConfig) -> tuple[Engine, EngineInfo]:
    """Load the model and put an engine around it. Raises `ModelRefused` with the reason."""
    if config.threads:
        torch.set_num_threads(config.threads)
    loaded = load_model(config.model, config.dtype, config.quantization, config.device, config.max_model_len)
    shape, spec = probe(loaded, BLOCK_SIZE, config.max_adapter_rank)
    num_blocks, max_model_len = _size_kv_cache(config, loaded, shape)
    num_pages = config.adapter_slots * -(-config.max_adapter_rank // PAGE_COLUMNS)
    runner = ModelRunner(loaded, shape, spec, num_blocks=num_blocks, block_size=BLOCK_SIZE, num_pages=num_pages)
    residency = _residency(config, spec, runner, num_pages)
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE),
        residency,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_wait_steps=config.max_wait_steps,
    )
    refer = _reference_reader(config, spec, runner)
    trials = Trials(runner, residency, refer, _stay_single_threaded)
    engine = Engine(runner, scheduler, residency, trials, loaded.eos_token_ids, max_model_len)
    return engine, _info(config, loaded, spec, runner, num_blocks, max_model_len)


def _residency(config: ServeConfig, spec: ModelSpec, runner: ModelRunner, num_pages: int) -> Residency[PackedAdapter]:
    store = AdapterStore(config.data_dir / "store")
    return Residency(
        SlotTable(config.adapter_slots, num_pages),
        HostCache(config.adapter_host_bytes),
        read=lambda digest: pack(load(store.path(digest), spec, digest), runner.pool.dtype, runner.bases),
        write=runner.pool.write,
        on_thread_start=_stay_single_threaded,
    )


def _reference_reader(config: ServeConfig, spec: ModelSpec, runner: ModelRunner) -> Callable[[str], Reference]:
    store = AdapterStore(config.data_dir / "store")
    return lambda digest: Reference.of(load(store.path(digest), spec, digest), runner.bases)


def _stay_single_threaded() -> None:
    """A reader thread that ran parallel torch code would get OpenMP workers of its own. With more workers than cores
    libgomp no longer spins between parallel regions, and every step of the model takes almost twice as long."""
    torch.set_num_threads(1)


def _size_kv_cache(config: ServeConfig, loaded: LoadedModel, shape: CacheShape) -> tuple[int, int]:
    """Blocks of the cache, and the longest sequence that it can hold. Raises `ModelRefused`."""
    block_bytes = shape.bytes_per_token() * BLOCK_SIZE
    num_blocks = (config.kv_cache_bytes or _default_kv_bytes(loaded.device)) // block_bytes
    # One block of slack: the last token of a full-length sequence is never computed, but is looked up.
    fits = (num_blocks - 1) * BLOCK_SIZE
    if config.max_model_len > fits or fits < BLOCK_SIZE:
        needed = (max(config.max_model_len, 1) // BLOCK_SIZE + 2) * block_bytes
        raise ModelRefused(f"the KV cache holds {max(fits, 0)} tokens; --kv-cache-bytes {needed} or more is needed")
    if loaded.max_model_len > fits:
        log.warning("max_model_len lowered from %d to %d: the KV cache holds no more", loaded.max_model_len, fits)
    return num_blocks, min(loaded.max_model_len, fits)


def _default_kv_bytes(device: torch.device) -> int:
    """Most of what a GPU has left; on a CPU a modest share of memory (pages are only taken when written)."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(free - total // 10, 0)
    return min(2 * GIB, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)


def _info(
    config: ServeConfig,
    loaded: LoadedModel,
    spec: ModelSpec,
    runner: ModelRunner,
    num_blocks: int,
    max_model_len: int,
) -> EngineInfo:
    return EngineInfo(
        base_fingerprint=loaded.fingerprint,
        vocab_size=loaded.config.vocab_size,
        max_model_len=max_model_len,
        spec=spec,
        adapter_slots=config.adapter_slots,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        eos_token_ids=sorted(loaded.eos_token_ids),
        description={
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "quantization": config.quantization,
            "attention": "paged torch attention (no faster one is built for this device)",
            "lora_kernel": runner.kernel_reason,
        },
    )
