"""Sequences from the messages that start them, and the messages about them."""

import math
import time

from server.engine.kv_blocks.prompt_scores import of_first_output
from server.engine.pipeline import PLACEHOLDER
from server.ipc.messages import SequenceOutput, Submit
from server.model.pooling import embedding_of
from server.model.sampling.sampler import Sample
from server.request import FinishReason
from server.sequence import Sequence


def sequence_of(request: Submit) -> Sequence:
    return Sequence(
        request.seq_id,
        [*[PLACEHOLDER] * request.virtual_tokens, *request.token_ids],
        request.sampling,
        request.adapters,
        request.cache_salt,
        time.monotonic(),
        request.active_from,
        request.priority,
        request.weight,
        math.inf if request.deadline is None else request.deadline,
        num_virtual_tokens=request.virtual_tokens,
        num_copied_tokens=request.virtual_tokens if request.has_prefix else 0,
        request_salt=request.request_salt,
    )


def output_of(
    seq: Sequence, token_ids: list[int], reason: FinishReason | None, sampled: Sample | None, error: str | None
) -> SequenceOutput:
    switched, seq.switched = seq.switched, False
    return SequenceOutput(
        seq.seq_id,
        token_ids,
        None if reason is None else reason.value,
        [sampled.logprobs] if sampled is not None and sampled.logprobs is not None else None,
        seq.num_cached_tokens,
        (seq.admitted or time.monotonic()) - seq.arrival,
        error,
        of_first_output(seq),
        embedding_of(seq) if reason is FinishReason.LENGTH else None,
        seq.adapters if switched else None,
    )
