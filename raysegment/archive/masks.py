"""Masks as CF netCDF files: one class per cell and time, in the orientation and calendar of the file they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import cftime
import netCDF4
import numpy as np
from numpy.typing import NDArray

from raysegment.archive import times as calendar_times
from raysegment.archive.axes import Axes
from raysegment.archive.deepcam import DeepcamFile, open_maps
from raysegment.archive.files import committed
from raysegment.archive.netcdf import LABELS, NetcdfFile
from raysegment.archive.snapshots import LabelMap, check_label_map, checked_mask, label_numbers, merged_labels
from raysegment.climate.channels import CLASSES, CYCLONE, RIVER
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid

MASK_SUFFIX, ARTMIP_SUFFIX = ".mask.nc", ".artmip.nc"
TAGS = {"ar_binary_tag": RIVER, "tc_binary_tag": CYCLONE}  # ARTMIP's and TempestExtremes' own masks, read as one class
PROBABILITY = "PROB_{}"  # one float variable per class
EPOCH = "days since 1900-01-01 00:00:00"  # TECA wants days
UNKNOWN_EPOCH, UNKNOWN_CALENDAR = "days since 0001-01-01 00:00:00", "noleap"
Bounds = Sequence[tuple[cftime.datetime, cftime.datetime]]  # of each time, beginning and end of what it stands for
_REFERENCES = "Kurth et al. 2018, Exascale Deep Learning for Climate Analytics, doi:10.1109/SC.2018.00054"


@dataclass(frozen=True, eq=False)
class Masks:
    """`masks (T, H, W)` uint8 on the canonical grid, with `times` (None where unknown) and who made them."""

    masks: NDArray[np.uint8]
    axes: Axes
    times: tuple[cftime.datetime | None, ...]
    time_labels: tuple[str, ...]
    labeller: str
    source: Path

    def __post_init__(self) -> None:
        shape = (len(self.times), *self.axes.grid.shape)
        assert self.masks.shape == shape, (self.masks.shape, shape)

    @property
    def grid(self) -> Grid:
        return self.axes.grid

    def check_fits(self, grid: Grid, count: int) -> None:
        """Raise unless there is one mask for each of `count` snapshots on `grid`."""
        _check_fits(self.source, self.grid, len(self.times), grid, count)


def _check_fits(path: Path, own: Grid, have: int, grid: Grid, count: int) -> None:
    if not own.same_as(grid) or have != count:
        got = f"{have} on {_spoken(own)}"
        raise BadInput(path, f"{count} mask(s) on {_spoken(grid)}", got, "Use the masks made for these fields")


def _spoken(grid: Grid) -> str:
    return f"{grid.shape[0]} x {grid.shape[1]} cells from {grid.lat[0]:g}N {grid.lon[0]:g}E"


def mask_path(out_dir: str | Path, source: str | Path) -> Path:
    """Where the masks of a source file lie: the same name with `.mask.nc`."""
    return Path(out_dir) / (Path(source).stem + MASK_SUFFIX)


def artmip_path(path: str | Path) -> Path:
    """Where the ARTMIP file beside a mask file lies: the same name with `.artmip.nc`."""
    name = Path(path).name
    stem = name.removesuffix(MASK_SUFFIX) if name.endswith(MASK_SUFFIX) else Path(path).stem
    return Path(path).with_name(stem + ARTMIP_SUFFIX)


def write_masks(
    path: str | Path,
    masks: NDArray[np.uint8],
    axes: Axes,
    times: Sequence[cftime.datetime | None],
    labeller: str,
    title: str = "Extreme weather masks",
    source: str = "",
    institution: str = "not stated",
    references: str = _REFERENCES,
    probabilities: NDArray | None = None,
    artmip: bool = False,
) -> list[Path]:
    """Masks (T, H, W) on the canonical grid → a CF-1.8 file (see MaskWriter); returns the files written.

    `probabilities (T, 3, H, W)` add one variable per class.
    """
    masks = np.asarray(masks)
    assert masks.shape[:-2] == (len(times),), (masks.shape, len(times))
    about = About(labeller, title, source, institution, references)
    with MaskWriter(path, axes, times, about, probabilities is not None, artmip) as writer:
        for index, mask in enumerate(masks):
            writer.add(mask, None if probabilities is None else probabilities[index])
    return writer.paths


@dataclass(frozen=True)
class About:
    """What a mask file says about itself."""

    labeller: str
    title: str = "Extreme weather masks"
    source: str = ""
    institution: str = "not stated"
    references: str = _REFERENCES

    @property
    def attributes(self) -> dict[str, str]:
        return {
            "title": self.title,
            "institution": self.institution,
            "source": self.source or self.labeller,
            "history": f"raysegment: labelled by {self.labeller}",
            "references": self.references,
            "labeller": self.labeller,
        }


class MaskWriter:
    """Writes a CF-1.8 mask file, one snapshot after the other, in the orientation of `axes`; a context manager.

    The file gets its name when all `times` have been added and it is on the disk; on an error nothing is left of it.
    `artmip` also writes the file beside it that ARTMIP and TempestExtremes read: `ar_binary_tag(time, lat, lon)` and the
    axes, nothing else. `bounds` are the intervals that the times stand for. The same input gives the same bytes: no date is
    written. Where a time is unknown, the time axis counts snapshots and its comment says so.
    """

    def __init__(
        self,
        path: str | Path,
        axes: Axes,
        times: Sequence[cftime.datetime | None],
        about: About,
        probabilities: bool = False,
        artmip: bool = False,
        bounds: Bounds | None = None,
    ):
        self.path, self._axes, self._times, self._about = Path(path), axes, times, about
        self._probabilities, self._artmip, self._bounds = probabilities, artmip, bounds
        self._files, self._count = ExitStack(), 0

    @property
    def paths(self) -> list[Path]:
        """The files that are written."""
        return [*([artmip_path(self.path)] if self._artmip else []), self.path]

    def __enter__(self) -> MaskWriter:
        shape = (len(self._times), *self._axes.shape)
        with ExitStack() as files:
            self._data = self._open(files, self.path)
            _create_labels(self._data, shape, self._probabilities)
            if self._probabilities:
                _create_probabilities(self._data, shape)
            self._tags = self._open(files, artmip_path(self.path)) if self._artmip else None
            if self._tags is not None:
                _create_tag(self._tags, shape, self._about.labeller)
            self._files = files.pop_all()
        return self

    def __exit__(self, *error) -> None:
        if error[0] is None:
            assert self._count == len(self._times), f"{self.path}: {self._count} of {len(self._times)} snapshots added"
        self._files.__exit__(*error)  # the tags first, then the masks, whose name says that all is there

    def add(self, mask: NDArray, probabilities: NDArray | None = None) -> None:
        """The next snapshot: `mask (H, W)`, checked, and `probabilities (3, H, W)` where the file has them, canonical."""
        own = self._axes.from_canonical(checked_mask(self.path, mask, self._axes.grid.shape))
        self._data[LABELS][self._count] = own.astype(np.int8)
        if self._tags is not None:
            self._tags["ar_binary_tag"][self._count] = (own == RIVER).astype(np.int8)
        if self._probabilities:
            assert probabilities is not None, self.path
            for name, values in zip(CLASSES, self._axes.from_canonical(probabilities), strict=True):
                self._data[PROBABILITY.format(name)][self._count] = values
        self._count += 1

    def _open(self, files: ExitStack, path: Path) -> netCDF4.Dataset:
        temporary = files.enter_context(committed(path))
        data = files.enter_context(netCDF4.Dataset(str(temporary), "w", format="NETCDF4_CLASSIC"))
        _write_header(data, self._axes, self._times, self._about.attributes, self._bounds)
        return data


def _write_header(
    data: netCDF4.Dataset,
    axes: Axes,
    times: Sequence[cftime.datetime | None],
    about: dict[str, str],
    bounds: Bounds | None,
) -> None:
    """Global attributes, dimensions and coordinate variables."""
    data.setncatts({"Conventions": "CF-1.8", **{key: text for key, text in about.items() if text}})
    data.createDimension("time", len(times))
    _write_time(data, times, bounds)
    for name, long_name, axis, unit, values in (
        ("lat", "latitude", "Y", "degrees_north", axes.lat),
        ("lon", "longitude", "X", "degrees_east", axes.lon),
    ):
        data.createDimension(name, values.size)
        variable = data.createVariable(name, "f8", (name,), fill_value=False)
        variable.setncatts({"standard_name": long_name, "long_name": long_name, "units": unit, "axis": axis})
        variable[:] = values


def _write_time(data: netCDF4.Dataset, times: Sequence[cftime.datetime | None], bounds: Bounds | None) -> None:
    variable = data.createVariable("time", "f8", ("time",), fill_value=False)
    variable.setncatts({"standard_name": "time", "long_name": "time", "axis": "T"})
    known = [time for time in times if time is not None]
    if len(known) == len(times):
        variable.setncatts({"units": EPOCH, "calendar": known[0].calendar})
        variable[:] = cftime.date2num(known, EPOCH, known[0].calendar)
        if bounds is not None:
            _write_bounds(data, variable, bounds, known[0].calendar)
        return
    comment = f"{calendar_times.UNKNOWN}: the numbers count snapshots of the source, they are not dates"
    variable.setncatts({"units": UNKNOWN_EPOCH, "calendar": UNKNOWN_CALENDAR, "comment": comment})
    variable[:] = np.arange(len(times))


def _write_bounds(data: netCDF4.Dataset, time: netCDF4.Variable, bounds: Bounds, calendar: str) -> None:
    """CF's boundary variable of the time axis; it has the axis's unit and calendar without saying so (CF-1.8, 7.1)."""
    time.setncatts({"bounds": "time_bnds"})
    data.createDimension("bnds", 2)
    variable = data.createVariable("time_bnds", "f8", ("time", "bnds"), fill_value=False)
    variable[:] = cftime.date2num(np.array(bounds, object), EPOCH, calendar)


def _create_labels(data: netCDF4.Dataset, shape: tuple[int, int, int], probabilities: bool) -> None:
    """LABELS without `_FillValue`: every cell has a class, and readers keep the integer type."""
    variable = data.createVariable(LABELS, "i1", ("time", "lat", "lon"), fill_value=False, **_packing(shape))
    variable.setncatts({
        "long_name": "extreme weather class",
        "flag_values": np.arange(len(CLASSES), dtype=np.int8),
        "flag_meanings": " ".join(CLASSES),
        "valid_range": np.array([0, len(CLASSES) - 1], np.int8),
        "cell_methods": "time: point",
    })  # fmt: skip
    if probabilities:
        variable.setncatts({"ancillary_variables": " ".join(PROBABILITY.format(name) for name in CLASSES)})


def _create_probabilities(data: netCDF4.Dataset, shape: tuple[int, int, int]) -> None:
    for name in CLASSES:
        dims = ("time", "lat", "lon")
        variable = data.createVariable(PROBABILITY.format(name), "f4", dims, fill_value=False, **_packing(shape))
        variable.setncatts({"long_name": f"probability of {name.replace('_', ' ')}", "units": "1", "cell_methods": "time: point"})


def _packing(shape: tuple[int, ...]) -> dict:
    """Compressed, one chunk per map."""
    return {"zlib": True, "complevel": 1, "shuffle": True, "chunksizes": (1, *shape[1:])}


def _create_tag(data: netCDF4.Dataset, shape: tuple[int, int, int], labeller: str) -> None:
    """The variable of ARTMIP's catalogues, the detector named by `scheme` and `version`."""
    variable = data.createVariable("ar_binary_tag", "i1", ("time", "lat", "lon"), fill_value=False, **_packing(shape))
    variable.setncatts({
        "long_name": "atmospheric river",
        "flag_values": np.array([0, 1], np.int8),
        "flag_meanings": "absent present",
        "cell_methods": "time: point",
        "scheme": labeller,
        "version": "1.0",
    })  # fmt: skip


class MaskSource:
    """The masks of a mask file, of a ClimateNet or DeepCAM source that holds labels, or of an ARTMIP tag file, one at a time.

    A context manager. `labeller` is who made them. Of several label maps `label_map` takes one, or merges all by a rule of
    `climate.consensus.CONSENSUS`.
    """

    def __init__(self, path: str | Path, label_map: LabelMap = 0):
        self.path, self._label_map = Path(path), label_map
        self._file = open_maps(path)
        try:
            self._name = self._find()
            self._check_label_map()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> MaskSource:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    @property
    def axes(self) -> Axes:
        return self._file.axes

    @property
    def times(self) -> tuple[cftime.datetime | None, ...]:
        return tuple(self._file.times)

    @property
    def time_labels(self) -> tuple[str, ...]:
        return tuple(self._file.time_labels)

    @property
    def labeller(self) -> str:
        if isinstance(self._file, DeepcamFile):
            return f"{self.path.name}: {f'labels_{self._label_map}' if isinstance(self._label_map, int) else self._label_map}"
        return self._file.attribute("labeller") or f"{self.path.name}: {self._name}"

    def check_fits(self, grid: Grid, count: int) -> None:
        """Raise unless there is one mask for each of `count` snapshots on `grid`."""
        _check_fits(self.path, self.axes.grid, len(self.times), grid, count)

    def read_once(self, memory_mib: float = 64.0) -> int:
        """From now on `read`, in ascending order, reads each stored byte once; how many the file has comes out."""
        if isinstance(self._file, DeepcamFile):
            return self._file.stored_bytes(label_numbers(self._label_map, self._file.label_maps()), fields=False)
        numbers = (0,) if self._name in TAGS else label_numbers(self._label_map, self._file.label_maps())
        places = [self._file.label_place(number, self._name) for number in numbers]
        return self._file.read_once(places, int(memory_mib * 2**20))

    def read(self, index: int) -> NDArray[np.uint8]:
        """Mask (H, W) of one time, canonical, checked."""
        if isinstance(self._file, NetcdfFile) and self._name in TAGS:
            return TAGS[self._name] * _tag(self._file, self._name, index)
        return merged_labels(self.path, self._file, index, self._label_map)

    def _find(self) -> str:
        """The variable with the masks; a tag file's ones become their class."""
        if self._file.label_maps():
            return LABELS
        file = self._file
        tag = next((name for name in TAGS if isinstance(file, NetcdfFile) and file.label_maps(name)), None)
        if tag is None:
            remedy = "Make masks with `raysegment segment`, or name a file that holds them"
            raise BadInput(self.path, f"labels ({LABELS}, climate/labels_0 or {', '.join(TAGS)})", "none", remedy)
        return tag

    def _check_label_map(self) -> None:
        if self._name == LABELS:
            check_label_map(self.path, self._label_map, self._file.label_maps())


def read_masks(path: str | Path, label_map: LabelMap = 0) -> Masks:
    """All masks of a file that `MaskSource` reads."""
    with MaskSource(path, label_map) as source:
        source.read_once()
        masks = np.stack([source.read(index) for index in range(len(source.times))])
        return Masks(masks, source.axes, source.times, source.time_labels, source.labeller, source.path)


def read_probabilities(path: str | Path) -> NDArray[np.float32] | None:
    """Probabilities (T, 3, H, W) of a mask file, canonical; None when it has none."""
    names = [PROBABILITY.format(name) for name in CLASSES]
    with NetcdfFile(path) as file:
        if not set(names) <= set(file.variables()):
            return None
        return np.array([[file.read(name, index) for name in names] for index in range(file.count)], np.float32)


def _tag(file: NetcdfFile, name: str, index: int) -> NDArray[np.uint8]:
    """A binary tag as 0 and 1, raised when it holds anything else."""
    plane = file.labels(index, 0, name)
    if not np.isin(plane, (0, 1)).all():
        got = f"{np.nanmin(plane):g} to {np.nanmax(plane):g}"
        raise BadInput(file.path, f"{name} of 0 or 1 in every cell", got, "Recode the tag")
    return plane.astype(np.uint8)
