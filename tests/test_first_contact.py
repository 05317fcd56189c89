"""The first contact with a GPU: no step takes another's results along, and nothing is imported that lacks there."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from load_tests.gpu import first_contact
from load_tests.gpu.first_contact import STEPS, Step, rows, run, summary
from tests.fixtures.triton_device import require_triton

require_triton()

ROOT = Path(__file__).parent.parent
WRITE = 'import sys, os, time; open(sys.argv[1], \'a\').write(\'{"section": "x", "value": 1}\\n\'); '


def test_a_step_that_dies_or_hangs_leaves_its_lines_and_the_other_steps(tmp_path: Path) -> None:
    ways = {"dies": "os._exit(3)", "hangs": "time.sleep(99)", "ends": "pass", "is killed": "os.kill(os.getpid(), 9)"}
    started = time.monotonic()
    for name, code in ways.items():
        step = Step(name, 2.0, ("-c", WRITE + code, "{lines}"))
        first_contact._add(tmp_path, run(step, tmp_path, 60, smoke=False))
    assert time.monotonic() - started < 60
    outcomes = {row["step"]: row["outcome"] for row in rows(tmp_path) if "step" in row}
    assert outcomes == {
        "dies": "failed with 3",
        "hangs": "ended at its limit",
        "ends": "done",
        "is killed": "failed with -9",
    }
    assert sum("section" in row for row in rows(tmp_path)) == len(ways)
    assert len(summary(tmp_path).splitlines()) == len(ways)


def test_a_step_without_time_is_left_out_and_a_line_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"section": "x"}\n{"sect\n{"section": "correctness", "check": "c", "ok": ')
    assert run(STEPS[0], tmp_path, 1.0, smoke=False)["outcome"] == "left out"
    assert list(rows(tmp_path)) == [{"section": "x"}]


def test_the_steps_fit_into_the_time_and_come_in_the_order_of_their_worth() -> None:
    assert [step.name for step in STEPS[:4]] == ["ceilings", "correctness", "triton tests", "decode"]
    assert sum(step.limit for step in STEPS[:5]) <= 400 and first_contact.TOTAL <= 560
    assert all(step.limit < 120 for step in STEPS)


# The modules of a usual image with torch for a GPU, and what first_contact.sh brings.
PRESENT = [
    "_pytest", "_yaml", "absl", "accelerate", "attr", "attrs", "certifi", "charset_normalizer", "click",
    "cloudpickle", "einops", "execnet", "filelock", "fsspec", "functorch", "h11", "hf_xet", "httpcore", "httpx",
    "huggingface_hub", "hypothesis", "idna", "iniconfig", "jinja2", "joblib", "markdown_it", "markupsafe",
    "mdurl", "mpmath", "msgpack", "networkx", "numpy", "packaging", "pandas", "peft", "pluggy", "psutil", "py",
    "pygments", "pytest", "pytest_timeout", "regex", "requests", "rich", "safetensors", "scipy",
    "sentencepiece", "setuptools", "shellingham", "six", "sortedcontainers", "sympy", "tabulate", "tokenizers",
    "torch", "torchgen", "tqdm", "transformers", "triton", "typer", "typing_extensions", "typing_inspect",
    "urllib3", "xdist", "yaml",
]  # fmt: skip
OF_OTHER_VERSIONS = ["anyio", "httpx2", "httpcore2", "truststore", "annotated_doc", "matplotlib"]
CARRIED = ["msgspec"]
CHECK = """
import importlib, sys
from importlib.metadata import packages_distributions
present, installed = set(sys.argv[1].split(",")), set(packages_distributions())

class Blocked:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in installed - present and top not in ("adapters", "server"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocked())
for module in sys.argv[2:]:
    importlib.import_module(module)
"""


@pytest.mark.slow
def test_nothing_is_imported_that_a_gpu_machine_lacks() -> None:
    parts = sorted(path.stem for path in (ROOT / "load_tests" / "gpu").glob("[!_]*.py"))
    modules = [f"load_tests.gpu.{part}" for part in parts] + [
        f"tests.{path.stem}" for path in [*sorted(ROOT.glob("tests/test_triton_*.py")), ROOT / "tests/test_copies.py"]
    ]
    done = subprocess.run(
        [sys.executable, "-c", CHECK, ",".join([*PRESENT, *OF_OTHER_VERSIONS, *CARRIED]), *modules],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_project_and_its_wheels_are_small_enough_to_carry() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in tracked.split("\0") if name and (ROOT / name).is_file()]
    assert sum(file.stat().st_size for file in files) < 55 << 20  # with a wheel of msgspec under 60 MiB


def test_results_are_lines_of_json(tmp_path: Path) -> None:
    from load_tests.gpu.setting import Report, smoke

    report = Report(smoke(), 0.0, lines=tmp_path / "results.jsonl")
    report.add("ceilings", what="copy", gb_per_s=4000.0)
    assert [json.loads(line)["what"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == ["copy"]
    later = Report(smoke(), 0.0, lines=tmp_path / "results.jsonl")
    later.resume()
    assert later.copy_bytes_per_second == 4e12
