"""Requested moves, pins and retirements of adapters that are not complete. Does not use torch."""

import logging
from collections.abc import Set
from typing import Any

from adapters.errors import MoveRefused
from adapters.residency.residency import Residency
from server.engine.faults import failure_reply
from server.ipc.messages import MoveAdapter, PinAdapter, Reply

log = logging.getLogger(__name__)

_TIERS = ("disk", "host", "device")


class AdapterMoves:
    """Pending requests for moves and pins; `poll` advances them between steps."""

    def __init__(self, residency: Residency[Any]) -> None:
        self._residency = residency
        self._pending: list[MoveAdapter | PinAdapter] = []
        self._retired: set[str] = set()  # versions that no name points at: unloaded once nothing uses them
        self._withdrawn: list[Reply] = []

    def __bool__(self) -> bool:
        return bool(self._pending or self._retired or self._withdrawn)

    def digests(self) -> set[str]:
        return {request.digest for request in self._pending}

    def add(self, request: MoveAdapter | PinAdapter) -> None:
        if isinstance(request, PinAdapter) and not request.pinned:
            self._withdraw(request.digest, "the adapter was unpinned meanwhile", with_moves=False)
        self._residency.forget_failure(request.digest)
        self._pending.append(request)

    def retire(self, digest: str) -> None:
        """Unpin a version without names, and unload it once no sequence uses it."""
        self._withdraw(digest, "the adapter was deleted meanwhile", with_moves=True)
        self._residency.unpin(digest)
        self._retired.add(digest)

    def unretire(self, digest: str) -> None:
        self._retired.discard(digest)

    def poll(self) -> list[Reply]:
        """Advance all requests; return replies to those that are complete or refused."""
        replies, self._withdrawn = self._withdrawn, []
        waiting = []
        for request in self._pending:
            try:
                if not self._advance(request):
                    waiting.append(request)
                    continue
                replies.append(Reply(request.request_id))
            except MoveRefused as refused:
                replies.append(Reply(request.request_id, (refused.code, str(refused))))
            except Exception:
                log.exception("%s of %s failed", type(request).__name__, request.digest)
                replies.append(failure_reply(request.request_id))
        self._pending = waiting
        return replies

    def unload_retired(self, in_use: Set[str]) -> None:
        for digest in self._retired - in_use if self._retired else ():
            try:
                self._residency.unload(digest)
            except MoveRefused:  # it is being loaded; retry later
                continue
            except Exception:
                log.exception("unloading %s failed", digest)
            self._retired.discard(digest)

    def _withdraw(self, digest: str, why: str, *, with_moves: bool) -> None:
        """Refuse pending pins of the version, and its moves if `with_moves`: completed later, they would undo a newer
        request."""
        for request in [request for request in self._pending if request.digest == digest]:
            if request.pinned if isinstance(request, PinAdapter) else with_moves:
                self._pending.remove(request)
                self._withdrawn.append(Reply(request.request_id, ("busy", why)))

    def _advance(self, request: MoveAdapter | PinAdapter) -> bool:
        """Return whether `request` is complete; otherwise start it. Raises `MoveRefused`."""
        digest = request.digest
        if isinstance(request, PinAdapter) and not request.pinned:
            self._residency.unpin(digest)
            return True
        if isinstance(request, MoveAdapter) and request.tier == "disk":
            self._residency.unload(digest)
            return True
        self.unretire(digest)
        tier = request.tier if isinstance(request, MoveAdapter) else "device"
        if _TIERS.index(self._residency.where(digest)) < _TIERS.index(tier):
            self._residency.bring(digest, tier, urgent=isinstance(request, MoveAdapter) and request.urgent)
            return False
        if isinstance(request, PinAdapter):
            self._residency.pin(digest)
        return True
