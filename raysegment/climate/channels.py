"""The 16 fields that the networks and the rules read, and the names they go by in other archives.

Order and CAM names as in the 2018 system's files (Kurth et al. 2018; DeepCAM, ClimateNet). `reference` and `scale` are
the published constants of the float16 staging format, `(x − reference) / scale`, close to mean and deviation of CAM5
(ClimateNet `config.json`, `feature_stats.json`, GFS where those are known to be wrong). `minimum` and `maximum` bound
what is physically plausible anywhere on Earth, with room for forecasts that overshoot; a value outside is an error in
the file (a wrong unit, a fill value), not weather.
"""

from __future__ import annotations

from dataclasses import dataclass

GRAVITY_M_S2 = 9.80665  # standard gravity (CGPM 1901)

CLASSES = ("background", "tropical_cyclone", "atmospheric_river")
BACKGROUND, CYCLONE, RIVER = 0, 1, 2


@dataclass(frozen=True)
class Alias:
    """Another archive's name for a channel; the channel's value is `factor · x + offset` of the variable's.

    `level_hpa` selects a pressure level when the variable has a vertical axis. `unit` is what the source is expected to
    declare; empty when its files declare none. `group` names the archive, for messages and `inspect`.
    """

    name: str
    group: str
    unit: str
    level_hpa: float | None = None
    factor: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Channel:
    """One field: CAM name, SI unit, plausible range, staging constants, names elsewhere (first match wins)."""

    name: str
    unit: str
    long_name: str
    minimum: float
    maximum: float
    reference: float
    scale: float
    aliases: tuple[Alias, ...] = ()

    def __post_init__(self) -> None:
        assert self.minimum < self.maximum, self.name
        assert self.scale > 0, self.name


def _levels(cam: str, cmip: str, era5: str, gfs: str, unit: str, hpa: float, era5_factor: float = 1.0) -> tuple[Alias, ...]:
    """Names of a pressure-level field: on a vertical axis (CMIP6, ERA5, GFS) or with the level in the name."""
    era5_unit = "m2 s-2" if era5_factor != 1.0 else unit
    return (
        Alias(cmip, "CMIP6", unit, hpa),
        Alias(era5, "ERA5", era5_unit, hpa, era5_factor),
        Alias(gfs, "GFS", unit, hpa),
        Alias(f"{cmip}{hpa:.0f}", "CMIP6", unit),
        Alias(f"{era5}{hpa:.0f}", "ERA5", era5_unit, None, era5_factor),
        Alias(cam.lower(), "lower case", unit),
    )


CHANNELS: tuple[Channel, ...] = (
    Channel("TMQ", "kg m-2", "total precipitable water", -0.5, 120.0, 19.2, 15.8,
            (Alias("prw", "CMIP6", "kg m-2"), Alias("tcwv", "ERA5", "kg m-2"), Alias("TQV", "MERRA-2", "kg m-2"),
             Alias("pwat", "GFS", "kg m-2"), Alias("IWV", "MERRA-2", "kg m-2"))),
    Channel("U850", "m s-1", "eastward wind at 850 hPa", -130.0, 130.0, 0.0, 8.3,
            _levels("U850", "ua", "u", "ugrd", "m s-1", 850.0)),
    Channel("V850", "m s-1", "northward wind at 850 hPa", -130.0, 130.0, 0.0, 6.2,
            _levels("V850", "va", "v", "vgrd", "m s-1", 850.0)),
    Channel("UBOT", "m s-1", "eastward wind of the lowest level", -110.0, 110.0, 0.0, 6.0,
            (Alias("ULML", "MERRA-2", "m s-1"), Alias("u100", "ERA5", "m s-1"), Alias("uas", "CMIP6", "m s-1"),
             Alias("u10", "ERA5", "m s-1"), Alias("U10M", "MERRA-2", "m s-1"), Alias("10u", "GFS", "m s-1"))),
    Channel("VBOT", "m s-1", "northward wind of the lowest level", -110.0, 110.0, 0.0, 5.0,
            (Alias("VLML", "MERRA-2", "m s-1"), Alias("v100", "ERA5", "m s-1"), Alias("vas", "CMIP6", "m s-1"),
             Alias("v10", "ERA5", "m s-1"), Alias("V10M", "MERRA-2", "m s-1"), Alias("10v", "GFS", "m s-1"))),
    Channel("QREFHT", "kg kg-1", "specific humidity at 2 m", -1e-3, 0.05, 0.0078, 0.0061,
            (Alias("huss", "CMIP6", "kg kg-1"), Alias("QV2M", "MERRA-2", "kg kg-1"), Alias("2sh", "GFS", "kg kg-1"),
             Alias("sh2", "GFS", "kg kg-1"), Alias("q2m", "ERA5", "kg kg-1"))),
    Channel("PS", "Pa", "surface pressure", 40000.0, 112000.0, 96600.0, 9300.0,
            (Alias("ps", "CMIP6", "Pa"), Alias("sp", "ERA5", "Pa"))),
    Channel("PSL", "Pa", "pressure at sea level", 85000.0, 110000.0, 100800.0, 1460.0,
            (Alias("psl", "CMIP6", "Pa"), Alias("msl", "ERA5", "Pa"), Alias("SLP", "MERRA-2", "Pa"),
             Alias("prmsl", "GFS", "Pa"))),
    Channel("T200", "K", "temperature at 200 hPa", 160.0, 280.0, 215.0, 6.1,
            _levels("T200", "ta", "t", "tmp", "K", 200.0)),
    Channel("T500", "K", "temperature at 500 hPa", 190.0, 310.0, 253.0, 13.0,
            _levels("T500", "ta", "t", "tmp", "K", 500.0)),
    Channel("PRECT", "m s-1", "precipitation rate", -1e-7, 2e-4, 3e-8, 1e-7,
            (Alias("pr", "CMIP6", "kg m-2 s-1", factor=1e-3), Alias("mtpr", "ERA5", "kg m-2 s-1", factor=1e-3),
             Alias("avg_tprate", "ERA5", "kg m-2 s-1", factor=1e-3), Alias("PRECTOT", "MERRA-2", "kg m-2 s-1", factor=1e-3),
             Alias("PRECTOTCORR", "MERRA-2", "kg m-2 s-1", factor=1e-3), Alias("prate", "GFS", "kg m-2 s-1", factor=1e-3),
             Alias("tp", "ERA5", "m", factor=1.0 / 3600.0))),  # ERA5: metres accumulated over one hour
    Channel("TS", "K", "surface temperature", 150.0, 360.0, 278.7, 21.7,
            (Alias("ts", "CMIP6", "K"), Alias("skt", "ERA5", "K"))),
    Channel("TREFHT", "K", "temperature at 2 m", 150.0, 340.0, 278.4, 20.7,
            (Alias("tas", "CMIP6", "K"), Alias("t2m", "ERA5", "K"), Alias("2t", "ERA5", "K"), Alias("T2M", "MERRA-2", "K"))),
    Channel("Z1000", "m", "geopotential height at 1000 hPa", -1500.0, 7000.0, 470.0, 810.0,
            (*_levels("Z1000", "zg", "z", "gh", "m", 1000.0, 1.0 / GRAVITY_M_S2), Alias("H1000", "MERRA-2", "m"))),
    Channel("Z200", "m", "geopotential height at 200 hPa", 9000.0, 13500.0, 11740.0, 590.0,
            (*_levels("Z200", "zg", "z", "gh", "m", 200.0, 1.0 / GRAVITY_M_S2), Alias("H200", "MERRA-2", "m"))),
    Channel("ZBOT", "m", "height of the lowest level above ground", 0.0, 200.0, 61.3, 4.6, ()),
)

NAMES: tuple[str, ...] = tuple(channel.name for channel in CHANNELS)
BY_NAME: dict[str, Channel] = {channel.name: channel for channel in CHANNELS}
INDEX: dict[str, int] = {name: index for index, name in enumerate(NAMES)}

# Height of the lowest level where an archive has none: about 0.22 m per kelvin of air temperature, the hydrostatic
# thickness of a layer whose middle lies at 0.9925 of the surface pressure (CAM5's lowest hybrid level).
ZBOT_M_PER_K = 0.22
