"""Generated requests name a model that exists, so that most get past the first check; the coverage phase has others."""

import os
from typing import Any

import schemathesis

from server.api.fields import SELECTORS

MAX_NAME = 256
MODEL = os.environ["LORAPLEX_MODEL"]


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Replace valid names alone: a body that is wrong has to stay so."""
    if not isinstance(body, dict) or not _is_name(body.get("model")):
        return body
    kept = {name: value for name, value in body.items() if name not in SELECTORS or not _is_name(value)}
    return kept | {"model": MODEL}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME
