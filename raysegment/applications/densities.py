"""How often each class occurs: maps of both classes and, with `counts`, their seasonal cycle by hemisphere and their years.

From masks: the share of all maps in which a cell is of the class, and the mean number of objects on a map (connected, across
the date line too). From a table of events: the number of objects whose centre lies in a cell of CELL_DEG degrees, and the
number of tracks that begin (of objects, where the table has no tracks). One map, or one batch of rows, is in memory at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as parquet
from numpy.typing import NDArray
from pyarrow import BaseExtensionType
from scipy import ndimage

from raysegment.applications.canvas import MIDDLE_DEG, panel_style, world_canvas
from raysegment.applications.evaluate import mask_files
from raysegment.applications.maps import (
    DPI,
    STANDARD,
    TITLES,
    WIDTH_IN,
    Palette,
    check_ending,
    load_pyplot,
    palette_of,
    save_figure,
)
from raysegment.applications.projections import AUTO, Projection, projection_of
from raysegment.archive.masks import MASK_SUFFIX, MaskSource
from raysegment.climate.channels import CLASSES, CYCLONE, RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.climate.regions import label_regions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELL_DEG = 5.0
TABLES = (".parquet", ".csv")
KINDS = (CYCLONE, RIVER)
HEMISPHERES = ("north", "south")
_MONTHS = "JFMAMJJASOND"
_ROWS = 50_000
_FEW_YEARS = 2  # a shorter time is shown month by month
_TRACK_NAMES = ("track", "track_id")

Report = Callable[[int, int], None]


@dataclass
class Density:
    """Sums over an archive: `cells (2, H, W)` counts of cyclones and rivers on `grid`, and how many `maps` were read.

    `objects[kind, hemisphere, year, month]` and `maps_in[year, month]` count what has a time. `per_map`: whether objects
    are counted on every map (masks), so that only their mean per map means something.
    """

    grid: Grid
    per_map: bool
    cell_label: str
    object_label: str
    cells: NDArray[np.int64] = field(init=False)
    maps: int = 0
    objects: Counter = field(default_factory=Counter)
    maps_in: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.cells = np.zeros((len(KINDS), *self.grid.shape), np.int64)

    def shown(self, kind: int) -> NDArray[np.float64]:
        """Map (H, W) of a class to draw: percent of the maps, or counts."""
        cells = self.cells[KINDS.index(kind)].astype(np.float64)
        return 100.0 * cells / max(self.maps, 1) if self.per_map else cells

    def by(self, kind: int, part: Callable[[int, int], Any]) -> dict[str, dict[Any, float]]:
        """Objects of a class by hemisphere and by `part(year, month)`; per map where that is what counts."""
        maps = Counter[Any]()
        for when, number in self.maps_in.items():
            maps[part(*when)] += number
        sums = {hemisphere: dict.fromkeys(sorted(maps), 0.0) for hemisphere in HEMISPHERES}
        for (of, hemisphere, year, month), number in self.objects.items():
            if of == kind:
                sums[hemisphere][part(year, month)] += number / (maps[part(year, month)] if self.per_map else 1)
        return sums

    def months(self, kind: int) -> dict[str, dict[int, float]]:
        """The seasonal cycle of a class: hemisphere → month (1 to 12) → objects."""
        return self.by(kind, lambda year, month: month)

    def years(self, kind: int) -> dict[str, dict[str, float]]:
        """Hemisphere → year ("2011", or "2011-10" where there are few years) → objects."""
        few = len({year for year, _ in self.maps_in}) <= _FEW_YEARS
        return self.by(kind, (lambda year, month: f"{year:04d}-{month:02d}") if few else (lambda year, month: f"{year:04d}"))


def draw_density(
    sources: Sequence[str | Path],
    out: str | Path,
    counts: bool = True,
    colours: str = STANDARD,
    projection: str = AUTO,
    progress: Report | None = None,
) -> dict[str, Any]:
    """The picture of masks (files, folders) or of one table of events, and its numbers by class.

    `counts` adds the seasonal cycle and the years; BadInput where no time is known.
    """
    check_ending(out)
    chosen = projection_of(projection, MIDDLE_DEG)
    palette, report = palette_of(colours), progress or (lambda done, total: None)
    table = [Path(path) for path in sources if Path(path).suffix.lower() in TABLES]
    if table and len(sources) > 1:
        raise BadInput("map", "masks, or one table of events", ", ".join(map(str, sources)), "Draw one table at a time")
    found = table_density(table[0], report) if table else mask_density(sources, report)
    if counts and not found.maps_in:
        remedy = "Give the files a time axis, or leave out --density to draw only the maps"
        raise BadInput(sources[0], "times, for counts by month and year", "none known", remedy)
    title = f"{Path(sources[0]).name}: {found.maps} {'maps' if found.per_map else 'objects'}"
    numbers = {CLASSES[kind]: {"months": found.months(kind), "years": found.years(kind)} for kind in KINDS} if counts else {}
    return {
        "picture": draw_densities(found, out, title, counts, palette, chosen),
        "maps" if found.per_map else "objects": found.maps,
        "counted": found.object_label,
        **numbers,
    }


def mask_density(sources: Sequence[str | Path], report: Report) -> Density:
    """Sums over all maps of mask files and folders, which must have one grid."""
    files = sorted({file for path in sources for file in _masks_in(Path(path))})
    found: Density | None = None
    for done, file in enumerate(files):
        with MaskSource(file) as masks:
            if found is None:
                found = Density(masks.axes.grid, True, "share of the maps (%)", "objects per map")
            elif not found.grid.same_as(masks.axes.grid):
                got = f"{masks.axes.grid.shape} cells"
                raise BadInput(file, f"the grid of {files[0]}, {found.grid.shape} cells", got, "Draw masks of one grid at a time")
            masks.read_once()
            for index, time in enumerate(masks.times):
                _add_map(found, masks.read(index), time)
        report(done + 1, len(files))
    assert found is not None, sources
    return found


def _masks_in(path: Path) -> list[Path]:
    """Mask files that a path names; BadInput for a folder that holds neither masks nor labelled files."""
    try:
        return mask_files(path)
    except BadInput:
        expected, remedy = f"mask files (*{MASK_SUFFIX}) or a table of events", "Make masks with `raysegment segment`"
        raise BadInput(path, expected, "none" if path.exists() else "no such file or folder", remedy) from None


def _add_map(found: Density, mask: NDArray[np.uint8], time: Any) -> None:
    found.maps += 1
    if time is not None:
        found.maps_in[time.year, time.month] += 1
    for place, kind in enumerate(KINDS):
        inside = mask == kind
        found.cells[place] += inside
        if time is not None and inside.any():
            for hemisphere, number in _objects(inside, found.grid).items():
                found.objects[kind, hemisphere, time.year, time.month] += number


def _objects(inside: NDArray[np.bool_], grid: Grid) -> dict[str, int]:
    """Connected objects of a map (H, W) by the hemisphere that most of their area lies in."""
    labels, count = label_regions(inside, grid.periodic)
    signed_km2 = np.broadcast_to(grid.area_km2 * np.sign(grid.lat)[:, None], grid.shape)
    north = int((np.asarray(ndimage.sum_labels(signed_km2, labels, np.arange(1, count + 1))) >= 0).sum())
    return {"north": north, "south": count - north}


def table_density(path: Path, report: Report) -> Density:
    """Sums over the rows of a table of events (columns class, time, lat, lon and, for tracks, track)."""
    rows, columns = round(180.0 / CELL_DEG), round(360.0 / CELL_DEG)
    grid = Grid(np.linspace(0.5, rows - 0.5, rows) * CELL_DEG - 90.0, np.linspace(0.5, columns - 0.5, columns) * CELL_DEG)
    names = _columns(path)
    track = next((name for name in _TRACK_NAMES if name in names), None)
    counted = "objects" if track is None else "tracks that begin"
    found = Density(grid, False, f"objects with their centre in a {CELL_DEG:g}° × {CELL_DEG:g}° cell", counted)
    first: dict[Any, tuple[str, float]] = {}  # of each track the time and latitude at which it begins
    for batch in _batches(path, ["class", "time", "lat", "lon", *([track] if track else [])]):
        _add_rows(found, path, batch, first, track)
        report(found.maps, found.maps)
    for (_, kind), (time, lat) in first.items():
        _count(found, kind, time, lat)
    if found.maps == 0:
        raise BadInput(path, "a table with at least one object", "no rows", "Make it with `raysegment events`")
    return found


def _columns(path: Path) -> list[str]:
    """Names of a table's columns; BadInput unless the needed ones are there."""
    try:
        names = _stored_columns(path) if path.suffix.lower() == ".parquet" else list(pd.read_csv(path, nrows=0).columns)
    except (OSError, ValueError) as error:
        raise BadInput(path, "a table of events (Parquet or CSV)", error, "Make it with `raysegment events`") from None
    missing = [name for name in ("class", "time", "lat", "lon") if name not in names]
    if missing:
        got = f"no {', '.join(missing)} among {', '.join(names)}"
        raise BadInput(path, "columns class, time, lat and lon", got, "Make the table with `raysegment events`")
    return names


def _stored_columns(path: Path) -> list[str]:
    """Names of a Parquet file's columns. ValueError where one is of a type of somebody's own: Ray has one that unpickles."""
    schema = parquet.read_schema(path)
    if own := [name for name, kind in zip(schema.names, schema.types, strict=True) if isinstance(kind, BaseExtensionType)]:
        raise ValueError(f"columns of extension types: {', '.join(own)}")
    return list(schema.names)


def _batches(path: Path, names: list[str]) -> Iterator[pd.DataFrame]:
    if path.suffix.lower() == ".csv":
        yield from pd.read_csv(path, usecols=names, chunksize=_ROWS)
        return
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=names):
            yield batch.to_pandas()


def _add_rows(found: Density, path: Path, batch: pd.DataFrame, first: dict, track: str | None) -> None:
    batch = batch.loc[batch["class"].isin([CLASSES[kind] for kind in KINDS])]
    lats, lons = batch["lat"].to_numpy(np.float64), batch["lon"].to_numpy(np.float64)
    if not (np.abs(lats) <= 90.0).all() or not np.isfinite(lons).all():
        raise BadInput(path, "lat from -90 to 90 and lon in every row", "others", "Correct the table")
    rows = np.minimum((lats + 90.0) / CELL_DEG, found.grid.lat.size - 1).astype(int)
    columns = (lons % 360.0 / CELL_DEG).astype(int) % found.grid.lon.size
    kinds = batch["class"].map(CLASSES.index).to_numpy(int)
    np.add.at(found.cells, (kinds - KINDS[0], rows, columns), 1)
    found.maps += len(batch)
    numbers = batch[track].tolist() if track else range(len(batch))
    for kind, time, lat, number in zip(kinds.tolist(), batch["time"].tolist(), lats.tolist(), numbers, strict=True):
        if _month(time) is None:
            continue
        if track is None:
            _count(found, kind, str(time), lat)
        elif (number, kind) not in first or str(time) < first[number, kind][0]:
            first[number, kind] = str(time), lat


def _month(time: Any) -> tuple[int, int] | None:
    """Year and month of a time as tables have it (ISO text, a timestamp), None where it is unknown."""
    year, _, rest = str(time).partition("-")
    return (int(year), int(rest[:2])) if year.isdigit() and rest[:2].isdigit() else None


def _count(found: Density, kind: int, time: str, lat: float) -> None:
    month = _month(time)
    assert month is not None, time
    found.maps_in[month] += 1
    found.objects[kind, "north" if lat >= 0 else "south", *month] += 1


def draw_densities(
    found: Density, out: str | Path, title: str, counts: bool, palette: Palette, projection: Projection | None = None
) -> Path:
    """Both maps side by side, written to `out`; with `counts`, months and years below each."""
    pyplot = load_pyplot()
    rows = 3 if counts else 1
    heights = [(WIDTH_IN - 1.0) / 4 + 0.9, 2.6, 2.6][:rows]
    figure = pyplot.figure(figsize=(WIDTH_IN, sum(heights) + 0.8), dpi=DPI, layout="constrained")
    places = [[f"{row} {column}" for column in range(len(KINDS))] for row in range(rows)]
    worlds = {place: panel_style(projection) for place in places[0]}
    named = figure.subplot_mosaic(places, height_ratios=heights, per_subplot_kw=worlds)
    panels = {(row, column): named[place] for row, line in enumerate(places) for column, place in enumerate(line)}
    for column, kind in enumerate(KINDS):
        _draw_share(figure, panels[0, column], found, kind, palette, projection)
        if counts:
            months, years = found.months(kind), found.years(kind)
            _draw_bars(panels[1, column], {h: _all_months(months[h]) for h in months}, palette.of(kind), "month")
            _draw_bars(
                panels[2, column],
                years,
                palette.of(kind),
                "year" if len(next(iter(years["north"]))) == 4 else "month of the year",
            )
            for row in (1, 2):
                panels[row, column].set_ylabel(found.object_label)
    figure.suptitle(title, fontsize=14)
    return save_figure(figure, out)


def _draw_share(figure: Any, panel: Axes, found: Density, kind: int, palette: Palette, projection: Projection | None) -> None:
    """One class's map with its colour bar; cells without any are white."""
    from matplotlib.ticker import MaxNLocator

    shown, canvas = found.shown(kind), world_canvas(panel, projection)
    shades, most = palette.shades[KINDS.index(kind)], max(float(shown.max()), 1e-3)
    image = canvas.image(np.ma.masked_equal(shown, 0.0), found.grid, smooth=False, cmap=shades, vmin=0, vmax=most)
    canvas.coast()
    canvas.finish()
    panel.set_title(TITLES[kind], fontsize=13, loc="left", fontweight="bold")
    bar = figure.colorbar(image, ax=panel, orientation="horizontal", fraction=0.05, aspect=40, pad=0.02)
    bar.set_label(found.cell_label)
    if not found.per_map:
        bar.locator = MaxNLocator(nbins=8, integer=True)
        bar.update_ticks()


def _all_months(values: dict[int, float]) -> dict[str, float]:
    """Twelve bars; a month without maps has none."""
    return {f"{month} ": values.get(month, float("nan")) for month in range(1, 13)}


def _draw_bars(panel: Axes, sums: dict[str, dict[str, float]], colour: str, name: str) -> None:
    """Bars of both hemispheres side by side, the northern one full, the southern one light."""
    labels = list(sums["north"])
    places = np.arange(len(labels))
    style: dict[str, Any] = {"width": 0.4, "edgecolor": colour, "linewidth": 0.8}
    panel.bar(places - 0.2, list(sums["north"].values()), color=colour, label="northern hemisphere", **style)
    panel.bar(places + 0.2, list(sums["south"].values()), color=colour + "40", label="southern hemisphere", **style)
    shown = list(_MONTHS) if name == "month" else labels
    step = max(1, -(-len(labels) // 16))
    panel.set_xticks(places[::step], shown[::step])
    panel.set_xlim(-0.6, max(len(labels), 3) - 0.4)
    panel.set_xlabel(name)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(y=0.25)
    panel.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
