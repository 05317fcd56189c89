"""Merged mode: decides when a version is merged into the base model and when it is unmerged. Does not use torch.

none → preparing (a thread computes the merged weights) → waiting (sequences of other models finish) → merged → leaving
(running sequences acquire device slots) → none. `advance`, which the engine calls between steps, swaps the weights.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

from adapters.errors import AdapterError, MoveRefused, RefusalCode
from server.engine.faults import EngineBroken
from server.engine.merged_slots import enter_base, leave_base
from server.engine.scheduling.scheduler import Scheduler
from server.ipc.messages import AskedBy, Merge, MergeState, MergeStatus, MergeSwitch, Reply, SwitchReason
from server.sequence import Sequence

log = logging.getLogger(__name__)

Clock = Callable[[], float]  # seconds; the clock of `Sequence.arrival`


class Merged(Protocol):
    """The merged weights of a version (adapters/runtime/weight_merge.py)."""

    @property
    def requantized(self) -> bool: ...

    def install(self) -> None:
        """Replace the base model's weights. If it raises `MoveRefused`, the base model is unchanged."""

    def restore(self) -> None: ...


Prepare = Callable[[str, bool], "Future[Merged]"]  # takes a digest and whether requantizing is allowed


class MergePolicy:
    """Chooses the version to merge automatically: one that has received all traffic for `window` seconds, with at least
    `min_requests` requests, and not within `cooldown` seconds after a merge has ended or failed."""

    def __init__(self, window: float, min_requests: int, cooldown: float, clock: Clock = time.monotonic):
        self._window, self._cooldown, self._clock = window, cooldown, clock
        self._owner: str | None = None
        self._since = 0.0
        self._arrivals: deque[float] = deque(maxlen=min_requests)
        self._not_before = float("-inf")

    def arrived(self, version: str | None) -> None:
        """Record a request for `version` (None: the base model)."""
        now = self._clock()
        if version != self._owner or not self._arrivals:
            self._owner, self._since = version, now
            self._arrivals.clear()
        self._arrivals.append(now)

    def ended(self) -> None:
        self._not_before = self._clock() + self._cooldown

    def choice(self) -> str | None:
        now = self._clock()
        if self._owner is None or now - self._since < self._window or now < self._not_before:
            return None
        busy = len(self._arrivals) == self._arrivals.maxlen and now - self._arrivals[0] <= self._window
        return self._owner if busy else None


@dataclass(slots=True)
class Merging:
    """The state machine of merged mode. At most one version is merged. Automatic merges always yield to requests for
    other models; manual merges do so if `gives_way` (otherwise the API refuses such requests)."""

    scheduler: Scheduler
    prepare: Prepare
    gives_way: bool = True
    policy: MergePolicy | None = None
    clock: Clock = time.monotonic
    status: MergeStatus = field(default_factory=MergeStatus)
    changed: bool = False
    _request: Merge | None = None  # not answered yet
    _drain: bool = False
    _unmerges: list[int] = field(default_factory=list)  # request ids, not answered yet
    _future: "Future[Merged] | None" = None
    _merged: Merged | None = None
    _leaves: SwitchReason = "request"
    _replies: list[Reply] = field(default_factory=list)
    _switches: list[MergeSwitch] = field(default_factory=list)

    def has_work(self) -> bool:
        return self.changed or bool(self._replies) or self.status.state not in ("none", "merged")

    # -- requests ------------------------------------------------------------------------------------------------

    def arrived(self, version: str | None) -> None:
        if self.policy is not None:
            self.policy.arrived(version)

    def merge(self, request: Merge) -> None:
        same = self.status.digest == request.digest
        if self.status.state == "merged" and same:
            self._set("merged", request.digest, "request")
            self._replies.append(Reply(request.request_id))
        elif self.status.state != "none":
            which = "this adapter is being merged or unmerged" if same else "another adapter is merged"
            self._replies.append(Reply(request.request_id, ("busy", f"{which}; unmerge it first")))
        elif not request.drain and self._in_the_way(request.digest):
            reason = "requests of other models are running; set drain to wait for them"
            self._replies.append(Reply(request.request_id, ("busy", reason)))
        else:
            self._request, self._drain = request, request.drain
            self._start(request.digest, request.allow_requantize)

    def unmerge(self, request_id: int) -> None:
        self._unmerges.append(request_id)
        self.leave("request")

    def leave(self, reason: SwitchReason, digest: str | None = None) -> None:
        """Begin to unmerge, or cancel a merge in progress; with `digest`, only if it is that version."""
        if digest not in (None, self.status.digest):
            return
        if self.status.state == "merged":
            self._leaves = reason
            self._set("leaving", self.status.digest, self.status.asked_by)
        elif self.status.state in ("preparing", "waiting"):
            self._give_up("busy", "the merge was cancelled")
        if self.status.state == "none":
            self._answer_unmerges()

    # -- between steps -------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Advance the state as far as possible; called between steps."""
        digest = self.status.digest
        if self.status.state == "none":
            self._consider()
        elif self.status.state == "preparing":
            self._take_prepared()
        elif self.status.state == "merged" and self._yields() and self._in_the_way(digest):
            self.leave("others")
        if self.status.state == "waiting" and not self._in_the_way(digest):
            self._install()
        if self.status.state == "leaving" and leave_base(self.scheduler):
            self._restore()

    def refused(self) -> list[Sequence]:
        """Return the sequences that cannot run while this merge lasts because it does not yield. They are requests of
        other models that passed the API before the merge was requested."""
        if self.scheduler.gate.owner is None or self.status.state == "leaving" or self._yields():
            return []
        return [seq for seq in self.scheduler.waiting if not self.scheduler.gate.admits(seq)]

    def take_replies(self) -> list[Reply]:
        replies, self._replies = self._replies, []
        return replies

    def take_switches(self) -> list[MergeSwitch]:
        switches, self._switches = self._switches, []
        return switches

    def _yields(self) -> bool:
        return self.gives_way or self.status.asked_by == "policy"

    def _in_the_way(self, digest: str | None) -> bool:
        """Return whether sequences of other models run, or wait without being held back by this merge; once merged,
        whether any of them wait."""
        gate, waiting = self.scheduler.gate, self.scheduler.waiting
        queued = waiting if gate.merged else filter(gate.admits, waiting)
        return any(seq.sole_adapter != digest for seq in (*self.scheduler.running, *queued))

    def _consider(self) -> None:
        choice = None if self.policy is None else self.policy.choice()
        if choice is not None and not self._in_the_way(choice):
            self._drain = False
            self._start(choice, False)

    def _start(self, digest: str, allow_requantize: bool) -> None:
        try:
            self._future = self.prepare(digest, allow_requantize)
        except Exception:
            log.exception("merging %s could not begin", digest)
            self._give_up("failed", "the merge could not begin; the server's log has details")
            return
        self._set("preparing", digest, "policy" if self._request is None else "request")

    def _take_prepared(self) -> None:
        assert self._future is not None and self.status.digest is not None
        if not self._future.done():
            return
        try:
            self._merged = self._future.result()
        except MoveRefused as refused:
            self._give_up(refused.code, str(refused))
        except AdapterError as error:
            self._give_up("invalid", str(error))
        except Exception:  # raised in the thread; the engine must continue in any case
            log.exception("merging %s failed", self.status.digest)
            self._give_up("no_room", "the merged weights could not be computed; the server's log has details")
        else:
            if not self._drain and self._in_the_way(self.status.digest):
                self._give_up("busy", "requests of other models arrived meanwhile; set drain to wait for them")
                return
            self.scheduler.gate.close(self.status.digest, self.clock())
            self._set("waiting", self.status.digest, self.status.asked_by)

    def _install(self) -> None:
        assert self._merged is not None and self.status.digest is not None
        try:
            self._merged.install()
        except MoveRefused as refused:
            self._give_up(refused.code, str(refused))
            return
        except Exception:
            log.exception("the merged weights of %s could not be put in place", self.status.digest)
            self._put_back()
            self._give_up("failed", "the merged weights could not be put in place; the server's log has details")
            return
        enter_base(self.scheduler)
        self._set("merged", self.status.digest, self.status.asked_by)
        self._switch("merge", self.status.asked_by or "request")
        if self._request is not None:
            self._replies.append(Reply(self._request.request_id))
            self._request = None

    def _restore(self) -> None:
        self._put_back()
        self._switch("unmerge", self._leaves)
        self._clear()

    def _put_back(self) -> None:
        """Restore the base model's own weights. Raises `EngineBroken` if which weights are in place is not known."""
        assert self._merged is not None
        try:
            self._merged.restore()
        except Exception as error:
            log.exception("the base model's own weights could not be put back")
            raise EngineBroken("the base model's own weights could not be put back") from error

    def _give_up(self, code: RefusalCode, why: str) -> None:
        """Cancel a merge before the base model's weights have changed."""
        if self._request is not None:
            self._replies.append(Reply(self._request.request_id, (code, why)))
        else:
            log.info("not merged: %s", why)
        self.scheduler.gate.open()
        self._clear()

    def _clear(self) -> None:
        self._request = self._future = self._merged = None
        if self.policy is not None:
            self.policy.ended()
        self._set("none", None, None)
        self._answer_unmerges()

    def _set(self, state: MergeState, digest: str | None, asked_by: AskedBy | None) -> None:
        requantized = self._merged is not None and self._merged.requantized
        self.status, self.changed = MergeStatus(state, digest, asked_by, requantized), True

    def _switch(self, direction: Literal["merge", "unmerge"], reason: SwitchReason) -> None:
        assert self.status.digest is not None
        self._switches.append(MergeSwitch(self.status.digest, direction, reason))
        log.info("%sd %s (%s)", direction, self.status.digest[:12], reason)

    def _answer_unmerges(self) -> None:
        self._replies += [Reply(request_id) for request_id in self._unmerges]
        self._unmerges.clear()
