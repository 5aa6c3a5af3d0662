"""The whole path on one machine: synthesize → stage → train → segment → evaluate → events → maps.

It calls the functions of the verbs, with the same files between them; only the sizes are its own. Run again in the same
folder, it goes on where it was interrupted, as each verb does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysegment import config
from raysegment.applications.evaluate import evaluate
from raysegment.applications.events_table import write_events
from raysegment.applications.pictures import draw_files
from raysegment.applications.segment import SegmentConfig, segment
from raysegment.applications.synthesize import synthesize
from raysegment.applications.tracks import Storm, read_tracks, storm_distances
from raysegment.applications.worlds import OTHER_WORLD
from raysegment.archive.masks import mask_path, read_masks
from raysegment.archive.snapshots import list_sources, open_source
from raysegment.climate.events import find_events
from raysegment.climate.synthetic import SyntheticConfig
from raysegment.console import Console, table
from raysegment.elastic.train import TrainConfig, train
from raysegment.feed.session import ensure_ray
from raysegment.feed.stage import StageConfig, stage

LABELLERS = ("rules", "network")
PRESET = Path(__file__).parents[1] / "configs" / "small.yaml"


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults take some minutes on two cores. `train` overrides keys of `train`'s small preset."""

    snapshots: int = 160
    held_out: int = 16
    height: int = 72
    width: int = 144
    seed: int = 2018
    steps: int = 340
    workers: int = 2
    rules: str = "rules:default"
    train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.snapshots, self.held_out, self.steps, self.workers) < 1:
            raise ValueError(f"expected positive sizes, got {self}")


def run_demo(
    out: Path, settings: DemoConfig, console: Console, map_file: Path | None = None, tracks: Path | None = None
) -> dict[str, Any]:
    """Everything in `out`; returns `iou`, `iou_rules`, `seconds`, `pictures`, `files` and, with a map, `storms`."""
    started, out = time.monotonic(), Path(out)
    storms = _check_map(map_file, tracks)
    with console.phase("start Ray"):
        ensure_ray()
    trained = _train(out, settings, console)
    labellers = {"rules": settings.rules, "network": trained["checkpoint"]}
    found = {name: _judge(out, name, spec, console) for name, spec in labellers.items()}
    result: dict[str, Any] = {"iou": found["network"]["iou"], "iou_rules": found["rules"]["iou"], "train": trained}
    pictures = [_draw_held_out(out, console)]
    if map_file is not None:
        result["storms"], picture = _real_map(out, map_file, tracks, storms, labellers, console)
        pictures.append(picture)
    result |= {"pictures": pictures, "files": _files(out, trained, map_file), "seconds": time.monotonic() - started}
    _print(result, storms)
    return result


def _check_map(map_file: Path | None, tracks: Path | None) -> list[Storm]:
    """The best-track storms of the map's hour; an unusable map or table fails here, before minutes of work."""
    if map_file is None:
        return []
    with open_source(map_file) as source:
        first = source.read(0)
    return read_tracks(tracks, first.time) if tracks else []


def _train(out: Path, settings: DemoConfig, console: Console) -> dict[str, Any]:
    """Synthetic archives, shards of the first, a network trained on them; returns the summary of the training."""
    size = dict(height=settings.height, width=settings.width)
    for name, count, seed in (
        ("archive", settings.snapshots, settings.seed),
        ("heldout", settings.held_out, settings.seed + OTHER_WORLD),
    ):
        with console.phase(f"synthesize {count} snapshots into {out / name}") as report:
            synthesize(out / name, SyntheticConfig(snapshots=count, seed=seed, **size), progress=report)
    with console.phase(f"stage into {out / 'shards'}") as report:
        stage([out / "archive"], None, out / "shards", StageConfig(), progress=report)
    keys = [f"shards={out / 'shards'}", f"out={out / 'run'}", f"steps={settings.steps}", f"workers={settings.workers}"]
    mapping = config.apply_overrides(config.read_yaml(PRESET), [*keys, *settings.train])
    with console.phase(f"train {settings.steps} steps on {settings.workers} workers") as report:
        return train(config.load(TrainConfig, mapping, PRESET), report)


def _judge(out: Path, name: str, spec: str, console: Console) -> dict[str, Any]:
    """Masks, events and IoU of one labeller on the held-out archive."""
    masks = out / "masks" / name
    with console.phase(f"segment the held-out snapshots by {name}") as report:
        segment([out / "heldout"], spec, masks, SegmentConfig(max_skipped=0), report)
    write_events(masks, out / f"events_{name}", out / "heldout")
    return evaluate(masks, out / "heldout")


def _draw_held_out(out: Path, console: Console) -> Path:
    """The held-out snapshot that is drawn: the one in the middle of the archive, field and three masks."""
    sources = list_sources([out / "heldout"])
    source = sources[len(sources) // 2]
    with console.phase("draw"):
        masks = [mask_path(out / "masks" / name, source) for name in LABELLERS]
        return draw_files(source, masks, out / "heldout.png", with_truth=True)


def _real_map(
    out: Path, map_file: Path, tracks: Path | None, storms: list[Storm], labellers: dict[str, str], console: Console
) -> tuple[dict[str, Any], Path]:
    """Masks, events, distances to the best tracks and a picture of a real map, per labeller."""
    found = {}
    for name, spec in labellers.items():
        masks = out / "map" / name
        with console.phase(f"segment {map_file.name} by {name}"):
            segment([map_file], spec, masks, SegmentConfig(max_skipped=0, probabilities=name == "network"))
        write_events(masks, out / "map" / f"events_{name}", map_file)
        found[name] = storm_distances(_first_events(map_file, mask_path(masks, map_file)), storms)
    with console.phase("draw the map"):
        masks = [mask_path(out / "map" / name, map_file) for name in labellers]
        return found, draw_files(map_file, masks, out / "map.png", tracks=tracks)


def _first_events(map_file: Path, masks: Path) -> list:
    with open_source(map_file) as source:
        snapshot = source.read(0)
    return find_events(read_masks(masks).masks[0], snapshot.grid, snapshot.fields)


def _files(out: Path, trained: dict[str, Any], map_file: Path | None) -> dict[str, Path]:
    """Where everything is."""
    files = {
        "training archive": out / "archive",
        "held-out archive": out / "heldout",
        "shards": out / "shards",
        "run": out / "run",
        "checkpoint": Path(trained["checkpoint"]),
        "masks of held-out snapshots": out / "masks",
        "events of held-out snapshots": out / "events_network.csv",
        "picture of a held-out snapshot": out / "heldout.png",
    }
    if map_file is not None:
        files |= {
            "masks of the map": out / "map",
            "events of the map": out / "map" / "events_network.csv",
            "picture of the map": out / "map.png",
        }
    return files


def _print(result: dict[str, Any], storms: list[Storm]) -> None:
    names = ["background", "cyclone", "river", "mean"]
    rows = [["rules", *(result["iou_rules"][n] for n in names)], ["network", *(result["iou"][n] for n in names)]]
    table("IoU on held-out snapshots", ["labeller", *names], [[("–" if c is None else c) for c in row] for row in rows])
    if "storms" in result and storms:
        columns = ["labeller", *(s.label for s in storms), "other cyclones 50S–50N"]
        rows = [[name, *("none" if d is None else f"{d:.1f}°" for d in found["distances_deg"]), found["others"]]
                for name, found in result["storms"].items()]  # fmt: skip
        table("from each best-track storm to the nearest cyclone object", columns, rows)
    table("files", ["what", "where"], [[name, path] for name, path in result["files"].items()])
    print(f"{result['seconds']:.0f} s in all")
