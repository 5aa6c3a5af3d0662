"""Grafana's dashboard of training runs, made of the metrics' definitions: a row for each question of the person on call.

    raysegment/raysegment.json                 the dashboard
    provisioning/dashboards/raysegment.yml     tells Grafana of it

Ray writes its own dashboards into `GRAFANA` when a head starts, with a grafana.ini that looks there. Both files go beside
them, under names that Ray does not use; each new session's folder begins without them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raysegment.archive.files import committed
from raysegment.climate.checks import BadInput
from raysegment.elastic.telemetry import BY_NAME, METRICS, QUESTIONS, Metric

GRAFANA = "/tmp/ray/session_latest/metrics/grafana"
SELECTOR = 'run=~"$run"'
_NAME = "raysegment"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT, _ACROSS = 8, 7, 3  # of a panel in Grafana's grid, which is 24 wide; panels side by side


@dataclass(frozen=True)
class DashboardOptions:
    """`grafana` is the folder into which this cluster's head has written Ray's own dashboards, as Grafana sees it."""

    grafana: str = GRAFANA


def write_dashboards(options: DashboardOptions, out: Path | None = None) -> list[Path]:
    """Write dashboard and provisioning beside Ray's own, or both into the folder `out`, for another way there; the files.

    BadInput where the head has no such folder.
    """
    ray = Path(options.grafana)
    if out is None and not (ray / "provisioning").is_dir():
        remedy = "Start a head, name its folder (grafana=DIR below its temporary directory), or give --out."
        raise BadInput("grafana", "the folder of Ray's own dashboards", f"no {ray}/provisioning", remedy)
    files = {
        (out or ray / _NAME) / f"{_NAME}.json": json.dumps(dashboard(), indent=1) + "\n",
        (out or ray / "provisioning" / "dashboards") / f"{_NAME}.yml": yaml.safe_dump(provider(ray), sort_keys=False),
    }
    for path, text in files.items():
        with committed(path) as temporary:
            temporary.write_text(text)
    return [*files]


def provider(grafana: Path) -> dict[str, Any]:
    """What Grafana must know to find the dashboard below Ray's folder."""
    options = {"path": str(grafana / _NAME)}
    return {"apiVersion": 1, "providers": [{"name": _NAME, "folder": _NAME, "type": "file", "options": options}]}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return {
        "title": "raysegment: training runs",
        "uid": _NAME,
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "tags": [_NAME, "ray"],
        "templating": {"list": [_source_variable(), _run_variable()]},
        "panels": list(_panels()),
    }


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1}


def _run_variable() -> dict[str, Any]:
    name = BY_NAME["generations"].exported_name  # is there before the first step
    query = f"label_values({name}, run)"
    return {
        "name": "run", "label": "Run", "type": "query", "datasource": _SOURCE, "definition": query,
        "query": {"query": query, "refId": "runs"}, "refresh": 2, "sort": 1, "multi": True, "includeAll": True,
        "allValue": ".*", "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def _panels() -> Iterator[dict[str, Any]]:
    """Each question's row, and below it a panel for each metric that answers it."""
    top, number = 0, 1
    for question in QUESTIONS:
        yield {"type": "row", "id": number, "title": question, "collapsed": False, "gridPos": _place(0, top, 24, 1), "panels": []}
        top, number = top + 1, number + 1
        answers = [metric for metric in METRICS if metric.question == question]
        for index, metric in enumerate(answers):
            row, column = divmod(index, _ACROSS)
            yield _panel(metric, number, _place(column * _WIDTH, top + row * _HEIGHT, _WIDTH, _HEIGHT))
            number += 1
        top += -(-len(answers) // _ACROSS) * _HEIGHT


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(metric: Metric, number: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "id": number,
        "title": metric.title,
        "description": f"{metric.full_name} ({metric.kind}): {metric.description}.",
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": metric.unit, **_stacked(metric)}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [{"refId": "A", "datasource": _SOURCE, "expr": metric.promql(SELECTOR), "legendFormat": metric.legend}],
    }


def _stacked(metric: Metric) -> dict[str, Any]:
    """Shares lie on one another, up to one."""
    if "cause" not in metric.tags:
        return {"min": 0} if metric.unit == "percentunit" else {}
    return {"min": 0, "max": 1, "custom": {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 60}}
