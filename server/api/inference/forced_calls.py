"""The JSON schema of outputs that must call functions."""

from collections.abc import Sequence
from typing import Any

from server.api.errors import bad_request
from server.api.requests.functions import Function


def calls_schema(functions: Sequence[Function], *, one: bool) -> dict[str, Any]:
    """Return the schema of a call of one of `functions`, or of a list of calls. Raises 400 if their schemas define a
    name twice."""
    definitions: dict[str, Any] = {}
    calls = [_call(function, definitions) for function in functions]
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema = call if one else {"type": "array", "items": call, "minItems": 1}
    return {**schema, "$defs": definitions} if definitions else schema


def _call(function: Function, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a call. What the parameters define is moved to `definitions`, because their references begin
    at the root."""
    parameters = {"type": "object", **(function.parameters or {})}
    defined = parameters.pop("$defs", {})
    for name, schema in defined.items() if isinstance(defined, dict) else ():
        if definitions.setdefault(name, schema) != schema:
            raise bad_request(f"Two of the functions define '{name}' in '$defs', each in its own way.", "tools")
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
