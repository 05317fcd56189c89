"""Handling of messages to the engine, and of what they asked for between steps."""

import logging
import time

from adapters.residency.residency import Residency
from adapters.runtime.pack import PackedAdapter
from server.engine.adapter_requests import AdapterMoves
from server.engine.constraints import Constraints, Parser
from server.engine.faults import EngineBroken, failure_reply, input_problem
from server.engine.interruptions import Interruptions
from server.engine.live_sequences import LiveSequences
from server.engine.merging import Merging
from server.engine.selftest import SelfTests
from server.engine.sequence_messages import sequence_of
from server.engine.stats import digests_of
from server.ipc.messages import (
    Abort,
    Call,
    Merge,
    MoveAdapter,
    Pause,
    PinAdapter,
    Reply,
    ResetPrefixCache,
    Resume,
    RetireAdapter,
    RunSelfTest,
    Submit,
    SwitchAdapter,
    ToEngine,
    Unmerge,
)
from server.request import FinishReason, ScaledAdapter

log = logging.getLogger(__name__)


class MessageHandler:
    """`handle` takes in one message, and `advance` lets loads, self-tests, merges and grammars go on between steps."""

    def __init__(
        self,
        live: LiveSequences,
        residency: Residency[PackedAdapter],
        selftests: SelfTests,
        merging: Merging,
        constraints: Constraints,
        base_vocab_size: int,
        max_model_len: int,
    ) -> None:
        self._live = live
        self._residency = residency
        self._selftests = selftests
        self._merging = merging
        self._constraints = constraints
        self._moves = AdapterMoves(residency)
        self._interruptions = Interruptions(live.scheduler, self._stop, self._use)
        self._base_vocab_size = base_vocab_size
        self._max_model_len = max_model_len
        self._replies: list[Reply] = []

    def has_work(self) -> bool:
        waiting = self._moves or self._selftests or self._constraints or self._interruptions
        return bool(waiting or self._replies) or self._merging.has_work()

    def interrupts(self) -> bool:
        """Return whether `advance` will interrupt sequences, for which no step may be in flight."""
        return bool(self._interruptions)

    def close(self) -> None:
        """End the threads that read adapters and grammars."""
        self._constraints.close()
        self._selftests.close()
        self._residency.close()

    def take_replies(self) -> list[Reply]:
        """Return the replies since the last call."""
        replies, self._replies = self._replies, []
        return replies

    def handle(self, message: ToEngine) -> None:
        """Take in one message. If that fails, the message gets an error as its response and nothing else changes.
        Raises `EngineBroken` if the engine cannot continue after that."""
        try:
            self._handle(message)
        except Exception:
            log.exception("%s could not be handled", type(message).__name__)
            self._refuse(message)

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit() if message.sampling.constraint is not None:
                self._constraints.prepare(message)
            case Submit():
                self._submit(message)
            case Abort(seq_ids=seq_ids, keep_output=False):
                for seq_id in seq_ids:
                    self._abort(seq_id)
            case Abort() | SwitchAdapter() | Pause() | Resume() | ResetPrefixCache():
                self._interruptions.add(message)
            case MoveAdapter() | PinAdapter():
                self._moves.add(message)
            case RunSelfTest():
                self._selftests.add(message)
            case RetireAdapter(digest=digest):
                self._moves.retire(digest)
                self._merging.leave("retired", digest)
            case Merge():
                self._residency.expect(message.digest)
                self._merging.merge(message)
            case Unmerge(request_id=request_id):
                self._merging.unmerge(request_id)

    def _refuse(self, message: ToEngine) -> None:
        match message:
            case Submit(seq_id=seq_id):
                self._live.discard(seq_id)
                self._live.reject(seq_id, "the engine could not take the request")
            case Abort():  # the books of a sequence that cannot be removed do not balance
                raise EngineBroken("a sequence could not be aborted")
            case _ if isinstance(message, Call):
                self._replies.append(failure_reply(message.request_id))

    def _abort(self, seq_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        if seq_id in self._live.by_id:
            self._live.finish(self._live.by_id[seq_id], reason)
        elif self._constraints.cancel(seq_id):
            self._live.reject(seq_id, None, reason)

    def _stop(self, seq_id: str) -> None:
        """End a sequence, with what it has generated as its output: nothing, if the first output, which has the numbers
        of the prompt, is still to come. No step may be in flight."""
        seq = self._live.by_id.get(seq_id)
        wants_numbers = seq is not None and (seq.sampling.pooling or seq.sampling.prompt_logprobs is not None)
        lacks_numbers = wants_numbers and seq is not None and not seq.num_output_tokens
        self._abort(seq_id, FinishReason.ABORT if lacks_numbers else FinishReason.STOPPED)

    def _submit(self, request: Submit, parser: Parser | str | None = None) -> None:
        """Queue a request, with the parser of its constraint or the reason why there is none."""
        if isinstance(parser, str):
            self._live.reject(request.seq_id, parser, FinishReason.REFUSED)
            return
        seq = sequence_of(request)
        problem = input_problem(seq.token_ids, seq.sampling, None if seq.adapters else self._base_vocab_size)
        if problem is None and seq.num_tokens > self._max_model_len:
            problem = f"the prompt has more than {self._max_model_len - request.virtual_tokens} tokens"
        if problem is not None:
            self._live.reject(request.seq_id, problem)
            return
        if parser is not None:
            self._constraints.begin(seq, parser)
        self._use(seq.adapters)
        self._merging.arrived(seq.sole_adapter)
        self._live.add(seq)

    def _use(self, adapters: tuple[ScaledAdapter, ...]) -> None:
        """Note that a sequence is about to use these versions."""
        for adapter in adapters:
            self._moves.unretire(adapter.digest)
            self._residency.expect(adapter.digest)

    # -- between steps -------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Let loads, self-tests, merges and grammars go on, and collect the replies that are due."""
        self._end_expired()
        for request, parser in self._constraints.prepared():
            self._submit(request, parser)
        self._residency.poll()
        self._replies += self._interruptions.advance(self._live.by_id)
        self._merging.advance()
        self._replies += [*self._moves.poll(), *self._selftests.advance(), *self._merging.take_replies()]
        self._cancel_reads()
        if self._moves:
            self._moves.unload_retired(digests_of(self._live.by_id.values()))
        for seq, reason in self._live.scheduler.failed():
            self._live.finish(seq, FinishReason.ERROR, error=f"the adapter could not be loaded: {reason}")
        for seq in self._merging.refused():
            self._live.finish(seq, FinishReason.MERGED)

    def _end_expired(self) -> None:
        """End sequences whose deadline has passed. Those that wait never start."""
        for seq in self._live.scheduler.expired(time.monotonic()):
            state = "before it started" if seq.admitted is None else f"after {seq.num_output_tokens} tokens"
            self._live.finish(seq, FinishReason.TIMEOUT, error=f"the request's time ran out {state}")

    def _cancel_reads(self) -> None:
        if self._residency.is_reading():
            in_use = digests_of(self._live.by_id.values())
            self._residency.cancel_reads(in_use | self._moves.digests() | self._selftests.digests())
