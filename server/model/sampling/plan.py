"""The sampling parameters of a step's rows, and sampling by them. They go to the device in one copy."""

from dataclasses import dataclass

import numpy as np
import torch

from adapters.device.transfers import upload_all
from server.model.sampling.adjustments import (
    Adjustments,
    adjustment_tables,
    is_adjusted,
    penalties_on_device,
    penalty_tables,
)
from server.model.sampling.allowed import Allowed, AllowedTokens
from server.model.sampling.categorical import (
    CategoricalParams,
    categorical_params,
    plan_categorical,
    sample_categorical,
    sampler_logits,
)
from server.model.sampling.logprobs import scores
from server.model.sampling.token_counts import TokenCounts
from server.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """The sampling parameters of all rows, on the device. `scored` are the rows with log-probabilities and `num_top` is
    their largest number; those of `processed` rows are of the distribution that is sampled from. `limits` `[rows, 1]`
    are vocabulary sizes, None if no row has a smaller one."""

    categorical: CategoricalParams
    scored: torch.Tensor
    processed: torch.Tensor
    num_top: int
    limits: torch.Tensor | None
    adjustments: Adjustments


def plan_sampling(
    logits: torch.Tensor,
    seqs: list[Sequence],
    eos_token_ids: frozenset[int],
    vocab_sizes: list[int] | None,
    counts: TokenCounts,
    allowed: AllowedTokens,
) -> SamplingPlan | None:
    """Return the sampling plan; None if every row is plainly greedy over the whole vocabulary."""
    vocab, device = logits.shape[-1], logits.device
    sizes = vocab_sizes if vocab_sizes is not None and min(vocab_sizes) < vocab else []
    if not sizes and not any(_needs_plan(seq) for seq in seqs):
        return None
    scored = [row for row, seq in enumerate(seqs) if seq.sampling.logprobs is not None]
    processed = [row for row in scored if seqs[row].sampling.processed_logprobs]
    categorical, num_plain, num_few, in_order = plan_categorical(seqs, vocab, device.type == "cpu")
    own = [np.array(rows, dtype=np.int64) for rows in (scored, sizes, processed)]
    adjustments = [*adjustment_tables(seqs, eos_token_ids, vocab), *penalty_tables(seqs, vocab, counts)]
    uploaded = upload_all([*own, *categorical, *allowed.tables(vocab), *adjustments], device)
    bias_at, bias, forbidden_at, forbidden = uploaded[8:12]
    return SamplingPlan(
        categorical_params(uploaded[3:6], num_plain, num_few, in_order),
        uploaded[0],
        uploaded[2],
        max((seqs[row].sampling.logprobs or 0 for row in scored), default=0),
        uploaded[1][:, None] if sizes else None,
        Adjustments(
            bias_at,
            bias,
            forbidden_at,
            forbidden,
            penalties_on_device(uploaded[12:], counts),
            Allowed(*uploaded[6:8]),
        ),
    )


def _needs_plan(seq: Sequence) -> bool:
    p = seq.sampling
    return p.temperature > 0 or p.logprobs is not None or is_adjusted(seq)


def sample_by_plan(logits: torch.Tensor, plan: SamplingPlan) -> list[torch.Tensor]:
    """Return tokens `[rows]` int64, -1 if a row is not finite, and the flattened result of `scores` if needed."""
    finite = is_finite(logits)
    if plan.limits is not None:
        beyond = torch.arange(logits.shape[-1], device=logits.device) >= plan.limits
        logits = logits.masked_fill(beyond, -torch.inf)
    changed = plan.adjustments.apply(logits)
    chosen = changed.argmax(-1)
    if len(plan.categorical.rows):
        chosen.index_copy_(0, plan.categorical.rows, sample_categorical(changed, plan.categorical))
    tokens = torch.where(finite, chosen, -1)
    plan.adjustments.count(tokens)
    if not len(plan.scored):
        return [tokens]
    if len(plan.processed):
        sampled_from = sampler_logits(changed, plan.categorical)
        logits = logits.index_copy(0, plan.processed, sampled_from[plan.processed])
    return [tokens, scores(logits, chosen, plan.scored, plan.num_top).flatten()]


def is_finite(logits: torch.Tensor) -> torch.Tensor:
    """Return for each row whether all of its logits are finite, `[rows]` bool."""
    return torch.isfinite(logits.amax(-1)) & torch.isfinite(logits.amin(-1))
