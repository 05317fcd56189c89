"""The contract of a PEFT type other than LORA: what its config says of the tensors beside it, and what they come to."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from adapters.errors import Problem
from adapters.peft.config_reader import ConfigReader, KeyTable
from adapters.peft.weights import LoraFactors
from adapters.traits import Traits

PREFIX = "base_model.model."
# The same for every type: the tensors tell which layers were meant.
_SERVED = frozenset({"peft_type", "target_modules"})
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "task_type",
    }
)
_FEATURES = {key: key for key in ("rank_pattern", "alpha_pattern", "layers_to_transform")}


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear of the base model that the adapter has tensors for: their shapes in the file, by kind."""

    name: str
    inputs: int
    outputs: int
    shapes: Mapping[str, tuple[int, ...]]

    def tensor(self, kind: str) -> str:
        """The name of the layer's tensor of that kind."""
        return f"{PREFIX}{self.name}.{kind}"


@dataclass(frozen=True, slots=True)
class ChannelScale:
    """What a linear's inputs or else its outputs are multiplied by, in float32."""

    vector: Tensor
    of_input: bool


class Family(ConfigReader, ABC):
    """One adapter's config, read. Where `usable`, everything else may be asked.

    A tensor's name is `base_model.model.<layer>.<kind>`, or one of `shared`; those of `indices` hold whole numbers.
    """

    peft_type: ClassVar[str]
    keys: ClassVar[KeyTable]
    kinds: ClassVar[frozenset[str]]
    shared: ClassVar[frozenset[str]] = frozenset()
    indices: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.target_modules = self._target_modules()
        self.features = (self.peft_type.lower(), *self._used(_FEATURES))

    @abstractmethod
    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Of the tensors that the layer must have, by kind."""

    @abstractmethod
    def rank(self, layer: Layer) -> int:
        """Of the LoRA that the layer's tensors come to."""

    @abstractmethod
    def convert(
        self, layer: Layer, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> LoraFactors | ChannelScale:
        """What tensors of the right shapes, in float32 or whole numbers, come to. Raises `AdapterInvalid`."""

    def shared_shapes(self, layers: Mapping[str, Layer]) -> dict[str, tuple[int, ...]]:
        """Of the tensors in `shared`, all of which the file must have."""
        return {}

    def layer_problems(self, layers: Mapping[str, Layer]) -> Iterator[Problem]:
        """Where the config does not fit the layers."""
        return iter(())

    def traits(self) -> Traits:
        return Traits()


def key_table(served: set[str], harmless: set[str], **refused: tuple[Any, ...]) -> KeyTable:
    """A type's own keys beside those of every type."""
    return KeyTable(_SERVED | served, _HARMLESS | harmless, {"modules_to_save": (), **refused})
