"""Description of the base model for adapters: all that validation needs to know about the model. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_SIBLINGS = 3  # linears that may be computed as one: query, key and value; gate and up


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The adaptable modules of a base model, by the names that PEFT gives them (`model.layers.0.self_attn.q_proj`).

    `modules` maps each adaptable linear to `(in_features, out_features)`; `max_rank` is the largest rank served;
    `biased` is the subset of `modules` that has a bias. `parameters` maps each module, in definition order, to the
    shapes of all parameters that an adapter may replace; `transposed` is the subset of its modules whose stacked
    experts are stored as `[experts, in, out]`. `tied` is true when the output head uses the input embedding's weight.
    `siblings` lists groups of `modules` that read the same input, in call order. `names` has every module of the base
    model, adaptable or not; it is empty if the base model is unknown. `kv` has the key/value heads and the head
    dimension of each layer. `rereads_tokens` is true when other modules than the embedding read the tokens as well.
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
