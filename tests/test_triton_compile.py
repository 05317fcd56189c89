"""Every Triton kernel becomes machine code for the GPU that it is meant for, also where there is none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.triton_device import require_triton

require_triton()

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_kernel_compiles_for_compute_capability_9(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fixtures.compile_triton"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    sources = [
        path.read_text() for path in [*ROOT.glob("server/**/triton_*.py"), *ROOT.glob("adapters/**/triton_*.py")]
    ]
    kernels = {name for source in sources for name in re.findall(r"@triton\.jit.*\ndef (_\w+)\(", source)}
    assert kernels and compiled >= kernels, kernels - compiled
