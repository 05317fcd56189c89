"""The GPU benchmark runs to its end where there is no GPU, tiny and in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from load_tests.gpu.setting import TINY, smoke
from tests.fixtures.triton_device import require_triton

require_triton()

ROOT = Path(__file__).parent.parent


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_it_measures_every_section_and_writes_what_it_found(tmp_path: Path) -> None:
    done = python("-m", "load_tests.gpu", "--smoke", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(next(tmp_path.glob("smoke-*.json")).read_text())
    results = written["results"]
    sections = {"ceilings", "decode", "prefill", "loading", "streams", "kernels", "fused", "nf4"}
    assert {row["section"] for row in results} == sections
    assert {row["arm"] for row in results if row["section"] == "fused"} == {"torch", "base", "expand", "fused", "side"}
    assert {(row["rows"], row["adapters"]) for row in results if row["section"] == "decode"} == {
        (1, 0), (1, 1), (2, 0), (2, 1), (2, 2),
    }  # fmt: skip
    assert all(row["largest_error"] < 0.05 for row in results if "largest_error" in row)
    assert all(f"kernels of {name} are left out" in str(written["notes"]) for name in ("vllm", "sglang"))


def test_the_model_is_the_one_that_the_server_runs() -> None:
    """Siblings are stacked: five groups with the head, and not eight linears."""
    from load_tests.gpu.models import build_runner

    runner = build_runner(TINY, smoke())
    assert [len(group.names) for group in runner.groups()] == [3, 1, 2, 1, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run for minutes")
def test_without_a_gpu_it_says_so() -> None:
    done = python("-m", "load_tests.gpu")
    assert done.returncode == 1 and "no CUDA device" in done.stderr
