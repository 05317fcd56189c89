"""Parameters of a request to the engine, and parts of its outputs. Does not import torch."""

from enum import StrEnum
from typing import Literal, NamedTuple

import msgspec

Pooling = Literal["last", "mean"]  # of a prompt's hidden states: that of its last token, or the mean of all


class ScaledAdapter(NamedTuple):
    """An adapter version of a request, with the factor `scale` on its delta."""

    digest: str
    scale: float = 1.0


class Constraint(msgspec.Struct, frozen=True):
    """A grammar that an output follows, in llguidance's description. Its tokens are those of the tokenizer that the
    adapter version `tokenizer` brings; without a version, those of the base model's."""

    grammar: str
    tokenizer: str = ""


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sampling parameters of a request. The API validates them; the engine does not check them again."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: off; n: of the sampled token and the n most probable ones
    processed_logprobs: bool = False  # of the distribution that is sampled from, not of the model's own
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt, of which the first has none
    pooling: Pooling | None = None  # of the prompt's final hidden states, which the last output then has
    constraint: Constraint | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, of the model's own distribution unless others were asked for."""

    logprob: float
    rank: int  # of the token itself; 1 is the most probable
    top: list[tuple[int, float]]  # the n most probable tokens, best first


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    STOPPED = "stopped"  # from outside: what it has generated is its output
    ABORT = "abort"
    TIMEOUT = "timeout"
    MERGED = "merged"  # refused, because another adapter is merged into the base model
    NONFINITE = "nonfinite"  # its logits were not finite
    ERROR = "error"
    REFUSED = "refused"  # the request asks for what this model cannot do
