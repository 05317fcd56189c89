"""Write the dashboards: `make docs`. A test fails when a file is out of date."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.panels import DASHBOARDS, SERVER, Dashboard, Panel

FOLDER = Path(__file__).parent
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3
_PERSES_UNITS = {"s": "seconds", "ops": "ops/sec", "percentunit": "percent-decimal", "short": "decimal"}


def files() -> dict[Path, str]:
    """Return the text of every dashboard by its path."""
    return {
        FOLDER / program / f"{dashboard.name}.json": json.dumps(form(dashboard), indent=2) + "\n"
        for program, form in (("grafana", grafana), ("perses", perses))
        for dashboard in DASHBOARDS
    }


def grafana(dashboard: Dashboard) -> dict[str, Any]:
    """Return a dashboard in Grafana's classic JSON, which Grafana 10 and later import and provision."""
    return {
        "uid": dashboard.name,
        "title": dashboard.title,
        "tags": ["loraplex"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "schemaVersion": 36,
        "templating": {"list": list(_grafana_variables(dashboard))},
        "panels": [_grafana_panel(number, panel) for number, panel in enumerate(dashboard.panels)],
    }


def _grafana_variables(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    for name, query in _variables(dashboard).items():
        yield {
            "name": name,
            "label": name.capitalize(),
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": f"label_values({query}, {name})", "refId": name},
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        }


def _variables(dashboard: Dashboard) -> dict[str, str]:
    """Return the series whose label gives the values of each variable."""
    found = {"job": "loraplex_requests_running", "instance": 'loraplex_requests_running{job=~"$job"}'}
    return {**found, "adapter": f"loraplex_requests_total{{{SERVER}}}"} if dashboard.by_adapter else found


def _grafana_panel(number: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": {"x": _place(number)[0], "y": _place(number)[1], "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 8}}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "expr": query.expression,
                "legendFormat": query.legend,
                "datasource": _SOURCE,
            }
            for place, query in enumerate(panel.queries)
        ],
    }


def _place(number: int) -> tuple[int, int]:
    return number % _COLUMNS * _WIDTH, number // _COLUMNS * _HEIGHT


def perses(dashboard: Dashboard) -> dict[str, Any]:
    """Return a dashboard as a resource of Perses, in the project `loraplex`."""
    panels = {f"panel-{number + 1}": panel for number, panel in enumerate(dashboard.panels)}
    return {
        "kind": "Dashboard",
        "metadata": {"name": dashboard.name, "project": "loraplex"},
        "spec": {
            "display": {"name": dashboard.title},
            "duration": "1h",
            "refreshInterval": "30s",
            "variables": [_perses_variable(name, query) for name, query in _variables(dashboard).items()],
            "panels": {key: _perses_panel(panel) for key, panel in panels.items()},
            "layouts": [{"kind": "Grid", "spec": {"items": list(map(_perses_item, range(len(panels)), panels))}}],
        },
    }


def _perses_variable(name: str, series: str) -> dict[str, Any]:
    plugin = {"kind": "PrometheusLabelValuesVariable", "spec": {"labelName": name, "matchers": [series]}}
    return {
        "kind": "ListVariable",
        "spec": {
            "name": name,
            "display": {"name": name.capitalize()},
            "allowAllValue": True,
            "allowMultiple": True,
            "customAllValue": ".*",
            "defaultValue": "$__all",
            "plugin": plugin,
        },
    }


def _perses_panel(panel: Panel) -> dict[str, Any]:
    format_ = {"unit": _PERSES_UNITS[panel.unit]}
    chart = {"legend": {"position": "bottom"}, "yAxis": {"format": format_, "min": 0}}
    return {
        "kind": "Panel",
        "spec": {
            "display": {"name": panel.title, "description": panel.description},
            "plugin": {"kind": "TimeSeriesChart", "spec": chart},
            "queries": [_perses_query(query.expression, query.legend) for query in panel.queries],
        },
    }


def _perses_query(expression: str, legend: str) -> dict[str, Any]:
    plugin = {"kind": "PrometheusTimeSeriesQuery", "spec": {"query": expression, "seriesNameFormat": legend}}
    return {"kind": "TimeSeriesQuery", "spec": {"plugin": plugin}}


def _perses_item(number: int, key: str) -> dict[str, Any]:
    x, y = _place(number)
    return {"x": x, "y": y, "width": _WIDTH, "height": _HEIGHT, "content": {"$ref": f"#/spec/panels/{key}"}}


def main() -> None:
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
