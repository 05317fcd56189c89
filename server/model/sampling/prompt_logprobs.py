"""Log-probabilities of prompt tokens. Each row before a token of the prompt gives that token's."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice

import torch

from adapters.device.transfers import download
from server.model.sampling.logprobs import scores, token_logprobs
from server.model.sampling.sampler import Sample
from server.request import TokenLogprobs
from server.sequence import ScheduledSequence

Collect = Callable[[], list[Sample]]

_CHUNK = 32  # rows whose log-probabilities are in memory at once


def start_scoring_prompts(
    logits: torch.Tensor, sequences: list[ScheduledSequence], vocab_size: Callable[[tuple[int, ...]], int]
) -> tuple[torch.Tensor, Callable[[Collect], Collect]]:
    """Queue the log-probabilities of a step's prompt rows on the device. Returns the logits of the other rows, which
    are sampled, and a wrapper of the function that collects the samples: it collects these results first and writes
    them to their sequences.

    Written by position, so a sequence that was preempted meanwhile and is computed again loses and doubles none.
    """
    scored = [each for each in sequences if each.num_scored]
    if not scored:
        return logits, lambda collect: collect
    places, sampled = _places(sequences)
    targets = [token for each in scored for token in _successors(each)]
    limits = [limit for each in scored for limit in [vocab_size(each.seq.slots)] * each.num_scored]
    num_top = max(each.seq.sampling.prompt_logprobs or 0 for each in scored)
    found = download(torch.cat([*_in_chunks(logits, places, targets, limits, num_top)]))

    def collect_both(collect_samples: Collect) -> list[Sample]:
        rows = iter(found().tolist())
        for each in scored:
            _write(each, list(islice(rows, each.num_scored)), num_top)
        return collect_samples()

    return logits[sampled], lambda collect: partial(collect_both, collect)


def _successors(scheduled: ScheduledSequence) -> list[int]:
    first = scheduled.scored_from + 1
    return scheduled.seq.token_ids[first : first + scheduled.num_scored]


def _places(sequences: list[ScheduledSequence]) -> tuple[list[int], list[int]]:
    """Return the scored and the sampled rows of the logits."""
    scored: list[int] = []
    sampled: list[int] = []
    for each in sequences:
        start = len(scored) + len(sampled)
        scored += range(start, start + each.num_scored)
        if each.samples:
            sampled.append(start + each.num_scored)
    return scored, sampled


def _in_chunks(
    logits: torch.Tensor, places: list[int], targets: list[int], limits: list[int], num_top: int
) -> Iterable[torch.Tensor]:
    device = logits.device
    columns = torch.arange(logits.shape[-1], device=device)
    table = torch.tensor([places, targets, limits], dtype=torch.int64, device=device)
    for rows, tokens, sizes in zip(*(part.split(_CHUNK) for part in table), strict=True):
        known = logits[rows].float().masked_fill(columns >= sizes[:, None], -torch.inf)
        yield scores(known, tokens, torch.arange(len(rows), device=device), num_top)


def _write(scheduled: ScheduledSequence, rows: list[list[float]], num_top: int) -> None:
    wanted = scheduled.seq.sampling.prompt_logprobs or 0
    start = scheduled.scored_from - scheduled.seq.num_virtual_tokens
    found = [token_logprobs(row, num_top, wanted) for row in rows]
    scheduled.seq.prompt_logprobs[start : start + len(found)] = found


def is_finite(logprobs: Iterable[TokenLogprobs | None]) -> bool:
    """Return whether none is NaN. A token that cannot occur has minus infinity."""
    return not any(each is not None and math.isnan(each.logprob) for each in logprobs)
