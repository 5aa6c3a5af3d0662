"""What a netCDF variable's attributes say of its numbers: which mean "no value", and how the others are unpacked.

The rules of the netCDF library's Python interface (`_FillValue`, `missing_value`, `valid_min`, `valid_max`, `valid_range`,
`_Unsigned`, `scale_factor`, `add_offset`, and the default fill value of each type), in one place for every container.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import netCDF4
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Packing:
    """`missing` values and the valid range [low, high] are of the stored type; factor and offset are None where not given."""

    missing: tuple[Any, ...] = ()
    low: Any = None
    high: Any = None
    factor: Any = None
    offset: Any = None
    unsigned: bool = False

    @staticmethod
    def of(dtype: np.dtype, attributes: Mapping[str, Any], prefilled: bool) -> Packing:
        """From a variable's attributes; `prefilled` says that cells never written hold the type's default fill value."""
        unsigned = dtype.kind == "i" and attributes.get("_Unsigned") in ("true", "True")
        stored = {name: _cast(attributes.get(name), dtype, unsigned) for name in _IN_STORED_TYPE}
        fill = stored["_FillValue"]
        if fill is None and not unsigned and (prefilled or dtype.itemsize > 1):  # a byte has no value to spare by itself
            fill = _cast(netCDF4.default_fillvals[dtype.str[1:]], dtype, unsigned)
        ends = stored["valid_range"]
        if ends is None or ends.size != 2:
            ends = [None if (end := stored[name]) is None else end[0] for name in ("valid_min", "valid_max")]
        missing = tuple(value for group in (stored["missing_value"], fill) if group is not None for value in group)
        factor, offset = (_number(attributes.get(name)) for name in ("scale_factor", "add_offset"))
        return Packing(missing, ends[0], ends[1], factor, offset, unsigned)

    def unpack(self, stored: NDArray) -> NDArray:
        """Numbers as they are meant, NaN (in float32 at least) where there is no value."""
        values = stored.view(stored.dtype.str.replace("i", "u")) if self.unsigned else stored
        absent = self._absent(values)
        values = self._scaled(values)
        if absent is None:
            return values
        return np.where(absent, np.nan, values.astype(np.promote_types(values.dtype, np.float32)))

    def _absent(self, values: NDArray) -> NDArray | None:
        """Where there is no value, None when there is one everywhere."""
        tests = [np.isnan(values) if np.isnan(value) else values == value for value in self.missing]
        tests += [] if self.low is None else [values < self.low]
        tests += [] if self.high is None else [values > self.high]
        found = [test for test in tests if test.any()]
        return np.logical_or.reduce(found) if found else None

    def _scaled(self, values: NDArray) -> NDArray:
        if self.factor is not None and self.offset is not None and self.factor == 1.0 and self.offset == 0.0:
            return values.astype(np.asarray(self.factor).dtype)
        both = self.factor is not None and self.offset is not None
        if self.factor is not None and (both or self.factor != 1.0):
            values = values * self.factor
        return values + self.offset if self.offset is not None and (both or self.offset != 0.0) else values


_IN_STORED_TYPE = ("_FillValue", "missing_value", "valid_range", "valid_min", "valid_max")


def _cast(value: Any, dtype: np.dtype, unsigned: bool) -> NDArray | None:
    """An attribute's numbers in the stored type, None where it is absent or cannot be said in that type."""
    given = np.atleast_1d(np.asarray(value))
    if value is None or given.dtype.kind not in "iuf":
        return None
    with np.errstate(all="ignore"):
        cast = given.astype(dtype)
    if not ((cast == given) | ((cast != cast) & (given != given))).all():
        return None
    return cast.view(dtype.str.replace("i", "u")) if unsigned else cast


def _number(value: Any) -> Any:
    return value if value is not None and np.ndim(value) == 0 and np.asarray(value).dtype.kind in "iuf" else None
