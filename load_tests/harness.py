"""lm-evaluation-harness over one server for many adapters at once, beside its own backend for one after the other.

    python -m load_tests.harness [--adapters 16] [--questions 12] [--environment FOLDER] [--dtype float32]

The harness has a virtual environment of its own, which is made on the first use. Its task is multiple choice from a
local file: which SQL answers a question. Through the server, all adapters and the base model are scored at once by
`local-completions`; then the harness's `hf` backend scores them one after the other with `peft=`. The table has the
accuracies and the largest difference of a log-likelihood; exit code 1: an accuracy differs, or a log-likelihood by more
than 1e-3 in float32.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from load_tests.engine_bench import write_adapter
from load_tests.own_server import serving
from load_tests.peers.environments import environment
from server.model.loading.default_model import prepare_default_model

PACKAGE = "lm_eval[hf,api]==0.4.13"
DATA = Path(__file__).parent.parent / "examples" / "data" / "sql.jsonl"
SCORER = Path(__file__).parent / "harness_scorer.py"
TASK = "which_sql"
CHOICES = 4
BASE = "base"
TOLERANCE = 1e-3

_TASK = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

Scores = dict[str, Any]  # by adapter: its accuracy and its log-likelihoods


def write_task(folder: Path, questions: int) -> None:
    """The wrong choices of a question are the answers of those that follow it."""
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    lines = []
    for index in range(questions):
        answers = [rows[(index * CHOICES + offset) % len(rows)]["answer"] for offset in range(CHOICES)]
        label = index % CHOICES
        choices = [*answers[1 : label + 1], answers[0], *answers[label + 1 :]]
        question = rows[index * CHOICES % len(rows)]["prompt"]
        lines.append(json.dumps({"question": question, "choices": choices, "label": label}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    (folder / f"{TASK}.yaml").write_text(_TASK.format(task=TASK, data=folder / "questions.jsonl"))


def scored(python: Path, folder: Path, how: str, **settings: Any) -> tuple[Scores, float]:
    """Scores by the harness, and the seconds that they took without its imports."""
    out = folder / f"{how}.json"
    settings |= {"how": how, "tasks": str(folder), "task": TASK, "out": str(out)}
    subprocess.run([str(python), str(SCORER), json.dumps(settings)], check=True, cwd=folder)
    found = json.loads(out.read_text())
    return found["scores"], found["seconds"]


def report(ours: Scores, theirs: Scores) -> bool:
    """Print the table; returns whether all accuracies and log-likelihoods agree."""
    agrees = True
    for name, own in ours.items():
        other = theirs[name]
        pairs = zip(own["loglikelihoods"], other["loglikelihoods"], strict=True)
        gap = max(abs(mine - its) for mine, its in pairs)
        agrees = agrees and own["accuracy"] == other["accuracy"] and gap < TOLERANCE
        print(f"{name:12} accuracy {own['accuracy']:.3f} and {other['accuracy']:.3f}, largest difference {gap:.1e}")
    return agrees


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache" / "loraplex" / "harness")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    python = environment(options.environment, PACKAGE)
    model = prepare_default_model()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, options.questions)
        base = AutoModelForCausalLM.from_pretrained(model)
        names = [f"adapter-{i}" for i in range(options.adapters)]
        adapters = {each: str(write_adapter(base, folder / each, 8, seed)) for seed, each in enumerate(names)}
        flags = ["--model", str(model), "--served-model-name", BASE, "--dtype", options.dtype]
        flags += ["--adapter-slots", str(max(options.adapters, 1))]
        flags += [part for each, path in adapters.items() for part in ("--adapter", f"{each}={path}")]
        with serving(folder / "data", *flags) as url:
            ours, took = scored(python, folder, "server", url=url, models=[BASE, *names], tokenizer=str(model))
        started = time.perf_counter()
        theirs, alone = scored(
            python,
            folder,
            "hf",
            model=str(model),
            adapters={BASE: None, **adapters},
            dtype=options.dtype,
            batch=options.batch_size,
        )
        print(f"the harness's own backend, with imports: {time.perf_counter() - started:.0f} s")
    agrees = report(ours, theirs)
    print(
        f"{len(ours)} models at once {took:.1f} s, one after the other {alone:.1f} s: {alone / took:.2f} times as fast"
    )
    if not agrees and options.dtype == "float32":
        raise SystemExit(1)


if __name__ == "__main__":
    main()
