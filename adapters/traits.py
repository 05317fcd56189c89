"""What the server has to know of an adapter before its weights are anywhere near. No torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Traits:
    """Follows from an adapter's content and is kept in its report.

    `additive`: all that it does is to add `s·B A x` to outputs, so that it can be scaled and composed.
    `mergeable`: it changes linear layers only, for every token alike.
    `invocation_tokens`: it is active from their last occurrence in the prompt on; empty for always.
    `vocab_size`: where it is not the base model's.
    `tokenizer`, `chat_template`: it brings its own.
    """

    additive: bool = True
    mergeable: bool = True
    invocation_tokens: tuple[int, ...] = ()
    vocab_size: int | None = None
    tokenizer: bool = False
    chat_template: bool = False

    def described(self) -> dict[str, Any]:
        """What is out of the ordinary, for the report."""
        ordinary = asdict(Traits())
        return {name: value for name, value in asdict(self).items() if value != ordinary[name]}

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> "Traits":
        """From a report that `described` is in under "traits"."""
        given = dict(report.get("traits", {}))
        return cls(**given | {"invocation_tokens": tuple(given.get("invocation_tokens", ()))})
