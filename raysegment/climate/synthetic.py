"""A physically plausible, labelled snapshot of weather, made from nothing but a seed.

Pressure is climate + travelling highs and lows + storms; wind follows from it by geostrophic balance away from the
equator; the heights of pressure levels follow from temperature by the hypsometric equation; humidity is drawn out into
filaments. Into this go warm-core vortices (cyclones, and weaker depressions that are *not* labelled), extratropical
lows with cold air aloft, moist filaments (rivers, and shorter ones that are not labelled), heat lows and mountains.
The label is what was put in: cells within the storm-force radius of a cyclone; cells of a river's cross-section
where its vapour transport reaches 250 kg/m/s (the ARTMIP community's usual threshold, Shields et al. 2018).

Below-ground values follow CAM: a pressure level under the lowest model level repeats that level.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from raysegment.climate import channels
from raysegment.climate.grid import Grid, gradient, great_circle_km
from raysegment.climate.noise import folded, smooth_noise, sphere_points
from raysegment.climate.planet import (
    GAS_CONSTANT_DRY,
    GRAVITY_M_S2,
    LAPSE_K_M,
    MeanState,
    Planet,
    make_planet,
    mean_state,
    saturation_humidity,
    spread,
    surface_pressure_pa,
)
from raysegment.climate.storms import AIR_DENSITY_KG_M3, Filament, Low, Vortex, coriolis, filament_path

CYCLONE_WIND_M_S = 12.0  # the mask of a cyclone ends where its own wind falls below this
RIVER_IVT_KG_M_S = 250.0
_LEVEL_WEIGHTS = (0.22, 0.50, 0.28)  # of 2 m, 500 and 200 hPa in the mean temperature of the 1000–200 hPa layer


@dataclass(frozen=True)
class SyntheticConfig:
    """What `synthesize` makes: `snapshots` maps of `height × width` cells, from `runs` planets, over the seasons of a year."""

    snapshots: int = 96
    height: int = 72
    width: int = 144
    seed: int = 2018
    runs: int = 8
    first_year: int = 1996

    def __post_init__(self) -> None:
        if min(self.snapshots, self.runs) < 1 or self.height < 16 or self.width < 32:
            raise ValueError(f"expected at least 1 snapshot, 1 run, 16 × 32 cells, got {self}")

    @property
    def grid(self) -> Grid:
        """Cell centres, half a spacing away from the poles, first column at Greenwich."""
        step = 180.0 / self.height
        lon = np.arange(self.width, dtype=np.float64) * (360.0 / self.width)
        return Grid(np.linspace(-90 + step / 2, 90 - step / 2, self.height), lon)


@dataclass(frozen=True, eq=False)
class SyntheticSnapshot:
    """Fields (16, H, W) float32 in `channels.NAMES` order, mask (H, W) uint8, and what was put into them."""

    fields: NDArray[np.float32]
    mask: NDArray[np.uint8]
    grid: Grid
    run: int
    year: int
    day_of_year: int
    hour: int
    cyclones: tuple[Vortex, ...]
    rivers: tuple[Filament, ...]

    @property
    def month_day(self) -> tuple[int, int]:
        """Month and day in a calendar without leap days."""
        date = datetime(2001, 1, 1) + timedelta(days=self.day_of_year - 1)
        return date.month, date.day


@dataclass(frozen=True)
class Weather:
    """Everything that happens in one snapshot; the drawing of it (`draw_weather`) is separate from painting it."""

    cyclones: tuple[Vortex, ...]
    depressions: tuple[Vortex, ...]
    lows: tuple[Low, ...]
    heat_lows: tuple[Low, ...]
    filaments: tuple[Filament, ...]


@dataclass(frozen=True, eq=False)
class Drawn:
    """What is painted before the rest follows from it: (H, W) each, SI units; winds at 850 hPa and of the lowest level."""

    psl: NDArray
    u850: NDArray
    v850: NDArray
    ubot: NDArray
    vbot: NDArray
    t500: NDArray
    t200: NDArray
    water: NDArray
    surface: NDArray
    air: NDArray
    rain: NDArray


def generate(config: SyntheticConfig, index: int, land: NDArray | None = None) -> SyntheticSnapshot:
    """Snapshot `index` of the archive; the same for the same config and land, whatever else was generated.

    `land` (H, W) is the share of each cell that is land; without it every run has continents of its own.
    """
    rng = np.random.default_rng([config.seed, index])
    run = index % config.runs
    day = 1 + int((index + rng.random()) * 365 / config.snapshots) % 365
    season = float(np.cos(2 * np.pi * (day - 205) / 365.0))
    planet = make_planet(config.grid, config.seed, run, land)
    state = mean_state(planet, season)
    weather = draw_weather(rng, planet, state, index)
    fields, own_ivt = paint(rng, planet, state, weather)
    mask = label(planet.grid, weather, own_ivt)
    return SyntheticSnapshot(
        fields, mask, planet.grid, run + 1, config.first_year + index * 7 % 11, day, 3 * int(rng.integers(8)),
        weather.cyclones, tuple(f for f in weather.filaments if f.river),
    )  # fmt: skip


# ---------------------------------------------------------------- what happens


def draw_weather(rng: np.random.Generator, planet: Planet, state: MeanState, index: int) -> Weather:
    """Positions and sizes of everything in a snapshot. Every third has a cyclone at a seam (0° or 180°) of the map."""
    equator = state.thermal_equator_deg
    cyclones: list[Vortex] = []
    for k in range(3 + int(rng.poisson(3.0))):
        seam = [0.0, 180.0][(index // 3) % 2] if k == 0 and index % 3 == 0 else None
        place = _tropical_place(rng, planet, equator, cyclones, seam)
        if place is not None:
            cyclones.append(_cyclone(rng, *place))
    depressions: list[Vortex] = []
    for _ in range(int(rng.poisson(5.0))):
        place = _tropical_place(rng, planet, equator, [*cyclones, *depressions], None)
        if place is not None:
            depressions.append(_depression(rng, *place))
    filaments = [_filament(rng, hemisphere, True) for hemisphere in (-1, 1) for _ in range(2 + int(rng.poisson(1.5)))]
    lows = [_low_of_river(rng, f) for f in filaments]
    filaments += [_filament(rng, int(rng.choice([-1, 1])), False) for _ in range(int(rng.poisson(5.0)))]
    lows += [_low(rng, hemisphere) for hemisphere in (-1, 1) for _ in range(2 + int(rng.poisson(3.0)))]
    heat = [_heat_low(rng, planet, equator) for _ in range(int(rng.poisson(4.0)))]
    return Weather(tuple(cyclones), tuple(depressions), tuple(lows), tuple(h for h in heat if h), tuple(filaments))


def _tropical_place(rng, planet: Planet, equator: float, others, seam: float | None) -> tuple[float, float] | None:
    """A point over the sea where cyclones live, 750 km from the others; None when eight tries found none.

    One in four stands within 1600 km of another: storms come in pairs along a monsoon trough.
    """
    for _ in range(8):
        summer = rng.random() < 0.5 + 0.04 * abs(equator)
        side = np.sign(equator or 1.0) if summer else -np.sign(equator or 1.0)
        lat = float(side * (8.0 + 22.0 * rng.beta(1.6, 2.2) + (10.0 * rng.random() if rng.random() < 0.12 else 0.0)))
        lon = float((seam + rng.normal(0.0, 1.5)) % 360.0 if seam is not None else rng.uniform(0.0, 360.0))
        if others and seam is None and rng.random() < 0.25:
            lat = float(others[-1].lat + rng.normal(0.0, 2.0))
            lon = float((others[-1].lon + rng.choice([-1, 1]) * rng.uniform(7.5, 15.0)) % 360.0)
        if seam is not None and planet.land[planet.grid.nearest(lat, lon)] > 0.5:
            lat = -lat  # Greenwich runs through Africa
        dry = planet.land[planet.grid.nearest(lat, lon)] > 0.5 and rng.random() > 0.1 and seam is None
        if not dry and all(great_circle_km(lat, lon, o.lat, o.lon) > 750.0 for o in others):
            return lat, lon
    return None


def _cyclone(rng, lat: float, lon: float) -> Vortex:
    """Strong storms are small (Knaff et al. 2015), which also keeps the deepest above the 870 hPa of the record."""
    wind = float(np.clip(17.0 + rng.gamma(2.0, 7.0), 18.5, 62.0))
    size = 1.0 - 0.4 * (wind - 18.5) / 43.5
    return Vortex(
        lat, lon, wind, core_km=size * rng.uniform(55.0, 170.0) * (1.0 + 0.01 * (abs(lat) - 15.0)), decay=rng.uniform(0.3, 0.6),
        outer_km=rng.uniform(700.0, 1300.0), warmth=rng.uniform(0.75, 1.35), upper_share=rng.uniform(0.25, 0.6),
        moisture_kg_m2=rng.uniform(60.0, 76.0), moist_radius_km=rng.uniform(220.0, 520.0), inflow_deg=rng.uniform(10.0, 28.0),
    )  # fmt: skip


def _depression(rng, lat: float, lon: float) -> Vortex:
    return Vortex(
        lat, lon, rng.uniform(5.5, 12.5), core_km=rng.uniform(120.0, 350.0), decay=rng.uniform(0.3, 0.7),
        outer_km=rng.uniform(600.0, 1200.0), warmth=rng.uniform(0.0, 0.9), upper_share=rng.uniform(0.2, 0.6),
        moisture_kg_m2=rng.uniform(50.0, 66.0), moist_radius_km=rng.uniform(200.0, 600.0), inflow_deg=rng.uniform(10.0, 28.0),
    )  # fmt: skip


def _filament(rng, hemisphere: int, river: bool) -> Filament:
    start = hemisphere * (rng.uniform(18.0, 36.0) if river else rng.uniform(5.0, 60.0))
    bearing = rng.normal(55.0, 16.0) if river else rng.uniform(-20.0, 200.0)
    turn = rng.normal(0.0, 30.0)
    length_km = rng.uniform(2300.0, 5200.0) if river else rng.uniform(500.0, 1300.0)
    lat, lon = filament_path(abs(start), rng.uniform(0.0, 360.0), bearing, turn, length_km)
    return Filament(
        tuple(hemisphere * v for v in lat), lon, width_km=rng.uniform(150.0, 330.0), moisture_kg_m2=rng.uniform(16.0, 30.0),
        jet_m_s=rng.uniform(12.0, 26.0) if river else rng.uniform(0.0, 9.0), river=river,
    )  # fmt: skip


def _low(rng, hemisphere: int) -> Low:
    return Low(
        hemisphere * float(np.clip(rng.normal(53.0, 9.0), 33.0, 75.0)), rng.uniform(0.0, 360.0),
        depth_pa=100.0 * float(np.clip(rng.gamma(2.5, 7.0), 4.0, 50.0)), radius_km=rng.uniform(280.0, 900.0),
        cold_k=rng.uniform(1.0, 8.0), tilt_km=rng.uniform(-700.0, -50.0),
    )  # fmt: skip


def _low_of_river(rng, filament: Filament) -> Low:
    """The low on the poleward and western side of a river's head, whose cold front the river runs along."""
    k = int(len(filament.lat) * rng.uniform(0.6, 0.9))
    lat = filament.lat[k] + np.sign(filament.lat[k]) * rng.uniform(2.0, 7.0)
    lat = float(np.clip(lat, -75.0, 75.0))
    lon = (filament.lon[k] - rng.uniform(5.0, 12.0) / max(np.cos(np.deg2rad(lat)), 0.3)) % 360.0
    return Low(
        lat, lon, depth_pa=100.0 * rng.uniform(8.0, 35.0), radius_km=rng.uniform(400.0, 900.0), cold_k=rng.uniform(2.0, 7.0),
        tilt_km=rng.uniform(-600.0, -100.0),
    )  # fmt: skip


def _heat_low(rng, planet: Planet, equator: float) -> Low | None:
    lat, lon = float(np.clip(rng.normal(2.5 * equator, 12.0), -45.0, 45.0)), rng.uniform(0.0, 360.0)
    if planet.land[planet.grid.nearest(lat, lon)] < 0.5:
        return None
    return Low(lat, lon, 100.0 * rng.uniform(3.0, 9.0), rng.uniform(300.0, 800.0), -rng.uniform(1.0, 7.0), 0.0)


# ---------------------------------------------------------------- how it looks


def paint(rng: np.random.Generator, planet: Planet, state: MeanState, weather: Weather) -> tuple[NDArray, list[NDArray]]:
    """Fields (16, H, W) float32, and the vapour transport (kg/m/s, H×W) inside each filament's cross-section."""
    grid, points = planet.grid, sphere_points(planet.grid)
    profiles = [f.profile(grid) for f in weather.filaments]
    psl = state.psl_pa + _pressure_waves(rng, planet, points, weather)
    u850, v850 = _balanced_wind(rng, points, planet, state, psl)
    t500, t200 = _upper_air(rng, points, planet, state, weather)
    water = _humidity(rng, points, planet, state, weather, profiles)
    surface = state.surface_k + _surface_noise(rng, points, planet, weather)
    for filament, (cross, east, north) in zip(weather.filaments, profiles, strict=True):
        u850, v850 = u850 + filament.jet_m_s * cross * east, v850 + filament.jet_m_s * cross * north
    drag = (0.72 + 0.1 * rng.standard_normal()) * (1.0 - 0.35 * planet.land)
    ubot, vbot = _turned(drag * u850, drag * v850, np.deg2rad(18.0) * np.sign(grid.lat)[:, None])
    for vortex in (*weather.cyclones, *weather.depressions):
        psl, u850, v850, ubot, vbot, t500, t200 = _add_vortex(vortex, planet, psl, u850, v850, ubot, vbot, t500, t200)
    air = surface - planet.land * 1.0 + 0.6 * smooth_noise(rng, points, 1500.0)
    rain = _rain(rng, points, planet, water, weather, profiles)
    drawn = Drawn(psl, u850, v850, ubot, vbot, t500, t200, water, surface, air, rain)
    fields = _assemble(rng, points, planet, state, drawn)
    ivt = fields[channels.INDEX["TMQ"]] * np.hypot(fields[channels.INDEX["U850"]], fields[channels.INDEX["V850"]])
    return fields, [np.where(cross > 0.5, ivt, 0.0) for cross, _, _ in profiles]


def _pressure_waves(rng, planet: Planet, points: NDArray, weather: Weather) -> NDArray:
    """Highs and lows (Pa) as noise of 6000 km and less, stronger in the storm tracks, and the explicit lows."""
    grid = planet.grid
    strength = 100.0 * spread(np.array([0.9, 1.5, 3.8, 7.0, 8.5, 7.5, 6.0]), grid) * planet.storm_track_factor
    waves = strength * smooth_noise(rng, points, 6500.0, 160, 1.8)
    waves = waves + 0.25 * strength * smooth_noise(rng, points, 1800.0, 160, 1.5)
    waves = waves + rng.uniform(15.0, 60.0) * smooth_noise(rng, points, 1000.0)
    rough = planet.height_m / 1500.0 * 100.0  # reduction to sea level over mountains invents pressure
    waves = waves + rough * smooth_noise(rng, points, 1600.0) * 1.2
    for low in (*weather.lows, *weather.heat_lows):
        waves = waves - low.depth_pa * low.shape(grid)
    return waves


def _balanced_wind(rng, points: NDArray, planet: Planet, state: MeanState, psl: NDArray) -> tuple[NDArray, NDArray]:
    """Wind at 850 hPa (m/s): geostrophic from the pressure anomalies, f held at its value of 14° nearer the equator, plus
    the climate's zonal wind, tropical rotational waves and unbalanced noise."""
    grid = planet.grid
    f = coriolis(np.maximum(np.abs(grid.lat), 14.0) * np.where(grid.lat >= 0, 1.0, -1.0))[:, None]
    zonal = psl.mean(axis=1, keepdims=True)
    east, north = gradient(psl - zonal, grid)
    limit = np.clip((90.0 - np.abs(grid.lat)) / 10.0, 0.0, 1.0)[:, None]
    u = -north / (f * AIR_DENSITY_KG_M3) * limit
    v = east / (f * AIR_DENSITY_KG_M3) * limit
    equatorial = np.exp(-((grid.lat / 22.0) ** 2))[:, None]
    u, v = u * (1.0 - 0.55 * equatorial), v * (1.0 - 0.55 * equatorial)
    stream = smooth_noise(rng, points, 7000.0, 128, 2.0)
    stream_e, stream_n = gradient(stream, grid)
    norm = 2.2 / max(float(np.std(stream_e[grid.shape[0] // 3 : -grid.shape[0] // 3])), 1e-12)
    u = u + state.u850_m_s - norm * equatorial * stream_n + rng.uniform(0.3, 1.2) * smooth_noise(rng, points, 1100.0)
    v = v + norm * equatorial * stream_e + rng.uniform(0.3, 1.2) * smooth_noise(rng, points, 1100.0)
    return _saturate(u, v, 38.0)


def _saturate(u: NDArray, v: NDArray, limit_m_s: float) -> tuple[NDArray, NDArray]:
    """Winds whose speed bends towards a limit: friction and curvature, which geostrophy forgets."""
    speed = np.hypot(u, v)
    factor = limit_m_s * np.tanh(speed / limit_m_s) / np.maximum(speed, 1e-6)
    return u * factor, v * factor


def _turned(u: NDArray, v: NDArray, angle: NDArray) -> tuple[NDArray, NDArray]:
    return u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)


def _upper_air(rng, points, planet: Planet, state: MeanState, weather: Weather) -> tuple[NDArray, NDArray]:
    """Temperatures at 500 and 200 hPa (K): waves, and the cold troughs of lows with the warm lowered tropopause above."""
    grid = planet.grid
    n500 = spread(np.array([0.6, 0.9, 2.0, 4.0, 4.2, 3.6, 2.5]), grid) * smooth_noise(rng, points, 6500.0, 160, 2.0)
    n200 = spread(np.array([0.7, 0.8, 1.9, 4.4, 5.6, 4.0, 2.5]), grid) * smooth_noise(rng, points, 6500.0, 160, 2.0)
    fine = rng.uniform(0.15, 0.5)
    t500 = state.t500_k + n500 + fine * smooth_noise(rng, points, 900.0)
    t200 = state.t200_k + n200 - 0.35 * n500 + fine * smooth_noise(rng, points, 900.0)
    for low in (*weather.lows, *weather.heat_lows):
        shape = low.shape(grid, low.tilt_km)
        t500, t200 = t500 - low.cold_k * shape, t200 + 0.6 * low.cold_k * shape
    return t500, t200


def _humidity(rng, points, planet: Planet, state: MeanState, weather: Weather, profiles) -> NDArray:
    """Precipitable water (kg/m²): climate × folded log-normal noise, moist filaments and vortex cores, a soft ceiling."""
    grid = planet.grid
    drawn = folded(rng, folded(rng, points, 7000.0, rng.uniform(400.0, 900.0)), 3000.0, rng.uniform(150.0, 450.0))
    spread_log = spread(np.array([0.20, 0.30, 0.40, 0.38, 0.34, 0.36, 0.30]), grid)
    water = state.water_kg_m2 * np.exp(spread_log * smooth_noise(rng, drawn, 5000.0, 160, 2.5) - 0.5 * spread_log**2)
    for filament, (cross, _, _) in zip(weather.filaments, profiles, strict=True):
        fade = np.interp(np.abs(grid.lat), [0.0, 25.0, 40.0, 60.0, 75.0], [1.0, 1.0, 0.85, 0.5, 0.2])[:, None]
        water = water + filament.moisture_kg_m2 * fade * cross * (1.0 - 0.5 * planet.land)
    for vortex in (*weather.cyclones, *weather.depressions):
        core = np.exp(-((grid.distance_km(vortex.lat, vortex.lon) / vortex.moist_radius_km) ** 2))
        water = water + np.maximum(vortex.moisture_kg_m2 - water, 0.0) * core * (1.0 - 0.25 * planet.land)
    water = water * np.exp(rng.uniform(0.02, 0.09) * smooth_noise(rng, points, 900.0))
    return np.maximum(np.where(water > 58.0, 58.0 + 16.0 * np.tanh((water - 58.0) / 16.0), water), 0.1)


def _surface_noise(rng, points, planet: Planet, weather: Weather) -> NDArray:
    """Departures of the ground's temperature (K): small over sea, day and night and dryness over land."""
    grid = planet.grid
    wavy = spread(np.array([0.8, 0.9, 1.6, 2.6, 2.8, 2.5, 2.0]), grid)  # currents and fronts in the westerlies
    noise = (wavy + 2.0 * planet.land) * smooth_noise(rng, points, 5000.0, 128, 3.0)
    for low in weather.heat_lows:
        noise = noise - low.cold_k * low.shape(grid) * planet.land
    return noise + planet.land * 5.0 * np.cos(np.deg2rad(grid.lon[None, :] - rng.uniform(0.0, 360.0)))


def _add_vortex(vortex: Vortex, planet: Planet, psl, u850, v850, ubot, vbot, t500, t200):
    """The fields with a vortex in them; its warm core makes up for `warmth` of its surface low."""
    grid = planet.grid
    radius_km = grid.distance_km(vortex.lat, vortex.lon)
    deficit = vortex.deficit_pa(radius_km)
    keep = 1.0 - 0.7 * np.exp(-((radius_km / (2.5 * vortex.core_km + 150.0)) ** 2))  # the storm replaces what was there
    u, v = vortex.winds(grid)
    friction = 0.78 * (1.0 - 0.35 * planet.land)
    u_low, v_low = vortex.winds(grid, vortex.inflow_deg)
    hypsometric = GAS_CONSTANT_DRY / GRAVITY_M_S2 * np.log(5.0)
    column_k = vortex.warmth * deficit / (1.2 * GRAVITY_M_S2) / hypsometric
    share = vortex.upper_share
    t500 = t500 + column_k * (1.0 - share) / _LEVEL_WEIGHTS[1]
    t200 = t200 + column_k * share / _LEVEL_WEIGHTS[2]
    ubot, vbot = ubot * keep + friction * u_low, vbot * keep + friction * v_low
    return psl - deficit, u850 * keep + u, v850 * keep + v, ubot, vbot, t500, t200


def _assemble(rng, points: NDArray, planet: Planet, state: MeanState, drawn: Drawn) -> NDArray[np.float32]:
    """The 16 channels, with what follows from the others: PS, humidity at 2 m, heights, below-ground values."""
    grid, air = planet.grid, drawn.air
    ps = surface_pressure_pa(drawn.psl, air, planet.height_m)
    zbot = channels.ZBOT_M_PER_K * air
    z1000 = (drawn.psl - 100000.0) * GAS_CONSTANT_DRY * air / (GRAVITY_M_S2 * 100000.0)
    sea_level_k = air + 0.9 * LAPSE_K_M * planet.height_m
    layer_k = sum(w * t for w, t in zip(_LEVEL_WEIGHTS, (sea_level_k, drawn.t500, drawn.t200), strict=True))
    z200 = z1000 + GAS_CONSTANT_DRY / GRAVITY_M_S2 * np.log(5.0) * layer_k
    lowest = 0.9925 * ps  # pressure of CAM5's lowest level
    below_850, below_1000 = lowest < 85000.0, lowest < 100000.0
    dryness = np.clip(drawn.water / np.maximum(state.water_kg_m2, 1.0), 0.3, 1.5)
    relative = (0.80 - 0.25 * planet.land) * dryness**0.25 + 0.04 * smooth_noise(rng, points, 2000.0)
    named = {
        "TMQ": drawn.water,
        "U850": np.where(below_850, drawn.ubot, drawn.u850),
        "V850": np.where(below_850, drawn.vbot, drawn.v850),
        "UBOT": drawn.ubot,
        "VBOT": drawn.vbot,
        "QREFHT": np.clip(relative, 0.1, 0.99) * saturation_humidity(np.minimum(air, 303.5), ps),
        "PS": ps,
        "PSL": drawn.psl,
        "T200": drawn.t200,
        "T500": drawn.t500,
        "PRECT": drawn.rain,
        "TS": drawn.surface,
        "TREFHT": air,
        "Z1000": np.where(below_1000, planet.height_m + zbot, z1000),
        "Z200": z200,
        "ZBOT": zbot,
    }
    return np.stack([np.broadcast_to(named[name], grid.shape) for name in channels.NAMES]).astype(np.float32)


def _rain(rng, points, planet: Planet, water, weather: Weather, profiles) -> NDArray:
    """Precipitation (m/s): showers where the column is moist (heavy-tailed), fronts of lows and filaments, storm cores."""
    grid = planet.grid
    moist = np.clip(water / 50.0, 0.0, 1.5) ** 2
    showers = np.maximum(0.0, smooth_noise(rng, points, 900.0, 160, 1.0) + 0.35 * smooth_noise(rng, points, 4000.0) - 0.5)
    rain = 2.4e-7 * moist * showers**2 * rng.gamma(1.0, 1.0, grid.shape)
    for low in weather.lows:
        patches = np.clip(0.5 + smooth_noise(rng, points, 1500.0, 32), 0.0, 2.0) ** 2
        rain = rain + 2.0e-11 * low.depth_pa * low.shape(grid, 0.5 * low.radius_km) * patches
    for filament, (cross, _, _) in zip(weather.filaments, profiles, strict=True):
        rain = rain + 5e-8 * cross**2 * (filament.jet_m_s / 15.0) * rng.gamma(1.0, 1.0, grid.shape)
    for vortex in (*weather.cyclones, *weather.depressions):
        radius_km = grid.distance_km(vortex.lat, vortex.lon)
        core = np.exp(-radius_km / (1.2 * vortex.core_km + 90.0)) * rng.gamma(2.0, 0.5, grid.shape)
        rain = rain + 1.0e-6 * (vortex.wind_m_s / 35.0) * core
    return np.minimum(rain, 6e-6)


# ---------------------------------------------------------------- what it is called


def label(grid: Grid, weather: Weather, own_ivt: list[NDArray]) -> NDArray[np.uint8]:
    """Mask (H, W): rivers where their own cross-section carries 250 kg/m/s, cyclones out to their storm-force radius."""
    mask = np.zeros(grid.shape, np.uint8)
    for filament, ivt in zip(weather.filaments, own_ivt, strict=True):
        if filament.river:
            mask[ivt >= RIVER_IVT_KG_M_S] = channels.RIVER
    for vortex in weather.cyclones:
        mask[grid.distance_km(vortex.lat, vortex.lon) <= mask_radius_km(vortex, grid)] = channels.CYCLONE
    return mask


def mask_radius_km(vortex: Vortex, grid: Grid) -> float:
    """Radius of a cyclone's mask: where its wind falls below 12 m/s, within 300–800 km and never less than 1.1 cells."""
    return float(np.clip(vortex.radius_of(CYCLONE_WIND_M_S), max(300.0, 1.1 * 111.2 * grid.dlat), 800.0))
