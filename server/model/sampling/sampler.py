"""Sampling of tokens from logits, for all rows of a step at once.

The order of operations is that of OpenAI's and vLLM's servers: log-probabilities are computed from the unmodified
distribution, unless those of the distribution that is sampled from were asked for; then logit bias, penalties, the
grammar's mask, temperature, top-k, top-p and min-p apply, and one uniform number per row selects a token. That number
is a hash of the row's seed and position, so a seeded output does not depend on the batch.

The results of all rows come back from the device in one copy, like their parameters go there (plan.py). Nothing
synchronizes in between. Plainly greedy rows have no parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapters.device.transfers import download
from server.model.cpu.argmax import argmax
from server.model.cpu.library import why_unavailable
from server.model.sampling.allowed import AllowedTokens
from server.model.sampling.logprobs import token_logprobs
from server.model.sampling.plan import is_finite, plan_sampling, sample_by_plan
from server.model.sampling.token_counts import TokenCounts
from server.request import TokenLogprobs
from server.sequence import Sequence


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


def sample(
    logits: torch.Tensor, seqs: list[Sequence], eos_token_ids: frozenset[int], vocab_sizes: list[int] | None = None
) -> list[Sample]:
    """Sample the next tokens of `seqs` from `logits` `[len(seqs), vocab]` (any float dtype), each from the first
    `vocab_sizes[row]` tokens (None: from all)."""
    return start_sampling(logits, seqs, eos_token_ids, TokenCounts(logits.device), vocab_sizes).collect()


def start_sampling(
    logits: torch.Tensor,
    seqs: list[Sequence],
    eos_token_ids: frozenset[int],
    counts: TokenCounts,
    vocab_sizes: list[int] | None = None,
    allowed: AllowedTokens | None = None,
) -> Started:
    """Queue the work of `sample` on the device without waiting for it. `counts` are those of earlier steps; `allowed`
    has the masks of the rows with a grammar."""
    if not seqs:
        return Started(torch.empty(0, dtype=torch.int64, device=logits.device), list)
    plan = plan_sampling(logits, seqs, eos_token_ids, vocab_sizes, counts, allowed or AllowedTokens.none())
    chosen, *scores = [_greedy(logits)] if plan is None else sample_by_plan(logits.float(), plan)
    found = download(torch.cat([chosen.double(), *scores]))
    return Started(chosen, lambda: _samples(found().tolist(), seqs, 0 if plan is None else plan.num_top))


def _greedy(logits: torch.Tensor) -> torch.Tensor:
    """Return the most probable tokens `[rows]` int64; -1 if a row is not finite."""
    if logits.device.type == "cpu" and why_unavailable(logits.dtype) is None:
        return argmax(logits)
    logits = logits.float()
    return torch.where(is_finite(logits), logits.argmax(-1), -1)


def _samples(found: list[float], seqs: list[Sequence], num_top: int) -> list[Sample]:
    samples = [Sample(int(token)) for token in found[: len(seqs)]]
    at, width = len(seqs), 2 + 2 * num_top
    for sampled, seq in zip(samples, seqs, strict=True):
        if seq.sampling.logprobs is not None:
            if sampled.token_id >= 0:
                sampled.logprobs = token_logprobs(found[at : at + width], num_top, seq.sampling.logprobs)
            at += width
    return samples
