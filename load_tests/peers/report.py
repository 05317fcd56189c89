"""What was found: per case each peer's medians, and how many times its throughput ours is, round by round."""

import statistics
from collections.abc import Callable

import msgspec
import numpy as np
from matplotlib.figure import Figure

from docs.tables import table as markdown
from load_tests.peers.setting import CASES, Measured

OURS = "Loraplex"


class Run(msgspec.Struct):
    peer: str
    case: str
    round: int
    measured: Measured


class Report(msgspec.Struct):
    date: str
    machine: str
    versions: dict[str, str]
    failed: dict[str, str] = {}  # peer to error
    runs: list[Run] = []

    def of(self, peer: str, case: str) -> list[Measured]:
        """Its rounds, in their order."""
        return [run.measured for run in self.runs if (run.peer, run.case) == (peer, case)]

    def peers(self) -> list[str]:
        return list(dict.fromkeys(run.peer for run in self.runs))

    def cases(self) -> list[str]:
        return [case.name for case in CASES if any(run.case == case.name for run in self.runs)]

    def ratios(self, peer: str, case: str) -> list[float]:
        """Our tokens per second to the peer's, in each round that both have."""
        pairs = zip(self.of(OURS, case), self.of(peer, case), strict=False)
        return [ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in pairs]


def table(report: Report) -> str:
    """Markdown, a column for each peer."""
    tables = {
        "tokens per second (ours to theirs: median, lowest to highest round)": throughput,
        "time to first token, s (p50, p99)": first_token,
        "time between tokens, ms (mean)": between_tokens,
    }
    parts = [f"{report.date}, {report.machine}; " + ", ".join(f"{k} {v}" for k, v in report.versions.items())]
    parts += [f"{peer} left out: {error}" for peer, error in report.failed.items()]
    parts += [f"{title}:\n\n{_by_peer(report, cell)}" for title, cell in tables.items()]
    return "\n\n".join(parts)


def _by_peer(report: Report, cell: Callable[[Report, str, str], str]) -> str:
    rows = [
        (case, *(cell(report, peer, case) if report.of(peer, case) else "" for peer in report.peers()))
        for case in report.cases()
    ]
    return markdown(("streams", *report.peers()), rows)


def throughput(report: Report, peer: str, case: str) -> str:
    speed = f"{median_speed(report, peer, case):.0f}"
    ratios = report.ratios(peer, case)
    if peer == OURS or not ratios:
        return speed
    return f"{speed} ({statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f})"


def median_speed(report: Report, peer: str, case: str) -> float:
    return statistics.median(found.tokens_per_second for found in report.of(peer, case))


def first_token(report: Report, peer: str, case: str) -> str:
    p50, p99 = np.percentile(_ttft_s(report, peer, case), (50, 99))
    return f"{p50:.2f}, {p99:.2f}"


def between_tokens(report: Report, peer: str, case: str) -> str:
    gaps_s = [gap for found in report.of(peer, case) for gap in found.inter_token_s]
    return f"{1000 * statistics.mean(gaps_s):.0f}"


def _ttft_s(report: Report, peer: str, case: str) -> list[float]:
    return [ttft for found in report.of(peer, case) for ttft in found.ttft_s]


def plot(report: Report) -> Figure:
    """Medians as bars, the rounds' range as a line over each."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    speeds, firsts = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(report.peers())
    for index, peer in enumerate(report.peers()):
        cases = [(at, case) for at, case in enumerate(report.cases()) if report.of(peer, case)]
        places = [at + (index + 0.5) * width - 0.4 for at, _ in cases]
        medians = [median_speed(report, peer, case) for _, case in cases]
        rounds = [[found.tokens_per_second for found in report.of(peer, case)] for _, case in cases]
        speeds.bar(places, medians, width, label=peer)
        speeds.vlines(places, [min(found) for found in rounds], [max(found) for found in rounds], color="0.2")
        firsts.bar(places, [statistics.median(_ttft_s(report, peer, case)) for _, case in cases], width)
    speeds.set(ylabel="tokens per second")
    firsts.set(ylabel="time to first token (p50), s", yscale="log", xlabel="streams, on how many adapters")
    firsts.set_xticks(range(len(report.cases())), report.cases())
    speeds.legend(ncols=4)
    return figure
