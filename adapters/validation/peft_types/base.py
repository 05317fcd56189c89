"""The contract of a PEFT type other than LORA: the expected tensors by its config, and their conversion."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from adapters.errors import Problem
from adapters.peft.config_keys import COMMON_HARMLESS_KEYS
from adapters.peft.config_reader import ConfigReader, KeyTable
from adapters.peft.targets import Targets
from adapters.traits import Traits

PREFIX = "base_model.model."
# Keys common to all types. `target_modules` may be an expression: the tensors show which layers it matched.
_SERVED = frozenset({"peft_type", "target_modules"})
_FEATURES = {key: key for key in ("rank_pattern", "alpha_pattern", "layers_to_transform")}


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear of the base model that the adapter has tensors for; `shapes` are their shapes in the file, by kind."""

    name: str
    inputs: int
    outputs: int
    shapes: Mapping[str, tuple[int, ...]]

    def tensor(self, kind: str) -> str:
        """Return the name of the layer's tensor of that kind."""
        return f"{PREFIX}{self.name}.{kind}"


Array = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]  # float32, or whole numbers for kinds in `indices`


@dataclass(frozen=True, slots=True)
class Factors:
    """The layer adds `scaling * (b @ a @ x)`, with `a [r, in]` and `b [out, r]` in float32."""

    a: Array
    b: Array
    scaling: float


@dataclass(frozen=True, slots=True)
class ChannelScale:
    """A factor for every input or else every output of a linear: `vector [channels]` in float32."""

    vector: Array
    of_input: bool


@dataclass(frozen=True, slots=True)
class AddedBias:
    """A vector that is added to the outputs of a linear: `vector [out]` in float32."""

    vector: Array


@dataclass(frozen=True, slots=True)
class Reflections:
    """The weight is `W H₁ … Hᵣ` with `H = I − 2 u uᵀ`: the unit vectors u are the rows of `vectors [r, in]`."""

    vectors: Array


@dataclass(frozen=True, slots=True)
class Projection:
    """The delta is `left (filled − rightᵀ W)`, with `left` and `right [out, r]` and `filled [r, in]` in float32."""

    left: Array
    right: Array
    filled: Array


@dataclass(frozen=True, slots=True)
class BlockRotation:
    """Blocks of a linear's inputs become `x @ block`, with `blocks [n, b, b]`, or one for all; `scale [out]` multiplies
    the products with the weight, without the bias."""

    blocks: Array
    scale: Array | None


@dataclass(frozen=True, slots=True)
class PairRotation:
    """The outputs y become `first ⊙ y + second ⊙ (−y₂, y₁)`, where y₁ and y₂ are the halves of every `2 * half`."""

    first: Array
    second: Array
    half: int


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """The delta, of `shape` (out, in), has these `values [n]` at `indices [2, n]`, rows and columns; those at one place
    are summed."""

    indices: NDArray[np.int64]
    values: Array
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Circulant:
    """The delta's blocks are circulant: `kernel [out / b, in / b, b]`, divided by the number of inputs."""

    kernel: Array


Part = (
    Factors
    | ChannelScale
    | AddedBias
    | Reflections
    | Projection
    | BlockRotation
    | PairRotation
    | SparseDelta
    | Circulant
)


def arrays_of(part: Part) -> tuple[Array, ...]:
    """Return every number of a part as it is applied."""
    if isinstance(part, Factors):
        return part.a, part.b * np.float32(part.scaling)
    return tuple(value for name in part.__slots__ if isinstance(value := getattr(part, name), np.ndarray))


class PeftTypeConfig(ConfigReader, ABC):
    """The parsed config of one adapter. Call the other methods only if it is `usable`.

    A tensor's name is `base_model.model.<layer>.<kind>`, or one of `shared`; a kind may have a dot in it. Tensors of a
    kind in `indices` hold whole numbers.
    """

    peft_type: ClassVar[str]
    keys: ClassVar[KeyTable]
    kinds: ClassVar[frozenset[str]]
    shared: ClassVar[frozenset[str]] = frozenset()
    indices: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.target_modules = self._target_modules()
        self.targets = Targets.of(config)
        self.features = (self.peft_type.lower(), *self._used(_FEATURES))

    def all_problems(self) -> list[Problem]:
        """Return the problems of the config's values and keys."""
        return self.problems + self.keys.problems(self._config)

    @abstractmethod
    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that the layer must have, by kind."""

    @abstractmethod
    def rank(self, layer: Layer) -> int:
        """Return the rank of the LoRA to which the layer's tensors are converted; 0 for scales."""

    @abstractmethod
    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Part:
        """Convert arrays of the right shapes. Raises `AdapterInvalid`."""

    def shared_shapes(self, layers: Mapping[str, Layer]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors in `shared`, all of which the file must have, by name."""
        return {}

    def layer_problems(self, layers: Mapping[str, Layer]) -> Iterator[Problem]:
        """Yield the problems of a config that does not fit the layers."""
        return iter(())

    def traits(self) -> Traits:
        """Return the traits of an adapter of this type."""
        return Traits()


def key_table(served: set[str], harmless: set[str], **refused: tuple[Any, ...]) -> KeyTable:
    """Build the table of a type's own keys and of those that all types have."""
    return KeyTable(_SERVED | served, COMMON_HARMLESS_KEYS | harmless, {"modules_to_save": (), **refused})
