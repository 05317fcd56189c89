"""What is written of the simulations: one JSON file, one HTML page that needs nothing else, and the tables and plots of
docs/simulation.md."""

import base64
import io
from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from itertools import product
from pathlib import Path

import matplotlib
import msgspec
from matplotlib.figure import Figure

from docs.tables import render
from docs.tables import table as markdown
from load_tests.simulator.scenarios import Scenario, best_shares
from load_tests.simulator.summary import Summary, Tenant

DOCUMENT = Path(__file__).parents[2] / "docs" / "simulation.md"
NAMES = {
    "tokens_per_s": "tokens/s",
    "wait_p50_s": "wait p50, s",
    "wait_p99_s": "wait p99, s",
    "latency_p95_s": "latency p95, s",
    "gap_p50_s": "gap p50, s",
    "gap_p99_s": "gap p99, s",
    "gap_max_s": "longest gap, s",
    "first_tokens": "first token of each, p50, s",
    "device_hits": "on the device",
    "host_hits": "in host memory",
    "reads_per_1000": "reads / 1000",
    "writes_per_1000": "copies / 1000",
    "adapters_per_step": "adapters / step",
    "waited_steps": "most steps passed over",
    "fairness": "fairness (Jain)",
    "tenants": "latency p95 of each, s (refused)",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } img { max-width: 100% }
"""
BEST = ("workload", "best share", "requests/s there", "best common share", "requests/s there")


class Finding(msgspec.Struct, frozen=True):
    """A scenario, and the summaries of its runs in their order."""

    scenario: Scenario
    summaries: list[Summary]


def write(findings: list[Finding], folder: Path) -> tuple[Path, Path]:
    """`simulation.json` and `simulation.html` in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    json_file, html_file = folder / "simulation.json", folder / "simulation.html"
    json_file.write_bytes(msgspec.json.encode(findings))
    html_file.write_text(_html(findings), encoding="utf-8")
    return json_file, html_file


def write_docs(findings: list[Finding], document: Path = DOCUMENT) -> None:
    """The document's tables, and its plots in images/ beside it."""
    tables: dict[str, Callable[[], str]] = {}
    for finding in findings:
        tables[finding.scenario.name] = partial(markdown, *_table(finding))
        if finding.scenario.name == "split":
            tables["best-shares"] = partial(markdown, BEST, _best_rows(finding))
        for kind, plot in _plots(finding).items():
            (document.parent / "images").mkdir(exist_ok=True)
            (document.parent / "images" / f"simulation-{kind}.png").write_bytes(plot)
    document.write_text(render(document.read_text(encoding="utf-8"), tables), encoding="utf-8")


def _html(findings: list[Finding]) -> str:
    parts = [f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>Simulation</title><style>{STYLE}</style>"]
    for finding in findings:
        parts.append(f"<h2>{escape(finding.scenario.title)}</h2>")
        parts += [f"<img alt='' src='data:image/png;base64,{_base64(png)}'>" for png in _plots(finding).values()]
        parts.append(_html_table(*_table(finding)))
        if finding.scenario.name == "split":
            parts.append(_html_table(BEST, _best_rows(finding)))
    return "\n".join([*parts, "</html>"])


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _html_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}" for line in lines) + "</table>"


def _table(finding: Finding) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    scenario = finding.scenario
    head = ("", scenario.x_label, *(NAMES.get(column, column) for column in scenario.columns))
    rows = [
        (run.series, f"{run.x:g}", *(_cell(getattr(summary, column)) for column in scenario.columns))
        for run, summary in zip(scenario.runs, finding.summaries, strict=True)
    ]
    return head, rows


def _best_rows(finding: Finding) -> list[tuple[str, ...]]:
    rows = best_shares(finding.scenario, finding.summaries)
    return [(mix, best, f"{there:.2f}", f"{common:g}", f"{then:.2f}") for mix, best, there, common, then in rows]


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell_of_tenant(of)}" for name, of in value.items())
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
    return f"{value}"


def _cell_of_tenant(of: Tenant | float) -> str:
    return _cell(of) if isinstance(of, float) else f"{of.latency_p95_s:.1f} ({of.refused})"


def _plots(finding: Finding) -> dict[str, bytes]:
    """Name → PNG."""
    with matplotlib.rc_context({"font.size": 8}):
        plots = {finding.scenario.name: _png(_over_x(finding))} if finding.scenario.plots else {}
        if finding.scenario.name == "cold":
            plots["cold"] = _png(_over_time(finding))
        return plots


def _over_x(finding: Finding) -> Figure:
    """A panel for every metric and profile, a line for every series."""
    scenario = finding.scenario
    found = list(zip(scenario.runs, finding.summaries, strict=True))
    panels = list(product(scenario.plots, dict.fromkeys(run.profile for run in scenario.runs)))
    figure = Figure(figsize=(max(3.4 * len(panels), 8), 2.8), layout="constrained")
    for axes, (metric, profile) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for series in dict.fromkeys(run.series for run, _ in found if run.profile == profile):
            points = [(run.x, getattr(summary, metric)) for run, summary in found if run.series == series]
            axes.plot(*zip(*points, strict=True), ".-", label=series.removesuffix(f"; {profile}"))
        axes.set(xlabel=scenario.x_label, ylabel=NAMES[metric], xscale=scenario.scale, ylim=(0, None))
        axes.set_title(profile, fontsize=8)
        axes.grid(color="0.9")
        if scenario.scale == "log":
            ticks = sorted({run.x for run in scenario.runs})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _over_time(finding: Finding) -> Figure:
    """The longest wait by time of arrival, around the burst."""
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    slots = list(dict.fromkeys(run.x for run in finding.scenario.runs))
    for panel, count in zip(figure.subplots(1, len(slots), sharey=True, squeeze=False)[0], slots, strict=True):
        for run, summary in zip(finding.scenario.runs, finding.summaries, strict=True):
            if run.x == count:
                panel.plot(*zip(*summary.timeline, strict=True), lw=0.8, label=run.series)
        panel.set(title=f"{count:g} slots", xlabel="arrival, s", ylabel="longest wait, s", ylim=(0, None))
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()
