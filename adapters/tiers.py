"""The tiers that hold adapter versions, and the record of a move between two of them."""

from typing import Literal

import msgspec

Tier = Literal["disk", "host", "device"]


class AdapterMove(msgspec.Struct, frozen=True, array_like=True):
    """A version was moved between tiers, or failed to. Evictions move down ("device" to "host", "host" to "disk")."""

    digest: str
    source: Tier
    target: Tier
    outcome: Literal["ok", "failed"]
    seconds: float
    error: str | None = None
