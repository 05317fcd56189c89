"""Functions that a model may call, and calls of them."""

import json
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from server.api.requests.wire import OpenWire, Text


class Function(OpenWire):
    """A function that the model may call. `strict` is not declared: arguments are not held to their schema."""

    name: str = Field(min_length=1, max_length=256)
    description: Text | None = None
    parameters: dict[str, Any] | None = None

    def as_schema(self) -> dict[str, Any]:
        """Return the JSON schema of the function as chat templates read it."""
        described = {} if self.description is None else {"description": self.description}
        parameters = {"type": "object", "properties": {}} if self.parameters is None else self.parameters
        return {"type": "function", "function": {"name": self.name, **described, "parameters": parameters}}


class Tool(OpenWire):
    type: Literal["function"]
    function: Function


class CalledFunction(OpenWire):
    name: str = Field(min_length=1, max_length=256)
    arguments: dict[str, Any]  # sent as JSON text

    @field_validator("arguments", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        """Chat templates read arguments as an object."""
        if not isinstance(value, str):
            return value or {}
        try:
            return json.loads(value or "{}")
        except (ValueError, RecursionError):
            raise PydanticCustomError("value_error", "must be the text of a JSON object") from None


class ToolCall(OpenWire):
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class NamedFunction(OpenWire):
    name: str = Field(min_length=1, max_length=256)


class NamedChoice(OpenWire):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedChoice
