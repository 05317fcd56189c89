"""Sequences, and the batches that they are scheduled in. Does not import torch."""

import math
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from server.request import SamplingParams, ScaledAdapter, TokenLogprobs

NO_BLOCK = -1  # in a block table: the block was released, because no later token sees it


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """One stream of tokens. `num_computed_tokens` advances towards `num_tokens`; prefill, chunked prefill, decode,
    prefix hits and recomputation after preemption differ only in how far it advances.

    The four cursors into `token_ids`, while a step with this sequence is in flight:

        token_ids  0 ────────────┬──────────────────┬──────────────────┬──────────────── num_tokens
                                 │                  │                  │
               num_verified_tokens     num_computed_tokens     num_launched_tokens
               led to finite logits    in the cache, as far    on the device or
               (-1: none can be        as the accounting       being computed there
               trusted)                goes

    The fourth, `num_cached_tokens`, does not move: it is where the first admission began, behind the prefix that was
    found in the cache.

    Between steps, verified <= computed <= launched <= num_tokens for a sequence that has been in a step; launched is
    ahead of computed only from the launch of a step to its commit. A preemption sets the first three to 0.

    Invariant: `block_table` covers at least `num_computed_tokens` slots of the KV cache while RUNNING and is empty
    otherwise; `adapters` changes only while WAITING (interruptions.py), so no token mixes two versions.
    """

    # Written by the API: the fields of `Submit`. Only `adapters` ever changes.
    seq_id: str
    token_ids: list[int]  # of the prompt; the engine appends the output
    sampling: SamplingParams
    adapters: tuple[ScaledAdapter, ...] = ()  # empty: the base model
    cache_salt: str = ""  # the tenant: prefix-cache hits stay within one tenant
    arrival: float = 0.0  # monotonic seconds, by the engine's clock
    active_from: int = 0  # the first token that the adapters apply to; earlier tokens use the base model
    priority: int = 0  # within its tenant; lower is more urgent
    weight: float = 1.0  # of its tenant, whose share of the device is proportional to it
    deadline: float = math.inf  # monotonic seconds; it ends then, wherever it is
    num_virtual_tokens: int = 0  # leading tokens that stand for the adapter's virtual ones
    num_copied_tokens: int = 0  # of these, those whose keys and values are copied from the adapter: all or none
    request_salt: str = ""  # prefix-cache hits stay within one salt of a tenant
    num_prompt_tokens: int = 0  # with the virtual ones

    # Written by the engine, when it launches and collects steps.
    num_launched_tokens: int = 0  # tokens whose keys and values are in the cache or being written
    num_verified_tokens: int = 0  # computed tokens whose keys and values led to finite logits
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    admitted: float | None = None  # time of its first step
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)  # of the second token and later ones
    pooled: Any = None  # float32 `[hidden]`: the sum of the hidden states of the pooled tokens before `pooled_to`
    pooled_to: int = 0
    switched: bool = False  # `adapters` are others than those of the last output

    # Written by the scheduler.
    number: int = 0  # in order of arrival
    status: SequenceStatus = SequenceStatus.WAITING
    slots: tuple[int, ...] = ()  # device slots of `adapters` while RUNNING, unless they are merged into the base
    waited_steps: int = 0  # steps in which later sequences had what it lacked
    overdue: bool = False  # waited_steps exceeds max_wait_steps
    requested: bool = False  # its adapters were requested
    read: set[str] = field(default_factory=set)  # of its adapters, those that were read since they were requested
    preempted: bool = False  # it was running before

    # Written by the block manager.
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks in token_ids, computed lazily
    chain_merged: str = ""  # the version that was merged into the weights when the hash chain began
    weight_changes: list[tuple[int, str]] = field(default_factory=list)  # since then: token, version ("": none)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)
        if self.sampling.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * (self.num_prompt_tokens - self.num_virtual_tokens - 1)

    @property
    def tenant(self) -> str:
        return self.cache_salt

    @property
    def digests(self) -> list[str]:
        return [adapter.digest for adapter in self.adapters]

    @property
    def sole_adapter(self) -> str | None:
        """The only version, if it is unscaled; None for the base model, compositions and scaled adapters."""
        return self.adapters[0].digest if len(self.adapters) == 1 and self.adapters[0].scale == 1 else None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_ready_tokens(self) -> int:
        """Number of leading tokens that need not be computed: they are in the cache, or can be copied into it."""
        return max(self.num_computed_tokens, self.num_copied_tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(slots=True)
class ScheduledSequence:
    """A sequence's part of one step, which computes its tokens `[start, end)`, after copying the keys and values of
    `[copied_from, start)` from its adapter. Does not change when the sequence advances.

    `samples`: this step reaches the sequence's last token, so the next token can be sampled. `num_scored` tokens from
    `scored_from` on are followed by a token of the prompt whose log-probability is wanted.
    """

    seq: Sequence
    num_new_tokens: int
    copied_from: int = field(init=False)
    start: int = field(init=False)
    end: int = field(init=False)
    samples: bool = field(init=False)
    scored_from: int = field(init=False)
    num_scored: int = field(init=False)

    def __post_init__(self) -> None:
        self.copied_from, self.start = self.seq.num_computed_tokens, self.seq.num_ready_tokens
        self.end = self.start + self.num_new_tokens
        self.samples = self.end == self.seq.num_tokens
        num_virtual = self.seq.num_virtual_tokens
        self.scored_from = max(self.start, num_virtual)
        self.num_scored = max(min(self.end, num_virtual + len(self.seq.prompt_logprobs)) - self.scored_from, 0)

    @property
    def num_inactive(self) -> int:
        """Number of leading new tokens that come before `active_from`."""
        return min(max(self.seq.active_from - self.start, 0), self.num_new_tokens)


@dataclass(slots=True)
class ScheduledBatch:
    """The work of one step, ordered by adapter slots so that each adapter's rows form one segment (base rows first)."""

    sequences: list[ScheduledSequence]

    @property
    def num_tokens(self) -> int:
        return sum(s.num_new_tokens for s in self.sequences)

    @property
    def num_adapters(self) -> int:
        return len({slot for s in self.sequences for slot in s.seq.slots})

    def __bool__(self) -> bool:
        return bool(self.sequences)
