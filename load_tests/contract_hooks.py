"""Generated requests name a model that exists and upload adapters that fit it, so that most get past the first checks.
The `coverage` phase, which takes no hooks, has others."""

import os
from pathlib import Path
from typing import Any

import schemathesis

from adapters.peft.files import FILES
from server.api.fields import SELECTORS

MAX_NAME = 256
MODEL = os.environ["LORAPLEX_MODEL"]
ADAPTER = {name: (Path(os.environ["LORAPLEX_ADAPTER"]) / name).read_bytes() for name in FILES}


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Replace valid values alone: a body that is wrong has to stay so."""
    if not isinstance(body, dict):
        return body
    if all(isinstance(body.get(name), bytes) for name in FILES):
        return {name: value for name, value in body.items() if not isinstance(value, bytes)} | ADAPTER
    if not _is_name(body.get("model")):
        return body
    kept = {name: value for name, value in body.items() if name not in SELECTORS or not _is_name(value)}
    return kept | {"model": MODEL}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME
