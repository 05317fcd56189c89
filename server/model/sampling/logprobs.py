"""Log-probabilities of sampled tokens."""

import torch

from server.request import TokenLogprobs


def scores(logits: torch.Tensor, chosen: torch.Tensor, scored: torch.Tensor, num_top: int) -> torch.Tensor:
    """Return per scored row the sampled token's log-probability and rank, then the top tokens and their
    log-probabilities: `[scored, 2 + 2 * num_top]` in float64, which represents all of them exactly."""
    logprobs = logits[scored].log_softmax(-1)
    own = logprobs.gather(-1, chosen[scored][:, None])
    rank = (logprobs > own).sum(-1, keepdim=True) + 1
    values, tokens = logprobs.topk(num_top, -1)
    return torch.cat([part.double() for part in (own, rank, tokens, values)], 1)


def token_logprobs(scores: list[float], num_top: int, wanted: int) -> TokenLogprobs:
    """Return one row of `scores`, cut to the number of top tokens `wanted` by its sequence."""
    tokens, values = scores[2 : 2 + num_top], scores[2 + num_top :]
    top = [(int(token), value) for token, value in zip(tokens[:wanted], values[:wanted], strict=True)]
    return TokenLogprobs(scores[0], int(scores[1]), top)
