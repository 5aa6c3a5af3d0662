"""An archive of synthetic weather over the Earth's own land, in ClimateNet's layout, with the labels inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import cftime
import ray.data
from numpy.typing import NDArray

from raysegment.applications.coast import land_share
from raysegment.archive.snapshots import write_climatenet
from raysegment.archive.times import name_of_time
from raysegment.climate.synthetic import SyntheticConfig, SyntheticSnapshot, generate
from raysegment.feed.session import ensure_ray


def synthesize(out: str | Path, config: SyntheticConfig, progress: Callable[[int, int], None] | None = None) -> list[Path]:
    """Files of all snapshots of `config` in `out`, written in parallel; files that are there are kept."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    indices = range(config.snapshots)
    ensure_ray()
    rows = ray.data.from_items([{"index": i} for i in indices], override_num_blocks=max(1, min(len(indices) // 4, 64)))
    made = rows.map(partial(_write, out=str(out), config=asdict(config)))
    paths = []
    for row in made.iter_rows():
        paths.append(Path(row["path"]))
        if progress:
            progress(len(paths), len(indices))
    return sorted(paths)


def file_name(config: SyntheticConfig, snapshot: SyntheticSnapshot, index: int) -> str:
    """ClimateNet's file name, `data-YYYY-MM-DD-TT-R.nc`; the run number carries the index, which makes it unique."""
    return f"{name_of_time(_time(snapshot), run=index + 1).removesuffix('.nc')}.nc"


def _write(row: dict, out: str, config: dict) -> dict:
    settings, index = SyntheticConfig(**config), int(row["index"])
    snapshot = generate(settings, index, _land(settings))
    path = Path(out) / file_name(settings, snapshot, index)
    if not path.exists():
        write_climatenet(path, snapshot.fields, snapshot.grid, snapshot.mask, _time(snapshot))
    return {"path": str(path)}


@lru_cache(maxsize=1)
def _land(settings: SyntheticConfig) -> NDArray:
    return land_share(settings.grid)


def _time(snapshot: SyntheticSnapshot) -> cftime.datetime:
    month, day = snapshot.month_day
    return cftime.DatetimeNoLeap(snapshot.year, month, day, snapshot.hour)
