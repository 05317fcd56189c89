"""Description of the base model for adapters: all that validation needs to know about the model. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

MAX_SIBLINGS = 3  # linears that may be computed as one: query, key and value; gate and up


@dataclass(frozen=True, slots=True)
class Renaming:
    """A rule for names that modules had in earlier releases of transformers: the first match of the expression
    `pattern` becomes `target`, in which `\\1` is the pattern's own group. `scopes` are the prefixes of the names to
    which the rule applies, without which they are matched; () for all names."""

    pattern: str
    target: str
    scopes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertFusion:
    """A rule for the factors of single experts that are now one parameter: `renaming` maps their name to that of the
    module, `parts` of them lie side by side in its `parameter`, and `kind` is A or B."""

    renaming: Renaming
    parameter: str
    parts: int
    kind: Literal["A", "B"]


@dataclass(frozen=True, slots=True)
class NameConversion:
    """The conversion of adapters from earlier releases of transformers, read from PEFT's and transformers' own tables:
    all `renamings` in sequence, then the first of `fusions` that matches. `targets` maps names of `target_modules` to
    parameters, and `fused` the parameters to the names that must be targets together."""

    renamings: tuple[Renaming, ...]
    fusions: tuple[ExpertFusion, ...] = ()
    targets: tuple[tuple[str, str], ...] = ()
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The adaptable modules of a base model, by the names that PEFT gives them (`model.layers.0.self_attn.q_proj`).

    `modules` maps each adaptable linear to `(in_features, out_features)`; `max_rank` is the largest rank served;
    `biased` is the subset of `modules` that has a bias. `parameters` maps each module, in definition order, to the
    shapes of all parameters that an adapter may replace; `transposed` is the subset of its modules whose stacked
    experts are stored as `[experts, in, out]`. `tied` is true when the output head uses the input embedding's weight.
    `gathered` has the modules of `parameters` whose stacked experts are computed with each row's own factors.
    `siblings` lists groups of `modules` that read the same input, in call order. `names` has every module of the base
    model, adaptable or not; it is empty if the base model is unknown. `conversion` is None where no names changed. `kv`
    has the key/value heads and the head dimension of each layer. `rereads_tokens` is true when other modules than the
    embedding read the tokens as well.
    """

    modules: dict[str, tuple[int, int]]
    max_rank: int
    biased: frozenset[str] = frozenset()
    parameters: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    embedding: str = ""
    head: str = ""
    tied: bool = False
    siblings: tuple[tuple[str, ...], ...] = ()
    names: frozenset[str] = frozenset()
    gathered: frozenset[str] = frozenset()
    conversion: NameConversion | None = None
    kv: tuple[tuple[int, int], ...] = ()
    rereads_tokens: bool = False

    def groups(self) -> Iterator[tuple[str, ...]]:
        """Yield every module exactly once: siblings together, all others alone."""
        grouped = {name for names in self.siblings for name in names}
        yield from self.siblings
        yield from ((name,) for name in self.modules if name not in grouped)

    @property
    def vocab_size(self) -> int | None:
        """Number of rows of the input embedding; None for a spec without an input embedding."""
        weight = self.parameters.get(self.embedding, {}).get("weight")
        return weight[0] if weight else None
