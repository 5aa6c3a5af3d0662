"""What every file of the archive has in common: it exists whole or not at all, and its first bytes say what it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raysegment.archive.classic import Header, read_header
from raysegment.climate.checks import BadInput

_HDF5 = b"\x89HDF\r\n\x1a\n"
_CLASSIC = (b"CDF\x01", b"CDF\x02", b"CDF\x05")
_COPY_AGAIN = "Copy or download the file again"


@contextmanager
def committed(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; on leaving it is fsynced and renamed to `path`, on an error removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def inside(folder: str | Path, name: str) -> Path:
    """The path of what `name` is called in a folder; BadInput where that leads out of it, by `..`, as an absolute path or
    over a link. The folder itself may be a link."""
    path = Path(folder, name)
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return path
    raise BadInput(path, f"a file inside {folder}", "one outside", "Put the file there itself: manifests name nothing elsewhere.")


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def container(path: str | Path) -> str:
    """`hdf5` (also netCDF-4) or `classic` (netCDF-3), by the file's first bytes; BadInput when it is neither."""
    path = Path(path)
    if path.is_dir():
        raise BadInput(path, "a netCDF or HDF5 file", "a folder", "Name a file inside it")
    try:
        with path.open("rb", buffering=0) as file:  # a buffer would be filled: kB, on some file systems MiB
            head = file.read(8)
    except OSError as error:
        raise BadInput(path, "a readable netCDF or HDF5 file", error.strerror or error, "Check the name and the rights") from None
    if head == _HDF5:
        return "hdf5"
    if head[:4] in _CLASSIC:
        return "classic"
    got = "an empty file" if not head else f"a file that begins with {head!r}"
    raise BadInput(path, "a netCDF or HDF5 file", got, f"{_COPY_AGAIN}, or convert it to netCDF")


def classic_header(path: Path) -> Header:
    """The header of a netCDF-3 file; BadInput when it is damaged or the file ends before its last variable does."""
    have = path.stat().st_size
    try:
        header = read_header(path)
    except (EOFError, ValueError) as error:
        raise BadInput(path, "a whole netCDF file", f"{have} bytes: {error}", _COPY_AGAIN) from None
    if have < header.end:
        raise BadInput(path, f"a whole netCDF file of {header.end} bytes", f"{have} bytes", f"{_COPY_AGAIN}: it is cut short")
    return header


def damaged(path: str | Path, error: Exception) -> BadInput:
    """The error for a file that the library cannot open or read through."""
    remedy = f"{_COPY_AGAIN}: it is damaged or cut short"
    return BadInput(path, "a whole netCDF or HDF5 file", f"{type(error).__name__}: {error}", remedy)
