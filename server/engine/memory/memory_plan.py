"""The memory plan: the device memory of each part of the server, computed before any of it is allocated. No torch.

On a GPU the parts are taken in this order: what other programs and the driver hold, a margin for fragmentation, the
base model's weights, the workspace of a step, CUDA graphs, the self-test, the adapter pool, adapters' own copies of
whole weights (module overrides), and the KV cache, which gets the rest. A plan that exceeds the device is refused with
the flag to change. On a CPU the pool and the KV cache take memory only when they are written, so the plan states upper
bounds and follows the memory limit of the container.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adapters.residency.slots import pages_of
from server.config import GIB, ServeConfig

MIB = 1 << 20
BLOCK_SIZE = 16  # tokens of a KV block
FULL_SLOTS = 16  # adapters of USUAL_RANK that fit by default; most adapters are smaller (docs/simulation.md)
DEFAULT_RANK, USUAL_RANK = 128, 64  # the limit by default, and the rank that the default pool is sized by
DRIVER_BYTES = 600 * MIB  # CUDA context and libraries, when planning without the device
POOL_SHARE, OVERRIDE_SHARE = 4, 8  # by default, the pool gets at most a quarter and the overrides an eighth of the rest
USEFUL_TOKENS = 2048  # the KV cache has room for a sequence of this length, or the plan is refused
CPU_OVERRIDE_BYTES = 256 * MIB  # the least that overrides may take on a CPU by default
SELFTEST_TOKENS = 16
REFERENCE_ROWS = 4096  # the same in adapters/runtime/reference.py, which imports torch
_LOGIT_BYTES = 32  # per logit while sampling: the logits, float32 copies, sorted values, indices, probabilities
_LAYER_GRAPH_BYTES = 64 << 10  # of one layer in one recorded graph


class PlanRefused(Exception):
    """The parts do not fit; the message names the flag to change."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The properties of a base model that decide the plan; sizes in bytes."""

    weights: int
    page: int  # 16 rank columns in all adaptable modules
    kv_token: int
    whole: int  # own copies of the input embedding and the output head
    vectors: int  # scale and shift of all adaptable modules
    token: int  # activations of one token
    scratch: int  # the largest 4-bit weight dequantized; 0 without 4-bit weights
    reference: int  # float32 rows of a weight in the self-test
    largest_module: int  # the largest module that is no linear or embedding: the experts of a layer
    vocab: int
    itemsize: int
    layers: int
    max_model_len: int  # the model's limit, or the one requested
    experts: int = 0  # the factors of all experts of one adapter of rank 16
    nf4_weights: int = 0  # weights after quantization to NF4; 0 if that is not possible
    nf4_scratch: int = 0


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """`total` bytes, of which `taken` belong to other programs and the driver. `lazy` memory (a CPU's) is taken when it
    is written."""

    total: int
    taken: int = 0
    lazy: bool = False

    @property
    def margin(self) -> int:
        """Bytes kept free for fragmentation."""
        return 0 if self.lazy else 512 * MIB + self.total // 50


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The parts in bytes, in order of allocation, and the sizes that follow from them."""

    total: int
    parts: dict[str, int]
    num_pages: int
    max_rank: int
    num_blocks: int
    override_bytes: int
    max_model_len: int
    workspace: str  # how the size of the workspace was found

    @property
    def unused(self) -> int:
        return self.total - sum(self.parts.values())

    def rows(self) -> list[tuple[str, int]]:
        return [*self.parts.items(), ("unused", self.unused), ("total", self.total)]

    def table(self) -> str:
        """Return the parts as lines for the log."""
        return "\n".join(f"  {name:<26}{size / GIB:9.2f} GiB" for name, size in self.rows())


def make_plan(
    facts: ModelFacts,
    config: ServeConfig,
    device: DeviceMemory,
    graph_rows: Sequence[int] = (),
    measured_workspace: int | None = None,
) -> MemoryPlan:
    """Return the plan. `graph_rows` are the batch sizes of the CUDA graphs. Raises `PlanRefused`.

    `measured_workspace` is the place for a profiling step that measures the workspace on the device; without it, the
    size is estimated. The estimate has not been measured on a GPU.
    """
    plan = _Planner(facts, config, device, graph_rows, measured_workspace)
    try:
        return plan.make()
    except _TooLarge as short:
        raise PlanRefused(f"{short}; {_advice(plan, short)}") from None


def with_adapters(facts: ModelFacts, config: ServeConfig, adapters: int) -> ServeConfig:
    """Return `config` with room for `adapters` adapters of the largest rank, if it is given, or of 64."""
    size = adapters * pages_of(config.max_adapter_rank or USUAL_RANK) * facts.page
    slots = max(adapters, config.adapter_slots)
    return dataclasses.replace(config, adapter_slots=slots, adapter_device_bytes=size)


class _TooLarge(Exception):
    """The parts exceed the device by `missing` bytes."""

    def __init__(self, missing: int, total: int) -> None:
        amount = f"{missing / GIB:.1f} GiB" if missing >= GIB else f"{-(-missing // MIB)} MiB"
        super().__init__(f"the server needs {amount} more than the {total / GIB:.1f} GiB of the device")
        self.missing = missing


@dataclass(frozen=True, slots=True)
class _Planner:
    facts: ModelFacts
    config: ServeConfig
    device: DeviceMemory
    graph_rows: Sequence[int]
    measured: int | None

    def make(self) -> MemoryPlan:
        parts = self._fixed()
        left = self.device.total - sum(parts.values())
        max_rank = self.config.max_adapter_rank or self._default_rank(left)
        num_pages = self._num_pages(left, max_rank)
        pool = num_pages * self.facts.page
        overrides = self._override_bytes(left - pool)
        parts |= {"adapter pool": pool, "module overrides": overrides}
        reference = min(self.facts.largest_module, overrides)  # no larger module can be an adapter's own
        parts["self-test"] += reference
        num_blocks, max_model_len = self._kv_cache(left - pool - overrides - reference)
        parts["KV cache"] = num_blocks * BLOCK_SIZE * self.facts.kv_token
        workspace = "estimated, not yet measured on a GPU" if self.measured is None else "measured"
        return MemoryPlan(
            self.device.total, parts, num_pages, max_rank, num_blocks, overrides, max_model_len, workspace
        )

    def _fixed(self) -> dict[str, int]:
        found = {
            "driver, other programs": self.device.taken,
            "margin": self.device.margin,
            "weights": self.facts.weights,
            "workspace": workspace_bytes(self.facts, self.config) if self.measured is None else self.measured,
            "CUDA graphs": self._graph_bytes(),
            "self-test": self.facts.reference + SELFTEST_TOKENS * self.facts.vocab * _LOGIT_BYTES,
        }
        return {name: size for name, size in found.items() if size or name == "weights"}

    def _graph_bytes(self) -> int:
        """Return the memory of the recorded decode steps: they share activations, and each keeps its logits."""
        if not self.graph_rows:
            return 0
        facts, rows = self.facts, sum(self.graph_rows)
        logits = 2 * rows * facts.vocab * facts.itemsize  # with adapters and without
        layouts = rows * -(-facts.max_model_len // BLOCK_SIZE) * 8
        launches = 2 * len(self.graph_rows) * facts.layers * _LAYER_GRAPH_BYTES
        return logits + layouts + launches + max(self.graph_rows) * facts.token

    def _default_rank(self, left: int) -> int:
        """Return the largest rank where the operator gave none: the default if two such adapters fit into the pool."""
        pool = self.config.adapter_device_bytes or (math.inf if self.device.lazy else left // POOL_SHARE)
        return DEFAULT_RANK if 2 * pages_of(DEFAULT_RANK) * self.facts.page <= pool else USUAL_RANK

    def _num_pages(self, left: int, max_rank: int) -> int:
        """Return the number of pages of the adapter pool."""
        config, page = self.config, self.facts.page
        largest = pages_of(max_rank)
        if config.adapter_device_bytes:
            num_pages = min(config.adapter_device_bytes // page, config.adapter_slots * largest)
            if num_pages < largest:
                raise PlanRefused(
                    f"an adapter of rank {max_rank} does not fit into --adapter-device-bytes "
                    f"{config.adapter_device_bytes}; raise it to {largest * page} or lower --max-adapter-rank"
                )
            return num_pages
        usual = largest if config.max_adapter_rank else pages_of(USUAL_RANK)
        # One of the largest rank always finds room beside pinned ones of the usual rank.
        default = (min(config.adapter_slots, FULL_SLOTS) - 1) * usual + largest
        share = default if self.device.lazy or not page else left // POOL_SHARE // page
        return max(min(default, share), largest)

    def _override_bytes(self, left: int) -> int:
        """Return the budget of what adapters keep on the device beside the pool."""
        if self.config.adapter_override_bytes:
            return self.config.adapter_override_bytes
        wanted = self.facts.whole + min(self.config.adapter_slots, FULL_SLOTS) * self.facts.vectors
        wanted += self.facts.experts * pages_of(self.config.max_adapter_rank)  # of one adapter; most are smaller
        if self.device.lazy:
            return min(max(wanted, CPU_OVERRIDE_BYTES), self.device.total // OVERRIDE_SHARE)
        return max(min(wanted, left // OVERRIDE_SHARE), self.facts.vectors)

    def _kv_cache(self, rest: int) -> tuple[int, int]:
        """Return the number of blocks, and the longest sequence that fits."""
        config, block = self.config, BLOCK_SIZE * self.facts.kv_token
        if config.kv_cache_bytes or self.device.lazy:
            size = config.kv_cache_bytes or min(2 * GIB, self.device.total // 8)
            if size > rest and not self.device.lazy:
                raise _TooLarge(size - rest, self.device.total)
            num_blocks = size // block
        else:
            num_blocks = min(max(rest, 0) // block, self._most_blocks())
        # One spare block: the last token of a full-length sequence is never computed, but is looked up.
        fits = (num_blocks - 1) * BLOCK_SIZE
        least = config.max_model_len or (BLOCK_SIZE if config.kv_cache_bytes or self.device.lazy else self._useful())
        if fits < max(least, BLOCK_SIZE):
            needed = (max(least, 1) // BLOCK_SIZE + 2) * block
            if not (config.kv_cache_bytes or self.device.lazy):
                raise _TooLarge(max(needed - rest, MIB), self.device.total)
            raise PlanRefused(f"the KV cache has room for {max(fits, 0)} tokens; set --kv-cache-bytes {needed} or more")
        return num_blocks, min(self.facts.max_model_len, fits)

    def _useful(self) -> int:
        return min(self.facts.max_model_len, USEFUL_TOKENS)

    def _most_blocks(self) -> int:
        """Return the number of blocks that all sequences of a step fill at their full length."""
        return self.config.max_num_seqs * (-(-self.facts.max_model_len // BLOCK_SIZE) + 1)


def workspace_bytes(facts: ModelFacts, config: ServeConfig) -> int:
    """Estimate the activations of `max_batch_tokens` tokens and the logits of `max_num_seqs` sampled rows. Not yet
    measured on a GPU."""
    return config.max_batch_tokens * facts.token + config.max_num_seqs * facts.vocab * _LOGIT_BYTES + facts.scratch


# -- what to change when it does not fit -------------------------------------------------------------------------------


def _advice(plan: _Planner, short: _TooLarge) -> str:
    """Return the first change that makes the plan fit, by its flag; otherwise the memory that it would take."""
    tried: list[str] = []
    changed = plan
    for flag, change in _changes(plan):
        tried.append(flag)
        alone = _changed(plan, change)
        changed = _changed(changed, change)
        if _fits(alone):
            return f"set {flag}"
        if _fits(changed):
            return "set " + " and ".join(tried)
    return f"serve a smaller --model, or use a larger device (--device): about {_least(plan, short.missing)} GiB"


def _least(plan: _Planner, missing: int) -> int:
    """Return the GiB of a device on which the plan would fit; the margin grows with the device."""
    return math.ceil((plan.device.total + missing * 50 / 49) / GIB)


def _changes(plan: _Planner) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield changes, the one that costs the users least first."""
    config = plan.config
    if config.kv_cache_bytes:
        yield "--kv-cache-bytes 0", {"kv_cache_bytes": 0}
    if config.adapter_device_bytes:
        yield "--adapter-device-bytes 0", {"adapter_device_bytes": 0}
    if config.adapter_override_bytes:
        yield "--adapter-override-bytes 0", {"adapter_override_bytes": 0}
    if config.max_model_len > USEFUL_TOKENS:
        yield f"--max-model-len {USEFUL_TOKENS}", {"max_model_len": USEFUL_TOKENS}
    if (config.max_adapter_rank or DEFAULT_RANK) > 16:
        yield "--max-adapter-rank 16", {"max_adapter_rank": 16}
    if config.max_batch_tokens > 256:
        yield "--max-batch-tokens 256", {"max_batch_tokens": 256}
    if config.max_num_seqs > 16:
        yield "--max-num-seqs 16", {"max_num_seqs": 16}
    if plan.facts.nf4_weights and config.quantization == "none":
        yield "--quantization nf4", {"quantization": "nf4"}


def _changed(plan: _Planner, change: dict[str, object]) -> _Planner:
    config = dataclasses.replace(plan.config, **change)  # type: ignore[arg-type]
    facts, rows = plan.facts, plan.graph_rows
    if config.max_model_len:
        facts = dataclasses.replace(facts, max_model_len=config.max_model_len)
    if config.quantization == "nf4" != plan.config.quantization:
        facts = dataclasses.replace(facts, weights=facts.nf4_weights, scratch=facts.nf4_scratch)
    rows = [row for row in rows if row <= config.max_num_seqs]
    return dataclasses.replace(plan, config=config, facts=facts, graph_rows=rows)


def _fits(plan: _Planner) -> bool:
    try:
        plan.make()
    except (_TooLarge, PlanRefused):
        return False
    return True
