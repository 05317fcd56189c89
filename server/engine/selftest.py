"""Self-tests of new adapters: a probe prompt through the serving path and through the reference arithmetic."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from adapters.errors import AdapterError
from adapters.residency.residency import Residency
from adapters.runtime.pack import PackedAdapter
from adapters.runtime.reference import ReferenceAdapter
from adapters.weights import AdapterWeights
from server.engine.faults import EngineBroken, failure_reply, is_lost
from server.engine.scheduling.merge_gate import MergeGate
from server.engine.weights_reader import WeightsReader
from server.ipc.messages import Reply, RunSelfTest, SelfTest
from server.model.loading.probe import TOLERANCE, relative_error
from server.model.runner import ModelRunner
from server.model.selftest import try_adapter

log = logging.getLogger(__name__)

SLOT_WAIT_SECONDS = 10.0  # how long a self-test waits for a device slot


@dataclass(slots=True)
class _Pending:
    request: RunSelfTest
    reference: "Future[ReferenceAdapter]"
    deadline: float = field(default_factory=lambda: time.monotonic() + SLOT_WAIT_SECONDS)


class SelfTests:
    """Pending self-tests. Each runs two short forward passes between steps; slower work runs in a thread."""

    def __init__(
        self,
        runner: ModelRunner,
        residency: Residency[PackedAdapter],
        reader: WeightsReader[AdapterWeights],
        gate: MergeGate,
        on_thread_start: Callable[[], None],
    ) -> None:
        self._runner = runner
        self._residency = residency
        self._reader = reader
        self._gate = gate
        self._threads = ThreadPoolExecutor(1, "adapter-reference", initializer=on_thread_start)
        self._pending: list[_Pending] = []

    def __bool__(self) -> bool:
        return bool(self._pending)

    def digests(self) -> set[str]:
        return {test.request.digest for test in self._pending}

    def add(self, request: RunSelfTest) -> None:
        self._residency.forget_failure(request.digest)
        self._reader.share(request.digest, verify=request.verify)
        self._pending.append(_Pending(request, self._threads.submit(self._reference, request.digest)))

    def advance(self) -> list[Reply]:
        """Run the self-tests that are ready; return replies to them and to those that cannot run."""
        replies = []
        for test in list(self._pending):
            reply = self._contained(test)
            if reply is not None:
                self._pending.remove(test)
                self._reader.unshare(test.request.digest)
                replies.append(reply)
        return replies

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _reference(self, digest: str) -> ReferenceAdapter:
        return ReferenceAdapter.of(self._reader.read(digest), self._runner.bases)

    def _contained(self, test: _Pending) -> Reply | None:
        """Advance one test. An exception ends this test and nothing else, unless the device is lost."""
        try:
            return self._advance(test)
        except Exception as error:
            log.exception("the self-test of %s failed", test.request.digest)
            if is_lost(self._runner.device):
                raise EngineBroken("the device was lost in the self-test of an adapter") from error
            if isinstance(error, torch.OutOfMemoryError):
                return Reply(test.request.request_id, ("no_room", "the device had no memory for the self-test"))
            return failure_reply(test.request.request_id)

    def _advance(self, test: _Pending) -> Reply | None:
        request = test.request
        reason = self._residency.failure(request.digest)
        if reason is not None:
            return Reply(request.request_id, ("invalid", reason))
        if self._gate.merged:  # the test needs the base model's own weights
            return Reply(request.request_id, ("no_room", "an adapter is merged into the base model"))
        if not test.reference.done():
            return None
        if self._residency.acquire(request.digest) is None:
            late = time.monotonic() > test.deadline
            return Reply(request.request_id, ("no_room", "no device slot became free")) if late else None
        try:
            return self._run(request, test.reference)
        finally:
            self._residency.release(request.digest)

    def _run(self, request: RunSelfTest, reference: "Future[ReferenceAdapter]") -> Reply:
        try:
            adapter = reference.result()
        except AdapterError as error:
            return Reply(request.request_id, ("invalid", str(error)))
        slot = self._residency.slots.get(request.digest)
        assert slot is not None
        served, expected = try_adapter(self._runner, slot, adapter)
        largest = float((served - expected).abs().max())
        if self._runner.is_routed and self._runner.pool.dtype is not torch.float32:
            served, expected = _closest_rows(served, expected)
        result = SelfTest(largest, relative_error(served, expected), TOLERANCE[self._runner.pool.dtype])
        return Reply(request.request_id, selftest=result)


def _closest_rows(served: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return three quarters of the rows, those that differ least: where experts are nearly tied, rounding changes
    which of them a router chooses, and with it a whole row."""
    errors = (served - expected).square().mean(-1).nan_to_num(torch.inf)
    rows = errors.argsort()[: len(served) * 3 // 4]
    return served[rows], expected[rows]
