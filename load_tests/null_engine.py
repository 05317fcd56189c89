"""An engine process without a model: every running sequence gets one token per step, in one message, at a steady pace.

Run by `ProcessTransport` in place of the engine, so that only the model is missing from the path that is measured.
"""

import os
import time

from transformers import AutoTokenizer

from adapters.model_spec import ModelSpec
from server.config import ServeConfig
from server.engine import worker
from server.ipc.messages import (
    Abort,
    Emit,
    EngineInfo,
    EngineStats,
    Ready,
    Receive,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    Submit,
    ToEngine,
)

STEP_SECONDS, CORE = "NULL_ENGINE_STEP_SECONDS", "NULL_ENGINE_CORE"  # environment
TEXT = "The quick brown fox jumps over the lazy dog, and nobody minds. "


class NullEngine:
    """Says `tokens` over and over to everyone until they have as many as they asked for."""

    def __init__(self, tokens: list[int]):
        self._tokens = tokens
        self._running: dict[str, tuple[int, int]] = {}  # said so far, and wanted

    def handle(self, message: ToEngine) -> list[SequenceOutput]:
        if isinstance(message, Submit):
            self._running[message.seq_id] = (0, message.sampling.max_tokens)
        if isinstance(message, Abort):
            return [SequenceOutput(i, [], "abort") for i in message.seq_ids if self._running.pop(i, None)]
        return []

    def step(self) -> list[SequenceOutput]:
        return [self._advance(seq_id, *counts) for seq_id, counts in list(self._running.items())]

    def _advance(self, seq_id: str, said: int, wanted: int) -> SequenceOutput:
        token = self._tokens[said % len(self._tokens)]
        if said + 1 < wanted:
            self._running[seq_id] = (said + 1, wanted)
            return SequenceOutput(seq_id, [token])
        del self._running[seq_id]
        return SequenceOutput(seq_id, [token], "length")


def serve(config: ServeConfig, receive: Receive, emit: Emit) -> None:
    os.sched_setaffinity(0, {int(os.environ[CORE])})
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    engine, pace = NullEngine(tokenizer.encode(TEXT)), float(os.environ[STEP_SECONDS])
    emit(Ready(_info(len(tokenizer))))
    due, outputs = 0.0, []
    while True:
        for message in receive(max(0.0, due - time.monotonic()) if engine._running else 1.0):
            if isinstance(message, Shutdown):
                return
            outputs += engine.handle(message)
        if engine._running and time.monotonic() >= due:
            due = max(due + pace, time.monotonic())
            outputs += engine.step()
        if outputs:
            stats = EngineStats(running=len(engine._running), step_seconds=pace, batch_tokens=len(outputs))
            emit(StepOutputs(outputs, stats))
            outputs = []


def _info(vocab_size: int) -> EngineInfo:
    return EngineInfo(
        base_fingerprint="0" * 12,
        vocab_size=vocab_size,
        max_model_len=8192,
        spec=ModelSpec({}, max_rank=16),
        adapter_slots=1,
        adapter_pages=1,
        num_blocks=1,
        block_size=16,
        eos_token_ids=[vocab_size - 1],
        description={"device": "none"},
    )


if __name__ == "__main__":
    worker.main(serve)
