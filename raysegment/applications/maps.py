"""Pictures: a field with the cyclones (red) and rivers (blue) of one or several labellers, coast lines, best-track storms.

A column per labeller; below the world, a row of zoomed panels for each group of storms. Also maps of how often each
class occurs. matplotlib is imported only where something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raysegment.applications.coast import coast_distance_km
from raysegment.applications.evaluate import Paths, mask_files
from raysegment.applications.tracks import Storm
from raysegment.archive.files import committed
from raysegment.archive.masks import read_masks
from raysegment.climate.channels import BY_NAME, CYCLONE, INDEX, RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.climate.rivers import ivt_stand_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {CYCLONE: "#d7191c", RIVER: "#1f6fd6"}
TITLES = {CYCLONE: "tropical cyclone", RIVER: "atmospheric river"}
_WIDTH_IN, _DPI = 16.0, 110  # 1760 pixels across
_WEST_DEG = 20.0  # the world is cut where it harms least: through Africa and eastern Europe
_COAST_STRIDE, _ZOOM_COAST_STRIDE = 3, 1  # tenths of a degree
_ZOOM_SIZE_DEG = (40.0, 20.0)  # smallest panel, longitude × latitude
_ZOOM_MARGIN_DEG = 8.0
_SMOOTH_DEG = 0.35  # coarser masks are outlined along their cells


@dataclass(frozen=True)
class Frame:
    """A rectangle of the world, degrees; `east` may pass 360."""

    west: float
    east: float
    south: float
    north: float

    @property
    def size(self) -> tuple[float, float]:
        return self.east - self.west, self.north - self.south


WORLD = Frame(_WEST_DEG, _WEST_DEG + 360.0, -90.0, 90.0)


def field_of(fields: NDArray, name: str) -> tuple[NDArray, str]:
    """A map (H, W) to draw and its label: one of the 16 channels, "IVT" (stand-in) or "WIND" (lowest level)."""
    if name == "IVT":
        return ivt_stand_in(fields), "vapour transport, TMQ · |V850| (kg m⁻¹ s⁻¹)"
    if name == "WIND":
        return np.hypot(fields[INDEX["UBOT"]], fields[INDEX["VBOT"]]), "wind of the lowest level (m s⁻¹)"
    if name not in BY_NAME:
        raise BadInput("field", f"IVT, WIND or one of {', '.join(BY_NAME)}", name, "Choose one of those")
    return fields[INDEX[name]], f"{BY_NAME[name].long_name} ({BY_NAME[name].unit})"


def draw_map(
    path: str | Path,
    field: NDArray,
    grid: Grid,
    masks: Mapping[str, NDArray[np.uint8]],
    label: str = "",
    title: str = "",
    tracks: Sequence[Storm] = (),
    zoom: bool = True,
) -> Path:
    """A field (H, W) with masks (H, W), one column for each of `masks` (title → mask), written to `path`.

    `tracks` marks best-track storms; with `zoom` every group of them also gets a row of panels. `label` names the field
    and its unit beside the colour bar.
    """
    pyplot = _pyplot()
    assert masks, "nothing to draw"
    for mask in masks.values():
        assert mask.shape == field.shape == grid.shape, (mask.shape, field.shape, grid.shape)
    frames = [WORLD, *(zoom_frames(tracks) if zoom else [])]
    figure, panels = _panels(pyplot, len(frames), len(masks))
    shades = None
    for column, (name, mask) in enumerate(masks.items()):
        for row, frame in enumerate(frames):
            shades = _draw_panel(panels[row, column], frame, field, grid, mask, _limits(field), tracks)
        panels[0, column].set_title(name, fontsize=13, loc="left", fontweight="bold")
    _finish(figure, list(panels.values()), shades, label, title, _legend_handles(bool(tracks)))
    return _save(pyplot, figure, path)


def zoom_frames(tracks: Sequence[Storm]) -> list[Frame]:
    """Frames that hold all storms, each with room around it; storms whose frames would overlap share one."""
    frames: list[Frame] = []
    for storm in sorted(tracks, key=lambda one: one.lon):
        frame = _around([storm])
        for place, other in enumerate(frames):
            if _overlap(frame, other):
                frames[place] = _merged(frame, other)
                break
        else:
            frames.append(frame)
    return frames


def _around(storms: Sequence[Storm]) -> Frame:
    lons, lats = [one.lon for one in storms], [one.lat for one in storms]
    return _padded(min(lons), max(lons), min(lats), max(lats))


def _padded(west: float, east: float, south: float, north: float) -> Frame:
    """A frame with a margin, of at least the smallest size, twice as wide as high, inside the world's latitudes."""
    wide = max(east - west + 2 * _ZOOM_MARGIN_DEG, _ZOOM_SIZE_DEG[0], 2 * (north - south + 2 * _ZOOM_MARGIN_DEG))
    high = wide / 2
    middle = float(np.clip((south + north) / 2, -90.0 + high / 2, 90.0 - high / 2))
    return Frame((west + east - wide) / 2, (west + east + wide) / 2, middle - high / 2, middle + high / 2)


def _overlap(a: Frame, b: Frame) -> bool:
    return a.west < b.east and b.west < a.east and a.south < b.north and b.south < a.north


def _merged(a: Frame, b: Frame) -> Frame:
    """The frame around both; the margins that they have already are not added again."""
    west, east = min(a.west, b.west), max(a.east, b.east)
    south, north = min(a.south, b.south), max(a.north, b.north)
    shrink = _ZOOM_MARGIN_DEG
    return _padded(west + shrink, east - shrink, min(south + shrink, north - shrink), max(south + shrink, north - shrink))


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def _panels(pyplot: Any, frames: int, masks: int) -> tuple[Figure, dict[tuple[int, int], Axes]]:
    """A figure and its axes by (frame, mask), all twice as wide as high: a row per frame and a column per mask.

    With a single mask the world takes the whole width and the zoomed frames share rows by two.
    """
    keys = {(frame, mask): f"{frame} {mask}" for frame in range(frames) for mask in range(masks)}
    places = [[keys[frame, mask] for mask in range(masks)] for frame in range(frames)]
    if masks == 1 and frames > 1:
        zooms = [keys[frame, 0] for frame in range(1, frames)] + ["."] * ((frames - 1) % 2)
        places = [[keys[0, 0]] * 2, *([zooms[k], zooms[k + 1]] for k in range(0, len(zooms), 2))]
    widths_in = [(_WIDTH_IN - 1.0) / len(set(row)) for row in places]
    figure = pyplot.figure(figsize=(_WIDTH_IN, sum(w / 2 + 0.45 for w in widths_in) + 1.3), dpi=_DPI, layout="constrained")
    panels = figure.subplot_mosaic(places, height_ratios=widths_in)
    return figure, {place: panels[key] for place, key in keys.items()}


def _limits(field: NDArray) -> tuple[float, float]:
    """Range of the grey scale: up to what one cell in 300 exceeds."""
    return float(field.min()), float(np.percentile(field, 99.7))


def _draw_panel(
    panel: Axes, frame: Frame, field: NDArray, grid: Grid, mask: NDArray, limits: tuple[float, float], tracks: Sequence[Storm]
) -> Any:
    """Field in grey, coast, classes and storms in one frame; returns the image for the colour bar."""
    columns, lon = _turned(grid, frame)
    extent = (lon[0] - grid.dlon / 2, lon[-1] + grid.dlon / 2, grid.lat[0] - grid.dlat / 2, grid.lat[-1] + grid.dlat / 2)
    shades = panel.imshow(
        field[:, columns], extent=extent, origin="lower", cmap=_light_greys(), vmin=limits[0], vmax=limits[1],
        interpolation="bilinear", aspect="auto",
    )  # fmt: skip
    _draw_coast(panel, frame)
    for kind in (RIVER, CYCLONE):
        _draw_class(panel, mask[:, columns] == kind, lon, grid, COLOURS[kind], frame)
    _draw_storms(panel, frame, tracks)
    _draw_axes(panel, frame)
    return shades


def _light_greys() -> Any:
    """White to middle grey, so that coloured fills and black text stay readable over the darkest values."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["Greys"](np.linspace(0.0, 0.62, 256)))


def _turned(grid: Grid, frame: Frame) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Columns of the grid in the frame's order and their longitudes; a global grid is turned to begin at its west."""
    if not grid.periodic:
        turns = 360.0 * np.round((frame.west + frame.east - grid.lon[0] - grid.lon[-1]) / 720.0)
        return np.arange(grid.lon.size), grid.lon + turns
    start = int(np.ceil(((frame.west - grid.lon[0]) % 360.0) / grid.dlon - 1e-9))
    order = np.arange(start - 1, start + grid.lon.size + 1)  # a column more at either end fills the frame
    first = frame.west + ((grid.lon[0] - frame.west) % grid.dlon)
    return order % grid.lon.size, first + (np.arange(order.size) - 1) * grid.dlon


def _draw_coast(panel: Axes, frame: Frame) -> None:
    stride = _COAST_STRIDE if frame.size[0] > 180 else _ZOOM_COAST_STRIDE
    grid, distance_km = coast_distance_km(stride)
    columns, lon = _turned(grid, frame)
    rows = np.flatnonzero((grid.lat >= frame.south - 1) & (grid.lat <= frame.north + 1))
    near = (lon >= frame.west - 1) & (lon <= frame.east + 1)
    panel.contour(
        lon[near], grid.lat[rows], distance_km[rows][:, columns[near]], levels=[0.0], colors="#5b4636",
        linewidths=0.7 if frame.size[0] > 180 else 1.0,
    )  # fmt: skip


def _draw_class(panel: Axes, inside: NDArray[np.bool_], lon: NDArray, grid: Grid, colour: str, frame: Frame) -> None:
    """Light fill and outline of a class; on coarse grids the outline follows the cells' edges."""
    rows = _near(inside.any(axis=1) & (grid.lat > frame.south - grid.dlat) & (grid.lat < frame.north + grid.dlat))
    cols = _near(inside.any(axis=0) & (lon > frame.west - grid.dlon) & (lon < frame.east + grid.dlon))
    inside, lat, lon = inside[rows, cols], grid.lat[rows], lon[cols]
    if not inside.any():
        return
    times = max(1, int(np.ceil(max(grid.dlat, grid.dlon) / _SMOOTH_DEG)))
    fine = np.repeat(np.repeat(inside, times, axis=0), times, axis=1).astype(np.float32)
    part = (np.arange(times) - (times - 1) / 2) / times
    lats = (lat[:, None] + part * grid.dlat).ravel()
    lons = (lon[:, None] + part * grid.dlon).ravel()
    panel.contourf(lons, lats, fine, levels=[0.5, 1.5], colors=[colour], alpha=0.28)
    panel.contour(lons, lats, fine, levels=[0.5], colors=[colour], linewidths=1.1 if frame.size[0] > 180 else 1.8)


def _near(used: NDArray[np.bool_]) -> slice:
    """From the first to the last place in use, with one more at either end."""
    places = np.flatnonzero(used)
    return slice(max(int(places[0]) - 1, 0), int(places[-1]) + 2) if places.size else slice(0)


def _draw_storms(panel: Axes, frame: Frame, tracks: Sequence[Storm]) -> None:
    """A star at each storm; its number on the world map, its name and wind in a zoomed panel."""
    from matplotlib import patheffects

    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    wide = frame.size[0] > 180
    by_lon = sorted(range(len(tracks)), key=lambda place: tracks[place].lon)
    for order, place in enumerate(by_lon):
        number, storm, side = place + 1, tracks[place], (1, -1)[order % 2]  # neighbours above and below: no overlap
        lon = frame.west + (storm.lon - frame.west) % 360.0
        if not (lon <= frame.east and frame.south <= storm.lat <= frame.north):
            continue
        panel.plot(lon, storm.lat, "*", markersize=7 if wide else 15, color="#ffd400", markeredgecolor="black", zorder=6)
        text = str(number) if wide else f"{number}: {storm.label}\n{_place(storm.lat, storm.lon)}"
        panel.annotate(
            text, (lon, storm.lat), xytext=(4, 5 * side) if wide else (8, 9 * side), textcoords="offset points",
            va="bottom" if side > 0 else "top", fontsize=9 if wide else 10, path_effects=halo, zorder=7, annotation_clip=True,
        )  # fmt: skip


def _place(lat: float, lon: float) -> str:
    return f"{abs(lat):.1f}°{'N' if lat >= 0 else 'S'} {_east(lon)}"


def _east(lon: float) -> str:
    """A longitude as people write it."""
    lon = (lon + 180.0) % 360.0 - 180.0
    text = f"{abs(lon):.1f}".removesuffix(".0")
    return f"{text}°" if abs(lon) in (0.0, 180.0) else f"{text}°{'E' if lon > 0 else 'W'}"


def _draw_axes(panel: Axes, frame: Frame) -> None:
    """Frame, ticks in degrees, names of the axes."""
    step = next(s for s in (5, 10, 20, 30, 60) if frame.size[0] / s <= 8 or s == 60)
    lons = np.arange(np.ceil(frame.west / step) * step, frame.east + 1e-6, step)
    lat_step = next(s for s in (5, 10, 20, 30) if frame.size[1] / s <= 6 or s == 30)
    lats = np.arange(np.ceil(frame.south / lat_step) * lat_step, frame.north + 1e-6, lat_step)
    panel.set(xlim=(frame.west, frame.east), ylim=(frame.south, frame.north), xlabel="longitude", ylabel="latitude")
    panel.set_xticks(lons, [_east(lon) for lon in lons])
    panel.set_yticks(lats, [f"{abs(lat):.0f}°{'N' if lat > 0 else 'S' if lat < 0 else ''}" for lat in lats])
    panel.tick_params(labelsize=9)
    panel.grid(color="0.6", linewidth=0.3, alpha=0.6)


def _legend_handles(with_tracks: bool) -> list[Any]:
    """Handles of the legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(facecolor=COLOURS[k] + "48", edgecolor=COLOURS[k], label=TITLES[k]) for k in (CYCLONE, RIVER)]
    handles.append(Line2D([], [], color="#5b4636", linewidth=1.0, label="coast"))
    if with_tracks:
        style: dict[str, Any] = {"linestyle": "", "markersize": 12, "color": "#ffd400", "markeredgecolor": "black"}
        handles.append(Line2D([], [], marker="*", label="best track", **style))
    return handles


def _finish(figure: Figure, panels: list[Axes], shades: Any, label: str, title: str, handles: list[Any]) -> None:
    style: dict[str, Any] = {"orientation": "horizontal", "shrink": 0.6, "aspect": 60, "pad": 0.01}
    figure.colorbar(shades, ax=panels, extend="max", **style).set_label(label, fontsize=11)
    if title:
        figure.suptitle(title, fontsize=15)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=11, frameon=False)


def _save(pyplot: Any, figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    with committed(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png")
    pyplot.close(figure)
    return path


def class_frequency(masks: Paths) -> tuple[NDArray[np.float32], Grid, int]:
    """Share of the maps in which each cell is of each class (3, H, W), their grid and number."""
    total, grid, count, first = None, None, 0, None
    for path in [masks] if isinstance(masks, str | Path) else masks:
        for file in mask_files(path):
            read = read_masks(file)
            here = np.stack([(read.masks == kind).sum(axis=0) for kind in range(3)])
            if grid is None or total is None:
                total, grid, first = np.zeros(here.shape), read.grid, file
            elif not grid.same_as(read.grid):
                raise BadInput(file, f"the grid of {first}", f"{read.grid.shape}", "Draw masks of one grid at a time")
            total, count = total + here, count + len(read.masks)
    assert total is not None, masks
    assert grid is not None, masks
    return (total / count).astype(np.float32), grid, count


def draw_frequency(path: str | Path, frequency: NDArray, grid: Grid, title: str = "", snapshots: int | None = None) -> Path:
    """How often each class occurs (3, H, W) as two maps, cyclones and rivers, written to `path`."""
    pyplot = _pyplot()
    figure, panels = _panels(pyplot, 1, 2)
    columns, lon = _turned(grid, WORLD)
    extent = (lon[0] - grid.dlon / 2, lon[-1] + grid.dlon / 2, grid.lat[0] - grid.dlat / 2, grid.lat[-1] + grid.dlat / 2)
    for panel, kind, colours in zip(panels.values(), (CYCLONE, RIVER), ("Reds", "Blues"), strict=True):
        percent = 100.0 * frequency[kind][:, columns]
        image = panel.imshow(
            percent, extent=extent, origin="lower", cmap=colours, vmin=0, vmax=max(float(percent.max()), 1e-3), aspect="auto"
        )  # fmt: skip
        _draw_coast(panel, WORLD)
        _draw_axes(panel, WORLD)
        panel.set_title(TITLES[kind], fontsize=13, loc="left", fontweight="bold")
        bar = figure.colorbar(image, ax=panel, orientation="horizontal", fraction=0.05, aspect=40, pad=0.02)
        bar.set_label("share of time (%)" if snapshots is None else f"share of {snapshots} maps (%)")
    if title:
        figure.suptitle(title, fontsize=15)
    return _save(pyplot, figure, path)
