"""How long a step and an adapter's moves take: linear in the work, with coefficients from measurements."""

import tomllib
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from adapters.residency.slots import PAGE_COLUMNS

PROFILES = Path(__file__).with_name("profiles.toml")


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The coefficients of one model on one machine. Bytes are decimal where rates are given."""

    about: str
    step_ms: float
    token_ms: float
    lora_ms: float  # once, in a step that has adapters
    lora_token_ms: float  # per token with an adapter, and unit of its rank
    adapter_ms: float  # per distinct adapter, and unit of its rank
    context_token_us: float  # per token that is attended to, in all sequences
    read_ms: float
    read_gb_s: float
    write_ms: float
    write_gb_s: float
    adapter_page_bytes: int  # of 16 rank columns
    kv_bytes_per_token: int
    prefill_pair_us: float = 0.0  # per token of a prompt and token that it attends to

    def step_seconds(self, work: "StepWork") -> float:
        ms = self.step_ms + self.token_ms * work.tokens + self.context_token_us * work.context_tokens / 1e3
        ms += self.prefill_pair_us * work.prefill_pairs / 1e3
        if work.adapter_ranks:
            ms += self.lora_ms + self.lora_token_ms * work.token_ranks + self.adapter_ms * work.adapter_ranks
        return ms / 1e3

    def read_seconds(self, rank: int) -> float:
        """Disk to host memory, checks and packing included."""
        return self.read_ms / 1e3 + self.adapter_bytes(rank) / (self.read_gb_s * 1e9)

    def write_seconds(self, rank: int) -> float:
        """Host memory to the device."""
        return self.write_ms / 1e3 + self.adapter_bytes(rank) / (self.write_gb_s * 1e9)

    def adapter_bytes(self, rank: int) -> int:
        """As packed: in whole pages."""
        return -(-rank // PAGE_COLUMNS) * self.adapter_page_bytes


class StepWork(msgspec.Struct):
    """What a step has to do."""

    tokens: int = 0
    context_tokens: int = 0  # summed over the sequences: tokens so far, the step's own included
    token_ranks: int = 0  # summed over the tokens: the rank of their adapter
    adapter_ranks: int = 0  # summed over the distinct adapters: their rank
    prefill_pairs: float = 0.0  # summed over the tokens of prefill: the tokens that they attend to


def load_profile(name: str, path: Path = PROFILES) -> Profile:
    """Raises KeyError for a name that is not in the file, `msgspec.ValidationError` for a table that is no profile."""
    return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8"))[name], Profile)


def fit(steps: Iterable[tuple[StepWork, float]]) -> dict[str, float]:
    """Coefficients of `Profile` that fit measured steps (work, seconds) best by least squares.

    At least five steps whose work differs in every respect; attention over the context is left out, since short steps
    do not tell it from noise. Raises ValueError when the steps do not determine the coefficients.
    """
    measured = list(steps)
    rows = [
        (1.0, work.tokens, float(bool(work.adapter_ranks)), work.token_ranks, work.adapter_ranks)
        for work, _ in measured
    ]
    found, _, rank, _ = np.linalg.lstsq(
        np.array(rows), np.array([seconds * 1e3 for _, seconds in measured]), rcond=None
    )
    if rank < len(found):
        raise ValueError("the measured steps are too alike to tell the coefficients apart")
    names = ("step_ms", "token_ms", "lora_ms", "lora_token_ms", "adapter_ms")
    return dict(zip(names, map(float, found), strict=True))
