"""Adjustments of logits before a token is chosen: bias, penalties, and the tokens that `min_tokens` forbids."""

from collections import Counter

import numpy as np
import torch

from server.model.sampling.categorical import Array
from server.sequence import SamplingParams, Sequence

Entries = tuple[int, list[int], list[float] | float]  # a row, some tokens, and a number for each or for all


def looks_back(params: SamplingParams) -> bool:
    """Return whether sampling depends on earlier tokens directly, not only through the logits."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def is_adjusted(seq: Sequence) -> bool:
    """Return whether the sequence's next logits have any adjustment."""
    p = seq.sampling
    return bool(looks_back(p) or p.logit_bias or seq.num_output_tokens < p.min_tokens)


def plan_adjustments(seqs: list[Sequence], eos_token_ids: frozenset[int]) -> list[Array]:
    """Return bias, repetition penalties, and later additions as three tables of (row, token) `[2, entries]` int64 and
    numbers `[entries]` float32."""
    bias: list[Entries] = []
    repeated: list[Entries] = []
    after: list[Entries] = []
    for row, seq in enumerate(seqs):
        params = seq.sampling
        if params.logit_bias:
            bias.append((row, [*params.logit_bias], [*params.logit_bias.values()]))
        if params.repetition_penalty != 1.0:  # over prompt and output, as in transformers
            repeated.append((row, [*set(seq.token_ids)], params.repetition_penalty))
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter(seq.output_token_ids)
            penalties = [-params.frequency_penalty * times - params.presence_penalty for times in counts.values()]
            after.append((row, [*counts], penalties))
        if seq.num_output_tokens < params.min_tokens:
            after.append((row, [*eos_token_ids | set(params.stop_token_ids)], -np.inf))
    return [array for table in (bias, repeated, after) for array in _table(table)]


def _table(entries: list[Entries]) -> tuple[Array, Array]:
    places, numbers = [np.zeros((2, 0), np.int64)], [np.zeros(0, np.float32)]
    for row, tokens, values in entries:
        places.append(np.array([np.full(len(tokens), row), tokens], dtype=np.int64))
        numbers.append(np.broadcast_to(np.array(values, dtype=np.float32), len(tokens)))
    return np.concatenate(places, 1), np.concatenate(numbers)


def adjusted(logits: torch.Tensor, adjustments: list[torch.Tensor]) -> torch.Tensor:
    """Apply bias, penalties and `min_tokens` to a copy of the logits; return the original if no row has any."""
    bias_at, bias, repeated, repetition, after_at, after = adjustments
    if len(bias) + len(repetition) + len(after) == 0:
        return logits
    logits = logits.clone()
    if len(bias):
        logits.index_put_((*bias_at,), bias, accumulate=True)
    if len(repetition):
        values = logits[*repeated]
        logits[*repeated] = torch.where(values > 0, values / repetition, values * repetition)
    if len(after):
        logits.index_put_((*after_at,), after, accumulate=True)
    return logits
