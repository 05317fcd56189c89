"""What a run comes to in numbers."""

from collections.abc import Iterable, Sequence

import msgspec

from load_tests.simulator.engine import Record, Result


class Tenant(msgspec.Struct, frozen=True):
    latency_p95_s: float
    first_token_p50_s: float
    refused: int
    tokens: int  # served before the last request arrived


class Summary(msgspec.Struct, frozen=True):
    """Waits are from arrival to the first step; latencies to the last token. Hits are by where the adapter was found
    at arrival."""

    requests: int
    refused: int
    virtual_s: float
    tokens_per_s: float
    wait_p50_s: float
    wait_p99_s: float
    latency_p95_s: float
    gap_p50_s: float  # between two tokens of a request
    gap_p99_s: float
    gap_max_s: float
    device_hits: float
    host_hits: float  # off the device, but in host memory
    reads_per_1000: float
    writes_per_1000: float
    adapters_per_step: float
    preemptions: int
    waited_steps: int  # the most of any request
    fairness: float
    tenants: dict[str, Tenant]
    first_tokens: dict[str, float]  # of the tenants: from arrival, p50
    timeline: list[tuple[float, float]]  # second of arrival, the longest wait of those that arrived then


def summarize(result: Result) -> Summary:
    records, done = result.records, [record for record in result.records if record.end == "done"]
    waits = [record.admitted - record.arrival for record in done]
    per_1000 = 1000 / len(records)
    return Summary(
        requests=len(records),
        refused=len(records) - len(done),
        virtual_s=result.seconds,
        tokens_per_s=sum(record.tokens for record in done) / result.seconds,
        wait_p50_s=percentile(waits, 0.5),
        wait_p99_s=percentile(waits, 0.99),
        latency_p95_s=_latency_p95(done),
        gap_p50_s=percentile(result.gaps, 0.5),
        gap_p99_s=percentile(result.gaps, 0.99),
        gap_max_s=max(result.gaps, default=0.0),
        device_hits=sum(record.found == "device" for record in records) / len(records),
        host_hits=sum(record.found == "host" for record in records) / len(records),
        reads_per_1000=result.reads * per_1000,
        writes_per_1000=result.writes * per_1000,
        adapters_per_step=result.step_adapters / result.steps,
        preemptions=result.preemptions,
        waited_steps=max(record.waited_steps for record in done),
        fairness=_fairness(records),
        tenants={name: _tenant(records, name) for name in _tenants(records)},
        first_tokens={name: _tenant(records, name).first_token_p50_s for name in _tenants(records)},
        timeline=_timeline(done),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, by nearest rank; 0 of none."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0.0


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index (Jain, Chiu and Hawe, 1984): 1 when all are equal, 1/n when one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def entitled(total: float, demands: dict[str, float]) -> dict[str, float]:
    """The max-min fair shares of `total`: nobody gets more than asked for, the rest is divided equally."""
    shares: dict[str, float] = {}
    for name in sorted(demands, key=lambda name: demands[name]):
        shares[name] = min(demands[name], (total - sum(shares.values())) / (len(demands) - len(shares)))
    return shares


def _fairness(records: list[Record]) -> float:
    """Jain's index over the tenants' service while requests arrived, each in relation to the max-min fair share."""
    served = {name: float(_tenant(records, name).tokens) for name in _tenants(records)}
    demands = {name: 0.0 for name in served}
    for record in records:
        demands[record.request.tenant] += record.request.output_tokens
    shares = entitled(sum(served.values()), demands)
    return jain([served[name] / shares[name] for name in served if shares[name] > 0])


def _tenants(records: list[Record]) -> list[str]:
    return sorted({record.request.tenant for record in records})


def _tenant(records: list[Record], name: str) -> Tenant:
    own = [record for record in records if record.request.tenant == name]
    done = [record for record in own if record.end == "done"]
    last_arrival = records[-1].arrival
    tokens = sum(record.tokens for record in done if record.finished <= last_arrival)
    first = percentile([record.first_token - record.arrival for record in done], 0.5)
    return Tenant(_latency_p95(done), first, len(own) - len(done), tokens)


def _latency_p95(done: Iterable[Record]) -> float:
    return percentile([record.finished - record.arrival for record in done], 0.95)


def _timeline(done: list[Record], points: int = 200) -> list[tuple[float, float]]:
    if not done:
        return []
    start, width = done[0].arrival, max(done[-1].arrival - done[0].arrival, 1e-9) / points
    longest: dict[int, float] = {}
    for record in done:
        bin_ = int((record.arrival - start) / width)
        longest[bin_] = max(longest.get(bin_, 0.0), record.admitted - record.arrival)
    return [(start + bin_ * width, wait) for bin_, wait in sorted(longest.items())]
