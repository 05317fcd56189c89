"""The result of a long run: JSON, a plot, and a line in docs/reliability.md."""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from docs.reliability import ROOT, record
from load_tests.endurance.faults import Faults
from load_tests.endurance.samples import slopes
from load_tests.world import World
from tests.fixtures.reliability import machine

RESULTS = ROOT / "load_tests" / "results"


def report(
    kind: str, world: World, samples: Sequence[dict[str, float]], faults: Faults | None, seconds: float
) -> dict[str, Any]:
    recoveries: dict[str, list[float]] = defaultdict(list)
    for name, _, took in faults.recoveries if faults else []:
        recoveries[name].append(took)
    return {
        "kind": kind,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "minutes": round(seconds / 60, 1),
        "operations": world.counts.total(),
        "outcomes": dict(sorted(world.counts.items())),
        "wrong_tokens": 0,  # the first one ends the run
        "lost_uploads": 0,
        "unexplained_errors": 0,
        "faults": sum(map(len, recoveries.values())),
        "recovery_seconds": {
            name: {"times": len(took), "median": round(statistics.median(took), 2), "longest": round(max(took), 2)}
            for name, took in sorted(recoveries.items())
        },
        "growth_per_1000_operations": slopes(samples),
        "samples": [{name: round(value, 2) for name, value in sample.items()} for sample in samples],
    }


def write(found: dict[str, Any], case: str, busy: str) -> None:
    """Write the run's JSON and plot, and its line in the results."""
    name = f"{found['kind']}-{found['date']}"
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found).savefig(RESULTS / f"{name}.png", dpi=110)
    growth = found["growth_per_1000_operations"]
    figures = [
        f"{found['minutes']} minutes{busy}, {found['operations']:,} operations, {found['faults']} faults",
        "0 wrong tokens, 0 lost uploads, 0 errors that no fault explains",
    ]
    if growth:
        figures.append(f"growth per 1,000 operations: engine {growth['engine_mib']} MiB, API {growth['api_mib']} MiB")
    told = {"command": f"make {found['kind']}", "file": f"load_tests/results/{name}.png", "figures": figures}
    record(case, "run", {**told, "date": found["date"], "machine": found["machine"]})


def plot(found: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 7), layout="constrained")
    memory, counts, operations = figure.subplots(3, 1, sharex=True)
    samples = found["samples"]
    at = [sample["seconds"] / 60 for sample in samples]
    for process in ("api", "engine"):
        memory.plot(at, [sample[f"{process}_mib"] for sample in samples], ".", markersize=2, label=f"{process}, MiB")
        for what in ("descriptors", "threads"):
            values = [sample[f"{process}_{what}"] for sample in samples]
            counts.plot(at, values, ".", markersize=2, label=f"{process}, {what}")
    operations.plot(at, [sample["operations"] for sample in samples], label="operations")
    for axes in (memory, counts, operations):
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right", fontsize=8)
    operations.set_xlabel("minutes")
    figure.suptitle(f"{found['kind']}, {found['date']}, {found['machine']}")
    return figure
