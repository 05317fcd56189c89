"""The self-test of a new adapter: the engine computes with it before it is published."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from adapters.errors import AdapterInvalid, Problem
from adapters.records import Inspected
from server.api.adapters.threads import finish_in_thread
from server.api.context import AppContext
from server.ipc.client import AdapterMoveRefused
from server.ipc.messages import SelfTest

_LIKE = "a version passed that differs from this one in nothing but its numbers"


def earlier_result(context: AppContext, name: str, digest: str) -> dict[str, Any] | None:
    """Return the recorded result of the self-test if `name` points at this version and the version passed."""
    record = context.registry.record(name) if name in context.registry else None
    if record is None or record.version.digest != digest:
        return None
    result = record.version.report.get("selftest")
    return result if isinstance(result, dict) and "max_abs_logit_diff" in result else None


@asynccontextmanager
async def self_tested(
    context: AppContext, inspected: Inspected, folder: Path, *, always: bool = False
) -> AsyncIterator[None]:
    """Run the self-test and add its result to the report. Unless `always`, a version that differs from a tested one in
    nothing but its numbers is not tested. The version is in the store inside the `async with` body, and stays there
    only if the body publishes it.

    Raises `AdapterInvalid` if the engine cannot load the adapter or its logits differ from the reference, and
    `AdapterMoveRefused` if the test itself failed.
    """
    registry, digest = context.registry, inspected.digest
    held = False

    def hold() -> bool:
        nonlocal held
        is_new = registry.hold(digest, folder)
        held = True
        return is_new

    is_tested = always or digest in registry.store  # stored bytes may have been damaged or refused before
    try:
        is_new = await finish_in_thread(hold)
        like = None if is_tested else context.tested.version_like(inspected)
        if like is not None:
            context.engine.load_soon(digest)
            inspected.report["selftest"] = {"skipped": _LIKE, "tested_version": f"sha256:{like}"}
        else:
            # Bytes that were stored earlier are not those that were hashed a moment ago.
            inspected.report["selftest"] = await _selftest(context, digest, verify=not is_new)
        if "max_abs_logit_diff" in inspected.report["selftest"]:
            context.tested.passed(inspected)
        yield
    finally:
        if held:
            await asyncio.to_thread(registry.release, digest)
        if not registry.names_of(digest):
            context.engine.retire_adapter(digest)
            await asyncio.to_thread(registry.collect_garbage, context.in_flight.digests())


async def _selftest(context: AppContext, digest: str, *, verify: bool) -> dict[str, float | str]:
    """Return the self-test's entry in the report. A full device skips the test and is not an error."""
    try:
        async with context.selftests:
            result = await context.engine.run_selftest(digest, verify=verify)
    except AdapterMoveRefused as refused:
        if refused.code == "no_room":
            return {"skipped": str(refused)}
        if refused.code in ("failed", "timeout"):  # the adapter is not to blame
            raise
        raise AdapterInvalid(
            [Problem("selftest", str(refused), "an adapter that can be loaded", "nonfinite")]
        ) from None
    if not result.relative_error <= result.tolerance:
        raise AdapterInvalid([_failed(result)])
    return {"max_abs_logit_diff": result.max_abs_logit_diff}


def _failed(result: SelfTest) -> Problem:
    """Describe a failed self-test. The error is NaN if the adapter's weights overflow the model's dtype."""
    if result.relative_error != result.relative_error:
        return Problem("selftest", "logits that are not finite", "finite logits on a probe prompt", "nonfinite")
    found = f"logits that differ from the reference by {result.relative_error:.2g} of their spread"
    return Problem("selftest", found, f"a difference of at most {result.tolerance:.2g}", "base_mismatch")
