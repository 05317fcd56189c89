"""A short soak: random operations with a crash, every answer and every invariant as the model says."""

from pathlib import Path

import pytest

from load_tests.soak import operations


@pytest.mark.reliability("T43")
@pytest.mark.slow
def test_random_operations_with_a_crash(tmp_path: Path) -> None:
    counts = operations(tmp_path, count=200, clients=6, seed=3, crash_every=200)
    assert counts.total() == 200 and counts["crash killed"] == 1
    assert {"infer 200", "stream 200", "compose 200", "abort 200", "publish 201", "delete 200"} <= counts.keys()
