"""The base of request bodies, which notes fields that nothing declares, and types of fields with their bounds."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from server.api.fields import (
    Refusal,
)
from server.api.schemas import Wire

MAX_TEXT = 4 << 20
INT64 = 1 << 63
MAX_CHOICES = 128  # of one request: prompts times n

Text = Annotated[str, Field(max_length=MAX_TEXT)]
ModelName = Annotated[str, Field(min_length=1, max_length=256 + len("@sha256:") + 64)]  # a name, or name@version
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 20, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
MAX_TIMEOUT_SECONDS = 86400.0
REST_OF_CONTEXT = -1
TokenCount = Annotated[int, Field(ge=REST_OF_CONTEXT, lt=1 << 31)]
NumTop = Annotated[int, Field(ge=0, le=20)]
AdapterScale = Annotated[float, Field(ge=-100, le=100)]
Grammar = Annotated[str, Field(min_length=1, max_length=1 << 16)]
Schema = Grammar | dict[str, Any]  # as text or as JSON
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000, fail_fast=True)]
LogitBias = dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]


class OpenWire(Wire):
    """Base of the parts of a request that clients of other servers extend. Undeclared fields are kept, refused if they
    would change the response, and otherwise listed by `unknown_fields`."""

    model_config = ConfigDict(extra="allow")

    refused: ClassVar[Mapping[str, Refusal]] = {}
    harmless: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        """Raise one error for each refused field, in the order of the table."""
        given = {name: data[name] for name in cls.refused if name in data} if isinstance(data, dict) else {}
        errors = [
            _unsupported(name, cls.refused[name])
            for name, value in given.items()
            if name not in cls.model_fields and value is not None and value not in cls.refused[name].neutral
        ]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return data

    def unknown_fields(self) -> Iterator[str]:
        """Yield the paths of the fields that are neither applied, refused nor harmless."""
        extra = self.model_extra or {}
        yield from (name for name in extra if name not in self.refused and name not in self.harmless)
        for name in type(self).model_fields:
            value = getattr(self, name)
            for path, part in _parts(name, value):
                yield from (f"{path}.{unknown}" for unknown in part.unknown_fields())


def _unsupported(name: str, refusal: Refusal) -> InitErrorDetails:
    context = {"instead": refusal.instead}
    error = PydanticCustomError("unsupported", "is not supported with this value{instead}", context)
    return InitErrorDetails(type=error, loc=(name,), input=None)


def _parts(name: str, value: Any) -> Iterator[tuple[str, OpenWire]]:
    if isinstance(value, OpenWire):
        yield name, value
    elif isinstance(value, list):
        yield from ((f"{name}.{i}", part) for i, part in enumerate(value) if isinstance(part, OpenWire))
