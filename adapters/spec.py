"""What the base model offers to adapters: the one thing validation needs to know of it. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Adaptable modules by the name PEFT gives them (`model.layers.0.self_attn.q_proj`), with
    `(in_features, out_features)`, the largest rank that is served, and those of the modules that have a bias."""

    modules: dict[str, tuple[int, int]]
    max_rank: int
    biased: frozenset[str] = frozenset()
