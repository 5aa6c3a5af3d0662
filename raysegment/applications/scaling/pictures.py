"""Pictures of the model: weak and strong scaling with intervals and measured points, time shares, goodput against interval,
the control plane's cost against members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from raysegment.applications.scaling.control import ControlPlane, Cost
from raysegment.applications.scaling.fit import Model
from raysegment.applications.scaling.goodput import Faults, Job, best_interval_s, goodput, simulate
from raysegment.applications.scaling.predict import Prediction, Query, complete, predict
from raysegment.applications.scaling.step import CAUSES
from raysegment.archive.files import committed

_COLOURS = ("#4477aa", "#66ccee", "#ccbb44", "#ee6677", "#aa3377")
_FACTORS = (0.1, 0.2, 0.4, 0.7, 1, 1.5, 2.5, 5, 10)  # of the best interval


def draw(model: Model, query: Query, published: float, job: Job, faults: Faults, folder: Path) -> list[str]:
    """Three pictures of one system: scaling (with the `published` efficiency), shares, goodput; their paths."""
    query = complete(model, query)
    sizes = sizes_to(query.gpus)
    weak = [predict(model, replace(query, gpus=gpus)) for gpus in sizes]
    named = {"scaling": _scaling(model, query, weak, published), "shares": _shares(weak), "goodput": _goodput(job, faults)}
    return [_save(figure, folder / f"scaling-{query.system}-{name}.png") for name, figure in named.items()]


def sizes_to(gpus: int) -> list[int]:
    """1, 4, 16, … and `gpus`."""
    return [4**power for power in range(16) if 4**power < gpus] + [gpus]


def strong(model: Model, query: Query, batch: int, sizes: Sequence[int]) -> list[Prediction]:
    """Predictions with the global batch held, where it divides among so many GPUs."""
    fit = [gpus for gpus in sizes if gpus <= batch]
    return [predict(model, replace(query, gpus=gpus, local_batch=max(1, batch // gpus))) for gpus in fit]


def _axes(title: str, x: str, y: str) -> Any:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6.4, 4.2), layout="constrained").subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return axes


def _scaling(model: Model, query: Query, weak: Sequence[Prediction], published: float) -> Any:
    axes = _axes(f"{query.system}, {query.network}, {query.precision}", "GPUs", "samples/s per GPU")
    sizes = [one.gpus for one in weak]
    per_gpu = np.array([(one.low, one.samples_per_s, one.high) for one in weak]) / np.array(sizes)[:, None]
    axes.fill_between(sizes, per_gpu[:, 0], per_gpu[:, 2], color=_COLOURS[0], alpha=0.25, label="90 % interval")
    axes.plot(sizes, per_gpu[:, 1], color=_COLOURS[0], label=f"weak: local batch {query.local_batch}")
    batch = 1024
    held = strong(model, query, batch, sizes)
    axes.plot([one.gpus for one in held], [one.samples_per_s / one.gpus for one in held], "--", color=_COLOURS[3],
              label=f"strong: global batch {batch}")  # fmt: skip
    mine = [p for p in model.of(query.system) if (p.network, p.precision) == (query.network, query.precision)]
    axes.plot([p.gpus for p in mine], [p.samples_per_s / p.gpus for p in mine], "ko", label="measured")
    axes.plot(sizes[-1], published * per_gpu[0, 1], "r*", markersize=12, label="published, not seen by the fit")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.legend()
    return axes.figure


def _shares(weak: Sequence[Prediction]) -> Any:
    axes = _axes(f"{weak[0].system}: where a step's time goes", "GPUs", "share of a step")
    parts = [[one.shares[cause] for one in weak] for cause in CAUSES]
    axes.stackplot([one.gpus for one in weak], parts, labels=CAUSES, colors=_COLOURS)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1)
    axes.legend(loc="lower left")
    return axes.figure


def _goodput(job: Job, faults: Faults) -> Any:
    axes = _axes(f"{job.gpus} GPUs, checkpoint {job.checkpoint_s:.2g} s", "seconds between checkpoint files", "goodput")
    for policy, colour in (("elastic", _COLOURS[0]), ("wait", _COLOURS[3])):
        here = replace(job, policy=policy)
        best = best_interval_s(here, faults)
        intervals = [best * factor for factor in _FACTORS]
        axes.plot(intervals, [goodput(here, faults, s) for s in intervals], color=colour, label=f"{policy}: formula")
        work_s = 100 * faults.mtbf_s(here.gpus)
        found = [simulate(here, faults, s, work_s) for s in intervals]
        axes.plot(intervals, found, "o", color=colour, label=f"{policy}: discrete events")
        axes.axvline(best, color=colour, linestyle=":")
    axes.set_xscale("log")
    axes.legend()
    return axes.figure


# ---------------------------------------------------------------- the control plane

_PANELS = (
    ("until all know their places", ("join_s", "loss_s", "grow_s")),
    ("the roster's processor", ("step_cpu_s", "beat_cpu_s", "straggler_cpu_s", "look_cpu_s")),
)
_FAR = 27360  # members, up to which costs are drawn


def draw_control(plane: ControlPlane, folder: Path) -> list[str]:
    """One picture of what a measured control plane costs: rounds, fits and their 90 % intervals, against members; its path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        axes.set(title=title, xlabel="members", ylabel="seconds", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        for name, colour in zip(names, _COLOURS, strict=False):
            if name in plane.costs:
                _cost(axes, plane.costs[name], colour)
        axes.axvspan(plane.largest, _FAR, color="0.5", alpha=0.12, label="not measured")
        axes.legend(fontsize=8)
    return [_save(figure, folder / "scaling-control.png")]


def _cost(axes: Any, cost: Cost, colour: str) -> None:
    sizes = np.geomspace(min(cost.members), _FAR, 40)
    middle, low, high = np.array([cost.at(float(size)) for size in sizes]).T
    axes.fill_between(sizes, np.maximum(low, 1e-7), high, color=colour, alpha=0.25)
    axes.plot(sizes, middle, color=colour, label=cost.name.removesuffix("_s"))
    axes.plot(cost.members, cost.seconds, "o", color=colour, markersize=3)


def _save(figure: Any, path: Path) -> str:
    with committed(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    return str(path)
