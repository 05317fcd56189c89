"""Interruptions of sequences from outside, between two steps: pauses, switches to another version, and resets of the
prefix cache. Does not use torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain

from server.engine.scheduling.scheduler import Scheduler
from server.ipc.messages import Abort, Pause, Reply, ResetPrefixCache, Resume, SwitchAdapter
from server.request import ScaledAdapter
from server.sequence import Sequence, SequenceStatus

Interruption = Abort | SwitchAdapter | Pause | Resume | ResetPrefixCache


@dataclass(slots=True)
class Interruptions:
    """`stop` ends a sequence, whose output is what it has generated; `use` prepares for new users of adapters."""

    scheduler: Scheduler
    stop: Callable[[str], None]
    use: Callable[[tuple[ScaledAdapter, ...]], None]
    _requests: list[Interruption] = field(default_factory=list)
    _pauses: list[Pause] = field(default_factory=list)  # that wait for sequences to end

    def __bool__(self) -> bool:
        """Return whether `advance` has something to do, for which no step may be in flight."""
        return bool(self._requests or self._pauses)

    def add(self, request: Interruption) -> None:
        if isinstance(request, Pause):
            self.scheduler.pause.close(chain(self.scheduler.running, self.scheduler.waiting))
        self._requests.append(request)

    def advance(self, sequences: Mapping[str, Sequence]) -> list[Reply]:
        """Carry out what was requested; return the replies. `sequences` are those that have not ended."""
        requests, self._requests = self._requests, []
        replies = [reply for request in requests for reply in self._carry_out(request, sequences)]
        if self._pauses and not any(map(self.scheduler.pause.admits, sequences.values())):
            self.scheduler.pause.frozen = True
            replies += [Reply(pause.request_id) for pause in self._pauses]
            self._pauses = []
        return replies

    def _carry_out(self, request: Interruption, sequences: Mapping[str, Sequence]) -> list[Reply]:
        match request:
            case SwitchAdapter():
                self._switch(request, sequences)
            case Pause():
                return self._pause(request, sequences)
            case Resume():
                return self._resume(request)
            case Abort(seq_ids=seq_ids):
                for seq_id in seq_ids:
                    self.stop(seq_id)
                return []
            case ResetPrefixCache():
                self.scheduler.blocks.forget_prefixes()
        return [Reply(request.request_id)]

    def _switch(self, request: SwitchAdapter, sequences: Mapping[str, Sequence]) -> None:
        for seq in [sequences[seq_id] for seq_id in request.seq_ids if seq_id in sequences]:
            if request.old in seq.digests and request.new not in seq.digests:
                changed = (
                    each._replace(digest=request.new) if each.digest == request.old else each for each in seq.adapters
                )
                adapters = tuple(sorted(changed))
                self.use(adapters)
                if seq.status is SequenceStatus.RUNNING:
                    self.scheduler.requeue(seq)
                _forget_what_was_computed(seq)
                seq.adapters, seq.switched = adapters, True

    def _pause(self, request: Pause, sequences: Mapping[str, Sequence]) -> list[Reply]:
        self.scheduler.pause.close(sequences.values())  # a `Resume` may have come between
        if request.mode == "abort":
            for seq in filter(self.scheduler.pause.admits, list(sequences.values())):
                self.stop(seq.seq_id)
        if request.mode == "wait" and not self.scheduler.pause.frozen:
            self._pauses.append(request)
            return []
        self.scheduler.pause.frozen = True
        return [Reply(request.request_id)]

    def _resume(self, request: Resume) -> list[Reply]:
        self.scheduler.pause.open()
        given_up, self._pauses = self._pauses, []
        why = "the server was resumed before its requests had ended"
        return [Reply(request.request_id), *(Reply(pause.request_id, ("busy", why)) for pause in given_up)]


def _forget_what_was_computed(seq: Sequence) -> None:
    """Forget what the adapters of a waiting sequence have to do with, besides its tokens."""
    seq.requested, seq.read = False, set()
    seq.block_hashes, seq.weight_changes = [], []
    seq.pooled, seq.pooled_to = None, 0
    if not seq.num_output_tokens:
        seq.prompt_logprobs = [None] * len(seq.prompt_logprobs)
