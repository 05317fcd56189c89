"""Composition of an engine: config → model → cache and pool → scheduler → engine."""

import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from adapters.device.forms import FormRefused, described_choice
from adapters.model_spec import ModelSpec
from adapters.registry.store import AdapterStore
from adapters.residency.host_cache import HostCache
from adapters.residency.residency import MoveRefused, Residency
from adapters.residency.slots import SlotTable, pages_of
from adapters.runtime.copies import writer
from adapters.runtime.pack import PackedAdapter, pack
from adapters.runtime.pool import page_bytes
from adapters.runtime.reference import Reference
from adapters.runtime.weight_merge import Room, merge
from adapters.traits import Traits
from adapters.validation.inspect import inspect, load
from server.config import GIB, ServeConfig
from server.engine.block_manager import BlockManager
from server.engine.engine import Engine
from server.engine.machine import available_cpus, available_memory, cpu_quota, memory_limit, total_memory
from server.engine.merging import Merged, MergePolicy, Merging
from server.engine.policies import FairShare, FirstCome
from server.engine.scheduler import Scheduler
from server.engine.selftest import Trials
from server.ipc.messages import EngineInfo
from server.model import attention
from server.model.kv_cache import CacheShape
from server.model.loading.loader import LoadedModel, ModelRefused, load_model
from server.model.loading.probe import probe
from server.model.packed_linear import packed
from server.model.runner import ModelRunner

log = logging.getLogger(__name__)

BLOCK_SIZE = 16
READER_NICE = 10  # of the thread that reads adapters beside a step on the same cores
FULL_SLOTS = 16  # adapters of the largest rank that have room by default; most are smaller (docs/simulation.md)


def build_engine(config: ServeConfig) -> tuple[Engine, EngineInfo]:
    """Load the model and put an engine around it. Raises `ModelRefused` with the reason."""
    _set_threads(config.threads)
    log.info("native code: %s", _native_code())
    loaded = load_model(
        config.model, config.dtype, config.quantization, config.device, config.max_model_len, config.nf4_policy
    )
    shape, spec = probe(loaded, config.max_adapter_rank)
    num_blocks, max_model_len = _size_kv_cache(config, loaded, shape)
    num_pages = _size_pool(config, spec, loaded.dtype)
    runner = ModelRunner(loaded, shape, spec, num_blocks=num_blocks, block_size=BLOCK_SIZE, num_pages=num_pages)
    runner.check(loaded)
    graphs = "none: --eager" if config.eager else runner.capture_graphs(config.max_num_seqs, max_model_len)
    residency = _residency(config, spec, runner, num_pages)
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE),
        residency,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_wait_steps=config.max_wait_steps,
        policy=FairShare() if config.scheduling_policy == "fair" else FirstCome(),
    )
    refer = _reference_reader(config, spec, runner)
    trials = Trials(runner, residency, refer, scheduler.gate, _stay_single_threaded)
    merging = _merging(config, spec, runner, scheduler)
    engine = Engine(
        runner,
        scheduler,
        residency,
        trials,
        merging,
        loaded.eos_token_ids,
        max_model_len,
        overlap=runner.device.type == "cuda",  # a CPU computes when it is asked to
    )
    return engine, _info(config, loaded, spec, runner, residency.slots, num_blocks, max_model_len, graphs)


def _native_code() -> str:
    try:
        return described_choice()
    except FormRefused as refused:
        raise ModelRefused(str(refused)) from refused


def _set_threads(threads: int) -> None:
    """Set the number of the model's threads. Where it was left open, there are none that a CPU quota cannot keep busy:
    threads that wait for each other use it up, and then they all stand still until the next period."""
    if threads:
        torch.set_num_threads(threads)
    elif cpu_quota() < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cpus(torch.get_num_threads()))
        log.info("threads of the model: %d, as the CPU quota is %.2f cores", torch.get_num_threads(), cpu_quota())


def _residency(config: ServeConfig, spec: ModelSpec, runner: ModelRunner, num_pages: int) -> Residency[PackedAdapter]:
    store = AdapterStore(config.data_dir / "store")
    on_gpu = runner.device.type == "cuda"

    def read(digest: str) -> PackedAdapter:
        return pack(load(store.path(digest), spec, digest), runner.pool.dtype, runner.bases, pinned=on_gpu)

    return Residency(
        SlotTable(config.adapter_slots, num_pages),
        HostCache(_host_cache_bytes(config, runner, num_pages * page_bytes(spec, runner.pool.dtype))),
        read=read,
        write=writer(runner.pool, runner.device),
        max_pages=pages_of(config.max_adapter_rank),
        threads=1 if runner.device.type == "cpu" else 2,
        on_thread_start=_step_aside if runner.device.type == "cpu" else _stay_single_threaded,
    )


def _host_cache_bytes(config: ServeConfig, runner: ModelRunner, pool_bytes: int) -> int:
    """The number that was set, or fewer where a memory limit leaves less. On a CPU the KV cache and the pool take
    memory only as they are written, and until then it looks free."""
    if memory_limit() == math.inf:
        return config.adapter_host_bytes
    cache = (*runner.kv_cache.keys, *runner.kv_cache.values)
    promised = pool_bytes + sum(tensor.nbytes for tensor in cache) if runner.device.type == "cpu" else 0
    fits = max(available_memory() - promised, 0) * 3 // 4  # the rest is for steps and uploads
    if fits < config.adapter_host_bytes:
        log.info("adapter_host_bytes lowered from %d to %d: the memory limit", config.adapter_host_bytes, fits)
    return min(config.adapter_host_bytes, fits)


def _reference_reader(config: ServeConfig, spec: ModelSpec, runner: ModelRunner) -> Callable[[str], Reference]:
    store = AdapterStore(config.data_dir / "store")
    return lambda digest: Reference.of(load(store.path(digest), spec, digest), runner.bases)


def _merging(config: ServeConfig, spec: ModelSpec, runner: ModelRunner, scheduler: Scheduler) -> Merging:
    store = AdapterStore(config.data_dir / "store")
    policy = MergePolicy(config.merge_window, config.merge_min_requests, config.merge_cooldown)

    def compute(digest: str, allow_requantize: bool) -> Merged:
        folder = store.path(digest)
        if not Traits.of(inspect(folder, spec).report).mergeable:
            raise MoveRefused("not_mergeable", "the adapter changes more than linear layers")
        weights = load(folder, spec, digest)
        return merge(weights, runner.layers, _room(runner.device), packed, allow_requantize=allow_requantize)

    def prepare(digest: str, allow_requantize: bool) -> "Future[Merged]":
        thread = ThreadPoolExecutor(1, "merge", initializer=_stay_single_threaded)
        future = thread.submit(compute, digest, allow_requantize)
        thread.shutdown(wait=False)  # it ends with the work
        return future

    gives_way = config.merge_others == "wait"
    return Merging(scheduler, prepare, gives_way, policy if config.merge_policy == "auto" else None)


def _room(device: torch.device) -> Room:
    host = available_memory()
    if device.type != "cuda":
        return Room(host)
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Room(free + unused, host)


def _stay_single_threaded() -> None:
    """A reader thread that ran parallel torch code would get OpenMP workers of its own. With more workers than cores
    libgomp no longer spins between parallel regions, and every step of the model takes almost twice as long. Nor does
    it keep to the core that the engine's thread is bound to."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))  # the parent is not bound


def _step_aside() -> None:
    """On a CPU a reader also takes cores from the step, each of whose parallel regions waits for its slowest thread."""
    _stay_single_threaded()
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), READER_NICE)


def _size_pool(config: ServeConfig, spec: ModelSpec, dtype: torch.dtype) -> int:
    """Pages of the adapter pool. Raises `ModelRefused` when the largest adapter would not fit into it."""
    largest, page = pages_of(config.max_adapter_rank), page_bytes(spec, dtype)
    most = config.adapter_slots * largest
    default = min(config.adapter_slots, FULL_SLOTS) * largest
    num_pages = min(config.adapter_device_bytes // page, most) if config.adapter_device_bytes else default
    if num_pages < largest:
        raise ModelRefused(
            f"an adapter of rank {config.max_adapter_rank} takes --adapter-device-bytes {largest * page}; "
            "give it that, or lower --max-adapter-rank"
        )
    return num_pages


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
    return min(2 * GIB, total_memory() // 8)


def _info(
    config: ServeConfig,
    loaded: LoadedModel,
    spec: ModelSpec,
    runner: ModelRunner,
    slots: SlotTable,
    num_blocks: int,
    max_model_len: int,
    graphs: str,
) -> EngineInfo:
    return EngineInfo(
        base_fingerprint=loaded.fingerprint,
        vocab_size=loaded.config.vocab_size,
        max_model_len=max_model_len,
        spec=spec,
        adapter_slots=slots.num_slots,
        adapter_pages=slots.num_pages,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        eos_token_ids=sorted(loaded.eos_token_ids),
        description={
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "quantization": config.quantization,
            **({"nf4_policy": loaded.nf4} if loaded.nf4 else {}),
            "native_code": described_choice(),
            "attention": attention.choose(loaded.device.type, loaded.dtype)[1],
            "lora_kernel": runner.kernel_reason,
            "cuda_graphs": graphs,
        },
    )
