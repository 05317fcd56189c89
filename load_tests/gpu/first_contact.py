"""The steps of the first contact, each in a process of its own with a limit of its own: what one finds is written line
by line, and what dies takes nothing along. This module imports nothing that could fail. See first_contact.sh."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOTAL = 555.0  # seconds of all steps
SMOKE_TIMES = 10  # a CPU and the interpreter take longer; nothing is measured there
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Step:
    """`command` follows the interpreter; `{lines}` stands for the file of results. `--smoke` leaves out what needs a
    GPU."""

    name: str
    limit: float
    command: tuple[str, ...]
    needs_gpu: bool = False


def section(name: str, limit: float, needs_gpu: bool = False) -> Step:
    return Step(name, limit, ("-m", "load_tests.gpu", "--only", name, "--lines", "{lines}"), needs_gpu)


TESTS = [
    "-m", "pytest", "-c", "/dev/null", "--rootdir", ".", "--noconftest", "-q", "-rfE",
    "--junitxml", "{out}/triton-tests.xml", "-p", "no:cacheprovider",
]  # fmt: skip
STEPS = [
    section("ceilings", 30),
    section("correctness", 110),
    Step("triton tests", 90, (*TESTS, "-n", "8", *sorted(str(p) for p in ROOT.glob("tests/test_triton_*.py"))), True),
    section("decode", 100),
    section("profile", 50, needs_gpu=True),
    section("prefill", 60),
    section("kernels", 60),
    section("fused", 45),
    section("nf4", 30),
    section("streams", 75),
    section("loading", 45),
    Step("memory checker", 60, ("-m", "load_tests.gpu", "--only", "launches"), needs_gpu=True),
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="first_contact.sh")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "load_tests/results/first-contact")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    for old in ("results.jsonl", "log.txt", "triton-tests.xml", "summary.md"):
        (out / old).unlink(missing_ok=True)
    end = time.monotonic() + TOTAL * (SMOKE_TIMES if options.smoke else 1)
    for step in STEPS:
        _add(out, run(step, out, end - time.monotonic(), options.smoke))
        print(summary(out).splitlines()[-1], flush=True)
    text = summary(out)
    (out / "summary.md").write_text(text + tables(out))
    print(text)
    failed = [
        row for row in rows(out) if row.get("outcome", "done") not in ("done", "left out") or row.get("ok") is False
    ]
    sys.exit(1 if failed else 0)


def run(step: Step, out: Path, left: float, smoke: bool) -> dict[str, Any]:
    """Run one step; return the line that tells how it ended."""
    line: dict[str, Any] = {"step": step.name}
    if smoke and step.needs_gpu:
        return line | {"outcome": "left out", "why": "it needs a GPU"}
    if left < 5:
        return line | {"outcome": "left out", "why": "the time is over"}
    started = time.monotonic()
    with (out / "log.txt").open("ab") as log:
        log.write(f"\n===== {step.name}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command(step, out, smoke), cwd=ROOT, env=environment(smoke), stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(min(step.limit * (SMOKE_TIMES if smoke else 1), left))
            outcome = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            outcome = "ended at its limit"
        finally:
            _kill(process)
    return line | {"outcome": outcome, "seconds": round(time.monotonic() - started, 1)}


def command(step: Step, out: Path, smoke: bool) -> list[str]:
    places = {"{lines}": str(out / "results.jsonl"), "{out}/triton-tests.xml": str(out / "triton-tests.xml")}
    arguments = [places.get(part, part) for part in step.command]
    if "load_tests.gpu" in arguments:
        arguments += ["--smoke"] if smoke else []
        arguments += ["--vllm", os.environ["VLLM"]] if os.environ.get("VLLM") else []
    checker = shutil.which("compute-sanitizer") if step.name == "memory checker" else None
    return [*([checker, "--error-exitcode", "9"] if checker else []), sys.executable, *arguments]


def environment(smoke: bool) -> dict[str, str]:
    return {**os.environ, "TRITON_INTERPRET": "1" if smoke else "0", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the step and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _add(out: Path, line: dict[str, Any]) -> None:
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def rows(out: Path) -> Iterator[dict[str, Any]]:
    """Yield the results so far; a line that a dying process left unfinished is passed over."""
    for line in (out / "results.jsonl").read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def summary(out: Path) -> str:
    """Return one line per step and per check that failed."""
    lines, count = [], 0
    for row in rows(out):
        if "step" in row:
            lines.append(f"{row['step']}: {row['outcome']} {row.get('seconds', row.get('why'))}, {count} results")
            count = 0
        else:
            count += 1
            if row.get("ok") is False:
                lines.append(f"  WRONG: {row['check']}: {row['error']}")
    return "\n".join(lines)


def tables(out: Path) -> str:
    try:
        from load_tests.gpu.writing import table
    except ImportError as error:
        return f"\n(no tables: {error})\n"
    return "\n" + table([row for row in rows(out) if "section" in row])


if __name__ == "__main__":
    main()
