"""The pictures of a run's page: curves, shares of time, the world's size with the faults, masks."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysegment.applications.maps import PALETTES, STANDARD, TITLES
from raysegment.archive.masks import read_masks
from raysegment.climate.channels import CLASSES, CYCLONE, RIVER
from raysegment.elastic.runs import CAUSES

Line = Mapping[str, Any]
_COLOURS = {kind: PALETTES[STANDARD].of(kind) for kind in (CYCLONE, RIVER)}
_POINTS = 1000  # along a curve: more are not seen, and a page of a million steps would not open
_MARKS = {  # event → its mark in the picture of the world's size: colour, sign, words
    "lost": ("#a40e26", "v", "member lost"),
    "node_lost": ("#a40e26", "X", "node lost"),
    "fault": ("#e08a00", "x", "fault injected"),
    "save_failed": ("#7b3fa0", "s", "saving failed"),
    "checkpoint": ("#2a7d3f", "|", "checkpoint"),
    "start": ("#1b1f24", "^", "command started"),
}


@dataclass(frozen=True)
class Picture:
    """A picture: its title, its media type and its bytes."""

    title: str
    kind: str
    content: bytes


@dataclass(frozen=True)
class Curve:
    """A curve of at most `_POINTS` points (N): middle of each bin in x, mean, least and most of it in y."""

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    least: NDArray[np.float64]
    most: NDArray[np.float64]


def curve(x: Iterable[float], y: Iterable[float | None]) -> Curve:
    """What is known of y over x, in bins of equally many points; empty where nothing is."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if b is not None and math.isfinite(b)]
    if not pairs:
        return Curve(*(np.empty(0) for _ in range(4)))
    held = np.array(pairs, dtype=np.float64)  # (N, 2)
    bins = np.array_split(held, min(_POINTS, len(held)))
    columns = [(part[:, 0].mean(), part[:, 1].mean(), part[:, 1].min(), part[:, 1].max()) for part in bins]
    return Curve(*np.array(columns).T)


def draw_curves(steps: Sequence[Line]) -> list[Picture]:
    """Loss, learning rate, gradient norm and samples per second, step by step."""
    if not steps:
        return []
    x = [step["step"] for step in steps]
    pace = [step["samples"] / step["step_s"] if step["step_s"] else None for step in steps]
    panels = {
        "loss": curve(x, [step["loss"] for step in steps]),
        "learning rate": curve(x, [step.get("lr") for step in steps]),
        "gradient norm": curve(x, [step.get("grad_norm") for step in steps]),
        "samples/s": curve(x, pace),
    }
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6), sharex=True, layout="constrained")
    for panel, (name, held) in zip(axes.flat, panels.items(), strict=True):
        panel.fill_between(held.x, held.least, held.most, color="#9cc3ec", linewidth=0)
        panel.plot(held.x, held.mean, color="#1f5fa8", linewidth=1.2)
        panel.set_title(name, loc="left")
        if len(held.mean) and held.least.min() > 0 and held.most.max() > 20 * held.least.min():
            panel.set_yscale("log")
    for panel in axes[1]:
        panel.set_xlabel("step")
    return [
        _svg(pyplot, figure, "Loss, learning rate, gradient norm, samples per second (mean; the band is what was in between)")
    ]


def draw_validation(events: Sequence[Line]) -> list[Picture]:
    """IoU per class on held-out tiles, where any was measured."""
    found = [event for event in events if event["event"] == "validation"]
    if not found:
        return []
    pyplot = load_pyplot()
    figure, panel = pyplot.subplots(figsize=(11, 3.2), layout="constrained")
    x = [event["step"] for event in found]
    for number, name in enumerate(CLASSES):
        held = curve(x, [event["iou"][number] for event in found])
        panel.plot(held.x, held.mean, marker=".", color=_COLOURS.get(number, "#57606a"), label=name.replace("_", " "))
    held = curve(x, [event["mean_iou"] for event in found])
    panel.plot(held.x, held.mean, color="#1b1f24", linestyle="--", label="mean")
    panel.set(xlabel="step", ylabel="IoU", xlim=(0, max(*x, 1) * 1.02), ylim=(0, 1))
    panel.legend(frameon=False, ncols=4)
    return [_svg(pyplot, figure, "Validation: IoU per class on tiles that are not trained on")]


def draw_shares(steps: Sequence[Line]) -> list[Picture]:
    """Seconds of a step by cause, along the run."""
    if not steps:
        return []
    x = [step["step"] for step in steps]
    parts = {cause.removesuffix("_s"): curve(x, [step.get(cause, 0.0) for step in steps]) for cause in CAUSES}
    whole = curve(x, [step["step_s"] for step in steps])
    other = np.maximum(whole.mean - sum(held.mean for held in parts.values()), 0.0)
    pyplot = load_pyplot()
    figure, panel = pyplot.subplots(figsize=(11, 3.2), layout="constrained")
    colours = ("#6fa8dc", "#1f5fa8", "#e08a00", "#2a7d3f", "#7b3fa0", "#b8bec5")
    values = [*(held.mean for held in parts.values()), other]
    panel.stackplot(whole.x, values, labels=[*parts, "other"], colors=colours, step="mid")
    panel.set(xlabel="step", ylabel="s per step")
    panel.legend(frameon=False, ncols=6, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    return [_svg(pyplot, figure, "Seconds of a step by cause")]


def draw_world(steps: Sequence[Line], events: Sequence[Line]) -> list[Picture]:
    """Members over time, with what befell them; time since the command was first started."""
    times = [line["time"] for line in (*steps, *events)]
    if not steps or not times:
        return []
    began, unit, seconds = min(times), *_unit(max(times) - min(times))
    changes = _changes(steps, began, seconds)
    pyplot = load_pyplot()
    figure, (panel, marks) = pyplot.subplots(2, 1, figsize=(11, 4.2), sharex=True, height_ratios=(2, 1.2), layout="constrained")
    panel.step(*zip(*changes, strict=True), where="post", color="#1f5fa8")
    panel.set(ylabel="members", ylim=(0, max(size for _, size in changes) + 0.5))
    panel.yaxis.get_major_locator().set_params(integer=True)
    shown = [kind for kind in _MARKS if any(event["event"] == kind for event in events)]
    for row, kind in enumerate(shown):
        colour, sign, _ = _MARKS[kind]
        at = [(event["time"] - began) / seconds for event in events if event["event"] == kind]
        marks.plot(at, [row] * len(at), sign, color=colour, markersize=6, linestyle="")
        if kind in ("lost", "node_lost", "fault"):
            panel.vlines(at, 0, 1, transform=panel.get_xaxis_transform(), color=colour, linewidth=0.6, alpha=0.5)
    marks.set_yticks(range(len(shown)), [_MARKS[kind][2] for kind in shown])
    marks.set(xlabel=unit, ylim=(-0.6, max(len(shown), 1) - 0.4))
    return [_svg(pyplot, figure, "World size over time; lines mark members lost and faults injected")]


def _unit(whole_s: float) -> tuple[str, float]:
    """In which unit so long a time is told, and the seconds of one."""
    return ("seconds", 1.0) if whole_s < 300 else ("minutes", 60.0) if whole_s < 18000 else ("hours", 3600.0)


def _changes(steps: Sequence[Line], began: float, unit_s: float) -> list[tuple[float, int]]:
    """(time, members) wherever the number of members changes, and at the end."""
    found: list[tuple[float, int]] = []
    for step in steps:
        if not found or found[-1][1] != step["world"]:
            found.append(((step["time"] - step["step_s"] - began) / unit_s, step["world"]))
    return [*found, ((steps[-1]["time"] - began) / unit_s, steps[-1]["world"])]


def draw_masks(path: Path) -> Picture:
    """The first map of a mask file, by itself."""
    masks = read_masks(path)
    pyplot = load_pyplot()
    figure, panel = pyplot.subplots(figsize=(11, 5.2), layout="constrained")
    grid = masks.grid
    extent = (
        grid.lon[0] - grid.dlon / 2,
        grid.lon[-1] + grid.dlon / 2,
        grid.lat[0] - grid.dlat / 2,
        grid.lat[-1] + grid.dlat / 2,
    )
    panel.imshow(painted(masks.masks[0]), extent=extent, origin="lower", aspect="auto", interpolation="nearest")
    panel.set(xlabel="longitude (°)", ylabel="latitude (°)")
    panel.set_title(f"red: {TITLES[CYCLONE]}, blue: {TITLES[RIVER]}", loc="left", fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90)
    pyplot.close(figure)
    return Picture(f"{path.name}, {masks.labeller}, {masks.time_labels[0]}", "image/png", content.getvalue())


def painted(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A mask (H, W) as colours (H, W, 3)."""
    colours = np.full((max(len(CLASSES), int(mask.max()) + 1), 3), 242, np.uint8)
    for number, colour in _COLOURS.items():
        colours[number] = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return colours[mask]


def _svg(pyplot: Any, figure: Any, title: str) -> Picture:
    """Lines and letters, without the links that matplotlib writes about itself."""
    content = io.BytesIO()
    unknown = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(content, format="svg", metadata=unknown)
    pyplot.close(figure)
    whole = content.getvalue()
    return Picture(title, "image/svg+xml", whole[whole.index(b"<svg") :])


def load_pyplot() -> Any:
    """The drawing library, set for the figures of a page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "raysegment", "axes.spines.top": False, "font.size": 9,
                            "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})  # fmt: skip
    return pyplot
