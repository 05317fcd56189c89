"""The report's plots, as SVG."""

import io
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from load_tests.client import Record
from load_tests.runner import Run
from load_tests.summary import by_class, e2e_s, ended_s, ttft_s

WIDTH, HEIGHT = 10, 3.2  # inches


def plots(run: Run) -> dict[str, bytes]:
    """Title → SVG document. Distributions are of the counted requests; plots over time show the warm-up too."""
    counted = [record for record in run.records if record.scheduled_s >= run.scenario.bounds.warm_up_s]
    done = [record for record in counted if record.error is None]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        return {
            "Requests over time": _svg(_over_time(run)),
            "Load over time": _svg(_load(run)),
            "Distributions": _svg(_distributions(done)),
        }


def _over_time(run: Run) -> Figure:
    figure, (axes,) = _figure(1)
    done = [record for record in run.records if record.error is None]
    failed = [record for record in run.records if record.error is not None]
    scheduled = [record.scheduled_s for record in done]
    axes.plot(scheduled, [e2e_s(record) for record in done], ".", label="end to end")
    axes.plot(scheduled, [ttft_s(record) for record in done], ".", label="first token")
    if failed:
        axes.plot([record.scheduled_s for record in failed], [0] * len(failed), "rx", label="failed")
    for index, change in enumerate(run.changes):
        axes.axvline(change.at_s, color="0.8", zorder=0, label="adapter changed" if not index else None)
    axes.axvspan(0, run.scenario.bounds.warm_up_s, color="0.95", zorder=0, label="warm-up")
    axes.set(xlabel="scheduled time, s", ylabel="latency, s")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _load(run: Run) -> Figure:
    figure, (flight, tokens) = _figure(2)
    done = [record for record in run.records if record.error is None]
    edges = np.sort([*(record.scheduled_s for record in done), *(ended_s(record) for record in done)])
    starts, ends = (np.sort([time(r) for r in done]) for time in (lambda r: r.scheduled_s, ended_s))
    in_flight = np.searchsorted(starts, edges, side="right") - np.searchsorted(ends, edges, side="right")
    flight.step(edges, in_flight, where="post")
    flight.set(xlabel="time, s", ylabel="requests waiting or running")
    seconds = np.arange(0, int(edges[-1]) + 2 if edges.size else 2)
    tokens.stairs(np.histogram(token_times(done), seconds)[0], seconds, fill=True)
    tokens.set(xlabel="time, s", ylabel="events with tokens, 1/s")
    return figure


def token_times(records: Iterable[Record]) -> list[float]:
    """When each event with text came, in seconds since the start of the run."""
    times: list[float] = []
    for record in records:
        if record.first_token_s is not None:
            times += np.cumsum([record.first_token_s, *record.gaps_s]).tolist()
    return times


def _distributions(done: Sequence[Record]) -> Figure:
    figure, (by_latency, by_model) = _figure(2)
    _share_below(by_latency, [gap for record in done for gap in record.gaps_s], "between tokens")
    _share_below(by_latency, [ttft_s(record) for record in done], "first token")
    _share_below(by_latency, [e2e_s(record) for record in done], "end to end")
    for name, members in by_class(done).items():
        _share_below(by_model, [ttft_s(record) for record in members], f"first token, {name}")
    for axes in (by_latency, by_model):
        axes.set(xscale="log", xlabel="latency, s", ylabel="share of requests")
        axes.xaxis.set_minor_formatter(NullFormatter())
        if done:
            axes.legend()
    by_latency.set_ylabel("share of values")
    return figure


def _share_below(axes: Axes, values: Sequence[float], label: str) -> None:
    if values:
        axes.ecdf(values, label=label)


def _figure(columns: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _svg(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
