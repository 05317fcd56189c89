"""What the base model offers to adapters: the one thing validation needs to know of it. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_SIBLINGS = 3  # linears that are computed as one: query, key and value; gate and up


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Modules go by the names that PEFT gives them (`model.layers.0.self_attn.q_proj`).

    `modules` are the linears that can be adapted, with `(in_features, out_features)`; `max_rank` is the largest rank
    that is served; `biased` are those of `modules` that have a bias. `parameters` are the shapes of everything that an
    adapter may replace, by module and in the order of definition; `transposed` those of its modules whose stacked
    experts are `[experts, in, out]`. `tied`: the output head uses the input embedding's weight. `siblings` are those of
    `modules` that read one and the same input, in the order of their calls.
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

    def groups(self) -> Iterator[tuple[str, ...]]:
        """Every module once: siblings together, all others alone."""
        grouped = {name for names in self.siblings for name in names}
        yield from self.siblings
        yield from ((name,) for name in self.modules if name not in grouped)

    @property
    def vocab_size(self) -> int | None:
        """Rows of the input embedding; None for a spec that has none."""
        weight = self.parameters.get(self.embedding, {}).get("weight")
        return weight[0] if weight else None
