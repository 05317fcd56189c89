"""The engine's step without a model: the server's own scheduler, block manager and residency, in virtual time.

What it leaves out: messages and HTTP take no time, samplers and stop tokens do not exist (an answer has the length that
was drawn), no adapter fails to load, and reader threads do not slow the step down.
"""

import math
from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from adapters.residency.host_cache import HostCache
from adapters.residency.residency import Residency
from adapters.residency.slots import PAGE_COLUMNS, Slot, SlotTable
from adapters.tiers import Tier
from load_tests.simulator.clock import Clock, VirtualExecutor
from load_tests.simulator.cost import Profile, StepWork
from load_tests.simulator.workload import BASE, Request
from server.engine.kv_blocks.block_manager import BlockManager
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.step_cost import StepBudget
from server.request import SamplingParams, ScaledAdapter
from server.sequence import ScheduledBatch, Sequence

BLOCK_SIZE = 16


class Setting(msgspec.Struct, frozen=True):
    """What of the server's configuration matters here; the defaults are its own."""

    slots: int = 16
    pages: int = 0  # of 16 rank columns; 0: as many as the slots need at the largest rank
    max_rank: int = 64
    host_bytes: int = 2 << 30
    kv_bytes: int = 2 << 30
    max_num_seqs: int = 64
    max_batch_tokens: int = 512
    max_step_ms: float | None = None  # None: the budget is a fixed number of tokens, not the server's default
    max_wait_steps: int = 256
    max_queue: int = 256  # requests that may wait before new ones are refused
    reader_threads: int = 2
    streams: int = 0  # closed loop: so many requests at a time, arrival times do not count; 0: they do
    pinned: tuple[int, ...] = ()  # adapters that are pinned to the device before the first request


@dataclass(slots=True)
class Record:
    """What became of one request. Times are in virtual seconds."""

    request: Request
    found: Tier  # where its adapter was when it arrived
    arrival: float
    end: Literal["", "done", "refused"] = ""
    admitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    finished: float = 0.0
    tokens: int = 0
    waited_steps: int = 0


@dataclass(slots=True)
class Result:
    records: list[Record] = field(default_factory=list)
    seconds: float = 0.0  # virtual, from the first arrival to the last token
    steps: int = 0
    reads: int = 0  # disk to host
    writes: int = 0  # host to device
    preemptions: int = 0
    step_adapters: int = 0  # distinct adapters, summed over the steps
    step_tokens: int = 0
    gaps: "array[float]" = field(default_factory=lambda: array("d"))  # between two tokens of a sequence


def _step_budget(setting: Setting) -> StepBudget:
    return StepBudget.for_device(math.inf if setting.max_step_ms is None else setting.max_step_ms, "cpu")


@dataclass(frozen=True, slots=True)
class Packed:
    num_pages: int
    nbytes: int
    extra_bytes: int = 0


class Simulation:
    """`run` takes requests in order of arrival. `ranks` are those of the adapters; beyond its end it starts again."""

    def __init__(self, setting: Setting, profile: Profile, ranks: list[int]) -> None:
        self.clock = Clock()
        self.result = Result()
        self._setting = setting
        self._profile = profile
        self._ranks = ranks
        self._reader = VirtualExecutor(self.clock, setting.reader_threads, self._job_seconds)
        self._copier = VirtualExecutor(self.clock, 1, self._job_seconds)
        pages = setting.pages or setting.slots * -(-setting.max_rank // PAGE_COLUMNS)
        self.residency: Residency[Packed] = Residency(
            SlotTable(setting.slots, pages),
            HostCache(setting.host_bytes),
            self._read,
            self._write,
            executor=self._reader,
            copier=self._copier,
        )
        self.scheduler = Scheduler(
            BlockManager(setting.kv_bytes // (profile.kv_bytes_per_token * BLOCK_SIZE), BLOCK_SIZE),
            self.residency,
            setting.max_num_seqs,
            setting.max_batch_tokens,
            setting.max_wait_steps,
            step_budget=_step_budget(setting),
        )
        self._slot_ranks = [0] * setting.slots
        self._records: dict[str, Record] = {}
        self._adapters: dict[int, tuple[ScaledAdapter, ...]] = {}
        self._sampling: dict[int, SamplingParams] = {}

    def run(self, requests: Iterable[Request]) -> Result:
        coming = deque(requests)
        self._pin()
        while coming or self.scheduler.waiting or self.scheduler.running:
            self._take_in(coming)
            if not self.step():
                self._fast_forward(coming)
        return self.finish()

    def _pin(self) -> None:
        """Load the pinned adapters. Requests of later times find them on the device."""
        for digest in map(str, self._setting.pinned):
            while self.residency.where(digest) != "device":
                self.residency.request(digest)
                self.clock.now = min(self._ends_of_jobs())
                self._run_due_jobs()
            self.residency.pin(digest)

    def finish(self) -> Result:
        result = self.result
        result.preemptions = self.scheduler.preemptions
        if result.records:
            result.seconds = self.clock.now - result.records[0].arrival
        return result

    def step(self) -> bool:
        """What the engine does in a step; whether anything ran."""
        self._run_due_jobs()
        self.residency.take_moves()
        assert not self.scheduler.failed()
        batch = self.scheduler.schedule()
        self.scheduler.take_suspect_blocks()
        if not batch:
            return False
        started = self.clock.now
        seconds = self._profile.step_seconds(self._work(batch))
        self.clock.now += seconds
        self.scheduler.step_budget.record(batch, seconds)
        self._update(batch, started)
        return True

    def submit(self, request: Request) -> None:
        arrival = self.clock.now if self._setting.streams else request.arrival
        named = () if request.adapter == BASE else (ScaledAdapter(str(request.adapter)),)
        adapters = self._adapters.setdefault(request.adapter, named)
        record = Record(request, self.residency.where(adapters[0].digest) if adapters else "device", arrival)
        self.result.records.append(record)
        if len(self.scheduler.waiting) >= self._setting.max_queue:
            record.end, record.finished = "refused", arrival
            return
        seq_id = str(len(self.result.records))
        self._records[seq_id] = record
        prompt = [len(self.result.records)] * request.prompt_tokens  # no two requests share a prefix
        sampling = self._sampling.setdefault(request.output_tokens, SamplingParams(max_tokens=request.output_tokens))
        self.scheduler.add(Sequence(seq_id, prompt, sampling, adapters, request.tenant, arrival))

    def _take_in(self, coming: deque[Request]) -> None:
        streams = self._setting.streams
        while coming and (len(self._records) < streams if streams else coming[0].arrival <= self.clock.now):
            self.submit(coming.popleft())

    def _fast_forward(self, coming: deque[Request]) -> None:
        """To when something can change: a job ends or a request arrives. The server meanwhile polls, which changes
        nothing."""
        events = self._ends_of_jobs()
        if coming and not self._setting.streams:
            events.append(coming[0].arrival)
        until = min(events, default=None)
        if until is None:
            raise RuntimeError("a request waits for what will never come")
        self.clock.now = max(until, self.clock.now)

    def _ends_of_jobs(self) -> list[float]:
        """Return when the next read and the next copy end."""
        ends = (self._reader.next_end(), self._copier.next_end())
        return [end for end in ends if end is not None]

    def _run_due_jobs(self) -> None:
        self._reader.run_due()
        self._copier.run_due()
        self.residency.poll()

    # -- the model's part ------------------------------------------------------------------------------------------

    def _work(self, batch: ScheduledBatch) -> StepWork:
        work = StepWork()
        distinct: set[int] = set()
        for scheduled in batch.sequences:
            seq, tokens = scheduled.seq, scheduled.num_new_tokens
            work.tokens += tokens
            work.context_tokens += seq.num_computed_tokens + tokens
            work.prefill_pairs += tokens * (scheduled.start + tokens / 2) if tokens > 1 else 0.0
            work.token_ranks += tokens * sum(self._slot_ranks[slot] for slot in seq.slots)
            distinct.update(seq.slots)
        work.adapter_ranks = sum(self._slot_ranks[slot] for slot in distinct)
        self.result.steps += 1
        self.result.step_tokens += work.tokens
        self.result.step_adapters += len(distinct)
        return work

    def _update(self, batch: ScheduledBatch, started: float) -> None:
        for scheduled in batch.sequences:
            seq, end = scheduled.seq, scheduled.end
            if seq.admitted is None:
                seq.admitted = started
            self.scheduler.blocks.commit(seq, end)
            if end < len(seq.token_ids):
                continue
            self.scheduler.blocks.verify(seq, end)
            seq.token_ids.append(0)
            num_output = end + 1 - seq.num_prompt_tokens
            record = self._records[seq.seq_id]
            if num_output == 1:
                record.first_token = self.clock.now
            else:
                self.result.gaps.append(self.clock.now - record.last_token)
            record.last_token = self.clock.now
            if num_output >= seq.sampling.max_tokens:
                self._finish(seq)

    def _finish(self, seq: Sequence) -> None:
        self.scheduler.finish(seq)
        record = self._records.pop(seq.seq_id)
        assert seq.admitted is not None
        record.end, record.admitted, record.finished = "done", seq.admitted, self.clock.now
        record.tokens, record.waited_steps = seq.num_output_tokens, seq.waited_steps

    # -- residency's jobs ------------------------------------------------------------------------------------------

    def _rank(self, digest: str) -> int:
        return self._ranks[int(digest) % len(self._ranks)]

    def _job_seconds(self, job: str | Slot, packed: Packed | None = None) -> float:
        """Residency's jobs: `(digest)` reads, `(slot, packed)` writes."""
        if isinstance(job, Slot):
            return self._profile.write_seconds(self._rank(job.digest))
        return self._profile.read_seconds(self._rank(job))

    def _read(self, digest: str) -> Packed:
        self.result.reads += 1
        rank = self._rank(digest)
        return Packed(-(-rank // PAGE_COLUMNS), self._profile.adapter_bytes(rank))

    def _write(self, slot: Slot, packed: Packed) -> None:
        self.result.writes += 1
        self._slot_ranks[slot.index] = self._rank(slot.digest)

    def check_integrity(self) -> None:
        """Raise AssertionError when the books of blocks and slots do not balance."""
        self.scheduler.blocks.check_integrity(self.scheduler.running)
        references: dict[str, int] = {}
        for seq in self.scheduler.running:
            for adapter in seq.adapters if seq.slots else ():  # none while its adapter is merged
                references[adapter.digest] = references.get(adapter.digest, 0) + 1
        self.residency.slots.check_integrity(references)
