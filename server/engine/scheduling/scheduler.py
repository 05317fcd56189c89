"""Scheduling: chooses the sequences of the next step and their numbers of tokens. Does not use torch.

There are no phases: every running sequence has tokens left to compute (one in decode, a chunk in prefill), and the
step's token budget (step_cost.py) goes to running sequences first, then to waiting ones. (This model of computed tokens
that catch up with known tokens is vLLM's.)

Waiting sequences are considered in the order of a policy (policies.py), preempted sequences among them.

Adapters: a waiting sequence is admitted when all its adapters have device slots. A sequence whose adapter is loading is
passed over; sequences behind it may not evict the adapters that it already has on the device.

A sequence that later ones overtook more than `max_wait_steps` times gets priority within its tenant and holds back
later sequences that compete with it until it is admitted (aging.py). Therefore neither cold adapters nor low priorities
starve, and a slow load delays no other request.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count, islice
from operator import attrgetter

from server.engine.kv_blocks.block_manager import BlockManager
from server.engine.kv_blocks.prompt_scores import bound_logits
from server.engine.scheduling.admission import AdapterSlots, Admission
from server.engine.scheduling.aging import LOAD, PREFIX, ROOM, Aging
from server.engine.scheduling.merge_gate import MergeGate
from server.engine.scheduling.pause_gate import PauseGate
from server.engine.scheduling.policies import FirstCome, Policy
from server.engine.scheduling.step_cost import StepBudget
from server.sequence import ScheduledBatch, ScheduledSequence, Sequence, SequenceStatus

PREFETCH_DEPTH = 32  # number of waiting sequences whose adapters are loaded or prefetched from disk


@dataclass(slots=True)
class Scheduler:
    """Queues of waiting and running sequences.

    Invariant: a sequence holds blocks exactly while it is in `running`, and, between steps, references on its adapters'
    device slots exactly while it has `slots`."""

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
    step_budget: StepBudget = field(default_factory=StepBudget)
    pause: PauseGate = field(default_factory=PauseGate)
    _numbers: Iterator[int] = field(default_factory=count)
    _suspect_blocks: list[int] = field(default_factory=list)
    _aging: Aging = field(init=False)
    admission: Admission = field(init=False)

    def __post_init__(self) -> None:
        self._aging = Aging(self.max_wait_steps)
        self.admission = Admission(self.blocks, self.adapters, self.gate)

    def add(self, seq: Sequence) -> None:
        seq.number = next(self._numbers)
        self.waiting.append(seq)
        self.policy.arrived(seq)

    def schedule(self) -> ScheduledBatch:
        """Distribute the token budget of one step. The batch is empty if all sequences wait for adapters."""
        batch: list[ScheduledSequence] = []
        tokens = self.step_budget.tokens(self.running, self.waiting, self.max_batch_tokens)
        tokens = 0 if self.pause.frozen else bound_logits(tokens, self.running, self.waiting, self.max_num_seqs)
        budget = self._schedule_running(batch, tokens)
        asking = self._schedule_waiting(batch, budget)
        had = [(self.admission.needs(scheduled.seq), scheduled.seq.number) for scheduled in batch]
        self._aging.end_step([*had, *((LOAD, seq.number) for seq in asking)] if batch else ())
        batch.sort(key=lambda scheduled: (scheduled.seq.slots, scheduled.seq.adapters))
        return ScheduledBatch(batch)

    def finish(self, seq: Sequence) -> None:
        """Remove `seq`, whether waiting or running, and release its resources."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        elif seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
            self.policy.left(seq)
        seq.status = SequenceStatus.FINISHED

    def release_passed(self, seq: Sequence, num_tokens: int) -> None:
        """Release the KV blocks that no token from `num_tokens` on can see, unless `seq` was preempted meanwhile."""
        if seq.num_computed_tokens >= num_tokens:
            self._suspect_blocks += self.blocks.release_passed(seq, num_tokens)

    def take_suspect_blocks(self) -> list[int]:
        """Return blocks freed since the last call whose content must be zeroed before reuse."""
        blocks, self._suspect_blocks = self._suspect_blocks, []
        return blocks

    def failed(self) -> list[tuple[Sequence, str]]:
        """Return waiting sequences whose adapters cannot be loaded, with the reasons."""
        return [(seq, reason) for seq in self.waiting if (reason := self.admission.failure(seq)) is not None]

    def expired(self, now: float) -> list[Sequence]:
        """Return waiting and running sequences whose deadline has passed."""
        return [seq for seq in chain(self.running, self.waiting) if seq.deadline <= now]

    def _schedule_running(self, batch: list[ScheduledSequence], budget: int) -> int:
        while self._blocks_wanted(budget) > self.blocks.num_free:
            self.requeue(self.policy.victim(self.running))
            self.preemptions += 1
        for seq in self.running:  # in order of admission
            if budget and seq.num_tokens > seq.num_computed_tokens:  # otherwise its last token is in flight
                budget = self._take_part(seq, batch, budget)
        return budget

    def _blocks_wanted(self, budget: int) -> int:
        """Return how many free blocks the running sequences need for a step of `budget` tokens."""
        wanted = 0
        for seq in self.running:
            num_new_tokens = min(seq.num_tokens - seq.num_computed_tokens, budget)
            wanted += self.blocks.to_grow(seq, seq.num_computed_tokens + num_new_tokens)
            budget -= num_new_tokens
        return wanted

    def _take_part(self, seq: Sequence, batch: list[ScheduledSequence], budget: int) -> int:
        """Add `seq` to the step and return the remaining budget."""
        num_new_tokens, budget = self.step_budget.take(seq, budget)
        scheduled = ScheduledSequence(seq, num_new_tokens)
        self.blocks.grow(seq, scheduled.end)
        batch.append(scheduled)
        if scheduled.samples:
            self.policy.charge(seq, generated=1)
        return budget

    def requeue(self, seq: Sequence) -> None:
        """Move `seq` back to its place in the queue; its tokens are recomputed, often from the prefix cache."""
        self.running.remove(seq)
        self._release(seq)
        seq.status, seq.preempted = SequenceStatus.WAITING, True
        self.waiting.insert(bisect_left(self.waiting, seq.number, key=attrgetter("number")), seq)
        self.policy.returned(seq)

    def _schedule_waiting(self, batch: list[ScheduledSequence], budget: int) -> list[Sequence]:
        """Admit waiting sequences into the step. Returns those that asked for a load."""
        candidates = self._candidates()
        admitted: list[Sequence] = []
        asking: list[Sequence] = []
        passed_over: list[Sequence] = []
        held_back: list[Sequence] = []
        collected: list[str] = []  # adapters of sequences passed over, referenced until the end of this method
        self._aging.begin_step()
        num_places = self.max_num_seqs - len(self.running)
        while budget > 0 and num_places > 0 and (seq := next(candidates, None)) is not None:
            needs = self.admission.needs(seq)
            if self._aging.holds_back(seq, needs):
                held_back.append(seq)
                continue
            may_load = len(asking) < PREFETCH_DEPTH
            lacks = self._try_admit(seq, collected, may_load)
            if lacks is None:
                admitted.append(seq)
                num_places -= 1
                budget = self._take_part(seq, batch, budget)
                continue
            passed_over.append(seq)
            self._aging.pass_over(seq, lacks)
            num_places -= bool(lacks & PREFIX)  # its place is kept, because it will run in a few steps
            if lacks & ROOM:  # memory is handed out in order: later sequences may not take it
                break
            if needs & LOAD and may_load:
                asking.append(seq)
        for seq in islice(chain(held_back, candidates), PREFETCH_DEPTH):
            for adapter in seq.adapters:
                self.adapters.prefetch(adapter.digest)
        for digest in collected:
            self.adapters.release(digest)
        if admitted:
            self.waiting = deque(seq for seq in self.waiting if seq.status is SequenceStatus.WAITING)
            self._age(admitted, {*passed_over, *held_back})
        return asking

    def _candidates(self) -> Iterator[Sequence]:
        """Return the waiting sequences in the order to consider them. Those that the gate holds are left out: they do
        not age, so they hold back nobody."""
        admissible = filter(self.pause.admits, self.waiting)
        return self.policy.order(admissible if self.gate.owner is None else filter(self.gate.admits, admissible))

    def _try_admit(self, seq: Sequence, collected: list[str], may_load: bool) -> int | None:
        """Admit `seq` if it can have all that it needs, and return None. Otherwise return what it lacks."""
        lacks = self.admission.acquire(seq, self.running, collected, may_load)
        if lacks is None:
            if not seq.preempted:
                self.policy.charge(seq, prompt=seq.num_tokens - seq.num_ready_tokens)
            self.policy.left(seq)
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
        return lacks

    def _age(self, admitted: list[Sequence], considered: set[Sequence]) -> None:
        """Count sequences that were not considered as overtaken if a later one of the same tenant was admitted.
        Admissions of other tenants do not count, because those are due to their shares."""
        latest: dict[str, int] = {}
        for seq in admitted:
            latest[seq.tenant] = max(seq.number, latest.get(seq.tenant, -1))
        for seq in self.waiting:
            if seq not in considered and seq.number < latest.get(seq.tenant, -1) and self.gate.admits(seq):
                self._aging.overtake(seq)

    def _release(self, seq: Sequence) -> None:
        self._suspect_blocks += self.blocks.disown_unverified(seq)
        self.blocks.free(seq)
        seq.num_verified_tokens = seq.num_launched_tokens = 0
        self.admission.release_slots(seq)
