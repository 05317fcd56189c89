"""The memory plan of this machine, and the sizes of the host cache and of the room for a merge."""

import logging
import math

import torch

from adapters.model_spec import ModelSpec
from adapters.runtime.weight_merge import FreeMemory
from server.config import ServeConfig
from server.engine.memory.machine import available_memory, memory_limit, total_memory
from server.engine.memory.memory_plan import DEFAULT_RANK, DeviceMemory, MemoryPlan, ModelFacts, PlanRefused, make_plan
from server.engine.memory.model_facts import facts_from_config, facts_of, loaded_weights
from server.model.graphs import bucket_sizes
from server.model.kv_cache import CacheShape
from server.model.loading.loader import LoadedModel, ModelRefused, chosen_device
from server.model.runner import ModelRunner

log = logging.getLogger(__name__)


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


def refuse_early(config: ServeConfig) -> None:
    """Raise `ModelRefused` if the server cannot fit on the GPU, before any weight is read. The plan that counts is made
    after the load (`plan_memory`)."""
    device = chosen_device(config.device)
    if device.type != "cuda" or config.model.endswith(".gguf"):
        return
    try:
        facts = facts_from_config(
            config.model,
            config.dtype,
            config.quantization,
            config.max_model_len,
            config.max_adapter_rank or DEFAULT_RANK,
        )
    except Exception as error:  # such a model can perhaps be probed once it is loaded
        log.info("no memory plan before the load: %s", error)
        return
    _planned(facts, config, device, 0)


def plan_memory(config: ServeConfig, loaded: LoadedModel, shape: CacheShape, spec: ModelSpec) -> MemoryPlan:
    """Return the plan for a loaded model, and log it. Raises `ModelRefused`."""
    on_gpu = loaded.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()  # what loading left in torch's allocator
    weights = torch.cuda.memory_allocated(loaded.device) if on_gpu else loaded_weights(loaded.model)
    plan = _planned(facts_of(loaded, shape, spec, weights), config, loaded.device, weights)
    log.info("memory plan of %s (workspace %s):\n%s", loaded.device, plan.workspace, plan.table())
    if plan.unused < 0:
        log.warning("memory: the parts exceed the host's by %d MiB once all of them are used", -plan.unused >> 20)
    if loaded.max_model_len > plan.max_model_len:
        log.warning(
            "max_model_len lowered from %d to %d: size of the KV cache", loaded.max_model_len, plan.max_model_len
        )
    return plan


def _planned(facts: ModelFacts, config: ServeConfig, device: torch.device, allocated: int) -> MemoryPlan:
    on_gpu = device.type == "cuda"
    rows = bucket_sizes(config.max_num_seqs) if on_gpu and not config.eager else ()
    try:
        return make_plan(facts, config, _device_memory(config, device, allocated), rows)
    except PlanRefused as refused:
        raise ModelRefused(str(refused)) from refused


def _device_memory(config: ServeConfig, device: torch.device, allocated: int) -> DeviceMemory:
    """Return the memory of `device`; the model has `allocated` bytes of it. On a CPU it follows the memory limit, on a
    GPU it ends where the server has its share."""
    if device.type != "cuda":
        return DeviceMemory(total_memory(), lazy=True)
    free, total = torch.cuda.mem_get_info(device)
    taken = max(total - free - allocated, 0)
    return DeviceMemory(min(total, taken + int(total * config.gpu_memory_utilization)), taken)
