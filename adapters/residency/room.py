"""The rule for which versions fit on the device together. The API applies it to requests that arrive, the engine to
sequences that wait and to pins."""

from collections.abc import Mapping
from typing import Literal

Shortage = Literal["slots", "pages", "beside_pinned"]


def shortage_of(pages: Mapping[str, int], pinned: Mapping[str, int], num_slots: int, num_pages: int) -> Shortage | None:
    """Return what keeps these versions from being on the device together, or None if they fit.

    `pages` and `pinned` are pages by digest. A single version always finds room beside the pinned ones sooner or later,
    because a pin that would leave no room for one is refused.
    """
    if len(pages) > num_slots:
        return "slots"
    if sum(pages.values()) > num_pages:
        return "pages"
    together = {**pinned, **pages}
    if len(pages) > 1 and (len(together) > num_slots or sum(together.values()) > num_pages):
        return "beside_pinned"
    return None
