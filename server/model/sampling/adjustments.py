"""Adjustments of logits before a token is chosen: bias, penalties, and the tokens that `min_tokens` or a grammar
forbids."""

from dataclasses import dataclass

import numpy as np
import torch

from server.model.cpu.library import why_unavailable
from server.model.cpu.penalties import penalize
from server.model.sampling.allowed import Allowed
from server.model.sampling.categorical import Array
from server.model.sampling.token_counts import OUTPUT, TokenCounts
from server.request import SamplingParams
from server.sequence import Sequence

Entries = tuple[int, list[int], list[float] | float]  # a row, some tokens, and a number for each or for all


@dataclass(frozen=True, slots=True)
class Penalties:
    """The rows with penalties. `rows` and `slots` `[rows]` int64 are places in the logits and in the table of `counts`;
    `strengths` `[3, rows]` float32 are the repetition, frequency and presence penalties."""

    rows: torch.Tensor
    slots: torch.Tensor
    strengths: torch.Tensor
    counts: TokenCounts


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Tables of (row, token) `[2, entries]` int64 with numbers `[entries]` float32 to add before the penalties (`bias`)
    and after them (`forbidden`). `allowed` has the tokens that grammars allow."""

    bias_at: torch.Tensor
    bias: torch.Tensor
    forbidden_at: torch.Tensor
    forbidden: torch.Tensor
    penalties: Penalties
    allowed: Allowed

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Adjust a copy of `logits` `[rows, vocab]` float32; return the original if no row has an adjustment."""
        if len(self.bias) + len(self.forbidden) + len(self.penalties.rows) + len(self.allowed.rows) == 0:
            return logits
        logits = logits.clone()
        if len(self.bias):
            logits.index_put_((*self.bias_at,), self.bias, accumulate=True)
        if len(self.penalties.rows):
            _penalize(logits, self.penalties)
        if len(self.forbidden):
            logits.index_put_((*self.forbidden_at,), self.forbidden, accumulate=True)
        if len(self.allowed.rows):
            self.allowed.keep(logits)
        return logits

    def count(self, tokens: torch.Tensor) -> None:
        """Count the sampled `tokens` `[rows]` int64 of the sequences with penalties."""
        if len(self.penalties.rows):
            self.penalties.counts.add(self.penalties.slots, tokens[self.penalties.rows])


def has_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def is_adjusted(seq: Sequence) -> bool:
    """Return whether the sequence's next logits have any adjustment."""
    p = seq.sampling
    return bool(has_penalties(p) or p.logit_bias or p.constraint or seq.num_output_tokens < p.min_tokens)


def adjustment_tables(seqs: list[Sequence], eos_token_ids: frozenset[int], vocab_size: int) -> list[Array]:
    """Return the host's part of `Adjustments`: bias and forbidden tokens, each with its places. End tokens beyond the
    vocabulary of the step's logits, which some models list, are left out."""
    bias: list[Entries] = []
    forbidden: list[Entries] = []
    for row, seq in enumerate(seqs):
        params = seq.sampling
        if params.logit_bias:
            bias.append((row, [*params.logit_bias], [*params.logit_bias.values()]))
        if seq.num_output_tokens < params.min_tokens and params.constraint is None:  # its mask has the end tokens
            ends = eos_token_ids | set(params.stop_token_ids)
            forbidden.append((row, [token for token in ends if token < vocab_size], -np.inf))
    return [*_table(bias), *_table(forbidden)]


def penalty_tables(seqs: list[Sequence], vocab_size: int, counts: TokenCounts) -> list[Array]:
    """Return the host's part of `Penalties` for the sequences with penalties: rows, strengths, slots, and the counts to
    write before."""
    rows = [row for row, seq in enumerate(seqs) if has_penalties(seq.sampling)]
    params = [seqs[row].sampling for row in rows]
    strengths = [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in params]
    return [
        np.array(rows, dtype=np.int64),
        np.array(strengths, dtype=np.float32).reshape(-1, 3).T,
        *counts.prepare([seqs[row] for row in rows], vocab_size if rows else 0),
    ]


def penalties_on_device(tables: list[torch.Tensor], counts: TokenCounts) -> Penalties:
    """Return the penalties of the uploaded `penalty_tables`."""
    rows, strengths, slots, stale, entries = tables
    counts.write(stale, entries)
    return Penalties(rows, slots, strengths, counts)


def _table(entries: list[Entries]) -> tuple[Array, Array]:
    places, numbers = [np.zeros((2, 0), np.int64)], [np.zeros(0, np.float32)]
    for row, tokens, values in entries:
        places.append(np.array([np.full(len(tokens), row), tokens], dtype=np.int64))
        numbers.append(np.broadcast_to(np.array(values, dtype=np.float32), len(tokens)))
    return np.concatenate(places, 1), np.concatenate(numbers)


def _penalize(logits: torch.Tensor, penalties: Penalties) -> None:
    """Apply penalties in place: the repetition penalty to tokens of prompt and output, as in transformers, then the
    frequency and presence penalties to tokens of the output, as in OpenAI's API."""
    if logits.device.type == "cpu" and why_unavailable(logits.dtype) is None:
        penalize(logits, penalties.counts.table, penalties.rows, penalties.slots, penalties.strengths)
        return
    counts = penalties.counts.table[penalties.slots, : logits.shape[1]]
    repetition, frequency, presence = penalties.strengths[:, :, None]
    values, outputs = logits[penalties.rows], counts // OUTPUT
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(counts > 0, repeated, values)
    logits[penalties.rows] = torch.where(outputs > 0, values - (frequency * outputs + presence), values)
