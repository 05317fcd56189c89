"""The dashboards and rules of deploy/ name what a server exposes, in the forms that their programs read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy import dashboards
from server import config
from tests.fixtures.promql import Asked, queries_of_grafana, queries_of_perses, queries_of_rules, rules, unknown_names

RECORDED = {rule["record"] for rule in rules() if "record" in rule}
GRAFANA = sorted((dashboards.FOLDER / "grafana").glob("*.json"))
PERSES = sorted((dashboards.FOLDER / "perses").glob("*.json"))


@pytest.mark.parametrize("path", dashboards.files(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_dashboard_is_that_of_the_panels(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == dashboards.files()[path], "run 'make docs'"


def test_every_query_names_metrics_and_labels_that_a_server_exposes() -> None:
    asked = [*queries_of_grafana(), *queries_of_perses(), *queries_of_rules()]
    assert len(asked) > 80
    assert {query.place: found for query in asked if (found := unknown_names(query, RECORDED))} == {}


@pytest.mark.parametrize(
    ("query", "unknown"),
    [
        (Asked("", "rate(loraplex_request_total[5m])"), {"loraplex_request_total"}),
        (Asked("", "loraplex_engine_step_seconds"), {"loraplex_engine_step_seconds"}),
        (Asked("", 'loraplex_requests_running{adapter="a"}'), {"adapter"}),
        (Asked("", "sum by (tier) (loraplex_requests_total)"), {"tier"}),
        (Asked("", "loraplex_adapters", "{{adapter}}"), {"adapter"}),
        (Asked("", "job:loraplex_requests:rate1h"), {"job:loraplex_requests:rate1h"}),
    ],
)
def test_a_name_that_does_not_exist_is_found(query: Asked, unknown: set[str]) -> None:
    assert unknown_names(query, RECORDED) == unknown


def lost(written: Any, read: Any, path: str = "") -> list[str]:
    """Return the places of `written` that `read` does not have with the same value."""
    if isinstance(written, dict):
        return [place for key in written for place in lost(written[key], (read or {}).get(key), f"{path}/{key}")]
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        return [
            place
            for n, (ours, theirs) in enumerate(zip(written, read, strict=True))
            for place in lost(ours, theirs, f"{path}/{n}")
        ]
    return [] if written == read else [path]


def lost_by_grafana(dashboard: dict[str, Any]) -> list[str]:
    """Return the fields that Grafana's own model of a dashboard does not know."""
    register_default_plugins()
    return lost(dashboard, json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder)))


@pytest.mark.parametrize("path", GRAFANA, ids=lambda path: path.stem)
def test_grafana_knows_every_field_of_its_dashboards(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    assert lost_by_grafana(dashboard) == []
    dashboard["panels"][0]["targets"][0]["expression"] = "up"
    dashboard["panels"][1]["options"]["legend"]["place"] = "top"
    assert lost_by_grafana(dashboard) == ["/panels/0/targets/0/expression", "/panels/1/options/legend/place"]


@pytest.mark.parametrize("path", PERSES, ids=lambda path: path.stem)
def test_the_layout_of_perses_has_every_panel_once_and_none_overlap(path: Path) -> None:
    spec = json.loads(path.read_text())["spec"]
    items = [item for layout in spec["layouts"] for item in layout["spec"]["items"]]
    assert sorted(item["content"]["$ref"] for item in items) == sorted(f"#/spec/panels/{key}" for key in spec["panels"])
    cells = [(x, y) for item in items for x in _span(item, "x", "width") for y in _span(item, "y", "height")]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def _span(item: dict[str, int], start: str, size: str) -> range:
    return range(item[start], item[start] + item[size])


def test_every_alert_says_what_to_do_with_flags_that_exist() -> None:
    flags = {config.flag_name(name) for name in config.HINTS}
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 10
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"]["summary"] and alert["annotations"]["runbook"].rstrip().endswith(".")
        assert set(re.findall(r"--[a-z][a-z-]+", alert["annotations"]["runbook"])) <= flags


def test_an_alert_on_a_recorded_series_names_one() -> None:
    used = {name for rule in rules() for name in re.findall(r"\b\w+:loraplex_[\w:]+", rule["expr"])}
    assert used and used <= RECORDED
