"""Composition of the engine: config → model → cache and pool → scheduler → engine."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import msgspec

import server
from adapters.device.forms import FormRefused, described_choice
from adapters.errors import MoveRefused
from adapters.load import load
from adapters.model_spec import ModelSpec
from adapters.peft.tokenizer_files import read_tokenizer_files
from adapters.registry.packed_files import PACKED_FOLDER, PackedFiles
from adapters.registry.store import AdapterStore
from adapters.residency.host_cache import HostCache
from adapters.residency.residency import Residency
from adapters.residency.slots import SlotTable, pages_of
from adapters.runtime.copies import writer
from adapters.runtime.pack import PackedAdapter, pack
from adapters.runtime.packed_format import PackedLayout
from adapters.runtime.weight_merge import merge
from adapters.traits import Traits
from adapters.validation.inspect import inspect
from adapters.weights import AdapterWeights
from server.base_tokenizer import BaseTokenizer
from server.config import ServeConfig
from server.engine.constraints import Constraints
from server.engine.engine import Engine
from server.engine.grammars import Grammars
from server.engine.kv_blocks.block_manager import BlockManager
from server.engine.kv_blocks.sliding_blocks import SlidingBlocks
from server.engine.memory.machine import schedulable_cores
from server.engine.memory.memory_plan import BLOCK_SIZE, DEFAULT_RANK, MemoryPlan
from server.engine.memory.sizing import host_cache_bytes, plan_memory, refuse_early, room
from server.engine.merging import Merged, MergePolicy, Merging
from server.engine.packed_reads import PackedReads
from server.engine.progress import StepProgress
from server.engine.scheduling.policies import FairShare, FirstCome
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.step_cost import StepBudget
from server.engine.selftest import SelfTests
from server.engine.threads import set_threads, stay_single_threaded, step_aside
from server.engine.weights_reader import WeightsReader
from server.ipc.messages import EngineInfo
from server.model import attention
from server.model.kv_cache import CacheShape
from server.model.loading.loader import LoadedModel, ModelRefused, load_model
from server.model.loading.probe import probe
from server.model.loading.tokenizer import load_tokenizer
from server.model.packed_linear import packed
from server.model.runner import ModelRunner
from server.model.warm_up import warm_up

log = logging.getLogger(__name__)


def build_serving_engine(config: ServeConfig) -> tuple[Engine, EngineInfo]:
    """Build the engine, and load the tokenizer that the API needs to serve text. Raises `ModelRefused`."""
    tokenizer = load_tokenizer(config.model)
    engine, info = build_engine(config, tokenizer)
    return engine, msgspec.structs.replace(info, tokenizer=tokenizer)


def build_engine(config: ServeConfig, tokenizer: BaseTokenizer | None = None) -> tuple[Engine, EngineInfo]:
    """Load the model and build the engine, which needs the tokenizer for constraints alone. Raises `ModelRefused` with
    the reason."""
    set_threads(config.threads)
    log.info("native code: %s", _native_code())
    refuse_early(config)
    loaded = load_model(
        config.model, config.dtype, config.quantization, config.device, config.max_model_len, config.nf4_policy
    )
    shape, spec = probe(loaded, config.max_adapter_rank or DEFAULT_RANK)
    plan = plan_memory(config, loaded, shape, spec)
    spec = replace(spec, max_rank=plan.max_rank)
    num_blocks, max_model_len = plan.num_blocks, plan.max_model_len
    runner = ModelRunner(loaded, shape, spec, num_blocks=num_blocks, block_size=BLOCK_SIZE, num_pages=plan.num_pages)
    runner.check_and_fuse(loaded)
    warm_up(runner.run, BLOCK_SIZE, runner.device)
    graphs = "none: --eager" if config.eager else runner.capture_graphs(config.max_num_seqs, max_model_len)
    reader = _weights_reader(config, spec)
    residency = _residency(config, loaded, spec, runner, plan, reader)
    scheduler = Scheduler(
        _blocks(config, shape, num_blocks),
        residency,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_wait_steps=config.max_wait_steps,
        policy=FairShare() if config.scheduling_policy == "fair" else FirstCome(),
        step_budget=StepBudget.for_device(config.max_step_ms, runner.device.type),
    )
    selftests = SelfTests(runner, residency, reader, scheduler.gate, stay_single_threaded)
    merging = _merging(config, spec, runner, scheduler)
    engine = Engine(
        runner,
        scheduler,
        residency,
        selftests,
        merging,
        _constraints(config, tokenizer, loaded.eos_token_ids, runner.device.type),
        loaded.eos_token_ids,
        max_model_len,
        overlap=runner.device.type == "cuda",  # launches are synchronous on a CPU
        progress=StepProgress(loaded.model),
    )
    return engine, _info(config, loaded, spec, runner, residency.slots, num_blocks, max_model_len, graphs)


def _blocks(config: ServeConfig, shape: CacheShape, num_blocks: int) -> BlockManager:
    if shape.window is None:
        return BlockManager(num_blocks, BLOCK_SIZE)
    return SlidingBlocks(num_blocks, BLOCK_SIZE, window=shape.window, max_step_tokens=config.max_batch_tokens)


def _native_code() -> str:
    try:
        return described_choice()
    except FormRefused as refused:
        raise ModelRefused(str(refused)) from refused


def _weights_reader(config: ServeConfig, spec: ModelSpec) -> WeightsReader[AdapterWeights]:
    store = AdapterStore(config.data_dir / "store")
    return WeightsReader(lambda digest, verify: load(store.path(digest), spec, digest, verify=verify))


def _residency(
    config: ServeConfig,
    loaded: LoadedModel,
    spec: ModelSpec,
    runner: ModelRunner,
    plan: MemoryPlan,
    reader: WeightsReader[AdapterWeights],
) -> Residency[PackedAdapter]:
    reads = _packed_reads(config, loaded, spec, runner, reader)
    return Residency(
        SlotTable(config.adapter_slots, plan.num_pages, plan.override_bytes, on_drop=runner.pool.release),
        HostCache(host_cache_bytes(config, runner, runner.pool.nbytes())),
        read=reads.read,
        write=writer(runner.pool, runner.device),
        max_pages=pages_of(plan.max_rank),
        threads=1 if runner.device.type == "cpu" else 2,
        on_thread_start=step_aside if runner.device.type == "cpu" else stay_single_threaded,
        on_urgent_start=stay_single_threaded,
        keep=reads.keep,
    )


def _packed_reads(
    config: ServeConfig,
    loaded: LoadedModel,
    spec: ModelSpec,
    runner: ModelRunner,
    reader: WeightsReader[AdapterWeights],
) -> PackedReads:
    on_gpu, dtype = runner.device.type == "cuda", runner.pool.dtype
    store = AdapterStore(config.data_dir / "store")
    layout = PackedLayout.of(spec, dtype, loaded.fingerprint, server.__version__)
    files = PackedFiles(config.data_dir / PACKED_FOLDER, layout.key, config.adapter_packed_bytes, store.__contains__)
    if not config.adapter_packed_bytes:
        files.clear()

    def fresh(weights: AdapterWeights) -> PackedAdapter:
        return pack(weights, dtype, runner.bases, pinned=on_gpu)

    kept = files if config.adapter_packed_bytes else None
    return PackedReads(reader, fresh, kept, layout, pinned=on_gpu)


def _constraints(
    config: ServeConfig, base: BaseTokenizer | None, eos_token_ids: frozenset[int], device: str
) -> Constraints:
    store = AdapterStore(config.data_dir / "store")

    def backend(version: str) -> str:
        if version:
            return str(read_tokenizer_files(store.path(version)).build().to_str())
        if base is None:
            raise LookupError("the engine has no tokenizer")
        return base.backend

    mask_threads = 1 if device == "cpu" else schedulable_cores()
    return Constraints(Grammars(backend, eos_token_ids), mask_threads, stay_single_threaded)


def _merging(config: ServeConfig, spec: ModelSpec, runner: ModelRunner, scheduler: Scheduler) -> Merging:
    store = AdapterStore(config.data_dir / "store")
    policy = MergePolicy(config.merge_window, config.merge_min_requests, config.merge_cooldown)

    def compute(digest: str, allow_requantize: bool) -> Merged:
        folder = store.path(digest)
        if not Traits.of(inspect(folder, spec, with_tokenizer=False).report).mergeable:
            raise MoveRefused("not_mergeable", "it changes more than linear layers and cannot be merged")
        weights = load(folder, spec, digest)
        return merge(weights, runner.layers, room(runner.device), packed, allow_requantize=allow_requantize)

    def prepare(digest: str, allow_requantize: bool) -> "Future[Merged]":
        thread = ThreadPoolExecutor(1, "merge", initializer=stay_single_threaded)
        future = thread.submit(compute, digest, allow_requantize)
        thread.shutdown(wait=False)  # the thread ends after this call
        return future

    gives_way = config.merge_others == "wait"
    return Merging(scheduler, prepare, gives_way, policy if config.merge_policy == "auto" else None)


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
