"""When a sequence has its last token."""

from server.request import FinishReason
from server.sequence import Sequence


def is_full(seq: Sequence, num_tokens: int, max_model_len: int) -> bool:
    """Return whether the sequence may have no token after the first `num_tokens`."""
    return num_tokens - seq.num_prompt_tokens >= seq.sampling.max_tokens or num_tokens >= max_model_len


def finish_reason(
    seq: Sequence, token_id: int, eos_token_ids: frozenset[int], max_model_len: int
) -> FinishReason | None:
    """Return why the sequence ends with `token_id`, its last token, or None if it goes on."""
    params = seq.sampling
    stops = token_id in params.stop_token_ids or (token_id in eos_token_ids and not params.ignore_eos)
    if stops and seq.num_output_tokens >= max(params.min_tokens, 1):
        return FinishReason.STOP
    return FinishReason.LENGTH if is_full(seq, seq.num_tokens, max_model_len) else None
