"""Pictures: a field with the cyclones (red) and rivers (blue) of one or several labellers, coast lines, best-track storms.

A column per labeller; below the world, a row of zoomed panels for each group of storms. matplotlib is imported only where
something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raysegment.applications.canvas import (
    COAST,
    MIDDLE_DEG,
    WORLD,
    Canvas,
    FlatCanvas,
    Frame,
    east_of,
    panel_style,
    world_canvas,
)
from raysegment.applications.projections import AUTO, Projection, projection_of
from raysegment.applications.tracks import Storm
from raysegment.archive.files import committed
from raysegment.climate.channels import CYCLONE, RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {CYCLONE: "tropical cyclone", RIVER: "atmospheric river"}
WIDTH_IN, DPI = 16.0, 110  # 1760 pixels across
_ZOOM_SIZE_DEG = (40.0, 20.0)  # smallest panel, longitude × latitude
_ZOOM_MARGIN_DEG = 8.0
PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Palette:
    """Colours of both classes and, for maps of how often they occur, of their shades; `hatched` tells cyclones from rivers
    without any colour."""

    cyclone: str
    river: str
    shades: tuple[str, str]
    hatched: bool = False

    def of(self, kind: int) -> str:
        return {CYCLONE: self.cyclone, RIVER: self.river}[kind]


STANDARD = "standard"
PALETTES = {
    STANDARD: Palette("#d7191c", "#1f6fd6", ("Reds", "Blues")),  # red and blue as in the 2018 paper's figure
    "colour-blind": Palette("#d55e00", "#0072b2", ("Oranges", "Blues"), hatched=True),  # Okabe and Ito 2008
}


def palette_of(name: str) -> Palette:
    """A palette by name."""
    if name not in PALETTES:
        raise BadInput("--colours", ", ".join(PALETTES), name, "Choose one of those")
    return PALETTES[name]


@dataclass(frozen=True)
class Scene:
    """What one picture shows: a `field (H, W)` with masks (H, W), one column for each of `masks` (title → mask).

    `label` names the field and its unit beside the colour bar, `stamp` says when it was. `tracks` marks best-track storms.
    `limits` are the ends of the grey scale (from the field where not given). Without masks the field is drawn alone.
    """

    field: NDArray
    grid: Grid
    masks: Mapping[str, NDArray[np.uint8]]
    label: str = ""
    title: str = ""
    stamp: str = ""
    tracks: Sequence[Storm] = ()
    limits: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for shape in (self.field.shape, *(mask.shape for mask in self.masks.values())):
            assert shape == self.grid.shape, (shape, self.grid.shape)


def draw_map(path: str | Path, scene: Scene, colours: str = STANDARD, zoom: bool = True, projection: str = AUTO) -> Path:
    """The picture of a scene, written to `path`; with `zoom` every group of storms also gets a row of panels.

    `projection`: of the world (`projection_of`); regions and zoomed panels are plate carrée.
    """
    figure = map_figure(scene, palette_of(colours), zoom=zoom, projection=projection)
    return save_figure(figure, path)


def map_figure(scene: Scene, palette: Palette, width_in: float = WIDTH_IN, zoom: bool = True, projection: str = AUTO) -> Figure:
    """The same as an open figure, for the caller to save and close."""
    first = home(scene.grid)
    chosen = projection_of(projection, MIDDLE_DEG) if first == WORLD else None
    frames = [first, *(zoom_frames(scene.tracks) if zoom else [])]
    columns = scene.masks or {"": np.zeros(scene.grid.shape, np.uint8)}
    figure, panels = panels_of(load_pyplot(), len(frames), len(columns), width_in, chosen)
    limits, shades = scene.limits or shade_limits(scene.field), None
    for column, (name, mask) in enumerate(columns.items()):
        for row, frame in enumerate(frames):
            panel = panels[row, column]
            canvas = world_canvas(panel, chosen) if frame == WORLD and row == 0 else FlatCanvas(panel, frame)
            shades = _draw_panel(canvas, scene, mask, limits, palette)
        panels[0, column].set_title(name, fontsize=12, loc="left", fontweight="bold")
    panels[0, len(columns) - 1].set_title(scene.stamp, fontsize=12, loc="right")
    _finish(figure, list(panels.values()), shades, scene, _legend_handles(palette, bool(scene.masks), bool(scene.tracks)))
    return figure


def home(grid: Grid) -> Frame:
    """The frame of the whole map: the world, or for a map of a region the region, twice as wide as high."""
    if grid.periodic or grid.lon.size * grid.dlon > 180.0:
        return WORLD
    west, east, south, north = grid.lon[0] - grid.dlon / 2, grid.lon[-1] + grid.dlon / 2, grid.lat[0], grid.lat[-1]
    wide = max(east - west, 2.0 * (north - south + grid.dlat))
    middle = float(np.clip((south + north) / 2, wide / 4 - 90.0, 90.0 - wide / 4))
    return Frame((west + east - wide) / 2, (west + east + wide) / 2, middle - wide / 4, middle + wide / 4)


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


def load_pyplot() -> Any:
    """matplotlib, drawing without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def panels_of(
    pyplot: Any, frames: int, masks: int, width_in: float = WIDTH_IN, projection: Projection | None = None
) -> tuple[Figure, dict[tuple[int, int], Axes]]:
    """A figure and its axes by (frame, mask), all twice as wide as high: a row per frame and a column per mask.

    With a single mask the world takes the whole width and the zoomed frames share rows by two.
    """
    keys = {(frame, mask): f"{frame} {mask}" for frame in range(frames) for mask in range(masks)}
    places = [[keys[frame, mask] for mask in range(masks)] for frame in range(frames)]
    if masks == 1 and frames > 1:
        zooms = [keys[frame, 0] for frame in range(1, frames)] + ["."] * ((frames - 1) % 2)
        places = [[keys[0, 0]] * 2, *([zooms[k], zooms[k + 1]] for k in range(0, len(zooms), 2))]
    widths_in = [(width_in - 1.0) / len(set(row)) for row in places]
    figure = pyplot.figure(figsize=(width_in, sum(w / 2 + 0.45 for w in widths_in) + 1.3), dpi=DPI, layout="constrained")
    world = {keys[0, mask]: panel_style(projection) for mask in range(masks)}
    panels = figure.subplot_mosaic(places, height_ratios=widths_in, per_subplot_kw=world)
    return figure, {place: panels[key] for place, key in keys.items()}


def shade_limits(field: NDArray) -> tuple[float, float]:
    """Range of the grey scale: up to what one cell in 300 exceeds."""
    return float(np.nanmin(field)), float(np.nanpercentile(field, 99.7))


def _draw_panel(canvas: Canvas, scene: Scene, mask: NDArray, limits: tuple[float, float], palette: Palette) -> Any:
    """Field in grey, coast, classes and storms; returns the image for the colour bar."""
    shades = canvas.image(scene.field, scene.grid, cmap=_light_greys(), vmin=limits[0], vmax=limits[1])
    canvas.coast()
    for kind in (RIVER, CYCLONE):
        hatch = "////" if palette.hatched and kind == CYCLONE else None
        canvas.region(mask == kind, scene.grid, palette.of(kind), hatch)
    _draw_storms(canvas, scene.tracks)
    canvas.finish()
    return shades


def _light_greys() -> Any:
    """White to middle grey, so that coloured fills and black text stay readable over the darkest values."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["Greys"](np.linspace(0.0, 0.62, 256)))


def _draw_storms(canvas: Canvas, tracks: Sequence[Storm]) -> None:
    """A star at each storm; its number on the world map, its name and wind in a zoomed panel."""
    from matplotlib import patheffects

    halo, wide = [patheffects.withStroke(linewidth=2.5, foreground="white")], canvas.wide
    numbered = sorted(enumerate(tracks, start=1), key=lambda one: one[1].lon)
    for order, (number, storm) in enumerate(numbered):
        point, side = canvas.place(storm.lat, storm.lon), (1, -1)[order % 2]  # neighbours above and below: no overlap
        if point is None:
            continue
        canvas.panel.plot(*point, "*", markersize=7 if wide else 15, color="#ffd400", markeredgecolor="black", zorder=6)
        text = str(number) if wide else f"{number}: {storm.label}\n{_place(storm.lat, storm.lon)}"
        canvas.panel.annotate(
            text, point, xytext=(4, 5 * side) if wide else (8, 9 * side), textcoords="offset points",
            va="bottom" if side > 0 else "top", fontsize=9 if wide else 10, path_effects=halo, zorder=7, annotation_clip=True,
        )  # fmt: skip


def _place(lat: float, lon: float) -> str:
    return f"{abs(lat):.1f}°{'N' if lat >= 0 else 'S'} {east_of(lon)}"


def _legend_handles(palette: Palette, with_masks: bool, with_tracks: bool) -> list[Any]:
    """Handles of the legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = (CYCLONE, RIVER) if with_masks else ()
    handles: list[Any] = [Patch(facecolor=palette.of(k) + "48", edgecolor=palette.of(k), label=TITLES[k]) for k in kinds]
    if palette.hatched and handles:
        handles[0].set_hatch("////")
    handles.append(Line2D([], [], color=COAST, linewidth=1.0, label="coast"))
    if with_tracks:
        style: dict[str, Any] = {"linestyle": "", "markersize": 12, "color": "#ffd400", "markeredgecolor": "black"}
        handles.append(Line2D([], [], marker="*", label="best track", **style))
    return handles


def _finish(figure: Figure, panels: list[Axes], shades: Any, scene: Scene, handles: list[Any]) -> None:
    style: dict[str, Any] = {"orientation": "horizontal", "shrink": 0.6, "aspect": 60, "pad": 0.01}
    figure.colorbar(shades, ax=panels, extend="max", **style).set_label(scene.label, fontsize=11)
    if scene.title:
        figure.suptitle(scene.title, fontsize=14)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=11, frameon=False)


def check_ending(path: str | Path, endings: Sequence[str] = PICTURES) -> None:
    """Raise unless a picture of that name can be written."""
    if Path(path).suffix.lower() not in endings:
        raise BadInput("--out", f"a name that ends in {', '.join(endings)}", path, "Choose the ending of a picture")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure, whole or not at all, and close it."""
    path = Path(path)
    try:
        check_ending(path)
        with committed(path) as temporary:
            figure.savefig(temporary, format=path.suffix.lower().lstrip("."))
    finally:
        load_pyplot().close(figure)
    return path
