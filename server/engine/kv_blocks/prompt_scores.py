"""Sequences that want log-probabilities of their prompts, or the mean of their hidden states: what they may take from
the prefix cache, and how many tokens of them a step computes. Does not use torch."""

from collections.abc import Iterable

from server.request import TokenLogprobs
from server.sequence import Sequence

LEAST_ROWS, ROWS_PER_SEQUENCE = 64, 4  # of logits for prompts in a step, the second per sequence of `max_num_seqs`


def max_cached_tokens(seq: Sequence) -> int:
    """Return how many tokens may come from the prefix cache: the logits of the last token are needed, and those of
    every token whose successor's log-probability is wanted and not yet known. A mean takes every token's hidden state,
    which the cache does not have."""
    if seq.sampling.pooling == "mean":
        return seq.num_virtual_tokens
    known = enumerate(seq.prompt_logprobs, start=seq.num_virtual_tokens)
    return next((at for at, found in known if found is None), seq.num_tokens - 1)


def bound_logits(tokens: int, running: list[Sequence], waiting: Iterable[Sequence], max_num_seqs: int) -> int:
    """Return a smaller budget where log-probabilities of prompts are left to compute: each of their tokens has a row
    of logits, for which memory is reserved as for sampled rows."""
    if any(map(_wants_scores, running)) or any(map(_wants_scores, waiting)):
        return min(tokens, max(LEAST_ROWS, ROWS_PER_SEQUENCE * max_num_seqs) + len(running))
    return tokens


def _wants_scores(seq: Sequence) -> bool:
    return seq.sampling.prompt_logprobs is not None and seq.num_computed_tokens < seq.num_prompt_tokens - 1


def of_first_output(seq: Sequence) -> list[TokenLogprobs] | None:
    """Return the log-probabilities of the prompt if they belong into this output; only the first has them."""
    found = [each for each in seq.prompt_logprobs if each is not None] if seq.num_output_tokens <= 1 else []
    return found if found and len(found) == len(seq.prompt_logprobs) else None
