"""A campaign's pictures: learning curves, the metric along each key, which keys matter, what was spent."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from raysegment.applications.campaign.journal import FINISHED, STOPPED, Journal
from raysegment.applications.campaign.measures import WORST
from raysegment.applications.campaign.proposals import make_study, make_trial
from raysegment.applications.campaign.results import Row
from raysegment.applications.campaign.space import CampaignConfig
from raysegment.archive.files import committed
from raysegment.climate.channels import NAMES
from raysegment.elastic.runs import read_lines

_COLOURS = {FINISHED: "#0b62a4", STOPPED: "#c8a24a"}
_OTHER = "#b03a2e"


def draw_all(out: Path, config: CampaignConfig, journal: Journal, rows: Sequence[Row]) -> list[Path]:
    """All pictures that can be drawn; the paths."""
    paths = [out / name for name in ("curves.png", "slices.png", "budget.png")]
    _save(paths[0], (8, 4.5), lambda figure: _curves(figure, out, config, rows))
    _save(paths[1], (max(4.0, 3.2 * len(config.dimensions)), 3.4), lambda figure: _slices(figure, config, rows))
    _save(paths[2], (8, 3.6), lambda figure: _budget(figure, config, rows))
    shares = importances(config, journal)
    if shares:
        paths.append(out / "importance.png")
        _save(paths[-1], (6, 0.6 + 0.45 * len(shares)), lambda figure: _importance(figure, shares))
    return paths


def importances(config: CampaignConfig, journal: Journal) -> dict[str, float]:
    """How much each key decides whether a trial is among the best, shares that add up to 1 (PED-ANOVA, Watanabe et al. 2023);
    empty with fewer than five judged trials or with one key."""
    records = [record for record in journal.of("search") if record.reports and abs(record.last["value"] or WORST) < WORST]
    if len(records) < 5 or len(config.dimensions) < 2:
        return {}
    study = make_study(config, [])
    for record in records:  # those stopped count with what they had reached
        study.add_trial(make_trial(config, record.point, TrialState.COMPLETE, float(record.last["value"])))
    try:
        found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25))
    except (RuntimeError, ValueError):  # all values equal, say
        return {}
    total = sum(found.values())
    return {key: value / total for key, value in found.items()} if total > 0 and math.isfinite(total) else {}


def _save(path: Path, size: tuple[float, float], draw: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    with committed(path) as temporary, temporary.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def _curves(figure: Any, out: Path, config: CampaignConfig, rows: Sequence[Row]) -> None:
    """Loss by step of every trial, smoothed over a twentieth of its steps; the best one drawn bold."""
    axes = figure.subplots()
    for number, row in enumerate(rows):
        steps = read_lines(out / row.folder / "steps.jsonl")[0]
        known = [(step["step"], step["loss"]) for step in steps if step["loss"] is not None]
        label = ", ".join(f"{key.rsplit('.', 1)[-1]} {short(row.point[key])}" for key in config.search)
        if known:
            x, y = zip(*known, strict=True)
            style = {"lw": 2.6, "zorder": 3} if number == 0 else {"lw": 0.9, "ls": "-" if row.status == FINISHED else ":"}
            shown = label if number < 12 else None
            axes.plot(x, smooth(list(y), max(1, len(y) // 20)), label=shown, **style)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    if rows:
        axes.legend(fontsize=6, frameon=False, ncols=2)


def _slices(figure: Any, config: CampaignConfig, rows: Sequence[Row]) -> None:
    """The metric along each key."""
    panels = figure.subplots(1, len(config.dimensions), squeeze=False, sharey=True)[0]
    for axes, dimension in zip(panels, config.dimensions, strict=True):
        known = [row for row in rows if math.isfinite(row.value) and abs(row.value) < WORST]
        names = [short(value) for value in dimension.values]
        for row in known:
            value = row.point[dimension.key]
            x = names.index(short(value)) if dimension.kind == "choice" else value
            axes.plot(x, row.value, "o", ms=5, alpha=0.75, color=_COLOURS.get(row.status, _OTHER))
        if dimension.kind == "choice":
            _name_ticks(axes, names)
        elif dimension.kind == "log":
            axes.set_xscale("log")
        axes.set_xlabel(dimension.key, fontsize=8)
    panels[0].set_ylabel(config.metric)
    figure.suptitle("blue finished, yellow stopped early (value when stopped)", fontsize=8)


def _name_ticks(axes: Any, names: Sequence[str]) -> None:
    """Names below the axis; long ones aslant, in several lines, each ending at its own tick."""
    aslant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 6 else {}
    axes.set_xticks(range(len(names)), [textwrap.fill(name, 24) for name in names], fontsize=7, **aslant)


def _budget(figure: Any, config: CampaignConfig, rows: Sequence[Row]) -> None:
    """What each trial computed, and what it would have to its end."""
    axes = figure.subplots()
    ordered = sorted(rows, key=lambda row: row.trial)
    x = range(len(ordered))
    axes.bar(x, [row.samples_whole for row in ordered], color="#e8e8e8", label="to the end")
    axes.bar(x, [row.samples for row in ordered], color=[_COLOURS.get(row.status, _OTHER) for row in ordered], label="computed")
    spent, whole = sum(row.samples for row in rows), sum(row.samples_whole for row in rows)
    axes.set(xlabel="trial, in the order of the search", ylabel="samples", title=f"{spent} of {whole} samples computed")
    axes.legend(fontsize=7, frameon=False)


def _importance(figure: Any, shares: dict[str, float]) -> None:
    axes = figure.subplots()
    keys = list(shares)[::-1]
    axes.barh(range(len(keys)), [shares[key] for key in keys], color=_COLOURS[FINISHED])
    axes.set_yticks(range(len(keys)), keys, fontsize=8)
    axes.set_xlabel("importance for being among the best quarter (PED-ANOVA)")


def smooth(values: list[float], width: int) -> list[float]:
    """Running mean over the last `width` values."""
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[k + 1] - sums[max(0, k + 1 - width)]) / min(k + 1, width) for k in range(len(values))]


def short(value: Any) -> str:
    """A value in a table or legend: most of the channels by those that are missing, a group by its name and keys."""
    if isinstance(value, Mapping):
        return " ".join(_short_item(key, item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return _short_list(value)
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _short_item(key: str, value: Any) -> str:
    """`name` and groups speak for themselves."""
    return short(value) if key == "name" or isinstance(value, Mapping) else f"{key} {short(value)}"


def _short_list(values: Sequence[Any]) -> str:
    missing = [name for name in NAMES if name not in values]
    if len(values) > len(NAMES) // 2 and set(values) <= set(NAMES):
        return f"all but {' '.join(missing)}" if missing else f"all {len(NAMES)}"
    return "+".join(map(short, values))
