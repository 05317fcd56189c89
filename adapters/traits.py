"""Properties of an adapter that the server needs before its weights are loaded. No torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Traits:
    """Properties that follow from an adapter's content and are kept in its report.

    `additive`: its only effect is to add `s·B A x`, or another scaled product, to outputs. `owned`: the last parts
    of the names of modules in which it does more; in a composition, a module has at most one owner. `scalable`: its
    scale is that of its factors, because nothing else in it has one in PEFT, as saved modules. `mergeable`: it
    changes linear layers only, and every token in the same way. `invocation_tokens`: it is active from the last
    occurrence of these tokens in the prompt; empty for always active. `vocab_size`: the size of its vocabulary
    where it differs from the base model's, else None. `virtual_tokens`: their number in front of every prompt;
    `has_prefix`: the adapter has their keys and values, not their embeddings. `tokenizer`, `chat_template`: it
    includes a tokenizer or a chat template of its own. `eos_token`: it has neither, and a token of the base's
    tokenizer that ends its outputs.
    """

    additive: bool = True
    owned: tuple[str, ...] = ()
    scalable: bool = True
    mergeable: bool = True
    invocation_tokens: tuple[int, ...] = ()
    vocab_size: int | None = None
    virtual_tokens: int = 0
    has_prefix: bool = False
    tokenizer: bool = False
    chat_template: bool = False
    eos_token: bool = False

    def described(self) -> dict[str, Any]:
        """Return the traits that differ from the defaults, for the report."""
        ordinary = asdict(Traits())
        return {name: value for name, value in asdict(self).items() if value != ordinary[name]}

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> "Traits":
        """Build the traits from a report that holds the output of `described` under "traits"."""
        given = dict(report.get("traits", {}))
        return cls(**given | {key: tuple(given.get(key, ())) for key in ("owned", "invocation_tokens")})
