"""Sampling of tokens from logits, for all rows of a step at once.

The order of operations is that of OpenAI's and vLLM's servers: log-probabilities are computed from the unmodified
distribution; then logit bias, penalties, temperature, top-k, top-p and min-p apply, and one uniform number per row
selects a token. That number is a hash of the row's seed and position, so a seeded output does not depend on the batch.

The parameters of all rows go to the device in one copy, and the results come back in one. Nothing synchronizes in
between.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from adapters.device.transfers import download, upload_all
from server.model.cpu.argmax import argmax
from server.model.cpu.library import why_unavailable
from server.model.sampling.categorical import (
    Array,
    CategoricalParams,
    categorical_params,
    plan_categorical,
    sample_categorical,
)
from server.sequence import SamplingParams, Sequence, TokenLogprobs

Entries = tuple[int, list[int], list[float] | float]  # a row, some tokens, and a number for each or for all


@dataclass(slots=True)
class Sample:
    """A sampled token. `token_id` is -1 if the row's logits were not finite, so that no token can be sampled."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """Sampling that is queued on the device: `tokens` `[rows]` int64, -1 if a row is not finite. `collect` waits for
    the results."""

    tokens: torch.Tensor
    collect: Callable[[], list[Sample]]


@dataclass(frozen=True, slots=True)
class _SamplingPlan:
    """The sampling parameters of all rows, on the device. `scored` are the rows with log-probabilities and `num_top` is
    their largest number; `limits` `[rows, 1]` are vocabulary sizes, None if no row has a smaller one."""

    categorical: CategoricalParams
    scored: torch.Tensor
    num_top: int
    limits: torch.Tensor | None
    changes: list[torch.Tensor]


def sample(
    logits: torch.Tensor, seqs: list[Sequence], eos_token_ids: frozenset[int], vocab_sizes: list[int] | None = None
) -> list[Sample]:
    """Sample the next tokens of `seqs` from `logits` `[len(seqs), vocab]` (any float dtype), each from the first
    `vocab_sizes[row]` tokens (None: from all)."""
    return start_sampling(logits, seqs, eos_token_ids, vocab_sizes).collect()


def start_sampling(
    logits: torch.Tensor, seqs: list[Sequence], eos_token_ids: frozenset[int], vocab_sizes: list[int] | None = None
) -> Started:
    """Queue the work of `sample` on the device without waiting for it."""
    if not seqs:
        return Started(torch.empty(0, dtype=torch.int64, device=logits.device), list)
    plan = _plan(logits, seqs, eos_token_ids, vocab_sizes)
    chosen, *scores = [_greedy(logits)] if plan is None else _sampled(logits.float(), plan)
    found = download(torch.cat([chosen.double(), *scores]))
    return Started(chosen, lambda: _samples(found().tolist(), seqs, 0 if plan is None else plan.num_top))


def looks_back(params: SamplingParams) -> bool:
    """Return whether sampling depends on earlier tokens directly, not only through the logits."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def _greedy(logits: torch.Tensor) -> torch.Tensor:
    """Return the most probable tokens `[rows]` int64; -1 if a row is not finite."""
    if logits.device.type == "cpu" and why_unavailable(logits.dtype) is None:
        return argmax(logits)
    logits = logits.float()
    return torch.where(_is_finite(logits), logits.argmax(-1), -1)


def _is_finite(logits: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(logits.amax(-1)) & torch.isfinite(logits.amin(-1))


def _sampled(logits: torch.Tensor, plan: _SamplingPlan) -> list[torch.Tensor]:
    """Return tokens `[rows]` int64, -1 if a row is not finite, and the flattened result of `_scores` if needed."""
    finite = _is_finite(logits)
    if plan.limits is not None:
        beyond = torch.arange(logits.shape[-1], device=logits.device) >= plan.limits
        logits = logits.masked_fill(beyond, -torch.inf)
    changed = _changed(logits, plan.changes)
    chosen = changed.argmax(-1)
    if len(plan.categorical.rows):
        chosen.index_copy_(0, plan.categorical.rows, sample_categorical(changed, plan.categorical))
    tokens = torch.where(finite, chosen, -1)
    return [tokens, _scores(logits, chosen, plan).flatten()] if len(plan.scored) else [tokens]


def _plan(
    logits: torch.Tensor, seqs: list[Sequence], eos_token_ids: frozenset[int], vocab_sizes: list[int] | None
) -> _SamplingPlan | None:
    """Return the sampling plan; None if every row is plainly greedy over the whole vocabulary."""
    vocab, device = logits.shape[-1], logits.device
    sizes = vocab_sizes if vocab_sizes is not None and min(vocab_sizes) < vocab else []
    if not sizes and not any(_needs_plan(seq) for seq in seqs):
        return None
    scored = [row for row, seq in enumerate(seqs) if seq.sampling.logprobs is not None]
    categorical, num_plain, num_few, in_order = plan_categorical(seqs, vocab, device.type == "cpu")
    own = [np.array(rows, dtype=np.int64) for rows in (scored, sizes)]
    uploaded = upload_all([*own, *categorical, *_changes(seqs, eos_token_ids, vocab)], device)
    return _SamplingPlan(
        categorical_params(uploaded[2:5], num_plain, num_few, in_order),
        uploaded[0],
        max((seqs[row].sampling.logprobs or 0 for row in scored), default=0),
        uploaded[1][:, None] if sizes else None,
        uploaded[5:],
    )


def _needs_plan(seq: Sequence) -> bool:
    p = seq.sampling
    changed = looks_back(p) or p.logit_bias or seq.num_output_tokens < p.min_tokens
    return bool(p.temperature > 0 or p.logprobs is not None or changed)


def _changes(seqs: list[Sequence], eos_token_ids: frozenset[int], vocab: int) -> list[Array]:
    """Return bias, repetition penalties, and later additions as three tables of (row, token) `[2, entries]` int64 and
    numbers `[entries]` float32. End tokens beyond the `vocab` of the step's logits, which some models list, are left
    out."""
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
            ends = eos_token_ids | set(params.stop_token_ids)
            after.append((row, [token for token in ends if token < vocab], -np.inf))
    return [array for table in (bias, repeated, after) for array in _table(table)]


def _table(entries: list[Entries]) -> tuple[Array, Array]:
    places, numbers = [np.zeros((2, 0), np.int64)], [np.zeros(0, np.float32)]
    for row, tokens, values in entries:
        places.append(np.array([np.full(len(tokens), row), tokens], dtype=np.int64))
        numbers.append(np.broadcast_to(np.array(values, dtype=np.float32), len(tokens)))
    return np.concatenate(places, 1), np.concatenate(numbers)


def _changed(logits: torch.Tensor, changes: list[torch.Tensor]) -> torch.Tensor:
    """Apply bias, penalties and `min_tokens` to a copy of the logits; return the original if no row has any."""
    bias_at, bias, repeated, repetition, after_at, after = changes
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


def _scores(logits: torch.Tensor, chosen: torch.Tensor, plan: _SamplingPlan) -> torch.Tensor:
    """Return per scored row the sampled token's log-probability and rank, then the top tokens and their
    log-probabilities: `[scored, 2 + 2 * num_top]` in float64, which represents all of them exactly."""
    logprobs = logits[plan.scored].log_softmax(-1)
    own = logprobs.gather(-1, chosen[plan.scored][:, None])
    rank = (logprobs > own).sum(-1, keepdim=True) + 1
    values, tokens = logprobs.topk(plan.num_top, -1)
    return torch.cat([part.double() for part in (own, rank, tokens, values)], 1)


def _samples(found: list[float], seqs: list[Sequence], num_top: int) -> list[Sample]:
    samples = [Sample(int(token)) for token in found[: len(seqs)]]
    at, width = len(seqs), 2 + 2 * num_top
    for sampled, seq in zip(samples, seqs, strict=True):
        if seq.sampling.logprobs is not None:
            if sampled.token_id >= 0:
                sampled.logprobs = _described(found[at : at + width], num_top, seq.sampling.logprobs)
            at += width
    return samples


def _described(scores: list[float], num_top: int, wanted: int) -> TokenLogprobs:
    tokens, values = scores[2 : 2 + num_top], scores[2 + num_top :]
    top = [(int(token), value) for token, value in zip(tokens[:wanted], values[:wanted], strict=True)]
    return TokenLogprobs(scores[0], int(scores[1]), top)
