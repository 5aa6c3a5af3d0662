"""One DeepCAM HDF5 file (Kurth et al. 2018; MLPerf HPC) seen as maps: one time, 16 channels, the grid of the whole Earth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from raysegment.archive import times
from raysegment.archive.axes import Axes
from raysegment.archive.files import container, damaged
from raysegment.archive.netcdf import NetcdfFile
from raysegment.archive.stored import open_hdf5
from raysegment.climate.channels import NAMES
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid

_DATA = "climate/data"


def is_deepcam(path: str | Path) -> bool:
    """True when the file is HDF5 with `climate/data`."""
    if container(path) != "hdf5":
        return False
    try:
        with h5py.File(path, "r") as file:
            return _DATA in file
    except (OSError, RuntimeError) as error:
        raise damaged(path, error) from None


def open_maps(path: str | Path) -> DeepcamFile | NetcdfFile:
    """The file as whichever of the two it is, opened once."""
    if container(path) != "hdf5":
        return NetcdfFile(path)
    file = open_hdf5(Path(path))
    return (DeepcamFile if _DATA in file else NetcdfFile)(path, file)


class DeepcamFile:
    """An open DeepCAM file (one process, one user: the HDF5 library is not for threads); close it or use `with`.

    It holds no coordinates: first row the South Pole, last the North Pole, first column Greenwich; its time is in its name.
    """

    count = 1
    string_time = True
    unknown_time = False

    def __init__(self, path: str | Path, file: h5py.File | None = None):
        self.path = Path(path)
        if file is None:
            container(self.path)
        self._file = file or open_hdf5(self.path)
        try:
            self._open_data()
        except BaseException:
            self.close()
            raise

    def _open_data(self) -> None:
        data = self._file.get(_DATA)
        shape = data.shape if isinstance(data, h5py.Dataset) else ()
        channel_axis = -1 if shape[-1:] == (len(NAMES),) else 0  # the 2018 system also used copies with the channel first
        if not isinstance(data, h5py.Dataset) or len(shape) != 3 or shape[channel_axis] != len(NAMES):
            got = "none" if data is None else f"shape {shape}"
            raise BadInput(self.path, f"{_DATA} (latitude, longitude, 16)", got, "Use DeepCAM's own files, with all 16 channels")
        self._data, self._channel_axis = data, channel_axis
        height, width = shape[:2] if channel_axis == -1 else shape[1:]
        self.axes = Axes.of(Grid.global_(height, width))
        self.times = (times.time_from_name(self.path.name),)
        self.time_labels = (times.label(self.times[0], 0, self.path.stem),)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> DeepcamFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def time_bounds(self) -> None:
        """The files say of no interval."""

    def fields(self, index: int) -> NDArray[np.float32]:
        """All channels (16, H, W)."""
        assert index == 0, index
        data = self._read(self._data)
        return np.ascontiguousarray(np.moveaxis(data, self._channel_axis, 0), np.float32)

    def stored_bytes(self, label_maps: Sequence[int], fields: bool = True) -> int:
        """Bytes that the file has for the fields and for the label maps named."""
        names = self._label_names()
        labels = [self._file[names[number]] for number in label_maps]
        return sum(data.id.get_storage_size() for data in [*([self._data] if fields else []), *labels])

    def label_maps(self) -> int:
        """How many label maps the file holds: `labels_0`, `labels_1`, …"""
        return len(self._label_names())

    def labels(self, index: int, label_map: int = 0) -> NDArray:
        """Label map (H, W) as stored (not checked)."""
        assert index == 0, index
        labels = self._read(self._file[self._label_names()[label_map]])
        return labels

    def _label_names(self) -> list[str]:
        names = [f"climate/labels_{number}" for number in range(10)] + ["climate/labels"]
        return [name for name in names if name in self._file]

    def _read(self, data: h5py.Dataset | h5py.Group | h5py.Datatype) -> NDArray:
        try:
            return np.asarray(data[...])  # type: ignore[index]
        except (OSError, RuntimeError) as error:
            raise damaged(self.path, error) from None
