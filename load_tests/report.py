"""What is written of a run: one JSON file with everything, and one HTML file to read."""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

import msgspec

from load_tests.plots import plots
from load_tests.runner import Run
from load_tests.summary import Latencies, Percentiles, Summary, summarize
from load_tests.verdict import Verdict, verdicts

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums } th, td:first-child { text-align: left }
img { max-width: 100% } .failed { color: #b00; font-weight: bold }
pre { background: #f6f6f6; padding: 1rem; overflow: auto }
"""


class Report(msgspec.Struct, frozen=True):
    """The JSON file. `run` has the scenario, the seed and every request, so that it can be drawn anew."""

    passed: bool
    verdicts: list[Verdict]
    summary: Summary
    run: Run


def report_of(run: Run) -> Report:
    summary = summarize(run)
    judged = verdicts(run.scenario.thresholds, summary)
    return Report(all(verdict.passed for verdict in judged), judged, summary, run)


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """`SCENARIO.json` and `SCENARIO.html` in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    json_file, html_file = (folder / f"{report.run.scenario.name}.{suffix}" for suffix in ("json", "html"))
    json_file.write_bytes(msgspec.json.encode(report))
    html_file.write_text(html(report), encoding="utf-8")
    return json_file, html_file


def html(report: Report) -> str:
    """One page that needs nothing else."""
    run = report.run
    title = f"Load test: {run.scenario.name}"
    outcome = "passed" if report.passed else "failed"
    parts = [
        f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)} <span class='{outcome}'>{outcome}</span></h1><p>{escape(run.scenario.description)}</p>",
        f"<p>{escape(run.url)}, seed {run.seed}</p>",
        "<h2>Thresholds</h2>",
        _table(("threshold", "bound", "found", ""), map(_verdict_row, report.verdicts)),
        "<h2>Throughput</h2>",
        _table(("", ""), _throughput_rows(report.summary)),
        "<h2>Latency</h2><p>In seconds from the scheduled time; p50 / p90 / p99 / max.</p>",
        _table(("", "requests", "failed", "first token", "between tokens", "end to end"), _class_rows(report.summary)),
        *(f"<h2>{escape(name)}</h2>{_image(svg)}" for name, svg in plots(run).items()),
        "<h2>Scenario</h2>",
        f"<pre>{escape(msgspec.json.format(msgspec.json.encode(run.scenario), indent=2).decode())}</pre></html>",
    ]
    return "\n".join(parts)


def text(report: Report) -> str:
    """A few lines for the terminal."""
    summary = report.summary
    rows = [*_throughput_rows(summary), *((row[0], *row[3:]) for row in _class_rows(summary))]
    lines = [f"{report.run.scenario.name}: {'passed' if report.passed else 'FAILED'}"]
    lines += ["  " + "   ".join(f"{cell:<24}" for cell in row).rstrip() for row in rows]
    lines += [
        f"  FAILED {v.threshold}: {_number(v.found)}, bound {_number(v.bound)}" for v in report.verdicts if not v.passed
    ]
    return "\n".join(lines)


def _throughput_rows(summary: Summary) -> list[tuple[str, str]]:
    rows = [
        ("requests per second", _number(summary.requests_per_s)),
        ("output tokens per second", _number(summary.output_tokens_per_s)),
        ("prompt tokens per second", _number(summary.prompt_tokens_per_s)),
        ("goodput, share", _number(summary.goodput.share)),
        ("goodput, per second", _number(summary.goodput.requests_per_s)),
        ("measured, s", _number(summary.measured_s)),
        ("warm-up, requests", str(summary.warm_up_requests)),
        ("sent late by, s", _percentiles(summary.send_lag_s)),
        ("adapter changes", f"{summary.changes}, failed {summary.failed_changes}, s {_percentiles(summary.change_s)}"),
    ]
    return rows + [(f"error {name}", str(count)) for name, count in summary.errors.items()]


def _class_rows(summary: Summary) -> list[tuple[str, ...]]:
    return [_latency_row("all", summary.all), *(_latency_row(name, found) for name, found in summary.classes.items())]


def _latency_row(name: str, found: Latencies) -> tuple[str, ...]:
    values = (found.ttft_s, found.itl_s, found.e2e_s)
    return name, str(found.requests), str(found.failed), *map(_percentiles, values)


def _verdict_row(verdict: Verdict) -> tuple[str, ...]:
    outcome = "passed" if verdict.passed else "failed"
    return verdict.threshold, _number(verdict.bound), _number(verdict.found), outcome


def _percentiles(found: Percentiles | None) -> str:
    return "–" if found is None else " / ".join(map(_number, msgspec.structs.astuple(found)))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = "".join(f"<th>{escape(cell)}" for cell in head)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) for row in rows)
    return f"<table><tr>{header}{body}</table>"


def _cell(cell: str) -> str:
    return f"<td{' class=failed' if cell == 'failed' else ''}>{escape(cell)}"


def _image(svg: bytes) -> str:
    return f"<img alt='' src='data:image/svg+xml;base64,{base64.b64encode(svg).decode()}'>"
