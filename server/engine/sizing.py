"""The sizes of the adapter pool, the KV cache and the host cache."""

import logging
import math

import torch

from adapters.model_spec import ModelSpec
from adapters.residency.slots import pages_of
from adapters.runtime.pool import page_bytes
from adapters.runtime.weight_merge import FreeMemory
from server.config import GIB, ServeConfig
from server.engine.machine import available_memory, memory_limit, total_memory
from server.model.kv_cache import CacheShape
from server.model.loading.loader import LoadedModel, ModelRefused
from server.model.runner import ModelRunner

log = logging.getLogger(__name__)

BLOCK_SIZE = 16
FULL_SLOTS = 16  # adapters of the largest rank that fit by default; most adapters are smaller (docs/simulation.md)


def host_cache_bytes(config: ServeConfig, runner: ModelRunner, pool_bytes: int) -> int:
    """Return the configured size of the host cache, or less if a memory limit requires it. On a CPU the KV cache and
    the pool take memory only when written; until then their memory appears free."""
    if memory_limit() == math.inf:
        return config.adapter_host_bytes
    cache = (*runner.kv_cache.keys, *runner.kv_cache.values)
    promised = pool_bytes + sum(tensor.nbytes for tensor in cache) if runner.device.type == "cpu" else 0
    fits = max(available_memory() - promised, 0) * 3 // 4  # the rest is for steps and uploads
    if fits < config.adapter_host_bytes:
        log.info("adapter_host_bytes lowered from %d to %d: memory limit", config.adapter_host_bytes, fits)
    return min(config.adapter_host_bytes, fits)


def room(device: torch.device) -> FreeMemory:
    host = available_memory()
    if device.type != "cuda":
        return FreeMemory(host)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return FreeMemory(free + unused, host)


def size_pool(config: ServeConfig, spec: ModelSpec, dtype: torch.dtype) -> int:
    """Return the number of pages of the adapter pool. Raises `ModelRefused` if the largest adapter does not fit."""
    largest, page = pages_of(config.max_adapter_rank), page_bytes(spec, dtype)
    most = config.adapter_slots * largest
    default = min(config.adapter_slots, FULL_SLOTS) * largest
    num_pages = min(config.adapter_device_bytes // page, most) if config.adapter_device_bytes else default
    if num_pages < largest:
        raise ModelRefused(
            f"an adapter of rank {config.max_adapter_rank} does not fit into --adapter-device-bytes "
            f"{config.adapter_device_bytes}; raise it to {largest * page} or lower --max-adapter-rank"
        )
    return num_pages


def size_kv_cache(config: ServeConfig, loaded: LoadedModel, shape: CacheShape) -> tuple[int, int]:
    """Return the number of blocks of the KV cache and the longest sequence that fits. Raises `ModelRefused`."""
    block_bytes = shape.bytes_per_token() * BLOCK_SIZE
    num_blocks = (config.kv_cache_bytes or _default_kv_bytes(loaded.device)) // block_bytes
    # One spare block: the last token of a full-length sequence is never computed, but is looked up.
    fits = (num_blocks - 1) * BLOCK_SIZE
    if config.max_model_len > fits or fits < BLOCK_SIZE:
        needed = (max(config.max_model_len, 1) // BLOCK_SIZE + 2) * block_bytes
        raise ModelRefused(f"the KV cache has room for {max(fits, 0)} tokens; set --kv-cache-bytes {needed} or more")
    if loaded.max_model_len > fits:
        log.warning("max_model_len lowered from %d to %d: size of the KV cache", loaded.max_model_len, fits)
    return num_blocks, min(loaded.max_model_len, fits)


def _default_kv_bytes(device: torch.device) -> int:
    """Return most of a GPU's free memory, or a modest share of host memory (pages are only taken when written)."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(free - total // 10, 0)
    return min(2 * GIB, total_memory() // 8)
