"""Drawing a token for each row by one uniform number: inversion of the cumulative distribution.

A row's form is chosen by its own parameters (on a CPU also by its own numbers), so what it draws does not depend on
its neighbours:

  plain  nothing is excluded: in the order of the vocabulary, without sorting it
  few    top-k of at most `FEW` tokens: those are selected and sorted
  many   anything else: the whole vocabulary is sorted

Sorting is by far the dearest: on a CPU, rows with top-p or min-p are drawn from their `FEW` likeliest tokens first,
and only those of which more are kept are sorted. That looks at the numbers, and a GPU
would have to be waited for.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from server.sequence import SamplingParams
from server.sequence import Sequence as TokenSequence

FEW = 1024

Array = npt.NDArray[Any]


class Form(IntEnum):
    PLAIN = 0
    FEW = 1
    MANY = 2


@dataclass(frozen=True, slots=True)
class Draws:
    """Parameters of the rows that are drawn for, ordered by form: so many are plain, so many few, the rest many.
    `in_order`: that order leaves every row of the logits in its place.

    rows `[draws]` int64; the others `[draws, 1]`, top_k int64 (off: the size of the vocabulary), the rest float32.
    """

    rows: torch.Tensor
    top_k: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor
    num_plain: int
    num_few: int
    in_order: bool

    def part(self, which: slice | torch.Tensor) -> "Draws":
        """Those of some of the rows, which are drawn for in one way."""
        numbers = self.temperature[which], self.top_p[which], self.min_p[which], self.uniform[which]
        return Draws(self.rows[which], self.top_k[which], *numbers, 0, 0, False)


def plan_draws(seqs: Sequence[TokenSequence], vocab: int, on_cpu: bool) -> tuple[list[Array], int, int, bool]:
    """On the host: what `draws_of` takes once it is on the device, how many rows are plain and few, and whether they
    are in order."""
    forms = {row: _form(seq.sampling, on_cpu) for row, seq in enumerate(seqs) if seq.sampling.temperature > 0}
    rows = sorted(forms, key=forms.__getitem__)
    top_k = [[seqs[row].sampling.top_k or vocab] for row in rows]
    numbers = np.array([_numbers(seqs[row]) for row in rows], dtype=np.float32).reshape(-1, 4).T[:, :, None]
    arrays: list[Array] = [np.array(rows, dtype=np.int64), np.array(top_k, dtype=np.int64).reshape(-1, 1), numbers]
    counts = [*forms.values()]
    return arrays, counts.count(Form.PLAIN), counts.count(Form.FEW), rows == [*range(len(seqs))]


def draws_of(uploaded: Sequence[torch.Tensor], num_plain: int, num_few: int, in_order: bool) -> Draws:
    rows, top_k, numbers = uploaded
    temperature, top_p, min_p, uniform = numbers
    return Draws(rows, top_k, temperature, top_p, min_p, uniform, num_plain, num_few, in_order)


def _form(params: SamplingParams, on_cpu: bool) -> Form:
    if not (params.top_k or params.top_p < 1 or params.min_p):
        return Form.PLAIN
    return Form.FEW if 0 < params.top_k <= FEW or (on_cpu and not params.top_k) else Form.MANY


def _numbers(seq: TokenSequence) -> tuple[float, float, float, float]:
    params = seq.sampling
    # Below 1e-5 it is greedy anyway, and logits divided by it would overflow.
    return max(params.temperature, 1e-5), params.top_p, params.min_p, _uniform(seq)


def _uniform(seq: TokenSequence) -> float:
    """A number in [0, 1), a function of the sequence's seed (or its id, without one) and position alone."""
    seed = seq.seq_id if seq.sampling.seed is None else f"seed:{seq.sampling.seed}"
    digest = hashlib.blake2b(f"{seed}:{seq.num_output_tokens}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def draw(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Tokens `[draws]` int64 from logits `[rows, vocab]` float32. What a row with NaN gives is some token."""
    logits = logits if draws.in_order else logits[draws.rows]
    probs = (logits / draws.temperature).softmax(-1)
    plain = draws.num_plain
    few = plain + draws.num_few
    parts = []
    if plain:
        parts.append(_invert(probs[:plain].cumsum(-1), draws.uniform[:plain]))
    if few > plain:
        parts.append(_draw_few(probs[plain:few], draws.part(slice(plain, few))))
    if few < len(probs):
        parts.append(_draw_sorted(probs[few:], draws.part(slice(few, None))))
    return torch.cat(parts)


def _invert(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first place of each row whose cumulative probability is beyond `uniform` of the total.

    Rounding must not pick a place with probability 0: the target stays below the total, which the last place with any
    probability is the first to reach.
    """
    total = cumulative[:, -1:]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    picked = torch.searchsorted(cumulative, target, right=True)
    return picked.clamp_(max=cumulative.shape[-1] - 1).squeeze(-1)  # a row of NaN is beyond everything


def _draw_few(probs: torch.Tensor, draws: Draws) -> torch.Tensor:
    best, order = probs.topk(min(FEW, probs.shape[-1]), -1)
    kept = _truncated(best, draws)
    tokens = order.gather(-1, _invert(kept.cumsum(-1), draws.uniform)[:, None]).squeeze(-1)
    if probs.device.type == "cpu" and best.shape[-1] < probs.shape[-1]:
        beyond = (kept[:, -1] > 0) & (draws.top_k[:, 0] > FEW)  # more than these may be kept
        if beyond.any():
            tokens[beyond] = _draw_sorted(probs[beyond], draws.part(beyond))
    return tokens


def _draw_sorted(probs: torch.Tensor, draws: Draws) -> torch.Tensor:
    probs, order = probs.sort(-1, descending=True)
    picked = _invert(_truncated(probs, draws).cumsum(-1), draws.uniform)
    return order.gather(-1, picked[:, None]).squeeze(-1)


def _truncated(probs: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Zero what top-k, top-p and min-p exclude; `probs` `[draws, candidates]` is sorted, the best always stays."""
    keep = torch.arange(probs.shape[-1], device=probs.device) < draws.top_k
    kept = probs * keep
    before = kept.cumsum(-1) - kept  # mass of the likelier ones
    mass = torch.where(
        draws.top_k > probs.shape[-1], 1.0, kept.sum(-1, keepdim=True)
    )  # top-k is off: that of all tokens
    keep &= (before < draws.top_p * mass) | (draws.top_p >= 1)
    keep &= probs >= draws.min_p * probs[:, :1]
    keep[:, 0] = True
    return probs * keep
