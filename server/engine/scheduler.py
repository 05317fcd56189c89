"""Which sequences take part in the next step, and with how many tokens. Pure accounting, no torch.

There are no phases: every running sequence has tokens left to compute (one when it decodes, a chunk when it
prefills), and the step's token budget is handed out first to what runs, then to what waits. (The idea of computed
tokens chasing known tokens is vLLM's.)

Waiting sequences are tried in the order of a policy (policies.py), preempted ones before all others: they had their
turn.

Adapters: a waiting sequence is admitted when all its adapters have device slots. One with an adapter on its way is
passed over, not waited for; those behind it may not push out what it already has.

Past `max_wait_steps` of being passed over, a sequence goes first in its tenant and closes the door behind it: nothing
that arrived later and is tried after it is admitted until it is. So neither cold adapters nor low priorities starve.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import chain, count, islice
from typing import Protocol

from server.engine.block_manager import BlockManager
from server.engine.policies import FirstCome, Policy
from server.sequence import ScheduledBatch, ScheduledSequence, Sequence, SequenceStatus

PREFETCH_DEPTH = 32  # waiting sequences whose adapters are loaded, or brought off the disk ahead of their turn


class AdapterSlots(Protocol):
    """What the scheduler asks of residency (adapters/residency/residency.py)."""

    def acquire(self, digest: str) -> int | None:
        """Take a reference on the version's device slot; None when it is not there (yet), which requests it."""

    def release(self, digest: str) -> None: ...

    def where(self, digest: str) -> str:
        """The tier of the version; on "device" it has a slot to acquire."""

    def fit(self, digests: Iterable[str]) -> bool:
        """Whether these versions can be on the device together, beside the pinned ones."""

    def prefetch(self, digest: str) -> None:
        """The version will be needed soon: bring it off the disk."""

    def failure(self, digest: str) -> str | None:
        """Why the version cannot be loaded, if its last load failed."""


@dataclass(slots=True)
class MergeGate:
    """What a merge (engine/merging.py) asks of admission. Open, unless it is kept for one version."""

    owner: str | None = None  # the version that is in the base's weights, or about to be
    closed: float = 0.0  # others that arrived later wait
    merged: bool = False

    def close(self, owner: str, now: float) -> None:
        self.owner, self.closed = owner, now

    def open(self) -> None:
        self.owner, self.merged = None, False

    def admits(self, seq: Sequence) -> bool:
        return self.owner is None or seq.sole_adapter == self.owner or seq.arrival <= self.closed

    def in_base(self, seq: Sequence) -> bool:
        """Its adapter is in the base's weights: it runs as a base row, without a slot."""
        return self.merged and seq.sole_adapter == self.owner


class Admission(Enum):
    ADMITTED = auto()
    NO_ADAPTER = auto()  # passed over: later sequences may still run
    NO_BLOCKS = auto()  # memory is handed out in order of arrival: nobody behind may take it


@dataclass(slots=True)
class Scheduler:
    """Invariant: a sequence holds blocks exactly while it is in `running`, and between steps references on its
    adapters' device slots exactly while it has `slots`."""

    blocks: BlockManager
    adapters: AdapterSlots
    max_num_seqs: int
    max_batch_tokens: int
    max_wait_steps: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    preemptions: int = 0
    gate: MergeGate = field(default_factory=MergeGate)
    policy: Policy = field(default_factory=FirstCome)
    _numbers: Iterator[int] = field(default_factory=count)
    _suspect_blocks: list[int] = field(default_factory=list)

    def add(self, seq: Sequence) -> None:
        seq.number = next(self._numbers)
        self.waiting.append(seq)
        self.policy.arrived(seq)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> ScheduledBatch:
        """Hand out the token budget. Empty when nothing can run (everything waits for adapters)."""
        batch: list[ScheduledSequence] = []
        budget = self._schedule_running(batch, self.max_batch_tokens)
        self._schedule_waiting(batch, budget)
        batch.sort(key=lambda scheduled: (scheduled.seq.slots, scheduled.seq.adapters))
        return ScheduledBatch(batch)

    def finish(self, seq: Sequence) -> None:
        """Take `seq` out, wherever it is, and give back what it held."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        elif seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
            if not seq.preempted:
                self.policy.left(seq)
        seq.status = SequenceStatus.FINISHED

    def take_suspect_blocks(self) -> list[int]:
        """Blocks freed since the last call whose content must be zeroed before anyone reads it."""
        blocks, self._suspect_blocks = self._suspect_blocks, []
        return blocks

    def failed(self) -> list[tuple[Sequence, str]]:
        """Waiting sequences whose adapters cannot be loaded, with the reason."""
        return [(seq, reason) for seq in self.waiting if (reason := self._failure(seq)) is not None]

    def _failure(self, seq: Sequence) -> str | None:
        if len(seq.adapters) > 1 and not self.adapters.fit(digest for digest, _ in seq.adapters):
            return f"{len(seq.adapters)} do not fit on the device beside the pinned ones"
        for digest, _ in seq.adapters:
            reason = self.adapters.failure(digest)
            if reason is not None:
                return reason
        return None

    def _schedule_running(self, batch: list[ScheduledSequence], budget: int) -> int:
        for seq in list(self.running):  # oldest first: the newest are preempted for them
            if seq.status is not SequenceStatus.RUNNING or budget == 0:
                continue
            num_new_tokens = min(seq.num_tokens - seq.num_computed_tokens, budget)
            if not num_new_tokens:  # its last token is on its way
                continue
            if self._make_room(seq, seq.num_computed_tokens + num_new_tokens):
                budget = self._take_part(seq, batch, budget)
        return budget

    def _take_part(self, seq: Sequence, batch: list[ScheduledSequence], budget: int) -> int:
        """Put `seq` into the step; returns what is left of the budget."""
        scheduled = ScheduledSequence(seq, min(seq.num_tokens - seq.num_computed_tokens, budget))
        self.blocks.grow(seq, scheduled.end)
        batch.append(scheduled)
        if scheduled.samples:
            self.policy.charge(seq, generated=1)
        return budget - scheduled.num_new_tokens

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Preempt newer sequences until `seq` fits; False when `seq` itself had to go."""
        while not self.blocks.can_grow(seq, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the head of the queue; its tokens are computed again (often from the prefix cache)."""
        self.running.remove(seq)
        self._release(seq)
        seq.status, seq.preempted = SequenceStatus.WAITING, True
        self.waiting.appendleft(seq)
        self.preemptions += 1

    def _schedule_waiting(self, batch: list[ScheduledSequence], budget: int) -> None:
        candidates = self._candidates()
        admitted: list[Sequence] = []
        passed_over: list[Sequence] = []
        held_back: list[Sequence] = []
        door = math.inf  # the number of the earliest overdue one: closed for later arrivals
        collected: list[str] = []  # what those passed over have of their adapters, held until all had their turn
        while budget > 0 and len(self.running) < self.max_num_seqs and (seq := next(candidates, None)) is not None:
            if seq.number > door:
                held_back.append(seq)
                continue
            admission = self._try_admit(seq, collected, may_load=len(passed_over) < PREFETCH_DEPTH)
            if admission is Admission.ADMITTED:
                admitted.append(seq)
                budget = self._take_part(seq, batch, budget)
                continue
            passed_over.append(seq)
            self._pass_over(seq)
            if seq.overdue:
                door = min(door, seq.number)
            if admission is Admission.NO_BLOCKS:
                break
        for seq in islice(chain(held_back, candidates), PREFETCH_DEPTH):
            for adapter in seq.adapters:
                self.adapters.prefetch(adapter.digest)
        for digest in collected:
            self.adapters.release(digest)
        if admitted:
            self.waiting = deque(seq for seq in self.waiting if seq.status is SequenceStatus.WAITING)
            self._age(admitted, set(passed_over))

    def _candidates(self) -> Iterator[Sequence]:
        yield from [seq for seq in self.waiting if seq.preempted]
        yield from self.policy.order([seq for seq in self.waiting if not seq.preempted])

    def _pass_over(self, seq: Sequence) -> None:
        seq.waited_steps += 1
        seq.overdue = seq.waited_steps > self.max_wait_steps

    def _age(self, admitted: list[Sequence], counted: set[Sequence]) -> None:
        """Who waits while a later one of the same tenant is admitted is passed over, tried or not. That another tenant
        goes first is no reason: it is owed its share."""
        latest: dict[str, int] = {}
        for seq in admitted:
            latest[seq.tenant] = max(seq.number, latest.get(seq.tenant, -1))
        for seq in self.waiting:
            if seq not in counted and seq.number < latest.get(seq.tenant, -1):
                self._pass_over(seq)

    def _try_admit(self, seq: Sequence, collected: list[str], may_load: bool) -> Admission:
        """Take the adapters' slots and the cached prefix for `seq`; on refusal only slots in `collected` stay taken.

        Without `may_load` nothing is asked to come: the host cache could not keep what all of a long queue wants.
        """
        if not self.gate.admits(seq):
            return Admission.NO_ADAPTER
        in_base = self.gate.in_base(seq)
        if not (may_load or in_base) and any(self.adapters.where(digest) != "device" for digest, _ in seq.adapters):
            return Admission.NO_ADAPTER
        slots = () if in_base else self._acquire_all(seq, collected)
        if slots is None:
            return Admission.NO_ADAPTER
        matched = self.blocks.match_prefix(seq)
        if not self.blocks.can_admit(seq, matched):
            if slots:
                collected += [adapter.digest for adapter in seq.adapters]
            return Admission.NO_BLOCKS
        self.blocks.admit(seq, matched)
        if not seq.preempted:
            self.policy.charge(seq, prompt=seq.num_tokens - seq.num_computed_tokens)
            self.policy.left(seq)
        seq.slots, seq.status = slots, SequenceStatus.RUNNING
        self.running.append(seq)
        return Admission.ADMITTED

    def _acquire_all(self, seq: Sequence, collected: list[str]) -> tuple[int, ...] | None:
        """The slots of all adapters of `seq`, or None, with those that it has so far in `collected`.

        What is there is taken first: asking for what is missing may evict whatever nobody holds.
        """
        slots: dict[str, int] = {}
        for digest, _ in sorted(seq.adapters, key=lambda adapter: self.adapters.where(adapter.digest) != "device"):
            slot = self.adapters.acquire(digest)
            if slot is not None:
                slots[digest] = slot
        if len(slots) < len(seq.adapters):
            collected.extend(slots)
            return None
        return tuple(slots[digest] for digest, _ in seq.adapters)

    def _release(self, seq: Sequence) -> None:
        self._suspect_blocks += self.blocks.disown_unverified(seq)
        self.blocks.free(seq)
        seq.num_verified_tokens = seq.num_launched_tokens = 0
        self._release_slots(seq)

    def _release_slots(self, seq: Sequence) -> None:
        if seq.slots:
            for adapter in seq.adapters:
                self.adapters.release(adapter.digest)
        seq.slots = ()

    # -- merged mode -----------------------------------------------------------------------------------------------

    def enter_base(self) -> None:
        """The gate's owner is in the base's weights now, and it is all that runs: its sequences need no slots."""
        self.gate.merged = True
        for seq in self.running:
            self._release_slots(seq)

    def leave_base(self) -> bool:
        """Have what runs take slots again and open the gate; False while there is none, which requests one."""
        for seq in self.running:
            if seq.adapters and not seq.slots:
                slot = self.adapters.acquire(seq.adapters[0].digest)
                if slot is None:
                    return False
                seq.slots = (slot,)
        self.gate.open()
        return True
