"""Categorical sampling with one uniform number per row, by inversion of the cumulative distribution.

The method for a row depends on its own parameters (on a CPU also on its own logits), so its token does not depend on
other rows:

  plain  no token is excluded: in the order of the vocabulary, without sorting
  few    top-k of at most `FEW` tokens: these are selected and sorted
  many   anything else: the whole vocabulary is sorted

Probabilities are summed as integers, which no order of additions changes: parallel float sums on a GPU depend on the
number of rows, and for a single row they differ from run to run.

Sorting is by far the most expensive: on a CPU, rows with top-p or min-p are sampled from their `FEW` most probable
tokens first, and only rows that keep more are sorted. This inspects the logits, for which a GPU would have to
synchronize.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from server.request import SamplingParams
from server.sequence import Sequence as TokenSequence

FEW = 1024
_UNIT = float(1 << 60)  # of an integer probability; the sum of a row stays below 2^63

Array = npt.NDArray[Any]


class Form(IntEnum):
    PLAIN = 0
    FEW = 1
    MANY = 2


@dataclass(frozen=True, slots=True)
class CategoricalParams:
    """Parameters of the rows to sample, ordered by form: `num_plain` plain rows, `num_few` few, the rest many.
    `in_order`: this order equals that of the logits' rows.

    rows `[n]` int64; the others `[n, 1]`, top_k int64 (off: the size of the vocabulary), the rest float32.
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

    def part(self, which: slice | torch.Tensor) -> "CategoricalParams":
        """Return the parameters of some rows, which all have one form."""
        numbers = self.temperature[which], self.top_p[which], self.min_p[which], self.uniform[which]
        return CategoricalParams(self.rows[which], self.top_k[which], *numbers, 0, 0, False)


def plan_categorical(seqs: Sequence[TokenSequence], vocab: int, on_cpu: bool) -> tuple[list[Array], int, int, bool]:
    """Return the host arrays that `categorical_params` takes after their upload, the numbers of plain and few rows, and
    whether the rows are in order."""
    forms = {row: _form(seq.sampling, on_cpu) for row, seq in enumerate(seqs) if seq.sampling.temperature > 0}
    rows = sorted(forms, key=forms.__getitem__)
    top_k = [[seqs[row].sampling.top_k or vocab] for row in rows]
    numbers = np.array([_numbers(seqs[row]) for row in rows], dtype=np.float32).reshape(-1, 4).T[:, :, None]
    arrays: list[Array] = [np.array(rows, dtype=np.int64), np.array(top_k, dtype=np.int64).reshape(-1, 1), numbers]
    counts = [*forms.values()]
    return arrays, counts.count(Form.PLAIN), counts.count(Form.FEW), rows == [*range(len(seqs))]


def categorical_params(
    uploaded: Sequence[torch.Tensor], num_plain: int, num_few: int, in_order: bool
) -> CategoricalParams:
    rows, top_k, numbers = uploaded
    temperature, top_p, min_p, uniform = numbers
    return CategoricalParams(rows, top_k, temperature, top_p, min_p, uniform, num_plain, num_few, in_order)


def _form(params: SamplingParams, on_cpu: bool) -> Form:
    if not (params.top_k or params.top_p < 1 or params.min_p):
        return Form.PLAIN
    return Form.FEW if 0 < params.top_k <= FEW or (on_cpu and not params.top_k) else Form.MANY


def _numbers(seq: TokenSequence) -> tuple[float, float, float, float]:
    params = seq.sampling
    # Below 1e-5 sampling is greedy anyway, and the division of logits would overflow.
    return max(params.temperature, 1e-5), params.top_p, params.min_p, _uniform(seq)


def _uniform(seq: TokenSequence) -> float:
    """Return a number in [0, 1) that depends only on the sequence's seed (without one, its id) and position."""
    seed = seq.seq_id if seq.sampling.seed is None else f"seed:{seq.sampling.seed}"
    digest = hashlib.blake2b(f"{seed}:{seq.num_output_tokens}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def sample_categorical(logits: torch.Tensor, params: CategoricalParams) -> torch.Tensor:
    """Sample tokens `[n]` int64 from logits `[rows, vocab]` float32. A row with NaN gives an arbitrary token."""
    logits = logits if params.in_order else logits[params.rows]
    probs = (logits / params.temperature).softmax(-1)
    plain = params.num_plain
    few = plain + params.num_few
    parts = []
    if plain:
        parts.append(_invert(probs[:plain], params.uniform[:plain]))
    if few > plain:
        parts.append(_sample_few(probs[plain:few], params.part(slice(plain, few))))
    if few < len(probs):
        parts.append(_sample_sorted(probs[few:], params.part(slice(few, None))))
    return torch.cat(parts)


def sampler_logits(logits: torch.Tensor, params: CategoricalParams) -> torch.Tensor:
    """Return logits `[rows, vocab]` whose softmax is the distribution that `sample_categorical` samples from; greedy
    rows stay as they are."""
    scaled = logits[params.rows] / params.temperature
    if params.num_plain < len(scaled):
        truncated = scaled[params.num_plain :]
        probs, order = truncated.softmax(-1).sort(-1, descending=True)
        kept = _truncated(probs, params.part(slice(params.num_plain, None))) > 0
        excluded = torch.ones_like(kept).scatter(-1, order, ~kept)
        scaled[params.num_plain :] = truncated.masked_fill(excluded, -torch.inf)
    return logits.index_copy(0, params.rows, scaled)


def _integers(probs: torch.Tensor) -> torch.Tensor:
    """Return `probs` in units of 2^-60; the product is exact, and what is lost below the unit is never sampled."""
    return (probs * _UNIT).long()


def _invert(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return the first index of each row whose cumulative probability exceeds `uniform` times the total."""
    cumulative = _integers(probs).cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum((uniform.double() * total).long(), total - 1)
    picked = torch.searchsorted(cumulative, target, right=True)
    return picked.clamp_(max=cumulative.shape[-1] - 1).squeeze(-1)  # a row of NaN gives an index past the end


def _sample_few(probs: torch.Tensor, params: CategoricalParams) -> torch.Tensor:
    best, order = probs.topk(min(FEW, probs.shape[-1]), -1)
    kept = _truncated(best, params)
    tokens = order.gather(-1, _invert(kept, params.uniform)[:, None]).squeeze(-1)
    if probs.device.type == "cpu" and best.shape[-1] < probs.shape[-1]:
        beyond = (kept[:, -1] > 0) & (params.top_k[:, 0] > FEW)  # more tokens than these may be kept
        if beyond.any():
            tokens[beyond] = _sample_sorted(probs[beyond], params.part(beyond))
    return tokens


def _sample_sorted(probs: torch.Tensor, params: CategoricalParams) -> torch.Tensor:
    probs, order = probs.sort(-1, descending=True)
    picked = _invert(_truncated(probs, params), params.uniform)
    return order.gather(-1, picked[:, None]).squeeze(-1)


def _truncated(probs: torch.Tensor, params: CategoricalParams) -> torch.Tensor:
    """Zero the probabilities that top-k, top-p and min-p exclude. `probs` `[n, candidates]` is sorted; the first column
    always stays."""
    keep = torch.arange(probs.shape[-1], device=probs.device) < params.top_k
    kept = probs * keep
    own = _integers(kept)
    cumulative = own.cumsum(-1)
    is_off = params.top_k > probs.shape[-1]
    mass = torch.where(is_off, _UNIT, cumulative[:, -1:].double())  # top-k is off: the mass of all tokens
    more_probable = (cumulative - own).double()  # the mass of more probable tokens
    keep &= (more_probable < params.top_p.double() * mass) | (params.top_p >= 1)
    keep &= probs >= params.min_p * probs[:, :1]
    keep[:, 0] = True
    return probs * keep
