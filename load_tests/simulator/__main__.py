"""Run the simulations and write their report.

python -m load_tests.simulator [--requests 1000] [--only slots,tenants] [--out simulation-results] [--docs]
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from load_tests.simulator.report import Finding, write, write_docs
from load_tests.simulator.scenarios import SCENARIOS, Scenario, simulate


def find(scenarios: list[Scenario], processes: int) -> list[Finding]:
    with ProcessPoolExecutor(processes) as pool:
        begun = [(scenario, [pool.submit(simulate, run) for run in scenario.runs]) for scenario in scenarios]
        return [Finding(scenario, [future.result() for future in futures]) for scenario, futures in begun]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load_tests.simulator", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000, help="requests in most runs")
    parser.add_argument("--only", default=",".join(SCENARIOS), help="names of scenarios")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("simulation-results"))
    parser.add_argument("--docs", action="store_true", help="write the tables and plots of docs/simulation.md too")
    given = parser.parse_args()
    started = time.perf_counter()
    findings = find([SCENARIOS[name](given.requests) for name in given.only.split(",")], given.processes)
    json_file, html_file = write(findings, given.out)
    if given.docs:
        write_docs(findings)
    runs = [summary for finding in findings for summary in finding.summaries]
    total = sum(summary.requests for summary in runs)
    print(f"{len(runs)} runs, {total:,} requests, {time.perf_counter() - started:.0f} s: {json_file}, {html_file}")


if __name__ == "__main__":
    main()
