"""Tropical cyclones of one map, found by published rules, and the cells that belong to each.

A rule set starts from seeds (maxima of cyclonic vorticity at 850 hPa, or minima of sea-level pressure), moves each to
its pressure minimum and keeps it when every contour and limit of the preset holds. Distances are great-circle
kilometres, so the rules work in both hemispheres, across any meridian and on any grid from 0.25 to 2.5 degrees.
A single map has no tracks: what the original trackers demand for some days of a track is demanded here of the moment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from raysegment.climate.channels import GRAVITY_M_S2, INDEX
from raysegment.climate.grid import EARTH_RADIUS_KM, KM_PER_DEGREE, Grid, vorticity
from raysegment.climate.regions import EIGHT, FOUR, Window, component_of, label_regions, spacing_km, window
from raysegment.climate.regrid import destination, sample

GAS_CONSTANT_J_KG_K = 287.05  # dry air
VORTICITY_SPACING_DEG = 0.25  # the grid that the published vorticity thresholds are meant for
# A coarse grid sees less vorticity in the same storm. Published thresholds are 1.6e-4 s⁻¹ at 0.25 degrees (TECA) and
# 3.5e-5 s⁻¹ at 2.8 degrees (Bengtsson et al. 1995; Vitart et al. 1997): a power law of the spacing through both.
VORTICITY_EXPONENT = -0.63
# So is the wind: a storm of 17.5 m/s shows about 10 m/s at 300 km, and roughly in proportion between (Walsh et al. 2007).
WIND_LOSS_PER_KM = (1.0 - 10.0 / 17.5) / 300.0
MIN_SEARCH_CELLS = 1.5  # no search distance is shorter than this many cells: a cell and its eight neighbours


@dataclass(frozen=True)
class Contour:
    """`quantity` changes by `delta` from the centre outward on every path before `radius_deg`.

    A positive delta asks for a minimum, a negative one for a maximum. The centre may lie up to `shift_deg` away.
    """

    quantity: str  # "psl_pa", "warm_core_k" or "thickness_m"
    delta: float
    radius_deg: float
    shift_deg: float = 0.0

    def __post_init__(self) -> None:
        assert self.quantity in QUANTITIES, self
        assert self.delta != 0, self
        assert self.radius_deg > 0 <= self.shift_deg, self


@dataclass(frozen=True)
class CyclonePreset:
    """Named thresholds of a published detector, with their source.

    `seeds` is "vorticity" or "pressure"; seeds within `apart_deg` of a stronger one are dropped. `core_deg` is how far the
    pressure minimum may lie from the seed. `paths` says how contours are followed: "flood" tries every path through
    neighbouring cells (TempestExtremes), "rays" eight compass directions (TECA).

    On a grid coarser than 0.25 degrees, limits scale as follows. Distances stay what they are in kilometres, but reach a cell
    and its neighbours at least. Vorticity falls as the power VORTICITY_EXPONENT of the spacing (`scaled_vorticity_s`). The wind
    of presets that start from vorticity falls linearly (`scaled_wind_m_s`); that of the others does not, because
    TempestExtremes' 10 m/s was published for reanalyses of several spacings. Contours' depths do not scale.
    """

    name: str
    source: str
    seeds: str
    apart_deg: float
    contours: tuple[Contour, ...]
    paths: str
    core_deg: float = 0.0
    min_vorticity_s: float = 0.0
    min_wind_m_s: float = 0.0
    wind_radius_deg: float = 2.0
    max_abs_lat: float = 90.0
    max_height_m: float = np.inf

    def __post_init__(self) -> None:
        assert self.seeds in ("vorticity", "pressure"), self
        assert self.paths in ("flood", "rays"), self
        assert self.apart_deg > 0 < self.max_abs_lat <= 90, self
        assert self.contours, self

    @property
    def needs(self) -> frozenset[str]:
        """Names of the channels that decide; `Cyclone.warm_core_k` is NaN where T200 and T500 are not among them and absent."""
        height = ("PSL", "PS", "TREFHT") if np.isfinite(self.max_height_m) else ()
        return frozenset(_ALWAYS_READ).union(height, *(_READ[contour.quantity] for contour in self.contours))


@dataclass(frozen=True)
class Cyclone:
    """One storm: centre (degrees), and what was measured there.

    `wind_m_s` is the strongest lowest-level wind near the centre, `vorticity_s` the strongest cyclonic vorticity at 850 hPa
    (positive in both hemispheres), `warm_core_k` by how much (T200 + T500) / 2 exceeds its mean 5 degrees away, and
    `radius_km` the storm's own radius (see `storm_radius_km`).
    """

    lat: float
    lon: float
    psl_pa: float
    wind_m_s: float
    vorticity_s: float
    warm_core_k: float
    radius_km: float


def sea_level_pressure_pa(fields: NDArray) -> NDArray:
    """PSL (H, W), Pa."""
    return fields[INDEX["PSL"]]


def warm_core_k(fields: NDArray) -> NDArray:
    """Mean temperature of the upper troposphere (H, W), K: (T200 + T500) / 2 (TSTORMS, TECA)."""
    return 0.5 * (fields[INDEX["T200"]] + fields[INDEX["T500"]])


def thickness_m(fields: NDArray) -> NDArray:
    """Thickness 1000–200 hPa (H, W), m, with Z1000 = (R T / g) ln(PSL / 1000 hPa).

    The file's own Z1000 is not used: where 1000 hPa lies below ground (so in every deep cyclone) archives either
    extrapolate or repeat the lowest level, and the second hides the very signal that is looked for.
    """
    scale_m = GAS_CONSTANT_J_KG_K / GRAVITY_M_S2 * fields[INDEX["TREFHT"]]
    return fields[INDEX["Z200"]] - scale_m * np.log(fields[INDEX["PSL"]] / 1e5)


QUANTITIES = {"psl_pa": sea_level_pressure_pa, "warm_core_k": warm_core_k, "thickness_m": thickness_m}
_READ = {"psl_pa": ("PSL",), "warm_core_k": ("T200", "T500"), "thickness_m": ("Z200", "TREFHT", "PSL")}
_ALWAYS_READ = ("PSL", "U850", "V850", "UBOT", "VBOT")  # where a storm is, how strong, how large


def surface_height_m(fields: NDArray) -> NDArray:
    """Height of the ground (H, W), m, from the two surface pressures: (R T / g) ln(PSL / PS)."""
    scale_m = GAS_CONSTANT_J_KG_K / GRAVITY_M_S2 * fields[INDEX["TREFHT"]]
    return scale_m * np.log(fields[INDEX["PSL"]] / fields[INDEX["PS"]])


def cyclonic_vorticity(fields: NDArray, grid: Grid) -> NDArray:
    """Relative vorticity at 850 hPa (H, W), s⁻¹, positive where it turns with the Earth."""
    return vorticity(fields[INDEX["U850"]], fields[INDEX["V850"]], grid) * np.sign(grid.lat)[:, None].astype(np.float32)


_TECA_SOURCE = "TECA teca_tc_detect (LBL-EESA/TECA 9190a29), after GFDL TSTORMS (Vitart et al. 1997; Knutson et al. 2007)"
_KURTH_SOURCE = "label scripts of Kurth et al. 2018 around TECA teca_tc_detect"


def _teca(name: str, source: str, vorticity_s: float, warm_k: float, psl_pa: float, wind_m_s: float = 17.0) -> CyclonePreset:
    """TECA's rule: vorticity maximum of a 7.74446 degree window, low within 2 degrees, warm core, thickness, wind."""
    contours = (
        Contour("psl_pa", psl_pa, 5.0),
        Contour("warm_core_k", -warm_k, 5.0, shift_deg=2.0),
        Contour("thickness_m", -50.0, 4.0, shift_deg=2.0),
    )
    return CyclonePreset(
        name, source, "vorticity", 7.74446 / 2, contours, "rays", core_deg=2.0, min_vorticity_s=vorticity_s,
        min_wind_m_s=wind_m_s, wind_radius_deg=7.74446 / 2, max_abs_lat=80.0,
    )


def _tempest(name: str, stand_in: str, warm: Contour) -> CyclonePreset:
    """TempestExtremes' rule: a closed low and a warm core, each followed along every path."""
    source = (
        f"TempestExtremes DetectNodes as in Zarzycki & Ullrich 2017 and Ullrich et al. 2021, with the {stand_in} for Z300 − Z500 "
        "by 6 m (neither level is among the 16 fields); StitchNodes' limits of wind (10 m/s), latitude (50) and height of the "
        "ground (150 m) applied to the moment"
    )
    return CyclonePreset(
        name, source, "pressure", 6.0, (Contour("psl_pa", 200.0, 5.5), warm), "flood", min_wind_m_s=10.0, wind_radius_deg=2.0,
        max_abs_lat=50.0, max_height_m=150.0,
    )


CYCLONE_PRESETS: dict[str, CyclonePreset] = {
    preset.name: preset
    for preset in (
        _teca("teca", _TECA_SOURCE, 1.6e-4, 0.8, 400.0),
        _teca("teca_relaxed", f"{_KURTH_SOURCE}: 'relaxed'", 1.4e-4, 0.6, 300.0),
        _teca("teca_super_relaxed", f"{_KURTH_SOURCE}: 'super relaxed' (labels_1)", 1e-5, 0.1, 100.0),
        _tempest("tempest", "thickness 200–1000 hPa by 20 m", Contour("thickness_m", -20.0, 6.5, shift_deg=1.0)),
        _tempest("tempest_warm", "(T200 + T500) / 2 by 0.6 K", Contour("warm_core_k", -0.6, 6.5, shift_deg=1.0)),
    )
}  # fmt: skip


def scaled_vorticity_s(min_vorticity_s: float, grid: Grid) -> float:
    """A published vorticity threshold on this grid: unchanged to 0.25 degrees, then ∝ spacing ** VORTICITY_EXPONENT."""
    return min_vorticity_s * max(1.0, max(grid.dlat, grid.dlon) / VORTICITY_SPACING_DEG) ** VORTICITY_EXPONENT


def scaled_wind_m_s(min_wind_m_s: float, grid: Grid) -> float:
    """A published wind threshold on this grid: unchanged to 0.25 degrees, then ∝ 1 − WIND_LOSS_PER_KM · spacing."""
    published_km = VORTICITY_SPACING_DEG * KM_PER_DEGREE
    share = 1.0 - WIND_LOSS_PER_KM * max(spacing_km(grid), published_km)
    return min_wind_m_s * max(share, 0.0) / (1.0 - WIND_LOSS_PER_KM * published_km)


def detect_cyclones(fields: NDArray, grid: Grid, preset: CyclonePreset) -> list[Cyclone]:
    """Storms of one map `fields (16, H, W)`, deepest first."""
    maps = {contour.quantity: QUANTITIES[contour.quantity](fields) for contour in preset.contours}
    maps["psl_pa"] = sea_level_pressure_pa(fields)
    spin = cyclonic_vorticity(fields, grid)
    centres = _centres(_seeds(maps["psl_pa"], spin, grid, preset), maps["psl_pa"], grid, preset)
    closed = [c for c in centres if all(_holds(maps[k.quantity], grid, c, k, preset.paths) for k in preset.contours)]
    height = surface_height_m(fields) if np.isfinite(preset.max_height_m) else None
    least = scaled_wind_m_s(preset.min_wind_m_s, grid) if preset.seeds == "vorticity" else preset.min_wind_m_s
    storms = []
    for row, col in closed:
        storm = _measure(fields, spin, grid, row, col, preset)
        low = height is None or height[row, col] <= preset.max_height_m
        if low and storm.wind_m_s >= least:
            storms.append(storm)
    return sorted(storms, key=lambda storm: storm.psl_pa)


def _reach_km(degrees: float, grid: Grid) -> float:
    """A search distance in km: as published, but never less than a cell and its neighbours."""
    return max(degrees * KM_PER_DEGREE, MIN_SEARCH_CELLS * spacing_km(grid))


def _seeds(psl: NDArray, spin: NDArray, grid: Grid, preset: CyclonePreset) -> list[tuple[int, int]]:
    """Cells to start from: local extremes with no stronger one near, strongest first."""
    if preset.seeds == "pressure":
        return _apart(-psl, -np.inf, grid, preset)
    seeds = _apart(spin, scaled_vorticity_s(preset.min_vorticity_s, grid), grid, preset)
    return [seed for seed in seeds if _tops(spin, grid, *seed, _reach_km(preset.apart_deg, grid))]


def _tops(field: NDArray, grid: Grid, row: int, col: int, radius_km: float) -> bool:
    """True when no cell within the radius exceeds this one."""
    near = window(grid, grid.lat[row], grid.lon[col], radius_km)
    return bool(field[near.index][near.distance_km <= radius_km].max() <= field[row, col])


def _apart(field: NDArray, minimum: float, grid: Grid, preset: CyclonePreset) -> list[tuple[int, int]]:
    """Local maxima (of 3 × 3 cells) ≥ `minimum`, without those that have a stronger one within the merging distance.

    A cell whose neighbours all equal it is none, so that a flat field has no seeds rather than one per cell.
    """
    around = np.pad(field, ((0, 0), (1, 1)), mode="wrap" if grid.periodic else "edge")
    top = (field >= ndimage.maximum_filter(around, 3, mode="nearest")[:, 1:-1]) & (field >= minimum)
    top &= (np.abs(grid.lat) <= preset.max_abs_lat)[:, None]
    top[top] = field[top] > ndimage.minimum_filter(around, 3, mode="nearest")[:, 1:-1][top]
    rows, cols = np.nonzero(top)
    order = np.argsort(-field[rows, cols], kind="stable")
    rows, cols = rows[order], cols[order]
    points = _unit(grid.lat[rows], grid.lon[cols])
    chord = 2.0 * np.sin(0.5 * _reach_km(preset.apart_deg, grid) / EARTH_RADIUS_KM)
    pairs = KDTree(points).query_pairs(chord, output_type="ndarray") if rows.size else np.empty((0, 2), int)
    weaker = np.zeros(rows.size, bool)
    weaker[pairs.max(axis=1, initial=0)] = pairs.size > 0
    return [(int(row), int(col)) for row, col in zip(rows[~weaker], cols[~weaker], strict=True)]


def _unit(lat: NDArray, lon: NDArray) -> NDArray:
    """Points on the unit sphere (n, 3)."""
    phi, lam = np.deg2rad(lat), np.deg2rad(lon)
    return np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=-1)


def _centres(seeds: list[tuple[int, int]], psl: NDArray, grid: Grid, preset: CyclonePreset) -> list[tuple[int, int]]:
    """The pressure minimum near each seed (each once)."""
    if preset.seeds == "pressure":
        return seeds
    found = (_lowest(psl, grid, row, col, _reach_km(preset.core_deg, grid)) for row, col in seeds)
    return list(dict.fromkeys(found))


def _lowest(field: NDArray, grid: Grid, row: int, col: int, radius_km: float, sign: float = 1.0) -> tuple[int, int]:
    """The cell with the lowest value of `sign · field` within a radius of a cell."""
    near = window(grid, grid.lat[row], grid.lon[col], radius_km)
    values = np.where(near.distance_km <= radius_km, sign * field[near.index], np.inf)
    y, x = np.unravel_index(int(values.argmin()), values.shape)
    return int(near.rows[y]), int(near.cols[x])


def _holds(field: NDArray, grid: Grid, centre: tuple[int, int], contour: Contour, paths: str) -> bool:
    """True when the contour closes around the centre (moved by at most the contour's shift)."""
    sign = float(np.sign(contour.delta))
    row, col = centre
    if contour.shift_deg > 0:
        row, col = _lowest(field, grid, row, col, _reach_km(contour.shift_deg, grid), sign)
    closed = closed_by_flood if paths == "flood" else closed_along_rays
    return closed(field, grid, row, col, contour.delta, _reach_km(contour.radius_deg, grid))


def closed_by_flood(field: NDArray, grid: Grid, row: int, col: int, delta: float, radius_km: float) -> bool:
    """True when every path from a cell meets value + delta before it is farther than the radius.

    Flood fill over neighbours that share a side (TempestExtremes' rule): the cells still within delta of the centre and
    connected to it must not reach beyond the radius.
    """
    near = window(grid, grid.lat[row], grid.lon[col], radius_km)
    rise = (field[near.index].astype(np.float64) - field[row, col]) * np.sign(delta)
    flooded = component_of(rise < abs(delta), *near.cell(row, col), FOUR)
    return bool(flooded.any() and near.distance_km[flooded].max() <= radius_km)


def closed_along_rays(field: NDArray, grid: Grid, row: int, col: int, delta: float, radius_km: float) -> bool:
    """True when the field reaches value + delta within the radius in all 8 compass directions (TECA's rule)."""
    lat, lon = float(grid.lat[row]), float(grid.lon[col])
    steps = max(2, int(np.ceil(radius_km / (0.5 * min(grid.dlat, grid.dlon) * KM_PER_DEGREE))))
    along_km = np.linspace(0.0, radius_km, steps + 1)[1:]
    lats, lons = destination(np.array(lat), np.array(lon), np.arange(0.0, 360.0, 45.0)[:, None], along_km[None, :])
    rise = (sample(field, grid, lats, lons) - float(field[row, col])) * np.sign(delta)
    return bool((rise.max(axis=1) >= abs(delta)).all())


def _measure(fields: NDArray, spin: NDArray, grid: Grid, row: int, col: int, preset: CyclonePreset) -> Cyclone:
    """What there is to say about a storm whose pressure minimum is this cell."""
    psl = fields[INDEX["PSL"]]
    near = window(grid, grid.lat[row], grid.lon[col], 8.0 * KM_PER_DEGREE)
    core = near.distance_km <= _reach_km(2.0, grid)
    ring = np.abs(near.distance_km - 5.0 * KM_PER_DEGREE) <= 0.75 * max(spacing_km(grid), KM_PER_DEGREE)
    warm = warm_core_k(fields[(slice(None), *near.index)])
    wind = np.hypot(fields[INDEX["UBOT"]][near.index], fields[INDEX["VBOT"]][near.index])
    strongest = wind[near.distance_km <= _reach_km(preset.wind_radius_deg, grid)].max()
    lat, lon = refined_minimum(psl, grid, row, col)
    return Cyclone(
        lat, lon, float(psl[row, col]), float(strongest), float(spin[near.index][core].max()),
        float(warm[core].max() - warm[ring].mean()), storm_radius_km(fields, grid, lat, lon),
    )  # fmt: skip


def refined_minimum(field: NDArray, grid: Grid, row: int, col: int) -> tuple[float, float]:
    """Place of a minimum between the cells: vertices of the parabolas through three rows and three columns."""
    height, width = grid.shape
    column = field[[max(row - 1, 0), row, min(row + 1, height - 1)], col].astype(np.float64)
    sides = [(col - 1) % width, col, (col + 1) % width] if grid.periodic else [max(col - 1, 0), col, min(col + 1, width - 1)]
    line = field[row, sides].astype(np.float64)
    lat = float(np.clip(grid.lat[row] + _vertex(column) * grid.dlat, -90.0, 90.0))
    return lat, float((grid.lon[col] + _vertex(line) * grid.dlon) % 360.0)


def _vertex(three: NDArray) -> float:
    """Where a parabola through values at −1, 0, 1 has its minimum, within half a cell."""
    bend = three[0] - 2.0 * three[1] + three[2]
    return float(np.clip(0.5 * (three[0] - three[2]) / bend, -0.5, 0.5)) if bend > 0 else 0.0


EDGE_WIND_M_S = 10.0  # the storm ends where the mean cyclonic wind at 850 hPa falls to this (about 8 m/s at the surface)
_PROFILE_KM = 10.0 * KM_PER_DEGREE  # how far the wind profile is read
_RADIUS_RANGE_KM = (200.0, 900.0)  # the smallest and largest storms on record (Chavas et al. 2016, radius of 12 m/s)
GALE_M_S = 17.5  # 63 km/h, the first of TECA's wind radii


def storm_radius_km(fields: NDArray, grid: Grid, lat: float, lon: float) -> float:
    """Where the azimuthal mean of the cyclonic wind at 850 hPa falls to 10 m/s, or to half its peak in weak storms.

    The mean over all directions cancels the current that carries the storm, so the radius is the vortex's own.
    """
    near = window(grid, lat, lon, _PROFILE_KM)
    profile, bin_km = _profile(_cyclonic_wind(fields, grid, near, lat, lon), near, grid)
    edge = _falls_to(profile, min(EDGE_WIND_M_S, 0.5 * float(profile.max())))
    smallest = max(_RADIUS_RANGE_KM[0], 1.05 * grid.dlat * KM_PER_DEGREE)
    return float(np.clip(edge * bin_km, smallest, max(smallest, _RADIUS_RANGE_KM[1])))


def _cyclonic_wind(fields: NDArray, grid: Grid, near: Window, lat: float, lon: float) -> NDArray:
    """Wind at 850 hPa (h, w), m/s, around a centre: the component that circles it cyclonically."""
    north = (grid.lat[near.rows] - lat)[:, None]
    east = ((grid.lon[near.cols] - lon + 180.0) % 360.0 - 180.0)[None, :] * np.cos(np.deg2rad(lat))
    u, v = fields[INDEX["U850"]][near.index], fields[INDEX["V850"]][near.index]
    return (v * east - u * north) / np.maximum(np.hypot(east, north), 1e-6) * (1.0 if lat >= 0 else -1.0)


def _profile(values: NDArray, near: Window, grid: Grid) -> tuple[NDArray, float]:
    """Mean by distance (n,) in bins centred on 0, b, 2b, … km and b; empty bins repeat the one before."""
    bin_km = max(0.5, grid.dlat) * KM_PER_DEGREE
    ring = np.round(near.distance_km / bin_km).astype(int)
    inside = ring <= int(_PROFILE_KM / bin_km)
    count = np.bincount(ring[inside])
    mean = np.bincount(ring[inside], values[inside]) / np.maximum(count, 1)
    filled = np.maximum.accumulate(np.where(count > 0, np.arange(count.size), 0))
    return mean[filled], bin_km


def _falls_to(profile: NDArray, level: float) -> float:
    """Bin (fractional) where a profile first falls to a level beyond its peak; its last bin if it never does."""
    peak = int(profile.argmax())
    below = np.flatnonzero(profile[peak:] < level)
    if below.size == 0 or below[0] == 0:
        return float(profile.size - 1) if below.size == 0 else float(peak)
    outer = peak + int(below[0])
    return outer - 1 + float((profile[outer - 1] - level) / (profile[outer - 1] - profile[outer]))


def cyclone_mask(fields: NDArray, grid: Grid, cyclones: list[Cyclone], shape: str = "wind") -> NDArray[np.bool_]:
    """Cells (H, W) that belong to the storms; `shape` is one of SHAPES."""
    mask = np.zeros(grid.shape, bool)
    for storm in cyclones:
        near, inside = SHAPES[shape](fields, grid, storm)
        mask[near.index] |= inside
    return mask


def wind_shape(fields: NDArray, grid: Grid, storm: Cyclone) -> tuple[Window, NDArray[np.bool_]]:
    """Cells within the storm's radius, windy (10 m/s at 850 hPa) or in the inner half of the low; connected, no holes."""
    near = window(grid, storm.lat, storm.lon, storm.radius_km)
    within = near.distance_km <= storm.radius_km
    psl = fields[INDEX["PSL"]][near.index]
    rim = within & (near.distance_km > 0.7 * storm.radius_km)
    edge_pa = float(psl[rim].mean()) if rim.any() else float(psl[within].mean())
    wind = np.hypot(fields[INDEX["U850"]][near.index], fields[INDEX["V850"]][near.index])
    inside = within & ((wind >= EDGE_WIND_M_S) | (psl <= 0.5 * (storm.psl_pa + edge_pa)))
    centre = near.cell(*grid.nearest(storm.lat, storm.lon))
    inside[centre] = True
    return near, np.asarray(ndimage.binary_fill_holes(component_of(inside, *centre, EIGHT)))


_PAPER_FIELDS = ("TMQ", "U850", "V850", "PRECT")
_PAPER_PAD_DEG, _PAPER_PERCENTILE = 6.6, 93.0


def paper2018_shape(fields: NDArray, grid: Grid, storm: Cyclone) -> tuple[Window, NDArray[np.bool_]]:
    """The 2018 labels (Kurth et al. 2018): in the box of ± (r0 + 6.6) degrees, TMQ, U850, V850 and PRECT above their
    93rd percentile each keep their largest region; the largest region of the union is the storm.

    r0 is the radius where the mean lowest-level wind falls to 17.5 m/s. Signed winds mark one side only, as published;
    the box closes over Greenwich, where the original was cut.
    """
    half = paper_r0_deg(fields, grid, storm) + _PAPER_PAD_DEG
    near = window(grid, storm.lat, storm.lon, half * KM_PER_DEGREE)
    away = np.abs((grid.lon[near.cols] - storm.lon + 180.0) % 360.0 - 180.0)
    box = (np.abs(grid.lat[near.rows] - storm.lat) <= half)[:, None] & (away <= half)[None, :]
    union = np.zeros(box.shape, bool)
    for name in _PAPER_FIELDS:
        values = fields[INDEX[name]][near.index]
        union |= _largest(box & (values > np.percentile(values[box], _PAPER_PERCENTILE)))
    return near, _largest(union)


def paper_r0_deg(fields: NDArray, grid: Grid, storm: Cyclone) -> float:
    """Radius (degrees) where the azimuthal mean of the lowest-level wind speed falls to 17.5 m/s; 0 if it never blows so."""
    near = window(grid, storm.lat, storm.lon, _PROFILE_KM)
    wind = np.hypot(fields[INDEX["UBOT"]][near.index], fields[INDEX["VBOT"]][near.index])
    profile, bin_km = _profile(wind, near, grid)
    profile = profile[: int(6.0 * KM_PER_DEGREE / bin_km) + 1]
    return _falls_to(profile, GALE_M_S) * bin_km / KM_PER_DEGREE if profile.max() >= GALE_M_S else 0.0


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest 8-connected region of a window's mask (h, w), by cells."""
    labels, count = label_regions(mask, periodic=False)
    return labels == 1 + int(np.bincount(labels.ravel())[1:].argmax()) if count else mask


SHAPES = {"wind": wind_shape, "paper2018": paper2018_shape}
SHAPE_NEEDS = {"wind": frozenset({"PSL", "U850", "V850"}), "paper2018": frozenset({*_PAPER_FIELDS, "UBOT", "VBOT"})}
