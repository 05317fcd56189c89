"""State shared by all request handlers: the parts of the server, and the sequences in flight by adapter."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple
from weakref import WeakValueDictionary

from fastapi import Depends, Request

from adapters.model_spec import ModelSpec
from adapters.registry.registry import AdapterRegistry
from adapters.tested_structures import TestedStructures
from adapters.tiers import Tier
from server.api.middleware.auth import KeyRing
from server.api.middleware.rate_limits import Limits, RateLimits
from server.api.text.adapter_tokenizers import AdapterTokenizers
from server.api.text.grammar_compiler import GrammarCompiler
from server.api.text.template_sandbox import TemplateSandbox
from server.api.text.tokenizer import Tokenizer
from server.audit import AuditLog
from server.config import ServeConfig
from server.history import History
from server.ipc.client import EngineClient
from server.ipc.messages import EngineInfo, ResidencyReport
from server.ipc.supervisor import EngineState, EngineUnavailable
from server.metrics import Metrics
from server.quarantine import Quarantine
from server.queue_limits import QueueLimits
from server.usage import UsageLedger

BASE_NAME = ""  # the base model in usage accounting; not a valid adapter name
_RATE_SECONDS = 30.0  # time constant of the decay
MAX_UPLOADS = 16  # uploads and registrations that clients wait for, at once; each has up to --max-upload-bytes on disk
MAX_FETCHES = 4  # lazy registrations that are copied and examined at once; the others wait
MAX_SELFTESTS = 2  # adapters that the engine holds in memory for their self-test at once; the others wait


class Rate:
    """Tokens per second, with exponential decay over half a minute."""

    def __init__(self) -> None:
        self._value = 0.0
        self._updated = time.monotonic()

    def add(self, count: int) -> None:
        self._value = self.current() + count / _RATE_SECONDS
        self._updated = time.monotonic()

    def current(self) -> float:
        return self._value * math.exp((self._updated - time.monotonic()) / _RATE_SECONDS)


@dataclass(slots=True)
class AdapterUse:
    """Usage of one adapter, or of the base model, since the server started."""

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    last_used: int | None = None
    rate: Rate = field(default_factory=Rate)


class Running(NamedTuple):
    """`fixed` are those of `digests` that the request named itself."""

    names: frozenset[str]
    digests: frozenset[str]
    fixed: frozenset[str] = frozenset()


class InFlight:
    """Sequences that were submitted and have not ended, by adapter. A sequence counts for each of its adapters."""

    def __init__(self) -> None:
        self._running: dict[str, Running] = {}
        self._names: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self.uses: dict[str, AdapterUse] = {}

    def __len__(self) -> int:
        return len(self._running)

    def add_sequence(self, seq_id: str, running: Running) -> None:
        self._running[seq_id] = running
        self._names.update(running.names)

    def remove_sequence(self, seq_id: str) -> None:
        self._names.subtract(self._running.pop(seq_id).names)
        self._changed.set()

    def use(self, name: str) -> AdapterUse:
        return self.uses.setdefault(name, AdapterUse())

    def count(self, name: str) -> int:
        return self._names[name]

    def running(self, seq_id: str) -> Running | None:
        return self._running.get(seq_id)

    def sequences(self, name: str | None = None) -> list[str]:
        """Return the ids of the sequences of `name`, or of all sequences."""
        return [seq_id for seq_id, running in self._running.items() if name is None or name in running.names]

    def following(self, name: str, digest: str) -> list[str]:
        """Return the ids of the sequences that use the version because `name` pointed to it."""
        return [
            seq_id
            for seq_id, running in self._running.items()
            if name in running.names and digest in running.digests - running.fixed
        ]

    def add_version(self, seq_ids: Iterable[str], digest: str) -> None:
        """Note that these sequences may use another version as well from now on."""
        for seq_id in seq_ids:
            running = self._running[seq_id]
            self._running[seq_id] = running._replace(digests=running.digests | {digest})

    def digests(self) -> set[str]:
        """Return the versions that running sequences use, current or not."""
        return {digest for running in self._running.values() for digest in running.digests}

    def forget(self, name: str) -> None:
        self.uses.pop(name, None)
        del self._names[name]

    async def wait_idle(self, name: str | None, timeout: float) -> bool:
        """Wait until no sequence of `name` (None: no sequence at all) is in flight. Returns False after `timeout`."""
        try:
            async with asyncio.timeout(timeout):
                while self.sequences(name):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return not self.sequences(name)
        return True


@dataclass(slots=True)
class Startup:
    """The remaining work of the start, for `/readyz` and for requests that name an adapter too early."""

    adapters: list[str] = field(default_factory=list)  # of the command line, not registered yet
    stage: str = "the model is loaded"  # what is done now, unless it is the registration of `adapters`
    done: bool = False
    _total: int = field(init=False)

    def __post_init__(self) -> None:
        self._total = len(self.adapters)

    def progress(self) -> str:
        if self.stage:
            return self.stage
        return f"{self._total - len(self.adapters)} of {self._total} adapters of the command line are registered"


@dataclass(slots=True, eq=False)
class AppContext:
    config: ServeConfig
    engine: EngineClient
    registry: AdapterRegistry
    keys: KeyRing
    metrics: Metrics
    base_model: str
    base_tokenizer: Tokenizer | None = None  # until the engine is ready
    audit: AuditLog | None = None
    usage: UsageLedger = field(default_factory=UsageLedger)
    started: float = field(default_factory=time.time)  # Unix seconds
    _began: float = field(default_factory=time.monotonic)
    startup: Startup = field(default_factory=lambda: Startup(done=True))
    draining: bool = False  # unready but still serving, because load balancers need time to notice
    accepting: bool = True
    in_flight: InFlight = field(default_factory=InFlight)
    fetching: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)  # tasks of the registry's pending adapters
    # Separate threads, so that slow remotes do not block uploads and tokenizers.
    fetchers: Executor = field(default_factory=lambda: ThreadPoolExecutor(MAX_FETCHES, "fetch"))
    uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_UPLOADS))
    fetches: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_FETCHES))
    selftests: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_SELFTESTS))
    tested: TestedStructures = field(default_factory=TestedStructures)
    sandbox: TemplateSandbox = field(default_factory=TemplateSandbox)
    grammars: GrammarCompiler = field(default_factory=GrammarCompiler)
    tokenizers: AdapterTokenizers = field(init=False)
    traces: int = 0  # readers of `/v1/trace`
    quarantine: Quarantine = field(default_factory=Quarantine)
    rate_limits: RateLimits = field(init=False)
    queue_limits: QueueLimits = field(init=False)
    history: History = field(init=False)
    _tiers: tuple[ResidencyReport, dict[str, Tier]] = field(
        default_factory=lambda: (ResidencyReport(), {})
    )  # derived from that message
    _locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    def __post_init__(self) -> None:
        self.tokenizers = AdapterTokenizers(lambda: self.tokenizer, self.registry.store, self.sandbox)
        config = self.config
        per_adapter = Limits(config.adapter_max_concurrent, config.adapter_rpm, config.adapter_tpm)
        self.rate_limits = RateLimits(per_adapter)
        self.history = History(self.engine, self.metrics)
        self.follow_keys()

    def follow_keys(self) -> None:
        """Derive again what follows from the API keys, which may have changed."""
        config, shared = self.config, len(self.keys.tenants) > 1
        self.queue_limits = QueueLimits(config.max_queue, config.max_queue_tokens, shared, self.engine.waiting)

    @property
    def ready(self) -> bool:
        return self.engine.state is EngineState.READY and self.base_tokenizer is not None

    @property
    def info(self) -> EngineInfo:
        """Description of the loaded model. Raises `EngineUnavailable` while the engine is not ready."""
        if self.engine.info is None or not self.ready:
            raise EngineUnavailable(self.engine.reason)
        return self.engine.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The base model's tokenizer. Raises `EngineUnavailable` before the engine was ready for the first time."""
        if self.base_tokenizer is None:
            raise EngineUnavailable(self.engine.reason)
        return self.base_tokenizer

    @property
    def spec(self) -> ModelSpec:
        return self.info.spec

    @property
    def saturated(self) -> bool:
        """Return whether the queue has no room for a request of anyone."""
        return self.queue_limits.full

    def uptime(self) -> float:
        return time.monotonic() - self._began

    def watch(self) -> None:
        """Connect the metrics to the engine and the registry."""
        registry = self.registry
        self.metrics.watch(self.engine, registry.names_of, registry.digests)
        self.metrics.watch_registry(lambda: len(registry.damaged), lambda: len(registry.set_aside))

    def tier_of(self, digest: str) -> Tier:
        residency = self.engine.residency
        if residency is not self._tiers[0]:
            tiers: dict[str, Tier] = dict.fromkeys(residency.host, "host")
            self._tiers = residency, tiers | dict.fromkeys(residency.device, "device")
        return self._tiers[1].get(digest, "disk")

    def lock(self, name: str) -> asyncio.Lock:
        """Return the lock that serializes changes to one adapter name."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, wait `timeout` seconds for running requests, then abort the rest."""
        self.draining = True
        self.accepting = False
        if not await self.in_flight.wait_idle(None, timeout):
            await self.abort(None)

    async def abort(self, name: str | None) -> int:
        """Abort the sequences of `name` (None: all), wait briefly for them to end, and return their number."""
        sequences = self.in_flight.sequences(name)
        self.engine.abort(sequences)
        await self.in_flight.wait_idle(name, timeout=1.0)
        return len(sequences)


async def _context_of(request: Request) -> AppContext:
    context: AppContext = request.app.state.context
    return context


Context = Annotated[AppContext, Depends(_context_of)]
