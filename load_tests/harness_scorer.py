"""Runs in the harness's own environment: `python harness_scorer.py '{"how": "server" | "hf", ...}'`."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lm_eval.api.registry import get_model
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager, get_task_dict


def tasks_of(settings: dict[str, Any]) -> Any:
    """Return the task anew: the requests are in it."""
    return get_task_dict([settings["task"]], TaskManager(include_path=settings["tasks"], include_defaults=False))


def score(settings: dict[str, Any], model: Any, tasks: Any) -> dict[str, Any]:
    """Return the accuracy, and the log-likelihood of every choice in the order of the questions."""
    found = evaluate(model, tasks, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"][settings["task"]], key=lambda sample: sample["doc_id"])
    values = [float(response[0]) for sample in samples for response in sample["filtered_resps"]]
    return {"accuracy": found["results"][settings["task"]]["acc,none"], "loglikelihoods": values}


def by_server(settings: dict[str, Any]) -> dict[str, Any]:
    """Score all models at once, each in a thread of its own."""
    address = {"base_url": f"{settings['url']}/v1/completions", "tokenizer_backend": "huggingface"}
    limits = {"num_concurrent": 2, "batch_size": 8, "timeout": 3600}
    client = get_model("local-completions")
    models = [client(model=name, tokenizer=settings["tokenizer"], **address, **limits) for name in settings["models"]]
    tasks = [tasks_of(settings) for _ in models]
    with ThreadPoolExecutor(len(models)) as threads:
        scores = threads.map(score, [settings] * len(models), models, tasks)
        return dict(zip(settings["models"], scores, strict=True))


def by_own_backend(settings: dict[str, Any]) -> dict[str, Any]:
    """Score one model after the other, with PEFT."""
    found = {}
    for name, folder in settings["adapters"].items():
        args = {"pretrained": settings["model"], "dtype": settings["dtype"], "device": "cpu"}
        model = get_model("hf")(**args, **({"peft": folder} if folder else {}), batch_size=settings["batch"])
        found[name] = score(settings, model, tasks_of(settings))
    return found


def main() -> None:
    settings = json.loads(sys.argv[1])
    started = time.perf_counter()
    scores = {"server": by_server, "hf": by_own_backend}[settings["how"]](settings)
    seconds = time.perf_counter() - started
    Path(settings["out"]).write_text(json.dumps({"scores": scores, "seconds": seconds}))


if __name__ == "__main__":
    main()
