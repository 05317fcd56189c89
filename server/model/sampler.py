"""From logits to tokens, for all rows of a step at once.

Order of operations, as in OpenAI's and vLLM's servers: log-probabilities are taken of the untouched distribution; then
logit bias, penalties, temperature, top-k, top-p, min-p, and one uniform number per row picks from what is left. That
number is a hash of the row's seed and position, so a seeded answer does not depend on who else was in the batch.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass

import torch

from server.sequence import SamplingParams, Sequence, TokenLogprobs


@dataclass(slots=True)
class Sample:
    """`token_id` is -1 when the row's logits were not finite: nothing can be sampled from those."""

    token_id: int
    logprobs: TokenLogprobs | None = None


def sample(
    logits: torch.Tensor, seqs: list[Sequence], eos_token_ids: frozenset[int], vocab_sizes: list[int] | None = None
) -> list[Sample]:
    """Next tokens of `seqs` from `logits` `[len(seqs), vocab]` (any float dtype), each from the first
    `vocab_sizes[row]` of them (None: from all)."""
    logits = logits.float()
    finite = torch.isfinite(logits.amax(-1)) & torch.isfinite(logits.amin(-1))
    if vocab_sizes is not None and min(vocab_sizes) < logits.shape[-1]:
        logits = _within(logits, vocab_sizes)
    logprobs = _logprobs(logits, seqs)
    logits = _adjusted(logits, seqs, eos_token_ids)
    chosen = logits.argmax(-1)
    random_rows = [row for row, seq in enumerate(seqs) if seq.sampling.temperature > 0]
    if random_rows:
        chosen[random_rows] = _draw(logits[random_rows], [seqs[row] for row in random_rows])
    samples = [Sample(token if ok else -1) for token, ok in zip(chosen.tolist(), finite.tolist(), strict=True)]
    for row, row_logprobs in logprobs.items():
        if samples[row].token_id >= 0:
            samples[row].logprobs = _describe(row_logprobs, samples[row].token_id, seqs[row].sampling.logprobs or 0)
    return samples


def _within(logits: torch.Tensor, vocab_sizes: list[int]) -> torch.Tensor:
    """A copy in which tokens beyond a row's vocabulary cannot be chosen."""
    sizes = torch.tensor(vocab_sizes, device=logits.device)[:, None]
    return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= sizes, -torch.inf)


def _logprobs(logits: torch.Tensor, seqs: list[Sequence]) -> dict[int, torch.Tensor]:
    rows = [row for row, seq in enumerate(seqs) if seq.sampling.logprobs is not None]
    if not rows:
        return {}
    return dict(zip(rows, logits[rows].log_softmax(-1), strict=True))


def _describe(logprobs: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    chosen = logprobs[token_id]
    values, indices = logprobs.topk(num_top)
    top = list(zip(indices.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(chosen.item(), int((logprobs > chosen).sum().item()) + 1, top)


def _adjusted(logits: torch.Tensor, seqs: list[Sequence], eos_token_ids: frozenset[int]) -> torch.Tensor:
    """Logits after bias, penalties and `min_tokens`; a copy only where a row asks for any of them."""
    rows = [row for row, seq in enumerate(seqs) if _adjusts(seq)]
    if rows:
        logits = logits.clone()
        for row in rows:
            _adjust_row(logits[row], seqs[row], eos_token_ids)
    return logits


def _adjusts(seq: Sequence) -> bool:
    p = seq.sampling
    penalised = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
    return bool(penalised or p.logit_bias or seq.num_output_tokens < p.min_tokens)


def _adjust_row(logits: torch.Tensor, seq: Sequence, eos_token_ids: frozenset[int]) -> None:
    params = seq.sampling
    if params.logit_bias:
        indices = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[indices] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if params.repetition_penalty != 1.0:  # over prompt and answer, as in transformers
        seen = torch.tensor(sorted(set(seq.token_ids)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        _penalise_answer(logits, seq.output_token_ids, params)
    if seq.num_output_tokens < params.min_tokens:
        logits[sorted(eos_token_ids | set(params.stop_token_ids))] = -torch.inf


def _penalise_answer(logits: torch.Tensor, output: list[int], params: SamplingParams) -> None:
    counts = Counter(output)
    if counts:
        tokens = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device)
        logits[tokens] -= params.frequency_penalty * times + params.presence_penalty


def _draw(logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    """Inverse-CDF sampling, `[rows]` int64, over logits sorted best first."""
    device = logits.device
    # Below 1e-5 it is greedy anyway, and logits divided by it would overflow.
    temperature = torch.tensor([max(seq.sampling.temperature, 1e-5) for seq in seqs], device=device)[:, None]
    probs, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    probs = _truncated(probs, seqs)
    cumulative = probs.cumsum(-1)
    uniform = torch.tensor([_uniform(seq) for seq in seqs], device=device)[:, None]
    picked = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    last_kept = (probs > 0).sum(-1, keepdim=True) - 1  # rounding must not pick a token that was cut off
    last_kept = last_kept.clamp(min=0)  # a row of NaN keeps none; its token is thrown away by the caller
    return order.gather(-1, picked.minimum(last_kept)).squeeze(-1)


def _truncated(probs: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    """Zero what top-k, top-p and min-p exclude; `probs` `[rows, vocab]` is sorted, the best always stays."""
    vocab, device = probs.shape[-1], probs.device
    top_k = torch.tensor([seq.sampling.top_k or vocab for seq in seqs], device=device)[:, None]
    top_p = torch.tensor([seq.sampling.top_p for seq in seqs], device=device)[:, None]
    min_p = torch.tensor([seq.sampling.min_p for seq in seqs], device=device)[:, None]
    keep = torch.arange(vocab, device=device) < top_k
    kept = probs * keep
    before = kept.cumsum(-1) - kept  # mass of the likelier ones
    keep &= (before < top_p * kept.sum(-1, keepdim=True)) | (top_p >= 1)
    keep &= probs >= min_p * probs[:, :1]
    keep[:, 0] = True
    return probs * keep


def _uniform(seq: Sequence) -> float:
    """A number in [0, 1), a function of the sequence's seed (or its id, without one) and position alone."""
    seed = seq.seq_id if seq.sampling.seed is None else f"seed:{seq.sampling.seed}"
    digest = hashlib.blake2b(f"{seed}:{seq.num_output_tokens}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
