"""A snapshot: the 16 fields of one time (and its mask), whatever the file it came from looked like."""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cftime
import netCDF4
import numpy as np
from numpy.typing import NDArray

from raysegment.archive import ground, times
from raysegment.archive.aliases import DEWPOINT, TRANSPORT, TRANSPORT_PARTS, Plan, Recipe, Variable, demand, find, plan
from raysegment.archive.axes import Axes
from raysegment.archive.deepcam import DeepcamFile, open_maps
from raysegment.archive.files import committed
from raysegment.archive.netcdf import LABELS, NetcdfFile
from raysegment.climate.channels import CHANNELS, CLASSES, GRAVITY_M_S2, INDEX, NAMES, Alias, Channel
from raysegment.climate.checks import BadInput
from raysegment.climate.consensus import CONSENSUS, merge_labels
from raysegment.climate.grid import Grid

LAYOUTS = ("climatenet", "cam", "deepcam", "cf")
SUFFIXES = (".nc", ".nc4", ".cdf", ".netcdf", ".h5", ".hdf5")
_NOT_SOURCES = (".mask.nc", ".artmip.nc")  # what this project writes beside sources
_NOT_SAMPLES = ("stats.h5",)  # DeepCAM keeps its statistics in the same folder
LabelMap = int | str  # one of several label maps by number, or how they become one: a rule of CONSENSUS
# Of a file: which of the channels that it gives, with or without a map of IVT, are needed (and "IVT" where that is wanted);
# BadInput when it gives too few
Needs = Callable[[Path, frozenset[str], bool], Collection[str]]
_PER_GRAVITY = 1.0 / GRAVITY_M_S2
OROGRAPHY = Channel("PHIS_M", "m", "height of the surface", -600.0, 9000.0, 0.0, 1000.0, (
    Alias("PHIS", "CAM", "m2 s-2", factor=_PER_GRAVITY), Alias("orog", "CMIP6", "m"), Alias("orography", "GFS", "m"),
    Alias("HGT", "GFS", "m"), Alias("HGT_surface", "GFS", "m"), Alias("hgtsfc", "GFS", "m"),
    Alias("z", "ERA5", "m2 s-2", factor=_PER_GRAVITY)))  # fmt: skip


@dataclass(frozen=True, eq=False)
class Snapshot:
    """`fields (16, H, W)` float32 in SI units and `mask (H, W)` uint8 (None without labels) on the canonical grid.

    From a file opened for a part of the channels, the others are NaN, and `ivt (H, W)` is the file's own vapour transport
    (kg m⁻¹ s⁻¹, NaN where it has no value), None where it has none or nobody asked for it.

    `axes` are those of the file, `time` is None where the file does not say (then `time_label` shows what it says
    instead), `index` is the place in the file `source`.
    """

    fields: NDArray[np.float32]
    mask: NDArray[np.uint8] | None
    axes: Axes
    time: cftime.datetime | None
    time_label: str
    source: Path
    index: int
    ivt: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        shape = self.axes.grid.shape
        assert self.fields.shape == (len(NAMES), *shape), (self.fields.shape, shape)
        assert self.mask is None or self.mask.shape == shape, (self.mask.shape, shape)

    @property
    def grid(self) -> Grid:
        return self.axes.grid


def list_sources(paths: Sequence[str | Path]) -> list[Path]:
    """The archive files that `paths` (files, folders searched through, glob patterns) name, sorted, each once."""
    found: set[Path] = set()
    for path in [paths] if isinstance(paths, str | Path) else paths:
        files = _named(Path(path))
        if not files:
            remedy = "Check the path; in a folder, files ending in " + ", ".join(SUFFIXES) + " are taken"
            raise BadInput(path, "archive files", "none", remedy)
        found.update(files)
    return sorted(found)


def _named(path: Path) -> list[Path]:
    if path.is_dir():
        return [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file() and _is_source(file, path)]
    if path.exists():
        return [path]
    return [file for match in glob.glob(str(path), recursive=True) for file in _named(Path(match))]


def _is_source(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and not file.name.endswith(_NOT_SOURCES) and file.name not in _NOT_SAMPLES


class Source:
    """An archive file open for reading, one snapshot at a time; a context manager.

    `layout` is one of LAYOUTS; `times` holds None where unknown. It travels between processes as its path: the other
    side opens the file anew. With `needs` only what they name is read, and the rest may be
    missing; without, all 16 must be there.
    """

    def __init__(self, path: str | Path, below_ground: bool = True, label_map: LabelMap = 0, needs: Needs | None = None):
        self.path, self.below_ground, self.label_map, self._needs = Path(path), below_ground, label_map, needs
        self._with_masks, self._spare = True, None
        self._file = open_maps(path)
        try:
            self._label_maps = self._file.label_maps()
            self._check_label_map()
            self._plan, self.layout = None, "deepcam"
            if isinstance(self._file, NetcdfFile):
                self._plan, self.layout = self._planned(self._file, self._file.variables())
        except BaseException:
            self.close()
            raise

    def __reduce__(self):
        return Source, (self.path, self.below_ground, self.label_map, self._needs)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def axes(self) -> Axes:
        return self._file.axes

    @property
    def times(self) -> tuple[cftime.datetime | None, ...]:
        return self._file.times

    @property
    def time_labels(self) -> tuple[str, ...]:
        return self._file.time_labels

    @property
    def time_bounds(self) -> tuple[tuple[cftime.datetime, cftime.datetime], ...] | None:
        """Of each time, beginning and end of what it stands for; None where the file does not say."""
        return self._file.time_bounds()

    @property
    def count(self) -> int:
        """Snapshots in the file."""
        return self._file.count

    @property
    def has_mask(self) -> bool:
        return self._label_maps > 0

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Snapshot:
        """Snapshot `index`, every field checked (finite, within the channel's plausible range)."""
        if not 0 <= index < self.count:
            raise IndexError(f"{self.path}: snapshot {index} of {self.count}")
        fields, when, absent = self._fields(index), self.time_labels[index], self._absent
        if self._may_be_buried(*ground.BURIED) and not ground.follows_below_ground(fields):
            check_fields(self.path, fields, when, (*ground.BURIED, *absent))  # CMIP6 has no value there below ground
            fields = ground.apply_below_ground(fields, self._orography_m(index, fields))
        check_fields(self.path, fields, when, absent)
        mask = self.read_mask(index) if self._with_masks and self.has_mask else None
        return Snapshot(fields, mask, self.axes, self.times[index], when, self.path, index, self._transport(index))

    def snapshots(self, into: NDArray[np.float32] | None = None) -> Iterator[Snapshot]:
        """All snapshots in order; after `read_once` each stored byte is read once.

        With an array `into (16, H, W)` their fields may lie in it, and those of a snapshot are overwritten by the next.
        """
        self._spare = into
        try:
            yield from (self.read(index) for index in range(self.count))
        finally:
            self._spare = None

    def read_once(self, memory_mib: float = 1024.0, masks: bool = True) -> int:
        """From now on snapshots, read in ascending order, read each stored byte once, however the file is chunked.

        Maps that share chunks with later ones are kept: in memory up to `memory_mib`, beyond that in temporary files.
        Without `masks` the labels inside the file are left alone. How many bytes the file has for all that comes out.
        """
        self._with_masks = masks
        labels = label_numbers(self.label_map, self._label_maps) if masks else ()
        if isinstance(self._file, DeepcamFile):
            return self._file.stored_bytes(labels)
        places = {self._file.place(recipe.variable, recipe.level) for recipe in self._recipes()}
        places |= {self._file.label_place(number) for number in labels}
        return self._file.read_once(places, int(memory_mib * 2**20))

    def read_mask(self, index: int) -> NDArray[np.uint8]:
        """Mask (H, W) of snapshot `index`, canonical, checked; without reading the fields."""
        return merged_labels(self.path, self._file, index, self.label_map)

    def describe(self) -> Mapping[str, str]:
        """Where each channel comes from: the variable's name, with its level and conversion, or the rule."""
        if self._plan is None:
            return {name: f"climate/data[{index}]" for index, name in enumerate(NAMES)}
        recipes = self._plan.recipes
        rules = {"ZBOT": f"{ground.ZBOT_M_PER_K} m/K x TREFHT", "QREFHT": "dew point and surface pressure"}
        return {name: _spoken(recipes[name]) if name in recipes else rules[name] for name in NAMES if name not in self._absent}

    def _planned(self, file: NetcdfFile, variables: Mapping[str, Variable]) -> tuple[Plan, str]:
        """Where the channels that are needed are, and the layout; BadInput where one is not."""
        how = plan(self.path, variables)
        needed = NAMES if self._needs is None else self._needs(self.path, how.channels, bool(how.transport))
        demand(self.path, how, variables, needed)
        return how.only(needed), self._layout_of(file, how)

    @property
    def _absent(self) -> tuple[str, ...]:
        """Channels that the file does not give, or that nobody needs."""
        return () if self._plan is None else tuple(name for name in NAMES if name not in self._plan.channels)

    def _check_label_map(self) -> None:
        if self.label_map:
            check_label_map(self.path, self.label_map, self._label_maps)

    def _layout_of(self, file: NetcdfFile, how: Plan) -> str:
        own_names = all(recipe.group == "CAM" for recipe in how.recipes.values())
        if own_names and (file.string_time or self.has_mask):
            return "climatenet"
        return "cam" if own_names and file.made_by_cam() else "cf"

    def _fields(self, index: int) -> NDArray[np.float32]:
        if self._plan is None:
            assert isinstance(self._file, DeepcamFile)
            return self._file.fields(index)
        fields = np.empty((len(NAMES), *self.axes.grid.shape), np.float32) if self._spare is None else self._spare
        for name, recipe in self._plan.recipes.items():
            fields[INDEX[name]] = self._cook(recipe, index)
        for name in self._absent:
            fields[INDEX[name]] = np.nan
        self._derive(self._plan, fields, index)
        return fields

    def _recipes(self) -> list[Recipe]:
        """Everything that a snapshot may need."""
        assert self._plan is not None
        assert isinstance(self._file, NetcdfFile)
        below = find(self.path, OROGRAPHY, self._file.variables()) if self._may_be_buried("Z1000") else None
        more = (one for one in (self._plan.dewpoint, below) if one is not None)
        return [*self._plan.recipes.values(), *self._plan.transport, *more]

    def _may_be_buried(self, *names: str) -> bool:
        """True when the below-ground rule is for this file and one of these channels is read."""
        return self.below_ground and self.layout == "cf" and not set(names) <= set(self._absent)

    def _transport(self, index: int) -> NDArray[np.float32] | None:
        """The file's own IVT (H, W), where it is wanted and there."""
        if self._plan is None or not self._plan.transport:
            return None
        parts = [self._cook(recipe, index) for recipe in self._plan.transport]
        kinds = (TRANSPORT,) if len(parts) == 1 else TRANSPORT_PARTS
        for kind, part in zip(kinds, parts, strict=True):
            _check_range(self.path, np.nan_to_num(part, nan=0.0), kind, self.time_labels[index])
        if not any(np.isfinite(part).any() for part in parts):
            names = ", ".join(recipe.variable for recipe in self._plan.transport)
            expected = f"values of {names} at {self.time_labels[index]}"
            raise BadInput(self.path, expected, "none (all missing)", "Leave this file out")
        return magnitude(parts).astype(np.float32)

    def _derive(self, how: Plan, fields: NDArray[np.float32], index: int) -> None:
        """Fill in the channels that the file does not hold."""
        if how.dewpoint is not None:
            dewpoint_k = self._cook(how.dewpoint, index)
            _check_range(self.path, dewpoint_k, DEWPOINT, self.time_labels[index])
            fields[INDEX["QREFHT"]] = ground.specific_humidity(dewpoint_k, fields[INDEX["PS"]].astype(np.float64))
        if how.zbot:
            fields[INDEX["ZBOT"]] = ground.bottom_height_m(fields[INDEX["TREFHT"]])

    def _cook(self, recipe: Recipe, index: int) -> NDArray:
        assert isinstance(self._file, NetcdfFile)
        raw = self._file.read(recipe.variable, index, recipe.level)
        if recipe.factor == 1.0 and recipe.offset == 0.0:
            return raw
        return raw.astype(np.float64) * recipe.factor + recipe.offset

    def _orography_m(self, index: int, fields: NDArray[np.float32]) -> NDArray:
        """Height of the surface (H, W): the file's, hydrostatic from PS and PSL where it has none."""
        assert isinstance(self._file, NetcdfFile)
        if not self._may_be_buried("Z1000"):
            return np.zeros(self.axes.grid.shape)  # which has no part in the winds
        estimate = ground.estimate_orography_m(fields)
        recipe = find(self.path, OROGRAPHY, self._file.variables())
        if recipe is None:
            return estimate
        height_m = self._cook(recipe, index)
        height_m = np.where(np.isnan(height_m), estimate, height_m)  # some archives leave out the sea
        _check_range(self.path, height_m, OROGRAPHY, self.time_labels[index])
        return height_m


def magnitude(parts: Sequence[NDArray]) -> NDArray:
    """Of a transport given whole, or by its two components (H, W)."""
    return parts[0] if len(parts) == 1 else np.hypot(*parts)


def open_source(path: str | Path, below_ground: bool = True, label_map: LabelMap = 0, needs: Needs | None = None) -> Source:
    """The archive file at `path`, of any layout, its channels found, its axes and times checked; BadInput otherwise.

    `below_ground` applies `ground.apply_below_ground` to archives that extrapolate pressure levels below the ground
    (layout "cf"; CAM-made files follow the rule already). `label_map` chooses among several label maps per time
    (several people, or DeepCAM's `labels_0` and `labels_1`), or is the rule by which they become one (CONSENSUS). `needs`
    says of the channels and IVT that the file gives which are needed; all 16 are unless it is given.
    """
    return Source(path, below_ground, label_map, needs)


def check_label_map(path: str | Path, label_map: LabelMap, have: int) -> None:
    """Raise unless `label_map` is the number of one of the `have` label maps of a file, or a rule to merge them."""
    if label_map not in CONSENSUS and not (isinstance(label_map, int) and 0 <= label_map < have):
        expected = f"a label map below {have}, or {', '.join(CONSENSUS)}"
        raise BadInput(path, expected, f"label map {label_map}", "Choose another label map")


def label_numbers(label_map: LabelMap, have: int) -> tuple[int, ...]:
    """Which of the `have` label maps of a file are read: one, or all where they are merged."""
    return (label_map,) if isinstance(label_map, int) and have else tuple(range(have))


def merged_labels(path: Path, file: NetcdfFile | DeepcamFile, index: int, label_map: LabelMap) -> NDArray[np.uint8]:
    """Mask (H, W) of time `index`: one label map of the file, or all of them by a rule of CONSENSUS; each checked."""
    numbers = label_numbers(label_map, file.label_maps())
    maps = [checked_mask(path, file.labels(index, number), file.axes.grid.shape) for number in numbers]
    return maps[0] if isinstance(label_map, int) else merge_labels(np.stack(maps), label_map)


def read_variables(path: str | Path, names: Sequence[str], index: int = 0) -> dict[str, NDArray[np.float64]]:
    """Maps (H, W) of any variables of a netCDF file by their own names, canonical, in the file's units, NaN where empty.

    For what is no channel (IVT, a land mask) and for files that hold only that.
    """
    with NetcdfFile(path) as file:
        have = file.variables()
        missing = [name for name in names if name not in have or not have[name].usable]
        if missing:
            usable = ", ".join(sorted(name for name, variable in have.items() if variable.usable))
            expected = f"variables {', '.join(missing)} on its grid"
            raise BadInput(path, expected, f"maps {usable or 'none'}", "Name one of those it has")
        return {name: file.read(name, index).astype(np.float64) for name in names}


def check_fields(path: str | Path, fields: NDArray, when: str, leave_out: Sequence[str] = ()) -> None:
    """Raise unless every value of `fields (16, H, W)`, but for the channels to leave out, is finite and plausible."""
    for channel, field in zip(CHANNELS, fields, strict=True):
        if channel.name not in leave_out:
            _check_range(path, field, channel, when)


def _check_range(path: str | Path, field: NDArray, channel: Channel, when: str) -> None:
    low, high = field.min(), field.max()  # NaN when any value is
    if channel.minimum <= low and high <= channel.maximum:
        return
    bad = ~((field >= channel.minimum) & (field <= channel.maximum))
    row, column = (int(i) for i in np.argwhere(bad)[0])
    what = "a missing value (NaN)" if np.isnan(field[row, column]) else f"{field[row, column]:.6g}"
    plausible = f"{channel.minimum:g} and {channel.maximum:g} {channel.unit}"
    expected = f"{channel.name} ({channel.long_name}) between {plausible} everywhere"
    got = f"{what} at row {row}, column {column} of {when} and {int(bad.sum()) - 1} more such cells of {bad.size}"
    raise BadInput(path, expected, got, "Check the variable's unit and fill value, or leave this file out")


def checked_mask(path: str | Path, labels: NDArray, grid_shape: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """`labels (…, H, W)` of any number type as uint8, raised when a value is no class or the shape is another."""
    if grid_shape is not None and labels.shape[-2:] != grid_shape:
        raise BadInput(path, f"labels of shape {grid_shape}", labels.shape, "Use the mask that was made for these fields")
    if labels.dtype.kind in "iu" and labels.min() >= 0 and labels.max() < len(CLASSES):
        return labels.astype(np.uint8)
    bad = ~np.isin(labels, range(len(CLASSES)))
    if bad.any():
        values = ", ".join(f"{value:g}" for value in np.unique(labels[bad])[:5])
        classes = ", ".join(f"{number} {name}" for number, name in enumerate(CLASSES))
        raise BadInput(path, f"labels {classes}", f"{values} in {int(bad.sum())} of {bad.size} cells", "Recode the labels")
    return labels.astype(np.uint8)


def _spoken(recipe: Recipe) -> str:
    level = "" if recipe.level is None else f"[level {recipe.level}]"
    scale = "" if recipe.factor == 1.0 else f" x {recipe.factor:.6g}"
    return f"{recipe.variable}{level}{scale}" + (f" {recipe.offset:+g}" if recipe.offset else "")


def write_climatenet(
    path: str | Path, fields: NDArray, grid: Grid, mask: NDArray | None, time: cftime.datetime | None = None, compression: int = 0
) -> None:
    """One snapshot in ClimateNet's layout: 16 variables (time, lat, lon), string time, LABELS (lat, lon) int64.

    The string is the ClimateNet name of the time; its exact value and calendar are attributes beside it. `compression`
    is the deflate level of the fields (0: none, as in ClimateNet).
    """
    assert fields.shape == (len(NAMES), *grid.shape), (fields.shape, grid.shape)
    with committed(path) as temporary, netCDF4.Dataset(str(temporary), "w", format="NETCDF4") as data:
        _write_axes(data, grid, time, Path(path).name)
        for channel, field in zip(CHANNELS, fields, strict=True):
            options = {"zlib": True, "complevel": compression, "shuffle": True} if compression else {}
            variable = data.createVariable(channel.name, "f4", ("time", "lat", "lon"), fill_value=False, **options)
            variable.setncatts({"units": channel.unit, "long_name": channel.long_name})
            variable[0] = field
        if mask is not None:
            labels = data.createVariable(LABELS, "i8", ("lat", "lon"), fill_value=False, zlib=True, complevel=1)
            labels.setncatts({"long_name": ", ".join(f"{number} {name}" for number, name in enumerate(CLASSES))})
            labels[:] = checked_mask(path, mask, grid.shape)


def _write_axes(data: netCDF4.Dataset, grid: Grid, time: cftime.datetime | None, name: str) -> None:
    for dimension, size in (("time", 1), ("lat", grid.shape[0]), ("lon", grid.shape[1])):
        data.createDimension(dimension, size)
    when = data.createVariable("time", str, ("time",))
    when[0] = name if time is None else times.name_of_time(time)
    if time is not None:
        when.setncatts({"iso8601": time.isoformat(), "calendar": time.calendar})
    for axis, values, unit in (("lat", grid.lat, "degrees_north"), ("lon", grid.lon, "degrees_east")):
        variable = data.createVariable(axis, "f8", (axis,), fill_value=False)
        variable.setncatts({"units": unit})
        variable[:] = values
