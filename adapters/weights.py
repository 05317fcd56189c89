"""An adapter's tensors in host memory, as the runtime applies them."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One module's factors `a [r, in]` and `b [out, r]`, as stored. The module adds `scaling * (b @ a @ x + bias)`,
    and DoRA's `magnitude` scales its rows. `bias` and `magnitude` are `[out]` or None."""

    a: Tensor
    b: Tensor
    scaling: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Projection:
    """`left` and `right [out, r]` and `filled [r, in]`: the module adds `left @ (filled - rightᵀ @ W) @ x`."""

    left: Tensor
    right: Tensor
    filled: Tensor


@dataclass(frozen=True, slots=True)
class PairRotation:
    """A linear's outputs y become `first ⊙ y + second ⊙ (−y₂, y₁)`, where y₁ and y₂ are the halves of every
    `2 * half` of them."""

    first: Tensor
    second: Tensor
    half: int


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """The delta, of `shape` (out, in), has the `values [n]` at `indices [2, n]`, rows and columns; those at one place
    are summed."""

    indices: Tensor
    values: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows `values [n, hidden]` that replace the rows of the tokens `ids` in an embedding's weight."""

    ids: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True, slots=True)
class VirtualTokens:
    """`number` (n) tokens in front of every prompt: their embeddings `[n, hidden]` or, with `is_prefix`, their keys and
    values, `[n, layers, 2, kv heads, head_dim]` as stored and `[layers, 2, n, kv heads, head_dim]` once packed."""

    values: Tensor
    is_prefix: bool
    number: int


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter in host memory: `rank` is the largest rank of its modules, `nbytes` the size of all tensors in bytes.

    `factors` are those of linears, and `biases` replace the linears' own; `embeddings` are factors with `a [r, vocab]`
    and `b [hidden, r]`. `parameters` are factors of any module's parameters, `a [experts·r, in]` and `b [out,
    r·experts]`. `replaced` has whole parameters, and `tokens` rows of the embedding or the head. `input_scales`
    multiply a linear's inputs, `output_scales` its outputs with their bias, and `added_biases` are added to its
    outputs. `reflections` are unit vectors `[r, in]`, along each of which its inputs are reflected, last to first;
    these and `projections` become factors where the base's weight is known. `block_rotations [n, b, b]`, or one block
    for all, multiply a linear's inputs, `weight_scales` its weight's rows, and `pair_rotations` change its outputs.
    `sparse` and `circulant` (kernels `[out / b, in / b, b]`) are deltas of a linear's weight. `virtual` are tokens in
    front of every prompt.
    """

    digest: str
    rank: int
    factors: dict[str, LoraFactors]
    nbytes: int
    biases: dict[str, Tensor] = field(default_factory=dict)
    embeddings: dict[str, LoraFactors] = field(default_factory=dict)
    parameters: dict[str, dict[str, LoraFactors]] = field(default_factory=dict)
    replaced: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    input_scales: dict[str, Tensor] = field(default_factory=dict)
    output_scales: dict[str, Tensor] = field(default_factory=dict)
    added_biases: dict[str, Tensor] = field(default_factory=dict)
    reflections: dict[str, Tensor] = field(default_factory=dict)
    projections: dict[str, Projection] = field(default_factory=dict)
    block_rotations: dict[str, Tensor] = field(default_factory=dict)
    weight_scales: dict[str, Tensor] = field(default_factory=dict)
    pair_rotations: dict[str, PairRotation] = field(default_factory=dict)
    sparse: dict[str, SparseDelta] = field(default_factory=dict)
    circulant: dict[str, Tensor] = field(default_factory=dict)
    virtual: VirtualTokens | None = None
    vocab_size: int | None = None  # where it is not the base's
