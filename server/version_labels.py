"""Short labels of what computed a token: the base model, a version, or versions with their scales."""

import hashlib
from functools import lru_cache

import msgspec

from server.request import ScaledAdapter

BASE_LABEL = "base"


@lru_cache(maxsize=4096)
def version_label(adapters: tuple[ScaledAdapter, ...]) -> str:
    """Return 12 hex digits that identify the version, or all versions and scales together; "base" without adapters."""
    if not adapters:
        return BASE_LABEL
    if len(adapters) == 1 and adapters[0].scale == 1:
        return adapters[0].digest[:12]
    return hashlib.sha256(msgspec.json.encode(adapters)).hexdigest()[:12]
